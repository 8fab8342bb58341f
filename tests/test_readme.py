"""Every command line of the README and of a docstring is one that the program accepts."""

import importlib
import json
import re
import shlex

import pytest

from tests.scripts import ROOT, SCRIPTS

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
    module = importlib.import_module(script)
    module.check(module.parser().parse_args(flags))


def test_there_are_commands_for_every_script():
    assert {script for script, _ in commands(BLOCKS)} == {*SCRIPTS, "eval", "plot"}


def test_ci_runs_the_readmes_test_command():
    last = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert last in README


def test_every_log_that_the_readme_names_is_there():
    named = re.findall(r"results/[\w./-]+", README)
    assert named and all((ROOT / name).exists() for name in named)


def test_every_result_in_the_readme_is_in_a_log():
    """Rows `| [name](results/...) | CPU-seconds | k-NN | linear | PGD 4/255 | PGD 8/255 |`, and, where there are
    three more cells, the same of the adversarial linear probe. Of a masked autoencoder: `... | k-NN | linear |
    fine-tuned | PGD 4/255 |`, or the first two of these."""
    rows = re.findall(r"^\| \[[^]]+\]\((results/[\w/-]+)\) \| (.*) \|$", README, re.M)
    assert rows
    for folder, cells in rows:
        log, evaluations = ([json.loads(line) for line in open(ROOT / folder / f)] for f in ("log.jsonl", "eval.jsonl"))
        found = {}
        for e in evaluations:
            found.setdefault(e["preset"], {}).update({a: r["accuracy"] for a, r in e["results"].items()})
        cells, presets = [float(c) for c in cells.split(" | ")], ("amoc-slf", "amoc-alf")
        want = [round(log[-1].get("cpu_seconds", 0)), found["knn"]["clean"]]
        if "mae-slf-cifar" in found:
            want.append(found["mae-slf-cifar"]["clean"])
            want += [found["mae-tune-cifar"][a] for a in ("clean", "pgd20-4")[: len(cells) - 3]]
            presets = ()
        want += [found[p][a] for p in presets[: (len(cells) - 2) // 3] for a in ("clean", "pgd20-4", "pgd20")]
        assert cells == pytest.approx(want, abs=0.5e-2), folder
