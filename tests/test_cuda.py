"""What only a GPU can show. Without one these tests have no parameters to run on."""
import copy
import importlib
import json

import pytest
import torch

import acl
import amoc
from common import log, run
from evaluation.autoattack import autoattack
from tests.scripts import SCRIPTS, TINY, tiny_npz
from tests.test_autoattack import EPS, N, trained

DEVICES = ["cuda"] if torch.cuda.is_available() else []
RUNS = [*((script, []) for script in SCRIPTS), *(("amoc", ["--variant", v]) for v in amoc.VARIANTS),
        *(("acl", ["--variant", v]) for v in acl.VARIANTS),
        *(("adco", ["--bank-size", "16384", *more]) for more in (
            [], ["--eps", "8", "--batch-negatives"], ["--eps", "8", "--clean-weight", "0.5"], ["--symmetric"], ["--multi-crop"])),  # large: by the kernels
        *(("caco", ["--bank-size", "16384", *more]) for more in (
            [], ["--cooperation", "-1"], ["--multi-crop", "--optimizer", "lars", "--lr", "0.06"], ["--eps", "8"])),
        *(("hardneg", ["--bank-size", "16384", *more]) for more in (
            [], ["--negatives", "ifm"], ["--negatives", "hcl"], ["--negatives", "hcl", "--base", "simclr"]))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("script, more", RUNS)
def test_a_step_waits_for_nothing_and_its_loss_is_finite(device, script, more, tmp_path, monkeypatch):
    """From the second step of an epoch (the first may set things up) until its line in the log."""
    end = log.Log.epoch

    def begin(args, env, state, step):
        torch.cuda.set_sync_debug_mode("error" if step % 3 else "default")

    def epoch(*args, **values):
        torch.cuda.set_sync_debug_mode("default")
        end(*args, **values)

    monkeypatch.setattr(run, "stop_if_signalled", begin)
    monkeypatch.setattr(log.Log, "epoch", epoch)
    npz, out = tiny_npz(tmp_path / "tiny.npz"), tmp_path / "run"
    try:
        importlib.import_module(script).main(
            [*TINY, *SCRIPTS[script], *more, "--data", npz, "--out", str(out), "--device", device])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = [json.loads(line) for line in open(out / "log.jsonl")][1:]
    assert len(lines) == 2 and all(0 <= line["loss"] < 100 for line in lines)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", EPS)
def test_autoattack_decides_as_on_a_cpu(device, norm):
    """But for one image, that rounding may decide."""
    net, x, y = trained()
    there = copy.deepcopy(net).to(device)
    ours, theirs = (autoattack(n, x.to(d), y.to(d), EPS[norm], norm)[0] for n, d in ((net, "cpu"), (there, device)))
    moved = [(adv.cpu() != x).flatten(1).any(1) for adv in (ours, theirs)]
    assert (moved[0] == moved[1]).sum() >= N - 1 and 2 < moved[0].sum() < N
