"""Every command line of the README and of a docstring is one that the program accepts."""

import glob
import importlib
import re
import shlex

import pytest
import torch

from common import encoders, resnet
from tests.scripts import ROOT, SCRIPTS, read_flags

README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")


def commands(text):
    """(script, flags) of every `... script.py flags` in `text`; what follows two spaces is a comment."""
    for line in re.split(r"\n|&&|;", text):
        found = re.search(r"(?:python|torchrun)\b[^|]*?\b(\w+)\.py\b(.*)", line)
        if found and found[1] in (*SCRIPTS, "eval", "plot"):
            yield found[1], shlex.split(re.split(r"\s#|\s{3,}", found[2])[0])


def all_commands():
    for name in (*SCRIPTS, "eval", "plot"):
        yield from commands(importlib.import_module(name).__doc__)
    yield from commands(BLOCKS)


@pytest.mark.parametrize(
    "script, flags", list(all_commands()), ids=lambda v: " ".join(v) if isinstance(v, list) else v
)
def test_command_lines_are_accepted(script, flags):
    read_flags(importlib.import_module(script), *flags)


def test_there_are_commands_for_every_script():
    assert {script for script, _ in commands(BLOCKS)} == {*SCRIPTS, "eval", "plot"}


def test_ci_runs_the_readmes_test_command():
    last = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert last in README


def test_every_log_that_the_readme_names_is_there():
    named = re.findall(r"\((results/[\w./-]+)\)", README)
    assert named and all((ROOT / name).exists() for name in named)


TABLES = re.findall(r"```sh\n(python eval\.py [^`]*--kept[^`]*?)\n```\n\n((?:\|.*\n)+)", README)


@pytest.mark.parametrize("command, printed", TABLES)
def test_each_table_of_results_is_what_its_command_prints(command, printed, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("\\\n", " "))[2:]
    words = [path for word in words for path in (sorted(glob.glob(word)) if "results/" in word else [word])]
    importlib.import_module("eval").main(words)
    assert capsys.readouterr().out == printed


def test_every_result_in_the_readme_is_in_such_a_table():
    rows = re.findall(r"^\| \[.*\]\(results/.*$", README, re.M)
    assert rows and all(any(row in printed for _, printed in TABLES) for row in rows)


def test_an_encoder_loads_without_this_repository(tmp_path):
    """The README's lines, run: features as `load_encoder` has them."""
    torch.manual_seed(0)
    encoder = encoders.make("resnet18", ("clean", "adv"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad(), resnet.branch(encoder, "adv"):
        encoder(x)  # statistics
    encoders.export(encoder, tmp_path / "encoder.pt", "adv")
    (lines,) = re.findall(r"```python\n(import torch, torchvision\n.*?)```", README, re.S)
    here = {}
    exec(lines.replace("runs/amoc/encoder.pt", str(tmp_path / "encoder.pt")), here)
    mean, std = (torch.tensor(here["saved"][name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        features = here["net"].eval()((x - mean) / std)
        torch.testing.assert_close(features, encoders.load_encoder(tmp_path / "encoder.pt")(x))
