"""The mathematics of acl.py against the paper read aloud: slow float64 loops, and printed values."""
import copy
import math

import pytest
import torch
from torch import nn

import acl
from common import data
from common.pgd import eval_mode, pgd
from tests.recipes import A, X, Z, unit
from tests.scripts import named, read_flags


def slow_nt_xent(z1, z2, T):
    """One anchor at a time."""
    u = [unit(row[None])[0] for row in (*z1, *z2)]
    n, total = len(u), 0.0
    for i in range(n):
        others = sum(torch.exp(torch.dot(u[i], u[k]) / T) for k in range(n) if k != i)
        total = total - torch.log(torch.exp(torch.dot(u[i], u[(i + n // 2) % n]) / T) / others)
    return total / n


def gradients(loss_of, rows, T):
    z1, z2 = (rows[i::2].clone().requires_grad_() for i in (0, 1))
    loss = loss_of(z1, z2, T)
    return loss.item(), torch.stack(torch.autograd.grad(loss, (z1, z2)))


@pytest.mark.parametrize("rows, T, value", [
    (Z(8, 16), 0.5, 1.159327522638802), (Z(8, 16), 0.1, 0.5980541373722221),
    (Z(12, 5), 0.5, 1.555389909406294), (Z(12, 5), 0.1, 1.830873058661235)])
def test_nt_xent_equals_slow_loops_and_the_printed_value(rows, T, value):
    (fast, g), (slow, g_slow) = (gradients(f, rows, T) for f in (acl.nt_xent, slow_nt_xent))
    assert (fast, slow) == pytest.approx((value, value), rel=1e-9)
    torch.testing.assert_close(g, g_slow, rtol=1e-9, atol=1e-12)


def test_nt_xent_has_the_printed_gradients():
    _, g = gradients(acl.nt_xent, Z(8, 16), 0.5)
    assert [g.abs().sum().item(), g[0, 0, 0].item(), g[1, 3, 15].item()] == pytest.approx(
        [4.200388848107154, -0.04874485726583698, -0.03049805984188616], rel=1e-9)
    assert gradients(acl.nt_xent, Z(8, 16), 0.1)[1].norm().item() == pytest.approx(1.734502229688417, rel=1e-9)
    assert gradients(acl.nt_xent, Z(12, 5), 0.5)[1].abs().sum().item() == pytest.approx(
        3.412964108599575, rel=1e-9)


def test_closed_forms():
    same, e = torch.ones(6, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    assert acl.nt_xent(same, same, 0.5).item() == pytest.approx(math.log(11), rel=1e-12)
    assert acl.nt_xent(e, e, 0.5).item() == pytest.approx(0.594437664233319, rel=1e-12)


def test_the_loss_is_finite_at_any_temperature_in_float32():
    z = Z(8, 16).float().requires_grad_()
    loss = acl.nt_xent(z[:4], z[4:], 0.001)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


class Linear(nn.Module):
    """The network of the printed values: x -> W x."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(0.1 * Z(6, 192))

    def forward(self, x):
        return x.flatten(1) @ self.W.T


images = X(6, 3, 8, 8)
x1, x2 = images[::2], images[1::2]
noise = torch.stack([2 * x1 - 1, 2 * x2 - 1], 1)
BOTH, FIRST, CLEAN = ("adv", "adv"), ("adv", "clean"), ("clean", "clean")


def attack(net, x1, x2, noise, kinds, **settings):
    return acl.attack(net, x1, x2, noise, kinds, **named(acl.attack, acl, **settings))


@pytest.mark.parametrize("kinds, steps, dv1, dv2, after", [
    (BOTH, 1, -0.843341430881837, -0.348653890643740, 1.66152945391237),
    (BOTH, 5, -0.286805768738821, 0.199807537488157, 3.38068651746905),
    (FIRST, 1, -0.848168493941237, 0, 1.30488824803723),
    (FIRST, 5, -0.188199815920014, 0, 2.39387502973112)])
def test_attack_equals_printed_values(kinds, steps, dv1, dv2, after):
    net = Linear()
    a1, a2 = attack(net, x1, x2, noise, kinds, steps=steps)
    found = [((a - x).flatten(1) * A(3, 192, 3)).sum().item() for a, x in ((a1, x1), (a2, x2))]
    assert found == pytest.approx([dv1, dv2], rel=1e-9)
    assert slow_nt_xent(net(a1), net(a2), 0.5).item() == pytest.approx(after, rel=1e-9)
    assert (a2 is x2) == (kinds == FIRST)


def step(net, variant, **flags):
    """A real train_step on the printed inputs. The optimizer only records."""
    opt = torch.optim.SGD(net.parameters(), 0.0)
    return acl.train_step(net, opt, x1, x2, noise, **named(acl.train_step, acl, variant=variant, **flags))


def test_train_step_has_the_printed_loss_and_gradient():
    net, slow = Linear(), Linear()
    losses = step(net, "ds")
    assert losses["loss"].item() == pytest.approx(2.166957575753704, rel=1e-9)
    assert [net.W.grad.norm().item(), net.W.grad[0, 0].item()] == pytest.approx(
        [11.60590011382106, 0.0985590079611724], rel=1e-9)
    a1, a2 = attack(slow, x1, x2, noise, BOTH)
    (0.5 * (slow_nt_xent(slow(x1), slow(x2), 0.5) + slow_nt_xent(slow(a1), slow(a2), 0.5))).backward()
    torch.testing.assert_close(slow.W.grad, net.W.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant, views", [
    ("s2s", [CLEAN]), ("a2a", [BOTH]), ("a2s", [FIRST]), ("ds", [CLEAN, BOTH])])
def test_each_variant_is_the_mean_of_its_terms(variant, views):
    net, want = Linear(), []
    for kinds in views:
        pair = (x1, x2) if kinds == CLEAN else attack(net, x1, x2, noise, kinds)
        want.append(slow_nt_xent(*(net(x) for x in pair), 0.5).item())
    assert step(net, variant)["loss"].item() == pytest.approx(sum(want) / len(want), rel=1e-9)


def test_without_perturbation_and_with_equal_branches_ds_is_s2s():
    assert step(Linear(), "ds", eps=0.0)["loss"].item() == pytest.approx(
        step(Linear(), "s2s")["loss"].item(), rel=1e-12)


@pytest.mark.parametrize("variant, names", [
    ("s2s", {"loss_clean"}), ("a2a", {"loss_adv"}), ("a2s", {"loss_adv_clean"}),
    ("ds", {"loss_adv", "loss_clean"})])
def test_each_term_of_a_variant_is_logged_by_the_kinds_of_its_views(variant, names):
    assert step(Linear(), variant).keys() == {"loss", *names}


def test_a_variant_may_attack_the_second_view_alone():
    """It mirrors the attack on the first, and leaves the clean view as it is."""
    net = Linear()
    a1, a2 = attack(net, x1, x2, noise, ("clean", "adv"))
    b2, b1 = attack(net, x2, x1, noise.flip(1), FIRST)
    assert a1 is x1 and b1 is x1 and not torch.equal(a2, x2)
    torch.testing.assert_close(a2, b2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("terms, names", [
    ([("clean", "adv")], {"loss_clean_adv"}), ([BOTH, FIRST], {"loss_adv", "loss_adv_clean"}),
    ([FIRST, ("clean", "adv"), CLEAN], {"loss_adv_clean", "loss_clean_adv", "loss_clean"})])
def test_variants_are_data(terms, names, monkeypatch):
    """Of a new row too each view goes through the branch of its kind, attacked or clean, each term is logged."""
    monkeypatch.setitem(acl.VARIANTS, "new", terms)
    net, want = Linear(), []
    for kinds in terms:
        pair = attack(net, x1, x2, noise, kinds) if "adv" in kinds else (x1, x2)
        want.append(slow_nt_xent(*(net(x) for x in pair), 0.5).item())
    losses = step(net, "new")
    assert losses.keys() == {"loss", *names}
    assert losses["loss"].item() == pytest.approx(sum(want) / len(want), rel=1e-9)

    net, v1, v2, u = real("new")
    seen, embed, clean = [], acl.embed, torch.cat([v1, v2])

    def spy(net, x, bn):
        untouched = [(clean == image).flatten(1).all(1).any().item() for image in x]
        seen.append((bn, net.training, untouched))
        return embed(net, x, bn)

    monkeypatch.setattr(acl, "embed", spy)
    acl.train_step(net, torch.optim.SGD(net.parameters(), 0.1), v1, v2, u, **named(acl.train_step, acl, variant="new"))
    for bn, _, untouched in seen:  # in the attack and after it
        assert all(untouched) if bn == "clean" else not any(untouched)
    passes = [bn for bn, training, _ in seen if training]
    assert passes == [bn for a, b in terms for bn in ([a] if a == b else [a, b])]
    monkeypatch.setattr(acl, "embed", embed)
    rows = acl.pictures(net, data.Images(255 * v1.byte(), torch.zeros(8).long(), 1), v1.shape[2],
                        acl.parser().parse_args(["--variant", "new"]))
    attacked = [kinds for kinds in terms if "adv" in kinds][0]
    names = [f"{view}{end}" for view, kind in zip(("x1", "x2"), attacked) if kind == "adv"
             for end in ("_adv", f"_adv - {view}")]
    assert [name for name, _ in rows] == ["x1", "x2", *names]


def real(variant):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    x1, x2 = torch.rand(2, 8, 3, 32, 32, generator=g)
    return acl.network("slim", variant), x1, x2, 2 * torch.rand(8, 2, 3, 32, 32, generator=g) - 1


def test_the_clean_view_embedded_once_changes_no_bit():
    net, x1, x2, noise = real("a2s")
    eps = 8 / 255

    def again(x):
        return acl.nt_xent(acl.embed(net, x, "adv"), acl.embed(net, x2, "clean"), 0.5)

    with eval_mode(net):
        want = pgd(again, x1, eps, 2 / 255, 5, start=(x1 + eps * noise[:, 0]).clamp(0, 1))
        assert torch.equal(attack(net, x1, x2, noise, FIRST)[0], want)
        assert again(want) > again(x1) + 1e-3


@pytest.mark.parametrize("variant", acl.VARIANTS)
def test_every_view_uses_its_branch_once_a_step_and_the_attack_leaves_no_trace(variant):
    net, x1, x2, noise = real(variant)
    before = copy.deepcopy(net.state_dict())
    for kinds in acl.VARIANTS[variant]:
        if "adv" in kinds:
            for x, a in zip((x1, x2), attack(net, x1, x2, noise, kinds)):
                assert (a - x).abs().max() <= 8 / 255 + 1e-6 and 0 <= a.min() and a.max() <= 1
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and all(m.training for m in net.modules())
    acl.train_step(net, torch.optim.SGD(net.parameters(), 0.1), x1, x2, noise, **named(acl.train_step, acl, variant=variant))
    counts = {k: v.item() for k, v in net.state_dict().items() if "num_batches_tracked" in k}
    assert set(counts.values()) == {1}
    kinds = {kind for pair in acl.VARIANTS[variant] for kind in pair}
    assert all(any(f".{kind}." in k for k in counts) for kind in kinds)
    assert not any(f".{kind}." in k for k in counts for kind in {"clean", "adv"} - kinds)


def test_views_of_a_kind_share_their_batch_statistics():
    net, x1, x2, _ = real("ds")
    z = torch.cat(acl.embed_pair(net, x1, x2, BOTH))
    assert torch.equal(z, acl.embed(net, torch.cat([x1, x2]), "adv"))
    assert not torch.allclose(z[:8], acl.embed(net, x1, "adv"), atol=1e-4)


@pytest.mark.parametrize("s, lr", [
    (1, 0.00510204081633), (490, 2.5), (980, 5), (10_000, 4.8941208112504), (49_490, 2.5000005),
    (98_000, 1e-6)])
def test_learning_rate_equals_printed_values(s, lr):
    assert acl.lr_at(s, 98_000, 5.0, 980) == pytest.approx(lr, rel=1e-9)
    assert acl.lr_at(s, 98_000, 0.0, 980) == 0


def test_network_sizes_are_the_authors():
    def size(net):
        return sum(p.numel() for p in net.parameters())

    plain, dual = acl.network("resnet18", "s2s"), acl.network("resnet18", "ds")
    assert size(plain[0]) == 11_168_832 and size(dual[1]) == 793_088 and size(dual) == 11_971_520


def test_defaults_are_the_papers_run():
    want = dict(variant="ds", epochs=1000, batch_size=512, lr=5.0, warmup=10, weight_decay=1e-6,
                temperature=0.5, norm="linf", eps=8, step_size=None, steps=5, arch="resnet18", data="cifar10")
    args = vars(acl.parser().parse_args([]))
    assert {k: args[k] for k in want} == want


@pytest.mark.parametrize("flags, words", [
    (["--variant", "s2a"], "--variant s2a: choose one of s2s, a2a, a2s, ds"),
    (["--eps", "-8"], "--eps -8: must be"), (["--steps", "-1"], "--steps -1"),
    (["--temperature", "0"], "--temperature 0: must be")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(acl, *flags)
