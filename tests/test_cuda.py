"""What only a GPU can show. Without one these tests have no parameters to run on."""
import copy
import importlib
import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import acl
import amoc
from common import log, run
from evaluation.autoattack import autoattack
from tests.scripts import SCRIPTS, TINY, command, environment, tiny_npz
from tests.test_autoattack import EPS, N, trained

DEVICES = ["cuda"] if torch.cuda.is_available() else []
PAIRS = ["cuda"] if torch.cuda.device_count() > 1 else []  # of GPUs
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


def losses_of(script, *flags, out):
    importlib.import_module(script).main([*TINY, *SCRIPTS[script], *flags, "--out", str(out)])
    return [json.loads(line)["loss"] for line in open(out / "log.jsonl").readlines()[1:]]


@pytest.mark.parametrize("device", DEVICES)
def test_an_attack_is_recorded_while_a_thread_pins_pictures(device, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(320):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    data = ["--data", str(tmp_path / "pictures"), "--workers", "2", "--device", device]
    plain = losses_of("amoc", *data, out=tmp_path / "plain")
    assert losses_of("amoc", *data, "--graph", out=tmp_path / "graph") == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_attacks_on_a_vits_small_crops_are_recorded(device, tmp_path):
    """Its positions for their grids are made on the device."""
    flags = ["--arch", "vit_slim", "--image-size", "56", "--multi-crop", "--eps", "8", "--device", device, "--graph",
             "--data", tiny_npz(tmp_path / "tiny.npz")]
    assert all(0 <= loss < 100 for loss in losses_of("adco", *flags, out=tmp_path / "run"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_compiled_to_graphs_of_its_own_takes_the_same_steps(device, tmp_path):
    flags = ["--data", tiny_npz(tmp_path / "tiny.npz"), "--device", device]
    plain = losses_of("amoc", *flags, out=tmp_path / "plain")
    found = losses_of("amoc", *flags, "--compile", "reduce-overhead", out=tmp_path / "compiled")
    assert found == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("device", PAIRS)
@pytest.mark.parametrize("script, more", [
    ("amoc", []), ("amoc", ["--graph"]), ("amoc", ["--compile"]), ("amoc", ["--sync-bn"]),
    ("amoc", ["--sync-bn", "--compile"]), ("acl", []),
    ("byorl", ["--sync-bn", "--graph"]), ("adco", ["--eps", "8", "--batch-negatives"]), ("adpe", ["--adversary", "pgd"])])
def test_two_gpus_agree_by_nccl(device, script, more, tmp_path):
    """Each on its own, as torchrun starts them."""
    flags = [*TINY, *SCRIPTS[script], *more, "--data", tiny_npz(tmp_path / "tiny.npz"), "--out", str(tmp_path / "run")]
    del flags[flags.index("--device") : flags.index("--device") + 2]
    done = subprocess.run(command(script, *flags, processes=2), env=environment(), capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert lines[0]["world"] == 2 and all(0 <= line["loss"] < 100 for line in lines[1:])
