"""Every script stands in each list by which tests, the bench and the documents know the scripts. One that were missing
there would pass without being tested: here it is an error that names the list."""
import json
import sys

import pytest

from evaluation.published import GROUPS
from tests import bench, test_augment, test_bench, test_export, test_starts, test_wiring
from tests.scripts import ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "results"))
import run_all  # noqa: E402

ELSEWHERE = {"pretext"}  # test_pretext.py and test_step_pretext.py watch its runs
WITHOUT_BATCHNORM = {script for script, flags in SCRIPTS.items() if "vit_slim" in flags}


def of(keys):
    """The scripts in the keys of a table: "amoc", "amoc CCC", "adco, blurred" or ("amoc", "opt")."""
    words = [key[0] if isinstance(key, tuple) else key for key in keys]
    return {word.replace(",", " ").split()[0] for word in words}


def text(name):
    return (ROOT / name).read_text()


LISTS = {  # where: the scripts there, and those that need not be there
    "CASES of tests/test_wiring.py": ({script for script, _ in test_wiring.CASES.values()}, ELSEWHERE),
    "VIEWS of tests/test_wiring.py": (of(test_wiring.VIEWS), ELSEWHERE),
    "RATES of tests/test_wiring.py": (of(test_wiring.RATES), ELSEWHERE),
    "CHANCE of tests/test_wiring.py": (of(test_wiring.CHANCE), ELSEWHERE),
    "OPTIMIZERS of tests/test_wiring.py": (of(test_wiring.OPTIMIZERS), ELSEWHERE),
    "AUGMENTED of tests/test_wiring.py": (of(test_wiring.AUGMENTED), ELSEWHERE),
    "NOISE of tests/test_wiring.py": (of(test_wiring.NOISE), ELSEWHERE),
    "ATTACKS of tests/test_wiring.py, if it calls pgd": (
        of(test_wiring.ATTACKS), ELSEWHERE | {"adios", "hardneg"}),
    "NETWORKS of tests/test_wiring.py, if it has a ResNet": (
        of(test_wiring.NETWORKS), ELSEWHERE | WITHOUT_BATCHNORM),
    "DEFAULTS of tests/test_wiring.py": (of(test_wiring.DEFAULTS), set()),
    "CASES of tests/test_export.py": ({case[0] for case in test_export.CASES.values()}, ELSEWHERE | {"rotnet"}),
    "NORMALISATION of tests/test_export.py": (of(test_export.NORMALISATION), ELSEWHERE | {"rotnet"}),
    "AUGMENTATIONS of tests/test_augment.py": (of(test_augment.AUGMENTATIONS), set()),
    "DIGESTS of tests/test_augment.py": (of(test_augment.DIGESTS), set()),
    "ATTACKS of tests/test_starts.py, if it attacks from a random start": (
        of(test_starts.ATTACKS), ELSEWHERE | {"adios", "clae", "hardneg", "rotnet"}),
    "CLAIMS of tests/test_bench.py, if its docstring says what a step costs": (
        of(test_bench.CLAIMS), {"hardneg", "unified"}),
    "SCRIPTS of tests/bench.py": (of(bench.SCRIPTS), set()),
    "COMPILED of tests/bench.py": (of(bench.COMPILED), set()),
    "the functions <script>_step of tests/bench.py": (
        {script for script in SCRIPTS if hasattr(bench, f"{script}_step")}, set()),
    "tests/mutants.json": ({mutant["file"].removesuffix(".py") for mutant in json.loads(text("tests/mutants.json"))}, set()),
    "tests, as test_step_<script>.py": (
        {script for script in SCRIPTS if (ROOT / "tests" / f"test_step_{script}.py").exists()}, set()),
    "GROUPS of evaluation/published.py": ({script for group in GROUPS.values() for script, _ in group}, set()),
    "ROWS of results/run_all.py": ({row.command.split(".py")[0] for row in run_all.ROWS.values()}, set()),
    "the methods of README.md": ({script for script in SCRIPTS if f"| [`{script}.py`]({script}.py) |" in text("README.md")}, set()),
    "the commands of docs/reproducing.md": (
        {script for script in SCRIPTS if f"\npython {script}.py" in text("docs/reproducing.md")}, set()),
}


@pytest.mark.parametrize("where", LISTS)
def test_every_script_is_in(where):
    found, spared = LISTS[where]
    missing = sorted(SCRIPTS.keys() - found - spared)
    assert not missing, f"add {', '.join(missing)} to {where}"
    assert spared <= SCRIPTS.keys() and not spared & found, "who need not be there, and is"


GATHERED = {  # whose gathering is tested in two processes: the file
    "adco": "test_adco.py", "adios": "test_adios.py", "adpe": "test_adpe.py",
}


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "dist.gather(" in text(f"{script}.py")])
def test_a_loss_over_all_processes_is_compared_with_that_of_one(script):
    """The tests that all scripts share see two processes only agree with each other."""
    there = GATHERED.get(script, "test_gathered_losses.py")
    source = text(f"tests/{there}")
    assert f"import {script}\n" in source and "in_two_processes(" in source, f"{script}.py gathers: add it to tests/{there}"
