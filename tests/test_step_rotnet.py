"""Whole steps of rotnet.py against the method: two in a row, and all that they leave behind, by an oracle."""
import math

import pytest
import torch

import rotnet
from tests import steps
from tests.scripts import named

B = 4  # images a step
CLASSES = 5
EPS, STEP_SIZE, STEPS = 40 / 255, 25 / 255, 3
WEIGHT_DECAY = 0.01
FLAGS = ["--target", "labels", "--eps", "40", "--step-size", "25", "--steps", "3"]


# The oracle: Rebuffi et al. 2023, Eq. 5; TRADES, Eq. 5 of its paper -------------------------------------------
def logits(w, images, mode):
    return steps.linear(w, "head", steps.encode(w, images, "norm", mode))


def cross_entropy(z, y, smoothing=0.0):
    total = 0.0
    for row, label in zip(z, y.tolist()):
        denominator = sum(v.exp() for v in row)
        for c, v in enumerate(row):
            weight = smoothing / len(row) + (1 - smoothing) * (c == label)
            total = total - weight * (v.exp() / denominator).log()
    return total / len(z)


def divergence(z, z_adv):
    total = 0.0
    for row, row_adv in zip(z, z_adv):
        p = row.exp() / row.exp().sum()
        p_adv = row_adv.exp() / row_adv.exp().sum()
        for a, b in zip(p, p_adv):
            total = total + a * (a / b).log()
    return total / len(z)


def attack_l2(loss, x, noise):
    x_adv = (x + EPS * noise).clamp(0, 1)
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(x_adv), x_adv)
        moved = []
        for i in range(len(x)):
            delta = x_adv[i].detach() + STEP_SIZE * g[i] / g[i].norm() - x[i]
            if delta.norm() > EPS:
                delta = delta * EPS / delta.norm()
            moved.append((x[i] + delta).clamp(0, 1))
        x_adv = torch.stack(moved)
    return x_adv


def step_of_paper(w, momentum, x, y, noise, lr, loss, norm, smoothing):
    clean = logits(w, x, "eval").detach()

    def inner(x_adv):
        z = logits(w, x_adv, "eval")
        return divergence(clean, z) if loss == "trades" else cross_entropy(z, y)

    if norm == "l2":
        x_adv = attack_l2(inner, x, noise)
    else:
        (x_adv,) = steps.attack(inner, [x], [noise], EPS, STEP_SIZE, STEPS)

    if loss == "trades":  # each is a batch to BatchNorm, the clean one first
        z = logits(w, x, "train")
        z_adv = logits(w, x_adv, "train")
        value = cross_entropy(z, y) + 3.0 * divergence(z, z_adv)
    else:
        z_adv = logits(w, x_adv, "train")
        value = cross_entropy(z_adv, y, smoothing)
    steps.sgd(w, value, momentum, lr, WEIGHT_DECAY)
    hits = [float(row.argmax() == label) for row, label in zip(z_adv, y)]
    return {"loss": value, "accuracy": torch.tensor(sum(hits) / len(hits))}


# The comparison ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss, norm, smoothing", [
    ("ce", "linf", 0.0), ("ce", "linf", 0.3), ("ce", "l2", 0.0), ("trades", "linf", 0.0), ("trades", "l2", 0.0)])
def test_two_steps_are_those_of_the_method(loss, norm, smoothing):
    net = steps.sequential(encoder=steps.encoder(48, 6), head=torch.nn.Linear(6, CLASSES))
    steps.scrambled(net, 1)
    opt = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9, weight_decay=WEIGHT_DECAY)
    w, momentum = steps.plain(net), {}
    flags = [*FLAGS, "--loss", loss, "--norm", norm, "--smoothing", str(smoothing), "--beta", "3"]
    if loss == "trades":
        flags[flags.index("--smoothing") + 1] = "0"

    for number, lr in enumerate([0.3, 0.2]):
        x = steps.images((B, 3, 4, 4), 10 + number)
        y = torch.tensor([[0, 3, 4, 1], [2, 2, 0, 4]][number])
        noise = steps.noise((B, 48), 20 + number) * (1 if norm == "linf" else 0.1)
        inputs = [t.clone() for t in (x, y, noise)]
        steps.set_lr(opt, lr)
        found = rotnet.train_step(net, opt, *inputs, **named(rotnet.train_step, rotnet, *flags))
        wanted = step_of_paper(w, momentum, x, y, noise.view(x.shape), lr, loss, norm, smoothing)

        found["accuracy"] = found["accuracy"].to(wanted["accuracy"].dtype)
        steps.assert_same(found, wanted, f"step {number}, logged")
        steps.assert_same(net.state_dict(), w, f"step {number}, network")
        steps.assert_same(steps.momenta(net, opt), momentum, f"step {number}, momentum")
        steps.assert_whole(net)
        assert all(torch.equal(a, b) for a, b in zip(inputs, (x, y, noise))), "inputs are not changed"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("target", ["rotation", "labels"])
def test_a_run_hands_the_step_what_the_method_starts_with(monkeypatch, tmp_path, optimizer, target):
    seen = steps.first_step(rotnet, monkeypatch, tmp_path, "--weight-decay", "0.02", "--lr", "0.7",
                            "--warmup", "0", "--optimizer", optimizer, "--target", target)
    net, opt = seen["net"], seen["opt"]
    if optimizer == "sgd":
        steps.assert_optimizer(opt, net, torch.optim.SGD, lr=0.7, momentum=0.9, weight_decay=0.02)
    else:
        assert type(opt) is torch.optim.AdamW
        for group in opt.param_groups:
            assert group["lr"] == 0.7 and group["betas"] == (0.9, 0.95)
            for w in group["params"]:
                assert group["weight_decay"] == (0.02 if w.dim() > 1 else 0.0)
        held = [w for group in opt.param_groups for w in group["params"]]
        assert sorted(map(id, held)) == sorted(map(id, net.parameters()))
    steps.assert_views(seen["x"])
    assert seen["noise"].shape == (16, 3 * 32 * 32) and seen["noise"].abs().max() <= 1
    assert net[1].out_features == 4 and seen["y"].dtype == torch.int64
    labels = torch.arange(16) % 4  # of tiny_npz: each four times
    if target == "labels":
        assert seen["y"].bincount().tolist() == labels.bincount().tolist()


def test_chance_is_the_logarithm_of_the_classes():
    assert rotnet.cross_entropy(torch.zeros(3, 4), torch.tensor([0, 3, 1]), 0.2).item() == pytest.approx(math.log(4))
