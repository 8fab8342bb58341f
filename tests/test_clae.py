"""The mathematics of clae.py: slow float64 loops, and printed values."""
import json
import math

import pytest
import torch
from torch import nn

import acl
import clae
from common import data
from common.pgd import frozen_stats
from common.resnet import BranchNorm, branch
from tests.recipes import X
from tests.scripts import TINY, named, read_flags, tiny_npz

torch64 = dict(dtype=torch.float64)


def S(n, d, p):
    """sin(p + 1.3 i + .7 j + .31 i j), (n, d)."""
    i = torch.arange(n, **torch64)[:, None]
    j = torch.arange(d, **torch64)
    return torch.sin(p + 1.3 * i + 0.7 * j + 0.31 * i * j)


def slow_nt_xent(z1, z2, temperature):
    """One anchor at a time."""
    u = [row / row.norm() for row in (*z1, *z2)]
    total = 0.0
    for i in range(len(u)):
        partner = (i + len(z1)) % len(u)
        others = sum((torch.dot(u[i], u[k]) / temperature).exp() for k in range(len(u)) if k != i)
        total = total - ((torch.dot(u[i], u[partner]) / temperature).exp() / others).log()
    return total / len(u)


def slow_objective(z1, z2, z_adv, temperature, alpha):
    return slow_nt_xent(z1, z2, temperature) + alpha * slow_nt_xent(z1, z_adv, temperature)


@pytest.mark.parametrize("views, temperature, alpha, value, norms, first, last", [
    ((S(4, 6, 0), S(4, 6, 0.4), S(4, 6, 1.1)), 0.5, 1.0, 1.80961597, (0.741928337, 0.167685504, 0.51794598),
     -0.222732321, 0.0651357828),
    ((S(3, 6, 0), 2 * S(3, 6, 0.4), S(3, 6, 0.1)), 0.2, 0.3, 0.018745224, (0.0339800338, 0.0168597148, 0.00187098272),
     -0.000879909114, -0.000250729206)])
def test_the_objective_equals_slow_loops_and_the_printed_values(views, temperature, alpha, value, norms, first, last):
    for objective in (clae.objective, slow_objective):
        given = [view.clone().requires_grad_() for view in views]
        loss = objective(*given, temperature, alpha)
        gradients = torch.autograd.grad(loss, given)
        assert loss.item() == pytest.approx(value, rel=1e-8)
        assert [g.norm().item() for g in gradients] == pytest.approx(norms, rel=1e-8)
        assert gradients[0][0, 0].item() == pytest.approx(first, rel=1e-8)
        assert gradients[2][-1, 5].item() == pytest.approx(last, rel=1e-8)


def test_a_zero_alpha_is_simclr_and_one_image_alone_has_no_loss():
    z1, z2, z_adv = S(4, 6, 0), S(4, 6, 0.4), S(4, 6, 1.1)
    assert torch.equal(clae.objective(z1, z2, z_adv, 0.5, 0.0), clae.nt_xent(z1, z2, 0.5))
    assert torch.equal(clae.nt_xent(z1, z2, 0.5), acl.nt_xent(z1, z2, 0.5))  # whose values are asserted there
    assert torch.equal(clae.objective(z1, z2, None, 0.5, 0.0), clae.nt_xent(z1, z2, 0.5))
    assert clae.nt_xent(z1[:1], z2[:1], 0.5).item() == pytest.approx(0, abs=1e-12)
    same = torch.ones(6, 4, **torch64)
    assert clae.nt_xent(same, same, 0.5).item() == pytest.approx(math.log(11), rel=1e-12)


