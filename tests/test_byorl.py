"""The mathematics of byorl.py against the paper read aloud: slow float64 loops, and printed values (eight digits)."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import byorl
from common import data, shapes
from common.pgd import frozen_stats, pgd
from tests.recipes import A, X, Z
from tests.scripts import read_flags

P = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
ZT = torch.tensor([[1, 0.5], [-0.5, 1], [0.2, 1]], dtype=torch.float64)


def fill(shape, g):
    """Element k, in row-major order, is g(k)."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return g(k).view(shape)


def slow_byol_loss(p, z):
    total = 0.0
    for a, b in zip(p, z):
        total = total + 2 - 2 * torch.dot(a, b) / (torch.dot(a, a).sqrt() * torch.dot(b, b).sqrt())
    return total / len(p)


@pytest.mark.parametrize("p, z, value", [(P, ZT, 0.25273022), (A(8, 16, 0), Z(8, 16), None)])
def test_the_loss_and_its_gradient_equal_slow_loops_and_the_printed_value(p, z, value):
    found = []
    for loss_of in (byorl.byol_loss, slow_byol_loss):
        x = p.clone().requires_grad_()
        loss = loss_of(x, z)
        found.append([loss, *torch.autograd.grad(loss, x)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    loss, g = found[0]
    torch.testing.assert_close((g * p).sum(1), p.new_zeros(len(p)), rtol=0, atol=1e-12)
    if value:
        assert loss.item() == pytest.approx(value, abs=5e-9)
        want = P.new_tensor([[0, -0.29814240], [0.29814240, 0], [0.18490007, -0.18490007]])
        torch.testing.assert_close(g, want, rtol=0, atol=1e-8)


def test_closed_forms_of_the_loss():
    z = Z(6, 8)
    swapped = torch.stack([-z[:, 1::2], z[:, ::2]], 2).flatten(1)  # orthogonal to z
    cases = {"same": (z, 0), "opposite": (-z, 4), "orthogonal": (swapped, 2), "zero": (0 * z, 2)}
    for name, (p, value) in cases.items():
        assert byorl.byol_loss(p, z).item() == pytest.approx(value, abs=1e-12), name
    value = byorl.byol_loss(A(6, 8, 0), z)
    assert byorl.byol_loss(3 * A(6, 8, 0), z / 7).item() == pytest.approx(value.item(), rel=1e-12)


class Toy(nn.Module):
    """v -> B tanh(A v), the network of the printed values."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(fill((3, 4), lambda k: (0.5 * k + 0.3).sin()))
        self.B = nn.Parameter(fill((2, 3), lambda k: (0.7 * k).cos()))

    def forward(self, v):
        return (v.flatten(1) @ self.A.T).tanh() @ self.B.T


v = fill((2, 1, 2, 2), lambda k: 0.2 + 0.05 * k)
zt = fill((2, 2), lambda k: (1.3 * k + 0.4).sin())


def arguments(**flags):
    return SimpleNamespace(**{**vars(byorl.parser().parse_args([])), **flags})


def attack(net, x, z, noise, args):
    return byorl.attack(net, x, z, noise, **byorl.attack_settings(args))


L2 = dict(norm="l2", eps=128.0, step_size=32.0)


@pytest.mark.parametrize("flags, losses, delta", [
    ({"step_size": 2.0}, (1.50503619, 1.53346200, 1.56211985, 1.59096372, 1.61994658, 1.61994658), None),
    (L2, (1.50503619, 1.76310405, 2.00995883, 2.22095081, 2.38673428, 2.38683399),
     [[0.36205112, 0.16237342, -0.07705896, -0.29762461], [-0.35936217, -0.15806414, 0.08193351, 0.30187098]])])
def test_attack_equals_printed_values(flags, losses, delta):
    net, zero = Toy(), torch.zeros(2, 4, dtype=torch.float64)
    for steps, want in enumerate(losses):
        x_adv = attack(net, v, zt, zero, arguments(steps=steps, **flags))
        assert slow_byol_loss(net(x_adv), zt).item() == pytest.approx(want, abs=5e-9)
    x = v.clone().requires_grad_()
    (g,) = torch.autograd.grad(slow_byol_loss(net(x), zt), x)
    printed = [[0.58439904, 0.26334532, -0.12218451, -0.47779931],
               [-0.87142328, -0.39230445, 0.18286420, 0.71326132]]
    torch.testing.assert_close(g.flatten(1), v.new_tensor(printed), rtol=0, atol=1e-8)
    want = v.new_tensor(delta) if delta else 8 / 255 * g.sign().flatten(1)
    torch.testing.assert_close((x_adv - v).flatten(1), want, rtol=0, atol=1e-8)


def matrices():
    """Encoder, projector and predictor as plain matrices."""
    parts = [nn.Linear(n, m, bias=False).double() for n, m in ((48, 8), (8, 6), (6, 6))]
    for i, part in enumerate(parts):
        part.weight.data = A(*part.weight.shape, i)
    return nn.Sequential(nn.Sequential(nn.Flatten(), parts[0]), *parts[1:])


x1 = X(4, 3, 4, 4)
x2 = x1.flip(3)
noise = A(4, 96, 6).view(4, 2, 48)


@pytest.mark.parametrize("flags", [{}, L2, {"eps": 0.0}])
def test_train_step_is_algorithm_read_aloud(flags):
    args, net = arguments(**flags), matrices()
    target = copy.deepcopy(net[:2]).requires_grad_(False)
    with torch.no_grad():
        target[1].weight.mul_(0.5).add_(0.1)
    slow, old = copy.deepcopy(net), copy.deepcopy(target)
    losses = byorl.train_step(net, target, torch.optim.SGD(net.parameters(), 0.1), x1, x2, noise,
                              tau=0.9, **byorl.attack_settings(args))
    loss, step_size = losses["loss"], args.step_size or 1.25 * args.eps / args.steps

    z1, z2 = old(x1), old(x2)
    best = []  # a constant prediction does best along the mean of the unit targets
    for z in (z1, z2):
        mean = sum(row / row.norm() for row in z)
        best.append(slow_byol_loss(mean.expand_as(z), z))
    assert losses["constant_loss"].item() == pytest.approx(sum(best).item(), rel=1e-9)
    terms = []
    for x, z, u in ((x1, z2, noise[:, 0]), (x2, z1, noise[:, 1])):
        eps = args.eps / 255
        x_adv = (x + eps * u.view_as(x)).clamp(0, 1)
        for _ in range(args.steps):
            y = x_adv.clone().requires_grad_()
            (g,) = torch.autograd.grad(slow_byol_loss(slow(y), z), y)
            moved = []
            for a, b, c in zip(x_adv, g, x):
                if args.norm == "linf":
                    d = (a + step_size / 255 * b.sign() - c).clamp(-eps, eps)
                else:
                    d = a + step_size / 255 * b / b.norm() - c
                    d = d * min(1, eps / d.norm().item())
                moved.append((c + d).clamp(0, 1))
            x_adv = torch.stack(moved)
        terms.append(slow_byol_loss(slow(x_adv), z))
    sum(terms).backward()
    assert loss.item() == pytest.approx(sum(terms).item(), rel=1e-9)
    for new, w in zip(net.parameters(), slow.parameters()):
        torch.testing.assert_close(new.grad, w.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(new, w - 0.1 * w.grad, rtol=1e-9, atol=1e-12)
    for xi, was, theta in zip(target.parameters(), old.parameters(), net.parameters()):
        torch.testing.assert_close(xi, was + 0.1 * (theta - was), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("progress, tau", [
    (0, 0.996), (0.1, 0.99609789), (0.25, 0.99658579), (0.5, 0.998), (0.75, 0.99941421), (1, 1)])
def test_tau_equals_printed_values(progress, tau):
    assert byorl.tau_at(1000 * progress, 1000, 0.996) == pytest.approx(tau, abs=5e-9)


def test_learning_rate_warms_up_by_step_and_ends_at_zero():
    values = [byorl.lr_at(s, 2000, 2.0, 100) for s in (0, 50, 100, 1050, 2000)]
    assert values == pytest.approx([0, 1, 2, 1, 0])
    assert byorl.lr_at(0, 10, 2.0, 0) == 2


def test_starts_are_uniform_in_the_ball():
    u = torch.rand(4000, 2, 4, generator=torch.Generator().manual_seed(0))
    u[0, 0, 1] = 0  # erfinv(-1) is not finite
    assert torch.equal(byorl.ball_point(u, "linf"), 2 * u[..., 1:] - 1)
    ball = byorl.ball_point(u, "l2").flatten(0, 1)
    length = ball.norm(dim=1)
    assert ball.isfinite().all() and length.max() <= 1 + 1e-6
    assert (length < 0.5).float().mean().item() == pytest.approx(0.5**3, abs=0.02)
    assert ball.mean(0).abs().max() < 0.02 and torch.corrcoef(ball.T).fill_diagonal_(0).abs().max() < 0.03


def real():
    torch.manual_seed(0)
    net = byorl.network("slim", 64)
    target = copy.deepcopy(net[:2]).requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    x1, x2 = torch.rand(2, 8, 3, 32, 32, generator=g)
    return net, target, x1, x2, torch.rand(8, 2, 1 + 3072, generator=g)


@pytest.mark.parametrize("flags, largest", [({}, 8 / 255), (L2, None), (dict(eps=0.0), None)])
def test_pictures_show_an_attack_where_there_is_one_at_full_scale(flags, largest):
    """In linf white is an addition of eps, in l2 that of the largest change."""
    net, target, *_ = real()
    x, y, _ = shapes.shapes(4, seed=0)
    args = arguments(**{"steps": 1, "random_start": False, "seed": 0, **flags, "step_size": 2.0})  # within eps
    rows = dict(byorl.pictures(net, target, data.Images(x, y, 10), 32, args))
    views = ["x1", "x2"]
    assert list(rows) == (views + [name for view in views for name in (f"{view}_adv", f"{view}_adv - {view}")] if args.eps else views)
    for view in views if args.eps else []:
        change = rows[f"{view}_adv"] - rows[view]
        full_scale = change.abs().max() if largest is None else largest
        torch.testing.assert_close(rows[f"{view}_adv - {view}"], 0.5 + change / (2 * full_scale))


@pytest.mark.parametrize("flags", [{}, L2])
def test_the_attack_climbs_stays_in_ball_and_box_and_leaves_no_trace(flags):
    net, target, x1, x2, u = real()
    args = arguments(**flags)
    noise, before = byorl.ball_point(u, args.norm)[:, 0], copy.deepcopy(net.state_dict())
    z = byorl.embed(target, x2)
    x_adv = attack(net, x1, z, noise, args)
    assert all(torch.equal(value, before[k]) for k, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and all(m.training for m in net.modules())
    with frozen_stats(net):
        start = (x1 + args.eps / 255 * noise.view_as(x1)).clamp(0, 1)
        losses = [byorl.byol_loss(byorl.embed(net, x), z) for x in (x1, start, x_adv)]
    assert losses[2] > max(losses[:2])
    length = (x_adv - x1).flatten(1).norm(float("inf") if args.norm == "linf" else 2, dim=1)
    assert length.max() <= args.eps / 255 + 1e-5 and 0 <= x_adv.min() and x_adv.max() <= 1
    assert torch.equal(attack(net, x1, z, noise, arguments(eps=0.0)), x1)


def test_the_target_computed_once_changes_no_bit():
    net, target, x1, x2, u = real()
    noise, args = byorl.ball_point(u, "linf")[:, 0], arguments()

    def again(x):
        return byorl.byol_loss(byorl.embed(net, x), byorl.embed(target, x2))

    start = (x1 + 8 / 255 * noise.view_as(x1)).clamp(0, 1)
    with frozen_stats(net):
        want = pgd(again, x1, 8 / 255, 2 / 255, 5, start=start)
    assert torch.equal(attack(net, x1, byorl.embed(target, x2), noise, args), want)


def test_a_step_moves_the_running_statistics_once_a_view():
    net, target, x1, x2, u = real()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    byorl.train_step(net, target, opt, x1, x2, byorl.ball_point(u, "linf"),
                     tau=0.99, **byorl.attack_settings(arguments()))
    counts = {m.num_batches_tracked.item() for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert counts == {2} and net[0].bn1.running_mean.abs().sum() > 0


def test_network_sizes_and_heads():
    net = byorl.network("resnet18", 4096)
    d, h = 512, 4096
    assert [sum(p.numel() for p in part.parameters()) for part in net] == [
        11_168_832, d * h + 3 * h + h * 256 + 256, 256 * h + 3 * h + h * 256 + 256]


def test_defaults_are_the_papers_but_for_the_named_departures():
    want = dict(epochs=200, batch_size=512, lr=2.0, warmup=10, weight_decay=5e-4, ema=0.996, hidden=4096,
                norm="linf", eps=8, step_size=None, steps=5, arch="resnet18", data="cifar10")
    args = vars(byorl.parser().parse_args([]))
    assert {k: args[k] for k in want} == want


@pytest.mark.parametrize("flags, words", [
    (["--norm", "l1"], "--norm l1: choose one of linf, l2"), (["--ema", "1.5"], "--ema 1.5: must be a number from 0 to 1"),
    (["--eps", "-8"], "--eps -8: must be"), (["--steps", "-1"], "--steps -1"),
    (["--hidden", "0"], "--hidden 0: must be")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(byorl, *flags)


def test_a_collapsed_run_stops_with_a_clear_line(tmp_path, monkeypatch):
    def collapse(net, *_, **__):
        with torch.no_grad():
            net[1][-1].weight.zero_(), net[1][-1].bias.fill_(1)
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(byorl, "train_step", collapse)
    flags = ["--data", "shapes", "--limit", "32", "--arch", "slim", "--hidden", "16", "--batch-size", "32", "--warmup", "0"]
    with pytest.raises(ValueError, match="embeddings have collapsed: their deviation is 0 of at most 1"):
        byorl.main([*flags, "--epochs", "1", "--device", "cpu", "--out", str(tmp_path)])
    assert not (tmp_path / "last.pt").exists()
