"""Whole steps of acl.py against the paper: two in a row, and all that they leave behind, by an oracle."""
import pytest
import torch

import acl
from common import optim
from tests import steps
from tests.scripts import named

B = 4  # images a step
EPS, STEP_SIZE, STEPS = 40 / 255, 25 / 255, 3
TEMPERATURE, WEIGHT_DECAY, TRUST = 0.4, 0.01, 0.02
FLAGS = ["--eps", "40", "--step-size", "25", "--steps", "3", "--temperature", "0.4"]
L2 = ["--norm", "l2", "--eps", "200", "--step-size", "110"]
HOW = {"linf": (EPS, STEP_SIZE, STEPS, "linf"), "l2": (200 / 255, 110 / 255, STEPS, "l2")}


def step_of_script(variant, norm, net, opt, x1, x2, noise):
    more = L2 if norm == "l2" else []
    settings = named(acl.train_step, acl, "--variant", variant, *FLAGS, *more)
    return acl.train_step(net, opt, x1, x2, noise, **settings)


# The oracle: ACL as the paper has it ------------------------------------------------------------------------
def embed(w, images, branch, mode):
    """z of one batch by a BatchNorm branch, "clean" or "adv", of encoder and head alike."""
    h = steps.encode(w, images, f"norm.branches.{branch}", mode)
    return steps.through_head(w, "projector", h, f"norm.branches.{branch}", mode)


def nt_xent(z1, z2):
    """Every view of every image is an anchor; the image's other view is its positive. All but the anchor is
    in the denominator."""
    u = [z / z.norm() for z in torch.cat([z1, z2])]
    total = 0.0
    for i in range(len(u)):
        positive = (i + len(z1)) % len(u)
        denominator = sum((u[i] @ u[j] / TEMPERATURE).exp() for j in range(len(u)) if j != i)
        total = total - ((u[i] @ u[positive] / TEMPERATURE).exp() / denominator).log()
    return total / len(u)


def standard_to_standard(w, x1, x2):
    """SimCLR."""
    return nt_xent(*embed(w, torch.cat([x1, x2]), "clean", "train").chunk(2))


def adversarial_to_adversarial(w, x1, x2, noise, how):
    """Both views attacked, jointly; then they are one batch to BatchNorm."""
    def loss(a1, a2):
        return nt_xent(embed(w, a1, "adv", "eval"), embed(w, a2, "adv", "eval"))

    x1_adv, x2_adv = steps.attack(loss, [x1, x2], [noise[:, 0], noise[:, 1]], *how)
    return nt_xent(*embed(w, torch.cat([x1_adv, x2_adv]), "adv", "train").chunk(2))


def adversarial_to_standard(w, x1, x2, noise, how):
    """The first view attacked; each view by the branch of its kind, and with gradient."""
    def loss(a1):
        return nt_xent(embed(w, a1, "adv", "eval"), embed(w, x2, "clean", "eval"))

    (x1_adv,) = steps.attack(loss, [x1], [noise[:, 0]], *how)
    return nt_xent(embed(w, x1_adv, "adv", "train"), embed(w, x2, "clean", "train"))


def step_of_paper(variant, w, momentum, x1, x2, noise, lr, how):
    """One iteration; the dual stream, ds, trains the mean of two losses."""
    losses = {}
    if variant in ("a2a", "ds"):
        losses["loss_adv"] = adversarial_to_adversarial(w, x1, x2, noise, how)
    if variant == "a2s":
        losses["loss_adv_clean"] = adversarial_to_standard(w, x1, x2, noise, how)
    if variant in ("s2s", "ds"):
        losses["loss_clean"] = standard_to_standard(w, x1, x2)
    loss = sum(losses.values()) / len(losses)
    steps.lars(w, loss, momentum, lr, WEIGHT_DECAY, TRUST)
    return {"loss": loss, **losses}


# The comparison ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant, norm", [
    ("s2s", "linf"), ("a2a", "linf"), ("a2s", "linf"), ("ds", "linf"), ("a2s", "l2"), ("ds", "l2")])
@pytest.mark.parametrize("first", ["clean", "adv"])  # branch: what a BatchNorm is set to between steps
def test_two_steps_of_every_variant_are_those_of_the_paper(variant, norm, first):
    branches = {"clean": ("clean", "adv"), "adv": ("adv", "clean")}[first]
    net = steps.sequential(encoder=steps.encoder(48, 6, branches), projector=steps.head(6, 7, 5, branches))
    steps.scrambled(net, 1)
    opt = optim.LARS(net.parameters(), 0.0, momentum=0.9, weight_decay=WEIGHT_DECAY, trust=TRUST)
    w, momentum = steps.plain(net), {}

    for number, lr in enumerate([3.0, 2.0]):
        x1, x2 = steps.images((2, B, 3, 4, 4), 10 + number)
        noise = steps.noise((B, 2, 3, 4, 4), 20 + number)
        if norm == "l2":
            noise = steps.l2_noise(noise)
        inputs = [t.clone() for t in (x1, x2, noise)]
        steps.set_lr(opt, lr)
        found = step_of_script(variant, norm, net, opt, *inputs)
        wanted = step_of_paper(variant, w, momentum, x1, x2, noise, lr, HOW[norm])

        what = f"{variant}, {norm}, step {number}"
        steps.assert_same(found, wanted, f"{what}, losses")
        steps.assert_same(net.state_dict(), w, f"{what}, network")
        steps.assert_same(steps.momenta(net, opt), momentum, f"{what}, momentum")
        steps.assert_whole(net, first)
        assert all(torch.equal(a, b) for a, b in zip(inputs, (x1, x2, noise))), "inputs are not changed"


def test_a_run_hands_the_step_what_the_paper_starts_with(monkeypatch, tmp_path):
    seen = steps.first_step(acl, monkeypatch, tmp_path, "--weight-decay", "0.02", "--lr", "0.7",
                            "--warmup", "0")
    steps.assert_optimizer(seen["opt"], seen["net"], optim.LARS, momentum=0.9, weight_decay=0.02, trust=0.001,
                           clip=False)
    steps.assert_views(seen["x1"], seen["x2"])
    steps.assert_noise(seen["noise"], (16, 2, 3, 32, 32))
