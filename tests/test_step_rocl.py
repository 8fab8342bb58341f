"""Whole steps of rocl.py against the method: two in a row, and all that they leave behind, by an oracle."""
import math

import pytest
import torch

import rocl
from common import optim
from tests import steps
from tests.scripts import named

B = 4  # images a step
EPS, STEP_SIZE, STEPS = 40 / 255, 25 / 255, 3
TEMPERATURE, WEIGHT_DECAY, TRUST = 0.4, 0.01, 0.02
FLAGS = ["--eps", "40", "--step-size", "25", "--steps", "3", "--temperature", "0.4"]


def step_of_script(flags, net, opt, x1, x2, noise):
    return rocl.train_step(net, opt, x1, x2, noise, **named(rocl.train_step, rocl, *FLAGS, *flags))


# The oracle: RoCL as restated, and as the authors' code sums over positives ---------------------------------
def embed(w, images, mode):
    """z of one batch; RoCL has one BatchNorm for clean and attacked images."""
    return steps.linear(w, "projector", steps.encode(w, images, "norm", mode))


def nt_xent(views):
    """Every view of every image is an anchor; each other view of the image is a positive, with a term of its
    own. All but the anchor is in the denominator. A sum over the positives, a mean over the anchors."""
    rows = [(image, z / z.norm()) for view in views for image, z in enumerate(view)]
    total = 0.0
    for i, (image, u) in enumerate(rows):
        others = [(other, u @ v / TEMPERATURE) for j, (other, v) in enumerate(rows) if j != i]
        denominator = sum(score.exp() for _, score in others)
        for other, score in others:
            if other == image:
                total = total - (score.exp() / denominator).log()
    return total / len(rows)


def asymmetric(views, a, hard):
    """A-InfoNCE: pairs of clean views count 1, an attacked positive a, an attacked anchor 1 - a. Similarities
    train their anchor only. The hard denominator: HCL's, with beta 1 and tau .12."""
    rows = [(view, image, z / z.norm()) for view, part in enumerate(views) for image, z in enumerate(part)]
    total = 0.0
    for i, (view, image, u) in enumerate(rows):
        e = {j: (u @ v.detach() / TEMPERATURE).exp() for j, (_, _, v) in enumerate(rows) if j != i}
        positives = [j for j in e if rows[j][1] == image]
        denominator = sum(e.values())
        if hard:
            n = [e[j] for j in e if j not in positives]
            p = sum(e[j] for j in positives) / 2
            mean = sum(n) / len(n)
            G = (sum(v * v for v in n) / mean - 0.12 * len(n) * p) / 0.88
            floor = len(n) * torch.tensor(-1 / TEMPERATURE, dtype=torch.float64).exp()
            denominator = p + torch.maximum(G, floor)
        for j in positives:
            weight = 1 - a if view == 2 else a if rows[j][0] == 2 else 1
            total = total - weight * (e[j] / denominator).log()
    return total / len(rows)


def attack_l2(loss, x, noise, eps, step_size):
    """One image at a time: a step along the gradient of unit length, back into the ball, back into [0, 1]."""
    x_adv = (x + eps * noise).clamp(0, 1)
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(x_adv), x_adv)
        moved = []
        for i in range(len(x)):
            delta = x_adv[i].detach() + step_size * g[i] / g[i].norm() - x[i]
            if delta.norm() > eps:
                delta = delta * eps / delta.norm()
            moved.append((x[i] + delta).clamp(0, 1))
        x_adv = torch.stack(moved)
    return x_adv


def step_of_paper(w, momentum, x1, x2, noise, lr, reg_weight, attack_to, regularize_to, a=None, hard=False,
                  l2=None):
    """One iteration."""
    partner = {"other": x2, "original": x1}

    def pair_loss(x):
        return nt_xent([embed(w, x, "eval"), embed(w, partner[attack_to], "eval")])

    if l2:
        x_adv = attack_l2(pair_loss, x1, noise, *l2)
    else:
        (x_adv,) = steps.attack(pair_loss, [x1], [noise], EPS, STEP_SIZE, STEPS)

    losses, loss_reg = {}, 0.0
    if reg_weight > 0:  # a pass of two views, and then one of three: each a batch to BatchNorm
        loss_reg = nt_xent(embed(w, torch.cat([x_adv, partner[regularize_to]]), "train").chunk(2))
        losses["loss_reg"] = loss_reg
    views = embed(w, torch.cat([x1, x2, x_adv]), "train").chunk(3)
    losses["loss_rocl"] = nt_xent(views) if a is None else asymmetric(views, a, hard)
    losses["loss"] = losses["loss_rocl"] + reg_weight * loss_reg
    steps.lars(w, losses["loss"], momentum, lr, WEIGHT_DECAY, TRUST)
    return losses


