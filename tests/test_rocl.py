"""The mathematics of rocl.py against the paper read aloud: slow float64 loops, and printed values."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rocl
from common import data
from common.pgd import eval_mode, pgd
from tests.recipes import A, X, Z, unit
from tests.scripts import named, read_flags


def slow_nt_xent(views, T):
    """One anchor and one positive at a time."""
    z = [(view, image, unit(row[None])[0]) for view, rows in enumerate(views) for image, row in enumerate(rows)]
    total = 0.0
    for a, (view, image, u) in enumerate(z):
        others = sum(torch.exp(torch.dot(u, w) / T) for k, (_, _, w) in enumerate(z) if k != a)
        for other_view, other_image, w in z:
            if other_image == image and other_view != view:
                total = total - torch.log(torch.exp(torch.dot(u, w) / T) / others)
    return total / len(z)


HALVES, THIRDS, ODD = A(8, 8, 0).chunk(2), A(12, 8, 0).chunk(3), Z(9, 6).chunk(3)


@pytest.mark.parametrize("views, value, norm, entries", [
    (HALVES, 4.255083800077276, 0.2471084263370869,
     {(0, 0, 0): 0.01475873779324956, (1, 3, 7): -0.01613713512485137}),
    (THIRDS, 7.6114567559608, 0.1486210838381158, {(0, 0, 0): -0.03874814232922086}),
    (ODD, 6.81914021043061, 0.3882906695645846,
     {(0, 0, 1): 0.05603092008681469, (2, 2, 5): 0.1982399782738254})])
def test_nt_xent_equals_slow_loops_and_the_printed_value_and_gradient(views, value, norm, entries):
    grads = []
    for loss_of in (rocl.nt_xent, slow_nt_xent):
        inputs = [v.clone().requires_grad_() for v in views]
        loss = loss_of(inputs, 0.5)
        assert loss.item() == pytest.approx(value, rel=1e-9)
        grads.append(torch.stack(torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    assert grads[0].norm().item() == pytest.approx(norm, rel=1e-9)
    for at, want in entries.items():
        assert grads[0][at].item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("V, value", [(3, 14.672571320042595), (2, 6.930494765951626)])
def test_equal_rows_give_the_chance_value(V, value):
    row = torch.ones(512, 4, dtype=torch.float64)
    assert rocl.nt_xent([row] * V, 0.5).item() == pytest.approx(value, rel=1e-12)
    assert value == pytest.approx((V - 1) * math.log(V * 512 - 1), rel=1e-12)


def test_the_loss_is_symmetric_in_the_views_and_blind_to_lengths():
    value = rocl.nt_xent(THIRDS, 0.5)
    assert rocl.nt_xent(THIRDS[::-1], 0.5).item() == pytest.approx(value.item(), rel=1e-12)
    assert rocl.nt_xent([7 * v for v in THIRDS], 0.5).item() == pytest.approx(value.item(), rel=1e-12)


def test_the_loss_is_finite_at_any_temperature_in_float32():
    views = [v.float().requires_grad_() for v in THIRDS]
    loss = rocl.nt_xent(views, 0.001)
    loss.backward()
    assert loss.isfinite() and all(v.grad.isfinite().all() for v in views)


def S(n, d, p):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(p + 1.3 * i + 0.7 * j + 0.31 * i * j)


def slow_asymmetric_loss(views, T, a, weight=1.0, hard=False, beta=1.0, tau=0.12):
    """One anchor and one positive at a time; the second factor of every similarity is a constant."""
    clean, attacked, B = (0, 1), 2, len(views[0])
    z = {(view, image): unit(row[None])[0] for view, rows in enumerate(views) for image, row in enumerate(rows)}

    def e(i, k):
        return torch.exp(torch.dot(z[i], z[k].detach()) / T)

    def term(i, j):
        view, image = i
        denominator = sum(e(i, k) for k in z if k != i)
        if hard:
            n = [e(i, k) for k in z if k[1] != image]
            p = sum(e(i, (other, image)) for other in range(3) if other != view) / 2
            R = sum(v ** (1 + beta) for v in n) / (sum(v**beta for v in n) / len(n))
            G = (R - tau * len(n) * p) / (1 - tau)
            denominator = p + max(G, torch.tensor(len(n) * math.exp(-1 / T), dtype=torch.float64))
        return -torch.log(e(i, j) / denominator)

    total = 0.0
    for image in range(B):
        for view in clean:
            total = total + term((view, image), (1 - view, image))
            total = total + weight * a * term((view, image), (attacked, image))
            total = total + weight * (1 - a) * term((attacked, image), (view, image))
    return total / (3 * B)


S_VIEWS = S(4, 5, 0), S(4, 5, 0.4), S(4, 5, 1.1)


@pytest.mark.parametrize("settings, value, norm, entries", [
    (dict(T=0.5, a=0.2), 1.71674288, 0.261968815, (-0.0348769278, 0.0150280183, 0.00897653119)),
    (dict(T=0.5, a=0.2, hard=True), 1.54676782, 0.673611072, (-0.118205843, -0.0539622643, 0.0199341592)),
    (dict(T=0.2, a=0.3, weight=1.2), 1.46036108, 0.528921209, (-0.0506847723, 0.000819200041, 0.0128172055)),
    (dict(T=0.3, a=0.5, weight=0.7, hard=True, beta=0.5, tau=0.05), 0.773398738, 0.600218582,
     (-0.148873489, -0.0491407089, 0.0101462545)),
    (dict(T=0.5, a=0.5, weight=2.0), 2.79133029, 0.379383705, (-0.0800759485, -0.0134923016, 0.011220664)),
    (dict(T=0.5, a=0.9, hard=True, tau=0.4), None, None, None)])  # eight of twelve anchors on the floor
def test_the_asymmetric_loss_equals_slow_loops_and_the_printed_values_and_gradients(settings, value, norm, entries):
    grads, losses = [], []
    for loss_of in (rocl.asymmetric_loss, slow_asymmetric_loss):
        inputs = [v.clone().requires_grad_() for v in S_VIEWS]
        T, a, *_ = settings.values()
        others = {name: value for name, value in settings.items() if name not in ("T", "a")}
        losses.append(loss_of(inputs, T, a, **others))
        grads.append(torch.stack(torch.autograd.grad(losses[-1], inputs)))
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    if value:
        assert losses[0].item() == pytest.approx(value, abs=1e-8)
        assert grads[0].norm().item() == pytest.approx(norm, abs=1e-8)
        found = [grads[0][at].item() for at in ((0, 0, 0), (1, 2, 3), (2, 3, 4))]
        assert found == pytest.approx(entries, abs=1e-8)


def test_at_half_and_weight_two_the_asymmetric_loss_is_rocls_in_value_but_not_in_gradient():
    found, wanted = [], []
    for loss_of, into in ((rocl.nt_xent, wanted), (rocl.asymmetric_loss, found)):
        inputs = [v.clone().requires_grad_() for v in S_VIEWS]
        loss = loss_of(inputs, 0.5) if into is wanted else loss_of(inputs, 0.5, 0.5, 2.0)
        into += [loss.item(), torch.stack(torch.autograd.grad(loss, inputs))]
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    assert (found[1] - wanted[1]).norm() > 0.1 * wanted[1].norm()


def test_hard_negatives_without_their_weights_and_their_correction_are_all_negatives_alike():
    """beta 0 and tau 0: the denominator is the mean of the two positives plus the negatives' sum."""
    found = rocl.asymmetric_loss(S_VIEWS, 0.5, 0.2, hard=True, beta=0.0, tau=0.0).item()
    plain = rocl.asymmetric_loss(S_VIEWS, 0.5, 0.2).item()
    u = [unit(v) for v in S_VIEWS]
    correction = 0.0
    for a in range(3):
        for b in range(3):
            if a != b:
                share = {(0, 1): 1.0, (1, 0): 1.0}.get((a, b), 0.2 if b == 2 else 0.8)
                third = 3 - a - b
                for i in range(4):
                    p = [torch.exp(u[a][i] @ u[k][i] / 0.5) for k in (b, third)]
                    n = sum(torch.exp(u[a][i] @ u[k][j] / 0.5) for k in range(3) for j in range(4) if j != i)
                    correction += share * (torch.log(sum(p) / 2 + n) - torch.log(sum(p) + n)).item()
    assert found == pytest.approx(plain + correction / 12, rel=1e-12)


