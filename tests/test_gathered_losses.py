"""Losses over in-batch negatives: a real train_step on two processes is that on one, loss and gradient."""
import pytest
import torch
from torch import nn

import acl
import advcl
import clae
import hardneg
import rocl
import unified
from common.vit import ViT
from tests import steps2 as plain
from tests.processes import in_two_processes
from tests.recipes import X, Z
from tests.scripts import named


def linear(n, d):
    layer = nn.Linear(d, n, bias=False, dtype=torch.float64)
    layer.weight.data = 0.1 * Z(n, d)
    return layer


def gradients(script, flags, rank, world):
    """Losses and the weights' gradient of one step on this process's share of eight images, unattacked: within an
    attack negatives are the process's own."""
    settings = {"eps": 0.0}
    x = X(8, 3, 4, 4).chunk(world)[rank]
    views, noise = [x.flip(3), x.flip(2)], torch.zeros(2, *x.shape, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), linear(6, 48))
    if script is advcl:
        net = nn.ModuleDict({"encoder": nn.Flatten(), "projector": linear(6, 48), "classifier": linear(5, 48)})
        settings |= {"cutoff": 2.0, "clusters": [2, 3]}
        labels = torch.stack([torch.arange(8) % k for k in (2, 3)], 1).chunk(world)[rank]
        views += [x, labels]
    opt = torch.optim.SGD(net.parameters(), 0.0)
    if script is rocl:
        noise = noise[0]
    if script is clae:
        noise = None
    if script is acl:
        noise = noise.transpose(0, 1)
    losses = script.train_step(net, opt, *views, noise, **named(script.train_step, script, *flags, **settings))
    return {k: v.detach() for k, v in losses.items()}, [p.grad for p in net.parameters()]


def hard_gradients(negatives, rank, world):
    """The same of hardneg.py on SimCLR, whose negatives are those of all processes."""
    x = X(8, 3, 4, 4).chunk(world)[rank]
    net = nn.Sequential(nn.Flatten(), linear(6, 48))
    opt = torch.optim.SGD(net.parameters(), 0.0)
    args = hardneg.parser().parse_args(["--base", "simclr", "--negatives", negatives])
    losses = hardneg.train_step(net, None, opt, None, x.flip(3), x.flip(2), torch.arange(len(x)).flip(0), None,
                                ema=0.5, hardest_rows=1, **hardneg.loss_settings(args))
    return {k: v.detach() for k, v in losses.items()}, [p.grad for p in net.parameters()]


HARD = ("plain", "ifm", "hcl", "debiased")


CASES = [(rocl, []), (acl, []), (advcl, []), (clae, []), (rocl, ["--asymmetry", "0.3"]),
         (rocl, ["--asymmetry", "0.3", "--hard"])]


def unified_gradients(rank, world):
    """The same of unified.py, on a ViT of one block."""
    encoder = ViT("toy", 2, 8, 1, 2, 6, plain.MEAN, plain.STD, "sincos", False, False)
    net = plain.randomised(unified.Unified(encoder, (12, 1, 2)), 1)
    x, u = (given.chunk(world)[rank] for given in (X(8, 3, 6, 6), 0.5 + 0.5 * Z(8, 9)))
    settings = named(unified.train_step, unified, "--arch", "vit_slim", "--eps", "0")
    losses = unified.train_step(net, torch.optim.SGD(net.parameters(), 0.0), x, x.flip(3), u, None, **settings)
    return {k: v.detach() for k, v in losses.items()}, [p.grad for p in net.parameters() if p.requires_grad]


def all_gradients(rank, world):
    of_scripts = [gradients(*case, rank, world) for case in CASES]
    hard = [hard_gradients(negatives, rank, world) for negatives in HARD]
    return [*of_scripts, *hard, unified_gradients(rank, world)]


@pytest.mark.parametrize("negatives", HARD)
def test_hard_negatives_of_two_processes_are_those_of_one(negatives, two):
    losses, grads = hard_gradients(negatives, 0, 1)
    for found_losses, found_grads in (part[len(CASES) + HARD.index(negatives)] for part in two):
        for a, b in zip(found_grads, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        for name in losses:
            torch.testing.assert_close(found_losses[name], losses[name], rtol=1e-12, atol=1e-12)


def test_the_unified_loss_of_two_processes_is_that_of_one(two):
    """Negatives are those of all; the reconstruction loss is a mean over processes."""
    losses, grads = unified_gradients(0, 1)
    for part in two:
        for a, b in zip(part[-1][1], grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(part[-1][0]["loss_con"], losses["loss_con"], rtol=1e-12, atol=1e-12)
    for name in losses:
        mean = (two[0][-1][0][name] + two[1][-1][0][name]) / 2
        torch.testing.assert_close(mean, losses[name], rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return in_two_processes(all_gradients, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("i, script, flags", [(i, *case) for i, case in enumerate(CASES)])
def test_two_processes_equal_one_in_loss_and_gradient(i, script, flags, two):
    losses, grads = gradients(script, flags, 0, 1)
    for rank in range(2):
        for a, b in zip(two[rank][i][1], grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        for name in losses:
            mean = (two[0][i][0][name] + two[1][i][0][name]) / 2  # as the log does
            torch.testing.assert_close(mean, losses[name], rtol=1e-12, atol=1e-12)
            if name != "loss_ce" and name != "loss":
                torch.testing.assert_close(two[rank][i][0][name], losses[name], rtol=1e-12, atol=1e-12)
