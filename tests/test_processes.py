"""Real processes: signals from outside, death, errors on the screen. All of it is common/run.py's, to which every script
leaves it (test_all_scripts.py), so a ResNet, a script with work before its first epoch and a ViT stand for all. The
processes are forked from one that has imported the libraries; what torchrun starts is new."""
import functools
import json
import signal
import subprocess
import time

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from tests.processes import Forked, free_port, left_by_a_death, script_in_two_processes
from tests.scripts import ROOT, command, environment
from tests.test_all_scripts import by_two, equal, flags, main, npz, quiet_signals, same_result  # noqa: F401

STAND_FOR_ALL = ["amoc", "adco", "adpe"]
pytestmark = pytest.mark.parametrize("script", STAND_FOR_ALL)


def started(folder, script, *words):
    """The process of a script's command; what it prints goes to out.txt and error.txt in `folder`."""
    with open(folder / "out.txt", "w") as out, open(folder / "error.txt", "w") as error:
        return Forked(command(script, *words), out, error, env=environment())


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None or path.exists()
        time.sleep(0.01)


def test_kill_9_from_outside(script, npz, tmp_path):
    """A real process, killed once its first checkpoint is there; what it was writing is no obstacle."""
    whole = main(script, npz, tmp_path / "whole", "--epochs", "5")
    cut = tmp_path / "cut"
    process = started(tmp_path, script, *flags(script, npz, cut, "--epochs", "5"))
    wait_for(cut / "last.pt", process)
    process.kill()
    process.wait()
    (cut / "last.pt.tmp").write_bytes(b"half a checkpoint")
    with open(cut / "log.jsonl", "a") as f:
        f.write('{"epoch": 7, "lo')
    main(script, npz, cut, "--epochs", "5")
    same_result(cut, whole)


def test_sigterm_from_outside_exits_without_a_traceback(script, npz, tmp_path):
    process = started(tmp_path, script, *flags(script, npz, tmp_path, "--epochs", "1000"))
    wait_for(tmp_path / "last.pt", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    output = (tmp_path / "out.txt").read_text() + (tmp_path / "error.txt").read_text()
    assert "Traceback" not in output and "the same command continues" in output


def test_an_error_is_one_line_and_a_non_zero_exit(script, npz, tmp_path):
    (tmp_path / "file").touch()
    process = started(tmp_path, script, *flags(script, npz, tmp_path / "file" / "run"))
    error = process.wait(60) and (tmp_path / "error.txt").read_text()
    assert process.poll() == 1 and error.startswith("error: ") and error.count("\n") == 1, error


def test_two_processes_that_die_leave_what_is_copied_in_their_place(script, npz, tmp_path, by_two):
    """Which is what test_all_scripts.py resumes. They die after the fourth step of six."""
    with pytest.raises(ProcessExitedException) as died:
        script_in_two_processes(script, *flags(script, npz, tmp_path), die_at=4)
    copy = left_by_a_death(by_two(script), 4)
    assert died.value.exit_code == 9
    assert {path.name for path in copy.iterdir()} == {path.name for path in tmp_path.iterdir()} - {".lock"}
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (tmp_path, copy))
    assert first["step"] == second["step"] == 3 and equal(first["state"], second["state"])


AS_THE_SHELL_DOES = """
import json, os, runpy, sys
import torchvision
for port, *words in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        if port:  # the store of torchrun holds where the processes of the first script met
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        sys.exit()
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"{words[0]} failed")
"""


@pytest.fixture(scope="module")
def by_torchrun(npz, tmp_path_factory):
    """The folders of the scripts' runs by one torchrun, whose two processes fork for one script after the other."""
    @functools.cache
    def folders():
        base = tmp_path_factory.mktemp("torchrun")
        (base / "each.py").write_text(AS_THE_SHELL_DOES)
        jobs = []
        for number, script in enumerate(STAND_FOR_ALL):
            port = free_port() if number else None
            jobs.append([port, str(ROOT / f"{script}.py"), *flags(script, npz, base / script)])
        launcher = command("amoc", processes=2)[:-1]
        done = subprocess.run([*launcher, str(base / "each.py"), json.dumps(jobs)], env=environment(),
                              capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return {script: base / script for script in STAND_FOR_ALL}

    return folders


def test_torchrun_gives_what_the_tests_of_two_processes_look_at(script, by_torchrun, by_two):
    same_result(by_torchrun()[script], by_two(script))
