"""Real processes: signals from outside, errors on the screen. All of it is common/run.py's, to which every script
leaves it (test_all_scripts.py), so a ResNet, a script with work before its first epoch and a ViT stand for all."""
import signal
import subprocess
import time

import pytest

from tests.scripts import command, environment, launch
from tests.test_all_scripts import by_two, flags, main, npz, quiet_signals, same_result  # noqa: F401

pytestmark = pytest.mark.parametrize("script", ["amoc", "adco", "adpe"])


def test_kill_9_from_outside(script, npz, tmp_path):
    """A real process, killed once its first checkpoint is there; what it was writing is no obstacle."""
    whole = main(script, npz, tmp_path / "whole", "--epochs", "6")
    cut = tmp_path / "cut"
    process = subprocess.Popen(command(script, *flags(script, npz, cut, "--epochs", "6")), env=environment())
    while not (cut / "last.pt").exists():
        assert process.poll() is None or (cut / "last.pt").exists()
        time.sleep(0.01)
    process.kill()
    process.wait()
    (cut / "last.pt.tmp").write_bytes(b"half a checkpoint")
    with open(cut / "log.jsonl", "a") as f:
        f.write('{"epoch": 7, "lo')
    main(script, npz, cut, "--epochs", "6")
    same_result(cut, whole)


def test_sigterm_from_outside_exits_without_a_traceback(script, npz, tmp_path):
    process = subprocess.Popen(
        command(script, *flags(script, npz, tmp_path, "--epochs", "1000")),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "last.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in output and "the same command continues" in output


def test_an_error_is_one_line_and_a_non_zero_exit(script, npz, tmp_path):
    (tmp_path / "file").touch()
    done = launch(script, *flags(script, npz, tmp_path / "file" / "run"))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
        done.stderr
    )


def test_torchrun_gives_what_the_tests_of_two_processes_look_at(script, npz, tmp_path, by_two):
    done = launch(script, *flags(script, npz, tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    same_result(tmp_path, by_two(script))
