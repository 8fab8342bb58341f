"""Do the tests notice when the code is wrong? Known ways to break it, tried one by one.

    python -m tests.mutants                      all of them; prints those that no test notices
    python -m tests.mutants amoc.py common/      those of files whose path begins so
    python -m tests.mutants --jobs 4

mutants.json holds them: the file, an exact piece of its text that occurs once, what is put in its place, and why
it matters. A piece that no longer occurs is an error, so that the list follows the code. "equivalent" says why a
mutant cannot be noticed; such a one is not tried.

Each is applied to a copy of the project, and the tests that concern the file run there in a forked process, until
the first one fails. Before, they run on the project as it is: there, none may fail. All of them take an hour or two
on two cores.
"""
import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
LIST = pathlib.Path(__file__).with_name("mutants.json")
SHARED = ("test_flags.py", "test_starts.py", "test_wiring.py", "test_augment.py", "test_export.py", "test_faults.py",
          "test_all_scripts.py")


def tests_of(path):
    """What is run for a mutant of the file `path`: (test file, -k expression or None), the quickest first."""
    name = pathlib.Path(path).stem
    own = [f"test_step_{name}.py", f"test_{name}_papers.py", f"test_{name}.py", f"test_{name}_faults.py"]
    found = [(test, None) for test in own if (ROOT / "tests" / test).exists()]
    if (ROOT / path).parent == ROOT and name not in ("eval", "plot"):
        found += [("test_pasted.py", None)]
        found += [(test, name) for test in SHARED if (ROOT / "tests" / test).exists()]
    if path.startswith("evaluation/") or name == "eval":
        shared = ("test_vote.py", "test_presets.py", "test_eval.py", "test_eval_faults.py", "test_testsets.py")
        found += [(test, None) for test in shared if (test, None) not in found]
    for more in MORE.get(path, ()):
        found.append((more, None))
    return found


MORE = {
    "acl.py": ("test_noise_sigma.py", "test_gathered_losses.py"),
    "adco.py": ("test_bank_players.py",),
    "adpe.py": ("test_encoders.py",),
    "advcl.py": ("test_gathered_losses.py",),
    "byorl.py": ("test_noise_sigma.py",),
    "caco.py": ("test_bank_players.py",),
    "clae.py": ("test_gathered_losses.py",),
    "common/augment.py": ("test_data.py", "test_data_faults.py"),
    "common/bank.py": ("test_step_amoc.py", "test_step_adco.py"),
    "common/data.py": ("test_pretext.py", "test_augment.py", "test_faults.py", "test_presets.py", "test_testsets.py"),
    "common/dist.py": ("test_run.py", "test_faults.py", "test_all_scripts.py"),
    "common/encoders.py": ("test_own_encoders.py", "test_export.py", "test_presets.py", "test_foreign.py"),
    "common/files.py": ("test_faults.py", "test_encoders.py", "test_foreign.py"),
    "common/own.py": ("test_own_encoders.py", "test_strangers.py"),
    "common/log.py": ("test_run.py", "test_faults.py", "test_wiring.py"),
    "common/optim.py": ("test_wiring.py", "test_step_rocl.py"),
    "common/pgd.py": ("test_folding.py", "test_step_amoc.py", "test_step_byorl.py"),
    "common/resnet.py": ("test_own_encoders.py", "test_folding.py", "test_encoders.py", "test_export.py", "test_step_amoc.py"),
    "common/run.py": ("test_flags.py", "test_faults.py", "test_wiring.py", "test_all_scripts.py"),
    "common/shapes.py": ("test_data.py",),
    "eval.py": ("test_names.py", "test_checkpoint.py"),
    "evaluation/results.py": ("test_foreign.py",),
    "evaluation/attacks.py": ("test_names.py", "test_together.py"),
    "hardneg.py": ("test_gathered_losses.py",),
    "rocl.py": ("test_gathered_losses.py",),
    "unified.py": ("test_gathered_losses.py",),
    "common/vit.py": ("test_encoders.py", "test_step_adpe.py", "test_adpe.py"),
}


def load():
    """The list. Raises ValueError where a piece of text does not occur exactly once in its file."""
    mutants = json.loads(LIST.read_text())
    for number, mutant in enumerate(mutants):
        text = (ROOT / mutant["file"]).read_text()
        if text.count(mutant["old"]) != 1 or mutant["old"] == mutant["new"]:
            raise ValueError(f"mutant {number} of {mutant['file']}: its text occurs {text.count(mutant['old'])} times: "
                             f"{mutant['old']!r}")
    return mutants


def noticed(mutant):
    """The first test file that fails on `mutant` (None: none does), and the seconds it took. Without "old" and "new"
    nothing is changed."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            ".git", ".venv", "__pycache__", ".pytest_cache", "runs", "data"))
        if "old" in mutant:
            path = copy / mutant["file"]
            path.write_text(path.read_text().replace(mutant["old"], mutant["new"]))
        for test, words in tests_of(mutant["file"]):
            child = multiprocessing.get_context("fork").Process(target=_run, args=(copy, test, words))
            child.start()
            child.join(600)
            if child.is_alive():  # a mutant may loop for ever: that is noticed too
                child.kill()
                return test, time.time() - began
            if child.exitcode != 0:
                return test, time.time() - began
    return None, time.time() - began


def _run(copy, test, words):
    sys.dont_write_bytecode = True
    os.chdir(copy)
    os.setsid()
    sys.path[:] = [str(copy), *(p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "common", "evaluation")]:
        del sys.modules[name]
    import pytest

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{test}", *(["-k", words] if words else [])])
    os._exit(0 if code in (0, 5) else 1)  # 5: no test of that name


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", help="beginnings of paths")
    p.add_argument("--jobs", type=int, default=2)
    args = p.parse_args(argv)
    import torch  # once, before the forks
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    mutants = [m for m in load() if not args.files or m["file"].startswith(tuple(args.files))]
    tried = [m for m in mutants if not m.get("equivalent")]
    survivors = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        controls = [{"file": file} for file in dict.fromkeys(m["file"] for m in tried)]
        for control, (test, _) in zip(controls, pool.map(noticed, controls)):
            if test is not None:
                sys.exit(f"error: {test} fails without a mutant of {control['file']}")
        for number, (mutant, (test, seconds)) in enumerate(zip(tried, pool.map(noticed, tried)), 1):
            print(f"{number}/{len(tried)}  {mutant['file']}  {test or 'SURVIVES'}  {seconds:.0f} s", flush=True)
            if test is None:
                survivors.append(mutant)
    for mutant in survivors:
        print(f"\nsurvives: {mutant['file']}: {mutant['why']}\n  - {mutant['old']}\n  + {mutant['new']}")
    print(f"\n{len(tried)} mutants, {len(survivors)} survive; {len(mutants) - len(tried)} more are equivalent")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
