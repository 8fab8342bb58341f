"""python -m tests.gpu, on a CPU and with everything tiny."""
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests import gpu
from tests.processes import Forked
from tests.scripts import SCRIPTS

BANK = """
                          grad of  ours ms  plain ms  eager ms
  256 x 4096, float32           q     0.10      0.08       0.2
  256 x 4096, float32     q, bank     0.10      0.20       0.2
  256 x 65536, float32          q     0.10      0.11       0.2
  512 x 65536, bfloat16   q, bank     0.20      1,000      0.2
  256 x 1048576, float32        q     0.10      0.30       0.2
"""


def test_kernels_pay_from_the_bank_on_from_which_they_always_do():
    assert gpu.kernel_rows(BANK) == 65536
    assert gpu.kernel_rows(BANK.replace("0.08", "0.3")) == 4096
    assert gpu.kernel_rows(BANK.replace("0.30       0.2", "0.05       0.2")) is None
    assert gpu.kernel_rows("") is None
    assert gpu.kernel_rows(f"$ bench bank\n{BANK}$ bench bank\n") is None  # of an earlier call
    assert gpu.kernel_rows(f"$ bench bank\n$ bench bank\n{BANK}") == 65536


def test_a_part_that_takes_too_long_is_interrupted_and_may_still_save(tmp_path):
    code = "import time\ntry:\n    print('begun', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')"
    began = time.time()
    assert gpu.call([sys.executable, "-c", code], tmp_path / "out.txt", 3) is None
    assert time.time() - began < 30 and (tmp_path / "out.txt").read_text().splitlines()[-2:] == ["begun", "saved"]
    assert gpu.call([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "out.txt", 60) == 3


def test_one_command_does_what_is_left_and_says_so(tmp_path, capsys, monkeypatch):
    """Bench is made elsewhere; here a test, and AMOC with its evaluations, in processes that have their imports."""
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(
        Popen=lambda command, cwd, stdout, stderr: Forked(command, stdout, cwd=cwd), STDOUT=None,
        TimeoutExpired=subprocess.TimeoutExpired))
    summary = tmp_path / "summary.json"
    benched = [name for name in gpu.commands(SimpleNamespace(device="cpu", quick=True)) if name != "tests"]
    assert len(benched) == 2 + len(SCRIPTS)
    summary.write_text(json.dumps({name: {"result": "done"} for name in benched}))
    flags = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--minutes", "20"]
    gpu.main(flags)
    found = json.loads(summary.read_text())
    assert found["tests"]["result"] == found["amoc"]["result"] == "done" and found["amoc"]["epochs"] == 2
    assert "passed" in (tmp_path / "tests.txt").read_text()
    evaluated = [json.loads(line) for line in (tmp_path / "amoc" / "eval.jsonl").read_text().splitlines()]
    assert {line["preset"] for line in evaluated} == {"knn", "amoc-slf", "amoc-alf"}
    capsys.readouterr()
    gpu.main(flags)
    assert capsys.readouterr().out.startswith("left for the next call: nothing; see ")


def test_an_interrupted_call_goes_on_with_what_is_left(tmp_path, capsys, monkeypatch):
    """What was cut off is made anew, but first what was not tried; a bank's tables count as far as they are there."""
    made, clock = [], SimpleNamespace(left=100)
    monkeypatch.setattr(gpu, "commands", lambda args: dict.fromkeys(["bank", "step-amoc", "step-acl", "step-rocl"], []))
    monkeypatch.setattr(gpu, "Clock", lambda minutes: clock)
    monkeypatch.setattr(gpu, "amoc", lambda *_: made.append("amoc") or "done")

    def call(command, path, seconds):
        made.append(path.stem)
        path.write_text(BANK if path.stem == "bank" else "")
        clock.left -= 40
        return None if path.stem == "bank" and len(made) == 1 else 0

    monkeypatch.setattr(gpu, "call", call)
    flags = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    gpu.main(flags)
    assert made == ["bank", "step-amoc"]
    assert "left for the next call: bank, step-acl, step-rocl, amoc; see" in capsys.readouterr().out
    part = json.loads((tmp_path / "summary.json").read_text())["bank"]
    assert part["result"] == "cut off" and part["kernels from rows"] == 65536
    clock.left = 1000
    gpu.main(flags)
    assert made[2:] == ["step-acl", "step-rocl", "bank", "amoc"]


def test_what_failed_and_what_is_left_is_said_and_without_a_device_nothing_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "commands", lambda args: {"bank": [sys.executable, "-c", "raise SystemExit(1)"]})
    flags = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--minutes", "1"]
    with pytest.raises(SystemExit, match="1"):
        gpu.main(flags)
    *_, failed, left = capsys.readouterr().out.splitlines()
    assert failed.startswith("failed: bank; see") and left.startswith("left for the next call: bank, amoc; see")
    assert json.loads((tmp_path / "summary.json").read_text())["bank"]["result"] == "failed, exit status 1"
    with pytest.raises(ValueError, match="--device nonsense cannot be used"):
        gpu.main([*flags[:-1], "1", "--device", "nonsense"])
