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


def shares(files, count):
    """The files in `count` lists of about equal size in bytes: the largest first, each to the shortest list."""
    lists = [[] for _ in range(count)]
    totals = [0] * count
    for file in sorted(files, key=lambda file: -file.stat().st_size):
        shortest = totals.index(min(totals))
        lists[shortest].append(file)
        totals[shortest] += file.stat().st_size
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
