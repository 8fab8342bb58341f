"""What only a GPU can show. Without one these tests have no parameters to run on."""
import pytest
import torch

import adco
import amoc
import caco
from common import data, run
from common.bank import Bank

DEVICES = [torch.device("cuda")] if torch.cuda.is_available() else []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", amoc.VARIANTS)
def test_a_step_waits_for_nothing_and_its_loss_is_finite(device, variant, tmp_path):
    args = amoc.parser().parse_args(["--variant", variant, "--out", str(tmp_path)])
    log = run.Log(args, run.Env(device, 0, 1), 3)
    net, target = amoc.network("slim").to(device), amoc.network("slim").to(device).requires_grad_(False)
    banks = [Bank(256, 128).to(device) for _ in range(2)]
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    x, y, _ = data.shapes(96, seed=0)
    images = data.Images(x.to(device), y.to(device), 10)
    log.start(0)
    try:
        for step, (x, _, rng) in enumerate(data.batches(images, 32, 0, 0)):
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step may set things up
            x1, x2 = amoc.augment(x, rng, 32), amoc.augment(x, rng, 32)
            noise = 2 * rng.uniform(2, *x1.shape[1:], device=device) - 1
            with run.autocast(device):
                losses = amoc.train_step(net, target, opt, *banks, x1, x2, noise, args)
            log.step(step, rng.total, **losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    log.check()
    assert all(v.isfinite() for v in losses.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("script, flags", [
    (adco, []), (adco, ["--eps", "8", "--batch-negatives"]), (adco, ["--symmetric"]), (adco, ["--multi-crop"]),
    (caco, []), (caco, ["--positives", "adversarial"]), (caco, ["--multi-crop", "--optimizer", "lars"])])
@pytest.mark.parametrize("rows", [256, 16384])  # the second: by the kernels
def test_a_step_with_a_trained_bank_waits_for_nothing(device, script, flags, rows, tmp_path):
    args = script.parser().parse_args([*flags, "--out", str(tmp_path)])
    log = run.Log(args, run.Env(device, 0, 1), 3)
    net, target = script.network("slim").to(device), script.network("slim").to(device).requires_grad_(False)
    bank = Bank(rows, 128).to(device)
    bank.register_buffer("velocity", torch.zeros_like(bank.rows))
    opt = caco.optimizer(net, args) if script is caco else torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    x, y, _ = data.shapes(96, seed=0)
    images = data.Images(x.to(device), y.to(device), 10)
    log.start(0)
    try:
        for step, (x, _, rng) in enumerate(data.batches(images, 32, 0, 0)):
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step may set things up
            views = script.views(x, rng, args)
            if script is adco:
                order = rng.uniform(1, device=device)[:, 0].argsort()
                noise = [2 * rng.uniform(*v.shape[1:], device=device) - 1 for v in views[0]]
                inputs = *views, order, noise, args
            else:
                inputs = views, 0.99, 0.3, args
            with run.autocast(device):
                losses = script.train_step(net, target, opt, bank, *inputs)
            log.step(step, rng.total, **losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    log.check()
    assert all(v.isfinite() for v in losses.values())
