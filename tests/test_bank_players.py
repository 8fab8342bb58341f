"""What adco.py and caco.py, whose bank is a player, have in common: the bank and its fill."""
import copy

import pytest
import torch
from torch import nn

import adco
import caco
from common import augment, data, run, shapes
from tests.recipes import unit
from tests.scripts import named_by

both = pytest.mark.parametrize("script", [adco, caco])


def setting(script, *flags):
    """Networks, optimizer, a bank made as a user would, images in batches of 16 and 12, flags."""
    args = script.parser().parse_args(["--batch-size", "16", *flags])
    torch.manual_seed(0)
    net = script.network("slim")
    target = copy.deepcopy(net).requires_grad_(False)
    opt = torch.optim.SGD(net.parameters(), 0.01)
    x, y, _ = shapes.shapes(28, seed=0)
    return net, target, opt, script.make_bank(args.bank_size, 128), data.Images(x, y, 10), args


@both
def test_a_bank_made_for_a_step_is_all_that_the_step_needs(script):
    net, target, opt, bank, images, args = setting(script, "--bank-size", "8")
    assert bank.state_dict().keys() == {"rows", "velocity", "_extra_state"}
    assert bank.velocity.shape == (8, 128) and not bank.velocity.any()
    x = augment.to_float(images.x[:16])
    rest = ([x], [x], torch.arange(16), None) if script is adco else ([x, x], None)
    settings = named_by(script.train_step, script, args)
    script.train_step(net, target, opt, bank, *rest, **settings)
    assert bank.velocity.norm(dim=1).min() > 0


@both
@pytest.mark.parametrize("size", [8, 28, 60])
def test_a_filled_bank_has_no_key_of_an_older_network(script, size, monkeypatch):
    """Also where the last batch of an epoch is short: 60 rows take five batches, of 16 and 12 in turns."""
    net, target, opt, bank, images, args = setting(script, "--bank-size", str(size), "--fill-steps", "3")
    pushed, push = [], bank.push
    monkeypatch.setattr(bank, "push", lambda keys: pushed.append(keys) or push(keys))
    script.fill(net, target, opt, bank, images, 32, args, run.Env(torch.device("cpu"), 0, 1))
    keys = torch.cat(pushed[3:])
    new = (bank.rows[:, None] == keys).all(2)
    assert new.any(1).all()
    assert len(keys) - len(pushed[-1]) < size  # and no batch more than that takes


def slow_fill(w, rows, views, steps, batch_negatives, T, lr, ema):
    """MoCo of queries w x1 and keys t x2, `steps` times, then keys alone, each batch (x1, x2) of `views` once. Changes
    `rows`, a list; returns w, t and the keys of each batch."""
    t = w.clone()
    oldest = 0
    pushed = []
    for number, (x1, x2) in enumerate(views):
        if number < steps:
            t = ema * t + (1 - ema) * w
        else:
            t = w
        keys = unit(x2 @ t.T)
        if number < steps:
            w = w.clone().requires_grad_()
            loss = 0.0
            for i, query in enumerate(unit(x1 @ w.T)):
                positive = (query @ keys[i] / T).exp()
                others = sum((query @ row / T).exp() for row in rows)
                of_the_batch = sum((query @ key / T).exp() for key in keys) if batch_negatives else positive
                loss = loss - (positive / (of_the_batch + others)).log() / len(x1)
            (g,) = torch.autograd.grad(loss, w)
            w = w.detach() - lr * g
        for key in keys:
            rows[oldest] = key
            oldest = (oldest + 1) % len(rows)
        pushed.append(keys)
    return w, t, pushed


@pytest.mark.parametrize("script, flags", [
    (adco, ["--temperature", "0.3", "--bank-temperature", "0.9"]),
    (adco, ["--temperature", "0.3", "--batch-negatives"]),
    (caco, ["--temperature", "0.9", "--fill-temperature", "0.3"])])
def test_the_fill_is_a_slow_moco_and_then_the_keys_of_the_network_it_leaves(script, flags, monkeypatch):
    """Of linear networks, and of two views that are the image and the image mirrored, darker."""
    args = script.parser().parse_args(["--batch-size", "8", "--bank-size", "13", "--fill-steps", "2", "--ema", "0.6", *flags])
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5, bias=False, dtype=torch.float64))
    target = copy.deepcopy(net).requires_grad_(False)
    torch.manual_seed(0)
    bank = script.make_bank(13, 5).double()
    seen = []

    def views(x, rng, size, **settings):
        x1 = x.double() / 255
        x2 = x1.flip(3) / 2
        seen.append((x1.flatten(1), x2.flatten(1)))
        return ([x1], [x2]) if script is adco else [x1, x2]

    monkeypatch.setattr(script, "views", views)
    pushed, push = [], bank.push
    monkeypatch.setattr(bank, "push", lambda keys: pushed.append(keys) or push(keys))
    w, rows = net[1].weight.detach().clone(), list(bank.rows.clone())
    pixels = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    opt = torch.optim.SGD(net.parameters(), 0.5)
    env = run.Env(torch.device("cpu"), 0, 1)
    script.fill(net, target, opt, bank, data.Images(pixels, torch.zeros(20), 1), 4, args, env)

    assert [len(x1) for x1, _ in seen] == [8, 8, 4, 8, 8]  # 20 rows after the two steps, of 13
    wanted = slow_fill(w, rows, seen, 2, args.batch_negatives if script is adco else False, 0.3, 0.5, 0.6)
    found = net[1].weight.detach(), target[1].weight, pushed
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bank.rows, torch.stack(rows), rtol=1e-9, atol=1e-12)
    assert (wanted[0] - w).abs().max() > 0.01