@pytest.mark.parametrize("hard, inner", [(False, 3 * 512 - 1), (True, 3 * 512 - 2)])
def test_equal_rows_give_the_asymmetric_losses_chance_which_the_run_prints(hard, inner):
    row = torch.ones(512, 4, dtype=torch.float64)
    found = rocl.asymmetric_loss([row] * 3, 0.5, 0.2, hard=hard).item()
    assert found == pytest.approx(4 / 3 * math.log(inner), rel=1e-9)
    flags = ["--asymmetry", "0.2", *(["--hard"] if hard else [])]
    assert rocl.chance(read_flags(rocl, *flags))[1] == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("hard", [False, True])
def test_the_asymmetric_loss_is_finite_at_any_temperature_in_float32(hard):
    views = [v.float().requires_grad_() for v in S_VIEWS]
    loss = rocl.asymmetric_loss(views, 0.001, 0.2, hard=hard)
    loss.backward()
    assert loss.isfinite() and all(v.grad.isfinite().all() for v in views)


def test_a_radius_in_l2_may_be_larger_than_the_range_of_a_pixel():
    assert rocl.attack_settings(read_flags(rocl, "--norm", "l2", "--eps", "510"))["eps"] == 2


def test_hard_negatives_go_with_an_asymmetry():
    with pytest.raises(ValueError, match="^--hard: goes with --asymmetry"):
        read_flags(rocl, "--hard")


