"""Whole steps of clae.py against the authors' algorithm: two in a row, and all that they leave behind, by an
oracle."""
import pytest
import torch
from torch import nn

import clae
from tests import steps
from tests.scripts import named

B = 4  # images a step
EPS = 40 / 255
TEMPERATURE, ALPHA = 0.4, 0.7
FLAGS = ["--eps", "40", "--temperature", "0.4", "--alpha", "0.7"]


# The oracle -------------------------------------------------------------------------------------------------
def embed(w, images, branch, mode):
    """z of one batch by a BatchNorm branch, "clean" or "adv"."""
    h = steps.encode(w, images, f"norm.branches.{branch}", mode)
    return steps.linear(w, "projector", h)


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


def attacked(w, x, noise, random):
    """One signed step from the image itself; batch statistics, which move nothing."""
    if random:
        direction = noise.sign()
    else:
        z = embed(w, x, "adv", "frozen").detach()
        copy = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nt_xent(z, embed(w, copy, "adv", "frozen")), copy)
        direction = gradient.sign()
    moved = x + EPS * direction
    clipped = moved.clamp(0, 1)
    assert not torch.equal(moved, clipped) and (moved == clipped).any()  # for the test: some are, not all
    return clipped


def adam(w, loss, memory, lr):
    """Adam without decay, betas 0.9 and 0.999."""
    names = steps.parameters(w)
    gradients = torch.autograd.grad(loss, [w[name] for name in names])
    memory["step"] = memory.get("step", 0) + 1
    for name, gradient in zip(names, gradients):
        mean, square = memory.get(name, (0.0, 0.0))
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient * gradient
        memory[name] = mean, square
        mean = mean / (1 - 0.9 ** memory["step"])
        square = square / (1 - 0.999 ** memory["step"])
        w[name] = (w[name].detach() - lr * mean / (square.sqrt() + 1e-8)).requires_grad_()


def step_of_paper(w, memory, x1, x2, noise, lr, random):
    x1_adv = attacked(w, x1, noise, random)
    z1, z2 = embed(w, torch.cat([x1, x2]), "clean", "train").chunk(2)
    z_adv = embed(w, x1_adv, "adv", "train")
    losses = {"loss_clean": nt_xent(z1, z2), "loss_adv": nt_xent(z1, z_adv)}
    losses["loss"] = losses["loss_clean"] + ALPHA * losses["loss_adv"]
    adam(w, losses["loss"], memory, lr)
    return losses


# The comparison ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("first", ["clean", "adv"])  # branch: what a BatchNorm is set to between steps
def test_two_steps_are_those_of_the_authors_algorithm(random, first):
    branches = {"clean": ("clean", "adv"), "adv": ("adv", "clean")}[first]
    net = steps.sequential(encoder=steps.encoder(48, 6, branches), projector=nn.Linear(6, 5))
    steps.scrambled(net, 1)
    opt = torch.optim.Adam(net.parameters(), 0.0)
    w, memory = steps.plain(net), {}
    settings = named(clae.train_step, clae, *FLAGS, *(["--random"] if random else []))

    for number, lr in enumerate([0.03, 0.02]):
        x1, x2 = steps.images((2, B, 3, 4, 4), 10 + number)
        noise = steps.noise((B, 3, 4, 4), 20 + number) if random else None
        inputs = [x1.clone(), x2.clone(), noise if noise is None else noise.clone()]
        steps.set_lr(opt, lr)
        found = clae.train_step(net, opt, *inputs, **settings)
        wanted = step_of_paper(w, memory, x1, x2, noise, lr, random)

        what = f"random {random}, step {number}"
        steps.assert_same(found, wanted, f"{what}, losses")
        steps.assert_same(net.state_dict(), w, f"{what}, network")
        steps.assert_whole(net, first)
        assert torch.equal(inputs[0], x1) and torch.equal(inputs[1], x2), "inputs are not changed"


def test_without_alpha_a_step_is_simclrs_and_branch_adv_stays_as_it_is():
    net = steps.sequential(encoder=steps.encoder(48, 6, ("clean", "adv")), projector=nn.Linear(6, 5))
    steps.scrambled(net, 1)
    opt = torch.optim.Adam(net.parameters(), 0.03)
    w, memory = steps.plain(net), {}
    x1, x2 = steps.images((2, B, 3, 4, 4), 10)
    z1, z2 = embed(w, torch.cat([x1, x2]), "clean", "train").chunk(2)
    wanted = nt_xent(z1, z2)
    names = [name for name in steps.parameters(w) if "branches.adv" not in name]
    gradients = torch.autograd.grad(wanted, [w[name] for name in names])
    for name, gradient in zip(names, gradients):  # the first step of Adam, whose memory is empty
        w[name] = w[name].detach() - 0.03 * gradient / (gradient.abs() + 1e-8)
    settings = named(clae.train_step, clae, *FLAGS[:-1], "0")
    found = clae.train_step(net, opt, x1, x2, None, **settings)
    steps.assert_same(found, {"loss": wanted}, "losses")
    steps.assert_same(net.state_dict(), w, "network")


def test_a_run_hands_the_step_what_the_method_starts_with(monkeypatch, tmp_path):
    seen = steps.first_step(clae, monkeypatch, tmp_path, "--lr", "0.7")
    steps.assert_optimizer(seen["opt"], seen["net"], torch.optim.Adam, lr=0.7, betas=(0.9, 0.999), eps=1e-8,
                           weight_decay=0, amsgrad=False)
    steps.assert_views(seen["x1"], seen["x2"])
    assert seen["noise"] is None
    assert [type(layer) for layer in seen["net"][1]] == [nn.Linear, nn.ReLU, nn.Linear]
    assert seen["net"][1][2].out_features == 64


def test_a_run_with_random_directions_hands_them_over(monkeypatch, tmp_path):
    seen = steps.first_step(clae, monkeypatch, tmp_path, "--random")
    steps.assert_noise(seen["noise"], (16, 3, 32, 32))