# The comparison ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reg_weight, attack_to, regularize_to, a, hard", [
    (0.0, "other", "other", None, False), (0.3, "other", "other", None, False),
    (0.3, "original", "other", None, False), (0.3, "other", "original", None, False),
    (0.3, "original", "original", None, False), (0.0, "original", "other", None, False),
    (0.3, "other", "other", 0.2, False), (0.3, "other", "other", 0.7, True), (0.0, "original", "other", 0.0, False)])
def test_two_steps_are_those_of_the_method(reg_weight, attack_to, regularize_to, a, hard):
    net = steps.sequential(encoder=steps.encoder(48, 6), projector=torch.nn.Linear(6, 5))
    steps.scrambled(net, 1)
    opt = optim.LARS(net.parameters(), 0.0, momentum=0.9, weight_decay=WEIGHT_DECAY, trust=TRUST)
    w, momentum = steps.plain(net), {}
    choice = dict(reg_weight=reg_weight, attack_to=attack_to, regularize_to=regularize_to, a=a, hard=hard)
    flags = ["--reg-weight", str(reg_weight), "--attack-to", attack_to, "--regularize-to", regularize_to]
    if a is not None:
        flags += ["--asymmetry", str(a), "--hard" if hard else "--no-hard"]

    for number, lr in enumerate([3.0, 2.0]):
        x1, x2 = steps.images((2, B, 3, 4, 4), 10 + number)
        noise = steps.noise((B, 3, 4, 4), 20 + number)
        inputs = [t.clone() for t in (x1, x2, noise)]
        steps.set_lr(opt, lr)
        found = step_of_script(flags, net, opt, *inputs)
        wanted = step_of_paper(w, momentum, x1, x2, noise, lr, **choice)

        what = f"{choice}, step {number}"
        steps.assert_same(found, wanted, f"{what}, losses")
        steps.assert_same(net.state_dict(), w, f"{what}, network")
        steps.assert_same(steps.momenta(net, opt), momentum, f"{what}, momentum")
        steps.assert_whole(net)
        assert all(torch.equal(a, b) for a, b in zip(inputs, (x1, x2, noise))), "inputs are not changed"


@pytest.mark.parametrize("flags, l2", [
    (["--eps", "200", "--step-size", "150"], (200 / 255, 150 / 255)),
    (["--eps", "128"], (128 / 255, 1.25 * 128 / 255 / 3))])
def test_two_steps_in_l2_are_those_of_the_method(flags, l2):
    net = steps.sequential(encoder=steps.encoder(48, 6), projector=torch.nn.Linear(6, 5))
    steps.scrambled(net, 1)
    opt = optim.LARS(net.parameters(), 0.0, momentum=0.9, weight_decay=WEIGHT_DECAY, trust=TRUST)
    w, momentum = steps.plain(net), {}
    flags = ["--norm", "l2", "--steps", "3", "--temperature", "0.4", "--reg-weight", "0.3", *flags]
    for number in range(2):
        x1, x2 = steps.images((2, B, 3, 4, 4), 10 + number)
        noise = steps.noise((B, 3, 4, 4), 20 + number)
        share = torch.tensor([0.3, 1, 0.6, 1]).double()  # two inside the ball, two on its edge
        noise = noise * (share / noise.flatten(1).norm(dim=1))[:, None, None, None]
        steps.set_lr(opt, 2.0)
        settings = named(rocl.train_step, rocl, *flags)
        found = rocl.train_step(net, opt, x1, x2, noise, **settings)
        wanted = step_of_paper(w, momentum, x1, x2, noise, 2.0, 0.3, "other", "other", l2=l2)
        steps.assert_same(found, wanted, f"{flags}, step {number}, losses")
        steps.assert_same(net.state_dict(), w, f"{flags}, step {number}, network")


def test_a_run_hands_the_step_what_the_method_starts_with(monkeypatch, tmp_path):
    seen = steps.first_step(rocl, monkeypatch, tmp_path, "--weight-decay", "0.02", "--lr", "0.7",
                            "--warmup", "0")
    steps.assert_optimizer(seen["opt"], seen["net"], optim.LARS, lr=0.7, momentum=0.9, weight_decay=0.02,
                           trust=0.001, clip=False)
    steps.assert_views(seen["x1"], seen["x2"])
    steps.assert_noise(seen["noise"], (16, 3, 32, 32))
    assert seen["asymmetry"] is None and not seen["hard"]
    assert (seen["norm"], seen["eps"], seen["step_size"]) == ("linf", 8 / 255, 1.785 / 255)


def test_a_run_hands_the_step_its_asymmetry_and_prints_the_chance_of_that_loss(monkeypatch, tmp_path, capsys):
    seen = steps.first_step(rocl, monkeypatch, tmp_path, "--asymmetry", "0", "--hard", "--warmup", "0")
    assert seen["asymmetry"] == 0 and seen["hard"]
    assert f"4/3 ln(3B - 2) = {4 / 3 * math.log(3 * 16 - 2):.3f}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^--hard: goes with --asymmetry"):
        steps.first_step(rocl, monkeypatch, tmp_path, "--hard")
