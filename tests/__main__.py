"""All tests, on all cores.

    python -m tests                    as python -m pytest -q, in as many processes as there are cores
    python -m tests -x --durations=9   options go to each pytest

Each process takes a share of the test files, so that what they share (imports, runs made once) is made once.
"""
import os
import pathlib
import subprocess
import sys
import tempfile

FOLDER = pathlib.Path(__file__).parent


# About how many seconds the slow files take; any other one counts as 5.
SECONDS = {
    "test_all_scripts": 200, "test_faults": 130, "test_processes": 100, "test_autoattack": 60, "test_eval": 60,
    "test_adco": 50, "test_eval_faults": 47, "test_foreign": 46, "test_wiring": 41, "test_adios": 29, "test_bank": 28,
    "test_bench": 35, "test_encoders": 27, "test_caco": 22, "test_export": 22, "test_data_faults": 45,
    "test_autoattack_papers": 15, "test_run": 15, "test_files": 10, "test_speed": 75, "test_gpu": 40, "test_rotnet": 30,
    "test_versus": 20, "test_hardneg": 8, "test_pretext": 35, "test_presets": 20, "test_plot": 15, "test_together": 15,
    "test_vote": 12, "test_snapshots": 20, "test_unified": 10, "test_step_unified": 10,
}


def seconds(file):
    return SECONDS.get(file.stem, 5)


def shares(files, count):
    """The files in `count` lists that take about as long: the slowest first, each to the shortest list."""
    lists = [[] for _ in range(count)]
    totals = [0] * count
    for file in sorted(files, key=seconds, reverse=True):
        shortest = totals.index(min(totals))
        lists[shortest].append(file)
        totals[shortest] += seconds(file)
    return lists


def main(options):
    files = sorted(FOLDER.glob("test_*.py"))
    started = []
    for share in shares(files, min(os.cpu_count() or 1, 8)):
        output = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "pytest", "-q", *options, *map(str, share)]
        started.append((subprocess.Popen(command, cwd=FOLDER.parent, stdout=output, stderr=output), output))
    code = 0
    for process, output in started:
        code = max(code, process.wait())
        output.seek(0)
        print(output.read(), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
