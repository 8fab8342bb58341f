"""Whole steps of rocl.py against the method: two in a row, and all that they leave behind, by an oracle."""
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


def step_of_paper(w, momentum, x1, x2, noise, lr, reg_weight, attack_to, regularize_to):
    """One iteration."""
    partner = {"other": x2, "original": x1}

    def pair_loss(x):
        return nt_xent([embed(w, x, "eval"), embed(w, partner[attack_to], "eval")])

    (x_adv,) = steps.attack(pair_loss, [x1], [noise], EPS, STEP_SIZE, STEPS)

    losses, loss_reg = {}, 0.0
    if reg_weight > 0:  # a pass of two views, and then one of three: each a batch to BatchNorm
        loss_reg = nt_xent(embed(w, torch.cat([x_adv, partner[regularize_to]]), "train").chunk(2))
        losses["loss_reg"] = loss_reg
    losses["loss_rocl"] = nt_xent(embed(w, torch.cat([x1, x2, x_adv]), "train").chunk(3))
    losses["loss"] = losses["loss_rocl"] + reg_weight * loss_reg
    steps.lars(w, losses["loss"], momentum, lr, WEIGHT_DECAY, TRUST)
    return losses


# The comparison ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reg_weight, attack_to, regularize_to", [
    (0.0, "other", "other"), (0.3, "other", "other"), (0.3, "original", "other"), (0.3, "other", "original"),
    (0.3, "original", "original"), (0.0, "original", "other")])
def test_two_steps_are_those_of_the_method(reg_weight, attack_to, regularize_to):
    net = steps.named(encoder=steps.encoder(48, 6), projector=torch.nn.Linear(6, 5))
    steps.scrambled(net, 1)
    opt = optim.LARS(net.parameters(), 0.0, momentum=0.9, weight_decay=WEIGHT_DECAY, trust=TRUST)
    w, momentum = steps.plain(net), {}
    choice = dict(reg_weight=reg_weight, attack_to=attack_to, regularize_to=regularize_to)
    flags = ["--reg-weight", str(reg_weight), "--attack-to", attack_to, "--regularize-to", regularize_to]

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


def test_a_run_hands_the_step_what_the_method_starts_with(monkeypatch, tmp_path):
    seen = steps.first_step(rocl, monkeypatch, tmp_path, "--weight-decay", "0.02", "--lr", "0.7",
                            "--warmup", "0")
    steps.assert_optimizer(seen["opt"], seen["net"], optim.LARS, lr=0.7, momentum=0.9, weight_decay=0.02,
                           trust=0.001, clip=False)
    steps.assert_views(seen["x1"], seen["x2"])
    steps.assert_noise(seen["noise"], (16, 3, 32, 32))