class Linear(nn.Module):
    """The network of the printed values: x -> W x."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(S(5, 48, 0.3))

    def forward(self, x):
        return x.flatten(1) @ self.W.T


images = X(4, 3, 4, 4)


@pytest.mark.parametrize("eps, temperature, alpha, flipped, moved, before_after, value, gradient", [
    (4, 0.5, 1.0, 3, (0.131772751, 2.8589034), (1.37934283, 1.46254543), 4.89584546,
     (2.22583144, -0.336333221, -0.0467106688)),
    (8, 0.2, 0.5, 2, (0.278341192, 5.55101243), (1.10618333, 1.33371846), 1.86642959,
     (1.31201348, 0.058854988, 0.00432139139))])
def test_the_attack_has_the_printed_values(eps, temperature, alpha, flipped, moved, before_after, value, gradient):
    net = Linear()
    x_adv = clae.attack(net, images, None, eps=eps / 255, temperature=temperature)
    d = (x_adv - images).flatten(1)
    assert [(d * S(4, 48, 2)).sum().item(), d.abs().sum().item()] == pytest.approx(moved, rel=1e-8)
    losses = [clae.nt_xent(net(images), net(x), temperature).item() for x in (images, x_adv)]
    assert losses == pytest.approx(before_after, rel=1e-8)
    loss = clae.objective(net(images), net(images.flip(flipped)), net(x_adv), temperature, alpha)
    (g,) = torch.autograd.grad(loss, net.W)
    assert loss.item() == pytest.approx(value, rel=1e-8)
    assert [g.norm().item(), g[0, 0].item(), g[4, 47].item()] == pytest.approx(gradient, rel=1e-8)


def test_the_attack_is_one_step_of_exactly_eps_from_the_image_itself():
    inside = 0.3 + 0.4 * images  # eps does not reach the box
    x_adv = clae.attack(Linear(), inside, None, eps=0.05, temperature=0.5)
    torch.testing.assert_close((x_adv - inside).abs(), torch.full_like(inside, 0.05))
    at_the_edge = clae.attack(Linear(), images.clamp(0, 1).round(), None, eps=0.05, temperature=0.5)
    assert 0 <= at_the_edge.min() and at_the_edge.max() <= 1
    assert torch.equal(clae.attack(Linear(), images, None, eps=0.0, temperature=0.5), images)
    alone = clae.attack(Linear(), images[:1], None, eps=0.05, temperature=0.5)
    assert torch.equal(alone, images[:1])  # no negatives, no direction


def test_random_directions_are_those_of_the_noise_and_of_equal_length():
    noise = S(4, 48, 1).view(images.shape)
    inside = 0.3 + 0.4 * images
    x_adv = clae.attack(Linear(), inside, noise, eps=0.05, temperature=0.5, random=True)
    torch.testing.assert_close(x_adv, inside + 0.05 * noise.sign())
    without = clae.attack(Linear(), inside, noise, eps=0.05, temperature=0.5)
    assert torch.equal(without, clae.attack(Linear(), inside, None, eps=0.05, temperature=0.5))  # noise is not read


def test_the_positive_has_no_gradient_at_the_image():
    """Its cosine is at its maximum there, so that the direction is that of the negatives alone."""
    x = images.clone().requires_grad_()
    net = Linear()
    z = net(images).detach()
    cosine = torch.cosine_similarity(z, net(x)).sum()
    (g,) = torch.autograd.grad(cosine, x)
    assert g.abs().max() < 1e-12


class Normalised(nn.Module):
    """Weights, then BatchNorm in branches."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, 6)
        self.norm = BranchNorm(6, ("clean", "adv"), nn.BatchNorm1d)

    def forward(self, x):
        return self.norm(self.linear(x.flatten(1)))


def normalised():
    torch.manual_seed(0)
    net = Normalised().double()
    with torch.no_grad():
        net.norm.branches["adv"].weight.copy_(torch.linspace(0.5, 2, 6))
        net.norm.branches["adv"].running_mean.fill_(3.0)
    return net


def test_the_attack_sees_branch_adv_with_batch_statistics_and_leaves_all_as_it_was():
    net = normalised()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x_adv = clae.attack(net, images, None, eps=0.05, temperature=0.5)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(w.grad is None for w in net.parameters())

    def loss_of(x, bn):
        with branch(net, bn), frozen_stats(net):
            return clae.nt_xent(net(images).detach(), net(x), 0.5)

    wanted = []
    for bn in ("adv", "clean"):
        x = images.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(x, bn), x)
        wanted.append((images + 0.05 * g.sign()).clamp(0, 1))
    assert torch.equal(x_adv, wanted[0]) and not torch.equal(x_adv, wanted[1])
    net.eval()
    assert not torch.equal(clae.attack(net, images, None, eps=0.05, temperature=0.5), x_adv)  # by running ones: another


