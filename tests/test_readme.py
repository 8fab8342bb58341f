"""Every command line of the README and of a docstring is one that the program accepts."""

import contextlib
import glob
import importlib
import pathlib
import re
import shlex
import subprocess
import textwrap

import pytest
import torch

from common import encoders, resnet
from evaluation import finetune, results
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


def test_ci_runs_the_readmes_test_commands():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "-m tests" in line or "pytest" in line]
    assert len(commands) == 2 and all(command in README for command in commands)


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


# Python blocks ----------------------------------------------------------------------------------------------
def markdown_files():
    """Those of the repository, by git where there is one: a checkout may have other things in it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    with contextlib.suppress(OSError):
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0 and listed.stdout:
            return sorted(ROOT / name for name in set(listed.stdout.splitlines()) if (ROOT / name).exists())
    patterns = ("*.md", "docs/**/*.md", "results/**/*.md")
    return [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]


def python_blocks(text):
    """(number of its first line, code) of every Python block."""
    for found in re.finditer(r"^( *)```(?:python|py)\b[^\n]*\n(.*?)^\1```", text, re.S | re.M):
        yield text[: found.start(2)].count("\n") + 1, textwrap.dedent(found[2])


def make_files(code, folder):
    """The .pt files that `code` names, in `folder`: a tiny encoder (a ResNet-18 where it names that class), or
    a tiny classifier."""
    for name in sorted(set(re.findall(r"""["']([\w./-]+\.pt)["']""", code))):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        arch = "resnet18" if "resnet18" in code else "slim"
        encoder = encoders.make(arch, ("clean", "adv"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        with torch.no_grad(), resnet.branch(encoder, "adv"):
            encoder(torch.rand(4, 3, 32, 32))  # statistics
        encoders.export(encoder, folder / "made.pt", "adv", image_size=32)
        if "classifier" in path.name:
            encoder = encoders.load_encoder(folder / "made.pt")
            results.save_classifier(finetune.Classifier(encoder, 4), path)
        else:
            (folder / "made.pt").rename(path)


def run_blocks(file):
    """Run the Python blocks of `file` one after the other, as a reader would, in the current folder. Returns
    the names that they leave behind."""
    left = {"__name__": "__main__"}
    blocks = list(python_blocks(file.read_text()))
    for line, code in blocks:
        make_files(code, pathlib.Path.cwd())
        exec(compile("\n" * (line - 1) + code, str(file), "exec"), left)
    return left


def with_blocks():
    return [str(file.relative_to(ROOT)) for file in markdown_files() if any(python_blocks(file.read_text()))]


@pytest.mark.parametrize("name", with_blocks())
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / name)


def test_the_readme_has_python_blocks_and_all_are_found():
    assert "README.md" in with_blocks()
    assert len(list(python_blocks(README))) == len(re.findall(r"^ *```(?:python|py)\b", README, re.M)) >= 2


def test_an_encoder_loads_without_this_repository(tmp_path, monkeypatch):
    """The README's lines, run: features as `load_encoder` has them, of any batch."""
    monkeypatch.chdir(tmp_path)
    here = run_blocks(ROOT / "README.md")
    net, mean, std, x = here["net"], here["mean"], here["std"], torch.rand(5, 3, 32, 32)
    encoder = encoders.load_encoder("runs/amoc/encoder.pt")
    with torch.no_grad():
        torch.testing.assert_close(net((x - mean) / std), encoder(x))
        torch.testing.assert_close(here["features"], encoder(here["x"]))


@pytest.mark.parametrize("change, words", [
    (lambda state: state.update({"layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)}), "Unexpected key"),
    (lambda state: state.pop("layer4.1.bn2.running_var"), "Missing key")], ids=["ResNet-34", "incomplete"])
def test_the_readmes_lines_refuse_another_architecture(change, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for _, code in python_blocks(README) if "torchvision" in code]
    make_files(code, tmp_path)
    (path,) = tmp_path.glob("**/*.pt")
    saved = torch.load(path, weights_only=True)
    change(saved["state"])
    torch.save(saved, path)
    with pytest.raises(RuntimeError, match=words):
        exec(code, {})
