"""What only a GPU can show. Without one these tests have no parameters to run on."""
import copy
import functools
import importlib
import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import acl
import amoc
import eval as evaluate
from common import encoders, log, run
from evaluation import checkpoint, screen
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


def judged_on(device, folder, *flags):
    """The accuracies {(preset, attack): of 20 images} of an encoder with two branches, by eval.py on `device`."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    encoders.export(encoders.make("slim", ["clean", "adv"]), folder / "encoder.pt", "adv", image_size=32)
    evaluate.main([str(folder / "encoder.pt"), "--data", tiny_npz(folder / "tiny.npz"), "--device", device,
                   "--epochs", "1", "--milestones", "--batch-size", "16", *flags])
    lines = [json.loads(line) for line in open(folder / "eval.jsonl")]
    return {(line["preset"], attack): result["accuracy"] for line in lines for attack, result in line["results"].items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flags", [
    "--preset knn amoc-slf --attacks clean pgd20 pgd5-0.5-l2 pgd20-l1 deepfool c17-like apgd --aa-limit 8 --pictures",
    "--preset amoc-slf --attacks pgd2-8 aa --aa-limit 2 --vote 3 --vote-sigma 0.1 --vote-draws 2",
    "--preset amoc-alf robustssl-aff rocl-aff mae-tune-cifar chen-f1 --warmup 0 --attacks clean pgd20"])
def test_an_evaluation_decides_as_on_a_cpu(device, flags, tmp_path):
    """But for a few of 20 images: the classifiers are trained on it too, with random numbers of its own."""
    ours = judged_on("cpu", tmp_path / "cpu", *flags.split())
    theirs = judged_on(device, tmp_path / "there", *flags.split())
    assert ours.keys() == theirs.keys() and len(ours) > 1
    for column in ours:
        assert abs(ours[column] - theirs[column]) <= 30, column


@pytest.mark.parametrize("device", DEVICES)
def test_classifiers_are_judged_together(device, tmp_path):
    for name in ("a", "b"):
        judged_on(device, tmp_path / name, "--preset", "amoc-slf", "--seed", str(ord(name)))
    (one,), (two,) = ((tmp_path / name).glob("classifier-*.pt") for name in ("a", "b"))
    for flag in ("--ensemble", "--matrix"):
        evaluate.main([flag, str(one), str(two), "--data", str(tmp_path / "a" / "tiny.npz"), "--device", device,
                       "--attacks", "pgd2-8"])
    lines = [json.loads(line) for name in ("ensemble", "matrix") for line in open(tmp_path / "a" / f"{name}.jsonl")]
    assert len(lines) == 3 + 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_of_a_classifier_that_was_stopped_goes_on(device, tmp_path, monkeypatch):
    """The state of the device's own random numbers is in its checkpoint too."""
    flags = ["--preset", "robustssl-aff", "--attacks", "clean", "--epochs", "3", "--milestones", "2"]
    whole = judged_on(device, tmp_path / "whole", *flags)

    class Stopped(Exception):
        pass

    monkeypatch.setattr(evaluate, "Checkpoint", functools.partial(checkpoint.Checkpoint, interval=0.0))
    show = screen.show_epoch

    def stop_in_the_third_epoch(epoch, *more):
        show(epoch, *more)
        if epoch == 2:
            raise Stopped

    monkeypatch.setattr(screen, "show_epoch", stop_in_the_third_epoch)
    with pytest.raises(Stopped):
        judged_on(device, tmp_path / "stopped", *flags)
    assert list((tmp_path / "stopped").glob("training-*.pt"))
    monkeypatch.setattr(screen, "show_epoch", show)
    again = judged_on(device, tmp_path / "stopped", *flags)
    assert again.keys() == whole.keys() and all(abs(again[column] - whole[column]) <= 10 for column in whole)
    assert not list((tmp_path / "stopped").glob("training-*.pt"))


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