def test_the_attacked_branch_has_the_momentum_of_the_authors_code():
    norms = [module for module in clae.network("slim").modules() if isinstance(module, BranchNorm)]
    assert norms and {norm.branches["adv"].momentum for norm in norms} == {0.01}
    assert {norm.branches["clean"].momentum for norm in norms} == {0.1}


@pytest.mark.parametrize("flags, wanted", [
    ([], dict(eps=4 / 255, temperature=0.5, random=False)),
    (["--eps", "8", "--temperature", "0.2", "--random"], dict(eps=8 / 255, temperature=0.2, random=True))])
def test_flags_reach_the_attack(flags, wanted):
    assert named(clae.attack, clae, *flags) == wanted


@pytest.mark.parametrize("flags, words", [
    (["--eps", "-1"], "--eps -1: must be a number from 0 to 255"),
    (["--temperature", "0"], "--temperature 0: must be a number above 0"),
    (["--alpha", "-1"], "--alpha -1: must be")])
def test_bad_flags_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(clae, *flags)


def test_the_rate_is_constant_or_falls_by_a_cosine():
    assert [clae.lr_at(epoch, 4, 3e-4, 3e-4) for epoch in range(4)] == pytest.approx([3e-4] * 4)
    assert [clae.lr_at(epoch, 4, 2.0, 1.0) for epoch in (0, 2)] == pytest.approx([2.0, 1.5])


@pytest.mark.parametrize("flags, share", [([], 1.0), (["--lr-final", "0"], 0.5), (["--lr-final", "1.6"], 1.3)])
def test_a_run_keeps_its_rate_unless_a_last_one_is_given_which_may_be_0(tmp_path, flags, share):
    """In the second of two epochs the cosine is half way."""
    images = tiny_npz(tmp_path / "images.npz", 16)
    clae.main([*TINY, "--data", images, "--out", str(tmp_path / "run"), "--lr", "1", *flags])
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["lr"] for line in lines] == pytest.approx([1.0, share])


def test_the_logged_gain_is_positive_for_the_attack_and_leaves_the_network_alone():
    torch.manual_seed(0)
    net = clae.network("slim")
    pixels = (255 * X(32, 3, 32, 32)).to(torch.uint8)
    loaded = data.Images(pixels, torch.zeros(32, dtype=torch.long), 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    args = read_flags(clae, "--eps", "8")
    gain = clae.gain(net, loaded, 32, args)
    assert gain > 0 and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    args.random = True
    assert clae.gain(net, loaded, 32, args) < gain
    args.eps = 0
    assert clae.gain(net, loaded, 32, args) == 0


def test_the_logged_gain_is_that_of_branch_adv_by_its_batch_statistics():
    """The view and its copy both go through it, in train mode."""
    torch.manual_seed(0)
    net = clae.network("slim")
    for module in net.modules():
        if isinstance(module, BranchNorm):
            nn.init.uniform_(module.branches["adv"].weight, 0.5, 2)
            nn.init.uniform_(module.branches["adv"].bias, -0.5, 0.5)
    pixels = (255 * X(70, 3, 32, 32)).to(torch.uint8)
    loaded = data.Images(pixels, torch.zeros(70, dtype=torch.long), 2)
    args = read_flags(clae, "--eps", "8", "--temperature", "0.3")
    x, _, rng = next(data.batches(loaded, 64, args.seed, 0))
    x1 = clae.augment(x, rng, 32)
    x1_adv = clae.attack(net, x1, None, eps=8 / 255, temperature=0.3)
    with torch.no_grad(), branch(net, "adv"), frozen_stats(net):
        z = net(x1)
        wanted = slow_nt_xent(z, net(x1_adv), 0.3) - slow_nt_xent(z, z, 0.3)
    assert wanted > 0.01 and clae.gain(net, loaded, 32, args) == pytest.approx(wanted.item(), abs=1e-4)
