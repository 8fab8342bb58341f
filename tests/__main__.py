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


# About how many seconds of a processor the slow files take; any other one counts as 5.
SECONDS = {
    "test_all_scripts": 140, "test_faults": 80, "test_processes": 50, "test_speed": 48, "test_eval": 43,
    "test_autoattack": 40, "test_wiring": 35, "test_eval_faults": 33, "test_bench": 30, "test_devices": 45,
    "test_foreign": 28, "test_rotnet": 28, "test_bank": 36, "test_adco": 23, "test_export": 23, "test_pretext": 22,
    "test_encoders": 18,
    "test_adios": 18, "test_caco": 15, "test_clae": 15, "test_gpu": 15, "test_plot": 14, "test_data_faults": 12,
    "test_presets": 12, "test_run": 12, "test_versus": 12, "test_autoattack_papers": 8, "test_starts": 8,
    "test_step_pretext": 8, "test_testsets": 8, "test_lifted": 7, "test_together": 7, "test_pasted": 6,
    "test_vote": 12, "test_snapshots": 20, "test_strangers": 8, "test_unified": 10, "test_step_unified": 10, "test_hardneg": 8,
    "test_checkpoint": 13,
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