class Linear(nn.Module):
    """The network of the printed values: x -> W x."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(Z(6, 48))

    def forward(self, x):
        return x.flatten(1) @ self.W.T


x1 = X(4, 3, 4, 4)
x2 = x1.flip(3)
noise = A(4, 48, 6).view(4, 3, 4, 4)


def attack(net, x1, x2, noise, **settings):
    return rocl.attack(net, x1, x2, noise, **named(rocl.attack, rocl, **settings))


@pytest.mark.parametrize("start, dv, length, before, after", [
    (0 * noise, -0.1341745815746557, 5.477825830893335, 1.8084009356171284, 1.8932428515759943),
    (noise, -0.46522280309851, 5.161169196905163, None, 1.8874981399435163)])
def test_attack_equals_printed_values(start, dv, length, before, after):
    net = Linear()
    x_adv = attack(net, x1, x2, start)
    d = (x_adv - x1).flatten(1)
    assert (d * A(4, 48, 3)).sum().item() == pytest.approx(dv, rel=1e-9)
    assert d.abs().sum().item() == pytest.approx(length, rel=1e-9)
    assert slow_nt_xent([net(x_adv), net(x2)], 0.5).item() == pytest.approx(after, rel=1e-9)
    if before:
        assert slow_nt_xent([net(x1), net(x2)], 0.5).item() == pytest.approx(before, rel=1e-9)


def step(net, **flags):
    """A real train_step on the printed inputs, from the clean start. The optimizer only records."""
    return rocl.train_step(net, torch.optim.SGD(net.parameters(), 0.0), x1, x2, 0 * noise,
                           **named(rocl.train_step, rocl, **flags))


def test_train_step_has_the_printed_losses_and_gradient():
    net, slow = Linear(), Linear()
    losses = step(net)
    assert [losses[k].item() for k in ("loss_rocl", "loss", "loss_reg")] == pytest.approx(
        [4.600039701166239, 4.607435181055207, 256 * 0.007395479888968728], rel=1e-9)
    assert net.W.grad.norm().item() == pytest.approx(0.7802878309127637, rel=1e-9)
    assert [net.W.grad[0, 0].item(), net.W.grad[5, 47].item()] == pytest.approx(
        [0.05750362447864232, -0.00721215113241181], rel=1e-9)
    x_adv = attack(slow, x1, x2, 0 * noise)
    z1, z2, z_adv = slow(x1), slow(x2), slow(x_adv)
    (slow_nt_xent([z1, z2, z_adv], 0.5) + slow_nt_xent([z_adv, z2], 0.5) / 256).backward()
    torch.testing.assert_close(slow.W.grad, net.W.grad, rtol=1e-9, atol=1e-12)


def test_flags_choose_the_targets_and_switch_the_regulariser_off():
    losses = step(Linear(), regularize_to="original")
    net = Linear()
    x_adv = attack(net, x1, x2, 0 * noise)
    assert losses["loss_reg"].item() == pytest.approx(slow_nt_xent([net(x_adv), net(x1)], 0.5).item(), rel=1e-9)
    off = step(Linear(), reg_weight=0.0)
    assert "loss_reg" not in off and off["loss"] == off["loss_rocl"]
    original = attack(net, x1, x2, noise, attack_to="original")
    assert torch.equal(original, attack(net, x1, x1, noise))
    assert not torch.equal(original, attack(net, x1, x2, noise))


def real():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    x1, x2, noise = torch.rand(3, 8, 3, 32, 32, generator=g)
    return rocl.network("slim"), x1, x2, 2 * noise - 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_image_starts_and_stays_in_a_ball_of_its_own(norm):
    """Uniformly: the length of a point to the power of its dimension is uniform in [0, 1)."""
    net, x1, x2, _ = real()
    x1 = 0.5 + 0.01 * x1  # far from the edges of the box
    noise = rocl.start_noise(x1, norm, data.Rng((0,), 8, slice(None)))
    assert noise.shape == x1.shape and len(noise.flatten(1).unique(dim=0)) == 8
    order = math.inf if norm == "linf" else 2
    flags = ["--norm", norm, "--eps", "8" if norm == "linf" else "100"]
    settings = named(rocl.attack, rocl, *flags)
    x_adv = rocl.attack(net, x1, x2, noise, **settings)
    for points, radius in ((noise, 1.0), (x_adv - x1, settings["eps"])):
        lengths = points.flatten(1).norm(order, dim=1)
        assert 0.95 * radius < lengths.min() and lengths.max() <= radius * (1 + 1e-5)
    many = rocl.start_noise(torch.zeros(4000, 3, 1, 1), norm, data.Rng((0,), 4000, slice(None)))
    volume = many.flatten(1).norm(order, dim=1) ** 3
    assert volume.mean().item() == pytest.approx(0.5, abs=0.02)
    assert volume.var().item() == pytest.approx(1 / 12, abs=0.01)


def test_the_target_embedded_once_changes_no_bit():
    net, x1, x2, noise = real()
    eps = 8 / 255

    def again(x):
        return rocl.nt_xent([net(x), net(x2)], 0.5)

    with eval_mode(net):
        want = pgd(again, x1, eps, 1.785 / 255, 7, start=(x1 + eps * noise).clamp(0, 1))
        assert torch.equal(attack(net, x1, x2, noise), want)
        assert again(want) > again(x1)


def test_a_step_moves_the_running_statistics_once_a_pass_and_the_attack_leaves_no_trace():
    for reg_weight, passes in ((1 / 256, 2), (0.0, 1)):
        net, x1, x2, noise = real()
        before = copy.deepcopy(net.state_dict())
        x_adv = attack(net, x1, x2, noise)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters()) and all(m.training for m in net.modules())
        assert (x_adv - x1).abs().max() <= 8 / 255 + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
        opt = torch.optim.SGD(net.parameters(), 0.1)
        rocl.train_step(net, opt, x1, x2, noise, **named(rocl.train_step, rocl, reg_weight=reg_weight))
        assert net[0].bn1.num_batches_tracked == passes


def test_batchnorm_sees_the_views_of_a_pass_together():
    net, x1, x2, _ = real()
    z = torch.cat(rocl.embed(net, x1, x2))
    assert torch.equal(z, net(torch.cat([x1, x2]))) and not torch.allclose(z[:8], net(x1), atol=1e-4)


@pytest.mark.parametrize("epoch, lr", [
    (0, 0.24), (1, 0.38), (8, 1.36), (9, 1.5), (10, 1.5), (100, 1.47022026425771), (510, 0.75),
    (999, 4.47788733770e-4)])
def test_learning_rate_equals_printed_values(epoch, lr):
    assert rocl.lr_at(epoch, 1000, 1.5, 10) == pytest.approx(lr, rel=1e-9)


def test_network_sizes_are_the_authors_and_pixels_are_not_normalised():
    net = rocl.network("resnet18")
    assert [sum(p.numel() for p in part.parameters()) for part in net] == [11_168_832, 1_312_896]
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        first = net[0].bn1.eval()(F.conv2d(x, net[0].conv1.weight, padding=1)).relu()
        seen = []
        net[0].layer1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        net.eval()(x)
    torch.testing.assert_close(seen[0], first)
    fan_in = 3 * 3 * 512
    assert net[0].layer4[1].conv2.weight.abs().max() <= fan_in**-0.5  # PyTorch's start: uniform to there


def test_defaults_are_the_authors_run():
    want = dict(epochs=1000, batch_size=512, lr=1.5, warmup=10, weight_decay=1e-6, temperature=0.5,
                reg_weight=1 / 256, attack_to="other", regularize_to="other", norm="linf", eps=8, steps=7,
                optimizer="lars", arch="resnet18", data="cifar10")
    args = vars(rocl.parser().parse_args([]))
    assert {k: args[k] for k in want} == pytest.approx(want)
    assert rocl.attack_settings(read_flags(rocl))["step_size"] == pytest.approx(0.007)


@pytest.mark.parametrize("flags, words", [
    (["--attack-to", "x3"], "--attack-to x3: choose one of other, original"),
    (["--regularize-to", "x3"], "--regularize-to x3: choose one of other, original"),
    (["--eps", "-8"], "--eps -8: must be"), (["--eps", "256"], "--eps 256: with --norm linf at most 255"),
    (["--norm", "l1"], "--norm l1: choose one of linf, l2"), (["--optimizer", "sgd"], "--optimizer sgd: choose one"),
    (["--steps", "-1"], "--steps -1"),
    (["--temperature", "0"], "--temperature 0: must be"), (["--asymmetry", "1.1"], "--asymmetry 1.1: must be"),
    (["--reg-weight", "-1"], "--reg-weight -1: must be")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(rocl, *flags)
