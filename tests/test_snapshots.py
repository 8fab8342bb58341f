"""Encoders that are kept over the epochs of a run, which is otherwise what it is by itself."""
import importlib
import json
import subprocess
import sys

import pytest
import torch

from common import encoders, run
from evaluation import snapshots, table
from tests.scripts import ROOT, SCRIPTS, TINY, tiny_npz


def test_a_run_with_snapshots_is_the_run_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    data = tiny_npz(tmp_path / "x.npz")
    flags = ["--data", data, *TINY, *SCRIPTS["acl"], "--epochs", "3"]
    importlib.import_module("acl").main([*flags, "--out", str(tmp_path / "alone")])
    original = run.save
    snapshots.main(["--every", "2", "--bn", "adv", "acl.py", *flags, "--out", str(tmp_path / "watched")])
    assert run.save is original
    assert sorted(path.name for path in (tmp_path / "watched").glob("*.pt")) == ["encoder-002.pt", "encoder.pt", "last.pt"]
    alone = torch.load(tmp_path / "alone" / "encoder.pt")
    last = torch.load(tmp_path / "watched" / "encoder.pt")
    kept = torch.load(tmp_path / "watched" / "encoder-002.pt")
    assert last.keys() == kept.keys() and kept["branch"] == "adv" and kept["image_size"] == 32
    assert all(torch.equal(last["state"][key], alone["state"][key]) for key in alone["state"])
    assert not torch.equal(last["state"]["conv1.weight"], kept["state"]["conv1.weight"])


def test_its_log_has_the_command_that_one_types_and_the_table_its_script(tmp_path):
    out = tmp_path / "run"
    words = ["-m", "evaluation.snapshots", "--bn", "clean", "acl.py", "--data", tiny_npz(tmp_path / "x.npz"), *TINY,
             *SCRIPTS["acl"], "--epochs", "0", "--out", str(out), "--variant", "s2s"]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    header = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert header["command"].startswith("python -m evaluation.snapshots --bn clean acl.py --data")
    assert table.read_run(out, run.FREE).script == "acl"


def test_what_a_stopped_run_saves_within_an_epoch_is_no_snapshot():
    assert [snapshots.is_due(epochs, 0, 3) for epochs in (1, 2, 3, 6)] == [False, False, True, True]
    assert not snapshots.is_due(3, 1, 3)


@pytest.mark.parametrize("flags, words", [
    (["--bn", "adv", "rocl.py"], "--bn adv: this encoder has no BatchNorm branches; leave --bn out"),
    (["acl.py"], "--bn None: this encoder has the BatchNorm branches adv, clean; name one"),
    (["nonsense.py"], "nonsense.py: no script here; such as caco.py"),
    (["--every", "0", "caco.py"], "--every 0"),
    (["--every", "2", "rocl.py", "--save-every", "5"], "--every 2: must be a multiple of the script's --save-every 5"),
    (["--every", "5", "rocl.py", "--save-every", "2"], "--every 5: must be a multiple of the script's --save-every 2"),
])
def test_what_would_fail_late_fails_before_the_run(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(ROOT)
    data = tiny_npz(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=words):
        snapshots.main([*flags, "--data", data, *TINY, "--out", str(tmp_path / "out")])
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_encoder_is_found_in_every_scripts_network(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = []
    monkeypatch.setattr(snapshots, "check_branch", lambda encoder, bn: found.append(encoder))
    flags = ["--data", tiny_npz(tmp_path / "x.npz"), *TINY, *SCRIPTS[name], "--epochs", "0", "--out", str(tmp_path / "out")]
    snapshots.main([f"{name}.py", *flags])
    exported = torch.load(tmp_path / "out" / "encoder.pt")
    (encoder,) = found
    assert encoder.recipe["arch"] == exported["arch"] and encoder.dim == encoders.rebuild(exported).dim
