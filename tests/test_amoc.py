"""The mathematics of amoc.py against the paper read aloud: slow float64 loops, and printed values."""

import copy
import math

import pytest
import torch
from torch import nn

import amoc
from common.bank import Bank
from common.pgd import pgd
from tests.recipes import A, X, Z, unit
from tests.scripts import named, read_flags

q, k, q_a, k_a = (unit(A(4, 8, p)) for p in (0, 1, 2, 5))
M_clean, M_adv = unit(A(8, 16, 3).T), unit(A(8, 16, 4).T)


def slow_info_nce(q, k, M, T):
    """Eq. 3.1, one image and one negative at a time."""
    total = 0.0
    for i in range(len(q)):
        pos = torch.exp(torch.dot(q[i], k[i]) / T)
        neg = sum(torch.exp(torch.dot(q[i], M[j]) / T) for j in range(len(M)))
        total = total - torch.log(pos / (pos + neg))
    return total / len(q)


def l_star(variant, info_nce):
    """L_* of a variant by its letters: query, key, bank."""
    letters = variant[:3]
    return info_nce(
        q_a if letters[0] == "A" else q,
        k_a if letters[1] == "A" else k,
        M_adv if letters[2] == "A" else M_clean,
        0.2,
    )


@pytest.mark.parametrize(
    "variant, value",
    [
        ("CCC", 1.0182162631445383),
        ("CCA", 1.039330231826339),
        ("CAC", 1.9459460988222717),
        ("CAA", 1.973674143287723),
        ("ACC", 0.8776813944296246),
        ("ACA", 0.8344132430353071),
        ("AAC", 8.016221377528171),
        ("AAA", 7.93919584557974),
        ("ACA_PLUS", 0.8344132430353071),
    ],
)
def test_loss_of_every_variant_equals_slow_loops_and_the_printed_value(variant, value):
    assert l_star(variant, amoc.info_nce).item() == pytest.approx(value, rel=1e-9)
    assert l_star(variant, slow_info_nce).item() == pytest.approx(value, rel=1e-9)
    v = amoc.VARIANTS[variant]
    assert tuple("CA"[a] for a in v[:3]) == tuple(variant[:3])


def test_loss_gradients_equal_slow_loops():
    inputs = [t.clone().requires_grad_() for t in (q, k, M_clean)]
    fast = torch.autograd.grad(amoc.info_nce(*inputs, 0.2), inputs)
    slow = torch.autograd.grad(slow_info_nce(*inputs, 0.2), inputs)
    for a, b in zip(fast, slow):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert fast[0].norm().item() == pytest.approx(1.6693565713823826, rel=1e-9)
    assert [fast[0][i].item() for i in ((0, 0), (0, 1), (3, 7))] == pytest.approx(
        [-0.27730169418096617, -0.45673409885126852, 0.25486115963432244], rel=1e-9
    )


def test_closed_forms():
    same = unit(torch.ones(4, 8, dtype=torch.float64))
    assert amoc.info_nce(same, same, same[:1].expand(16, 8), 0.2).item() == pytest.approx(math.log(17))
    e = torch.eye(17, dtype=torch.float64)
    assert amoc.info_nce(e[:1], e[:1], e[1:], 0.2).item() == pytest.approx(0.102382522621814, rel=1e-12)


def test_loss_is_finite_at_any_temperature_in_float32():
    a = unit(A(4, 8, 0)).float().requires_grad_()
    loss = amoc.info_nce(a, -a.detach(), a.detach(), 0.001)
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all()


class Linear(nn.Module):
    """Query and key network of the printed values: x -> W x."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(Z(6, 48))

    def forward(self, x):
        return x.flatten(1) @ self.W.T


x1 = X(4, 3, 4, 4)
x2 = x1.flip(3)
noise = A(8, 48, 6).view(2, 4, 3, 4, 4).transpose(0, 1)
starts = [(x + (8 / 255) * noise[:, i]).clamp(0, 1) for i, x in enumerate((x1, x2))]
bank_c, bank_a = unit(Z(16, 6)), unit(A(16, 6, 4))


def attack(variant):
    bank = bank_a if amoc.VARIANTS[variant].adv_bank else bank_c
    return amoc.attack(Linear(), Linear(), x1, x2, noise, bank, **named(amoc.attack, amoc, "--variant", variant))


@pytest.mark.parametrize(
    "variant, dv, length",
    [
        ("ACC", (-0.63410204189069, 0), (4.52159294101935, 0)),
        ("ACA", (-0.77106352988294, 0), (4.51780260035800, 0)),
        ("CAC", (0, 0.75848725250623), (0, 4.36488833731330)),
        ("AAA", (-0.77907136237176, 0.85614019371497), (4.48086229348640, 4.39298716910731)),
    ],
)
def test_attack_equals_printed_values(variant, dv, length):
    for x, x_adv, weighted, total in zip((x1, x2), attack(variant), dv, length):
        d = (x_adv - x).flatten(1)
        assert (d * A(4, 48, 3)).sum().item() == pytest.approx(weighted, rel=1e-9)
        assert d.abs().sum().item() == pytest.approx(total, rel=1e-9)


def test_a_variant_that_attacks_nothing_gets_its_views_back():
    for variant in ("CCC", "CCA"):
        assert all(ours is view for ours, view in zip(attack(variant), (x1, x2), strict=True))


@pytest.mark.parametrize("variant", [v for v in amoc.VARIANTS if v not in ("CCC", "CCA")])
def test_constants_computed_once_change_nothing(variant):
    """Bit for bit the attack that embeds both views again at every step."""
    v = amoc.VARIANTS[variant]
    bank = bank_a if v.adv_bank else bank_c
    net, target = Linear(), Linear()

    def loss(x):
        a, b = x.chunk(2)
        a, b = (a if v.adv_query else x1), (b if v.adv_key else x2)
        return amoc.info_nce(amoc.embed(net, a, "adv"), amoc.embed(target, b, "adv"), bank, 0.2) + 0 * x.sum()

    x = torch.cat([x1, x2])
    naive = pgd(
        loss,
        x,
        8 / 255,
        2 / 255,
        5,
        start=torch.cat([starts[0] if v.adv_query else x1, starts[1] if v.adv_key else x2]),
    )
    for ours, want in zip(attack(variant), naive.chunk(2)):
        assert torch.equal(ours, want)


def objective_after_attack(net):
    """The ACC objective of Eq. 3.4 with slow loops; the attacked query is a constant."""
    q, k, q_a = (unit(n(x)) for n, x in ((net, x1), (Linear(), x2), (net, attack("ACC")[0])))
    return 0.5 * slow_info_nce(q, k.detach(), bank_c, 0.2) + 0.5 * slow_info_nce(q_a, k.detach(), bank_c, 0.2)


def step(variant, net, target, **flags):
    """One real train_step on the printed inputs; returns losses and both banks. The optimizer only
    records."""
    banks = Bank(16, 6).double(), Bank(16, 6).double()
    banks[0].rows.copy_(bank_c), banks[1].rows.copy_(bank_a)
    opt = torch.optim.SGD(net.parameters(), lr=0.0)
    settings = named(amoc.train_step, amoc, "--variant", variant, **flags)
    return amoc.train_step(net, target, opt, *banks, x1, x2, noise, **settings), *banks


def test_train_step_has_the_printed_loss_and_gradient():
    net, target = Linear(), Linear().requires_grad_(False)
    losses, *_ = step("ACC", net, target)
    assert losses["loss"].item() == pytest.approx(0.6960773154988184, rel=1e-9)
    g = net.W.grad
    assert g.norm().item() == pytest.approx(0.8475203928029649, rel=1e-9)
    assert [g[0, 0].item(), g[5, 47].item()] == pytest.approx(
        [-0.02314560426247722, -0.04902599717642437], rel=1e-9
    )
    slow = Linear()
    objective = objective_after_attack(slow)
    objective.backward()
    assert objective.item() == pytest.approx(losses["loss"].item(), rel=1e-9)
    torch.testing.assert_close(slow.W.grad, g, rtol=1e-9, atol=1e-12)
    assert target.W.grad is None


@pytest.mark.parametrize("variant", amoc.VARIANTS)
def test_each_variant_feeds_its_banks_after_the_loss(variant):
    net, target = Linear(), Linear().requires_grad_(False)
    _, clean, adv = step(variant, net, target)
    (a1, a2) = attack(variant) if variant not in ("CCC", "CCA") else (x1, x2)
    torch.testing.assert_close(clean.rows, torch.cat([unit(target(x2)), bank_c[4:]]))  # the step has lr 0
    v = amoc.VARIANTS[variant]
    keys = (
        unit(target(a1)) if v.extra_key else unit(target(a2)) if v.adv_key else bank_a[:4]
    )  # ACA: noise for ever
    torch.testing.assert_close(adv.rows, torch.cat([keys, bank_a[4:]]))


@pytest.mark.parametrize("variant", amoc.VARIANTS)
def test_there_is_an_attack_where_a_view_is_attacked(variant, monkeypatch):
    attacks = []
    monkeypatch.setattr(amoc, "pgd", lambda *given, **more: attacks.append(1) or pgd(*given, **more))
    step(variant, Linear(), Linear().requires_grad_(False))
    assert len(attacks) == ("A" in variant[:2])


def test_momentum_update_follows_the_optimizer():
    net, target = Linear(), Linear().requires_grad_(False)
    with torch.no_grad():
        net.W += 1
    step("CCC", net, target, ema=0.9)
    torch.testing.assert_close(target.W, Z(6, 48) + 0.1)


def two_networks():
    torch.manual_seed(0)
    net = amoc.network("slim")
    return net, copy.deepcopy(net).requires_grad_(False)


def real_step(variant, net, target, **flags):
    settings = named(amoc.train_step, amoc, "--variant", variant, "--steps", "2")
    g = torch.Generator().manual_seed(1)
    x1, x2 = torch.rand(2, 8, 3, 32, 32, generator=g)
    banks = Bank(32, 128), Bank(32, 128)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    return amoc.train_step(net, target, opt, *banks, x1, x2, torch.rand(8, 2, 3, 32, 32, generator=g), **settings)


@pytest.mark.parametrize("variant", amoc.VARIANTS)
def test_attacked_images_touch_only_their_own_batchnorm(variant):
    net, target = two_networks()
    before = copy.deepcopy(net.state_dict()), copy.deepcopy(target.state_dict())
    real_step(variant, net, target)
    v = amoc.VARIANTS[variant]
    for module, old, attacked in (
        (net, before[0], v.adv_query),
        (target, before[1], v.adv_key or v.extra_key),
    ):
        for key, value in module.state_dict().items():
            if "running_mean" in key:
                assert torch.equal(value, old[key]) != ("clean" in key or attacked), key
        assert all(m.training for m in module.modules())
    steps = [s for k, s in net.state_dict().items() if "num_batches_tracked" in k and "clean" in k]
    assert all(s == 1 for s in steps)  # the attack adds none


def test_attack_raises_the_loss_of_a_real_network():
    net, target = two_networks()
    x1, x2 = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    bank = Bank(64, 128).rows
    for name, v in amoc.VARIANTS.items():
        if name in ("CCC", "CCA"):
            continue
        a1, a2 = amoc.attack(net, target, x1, x2, torch.zeros(8, 2, 3, 32, 32), bank,
                             **named(amoc.attack, amoc, "--variant", name))
        net.eval(), target.eval()
        before = amoc.info_nce(
            amoc.embed(net, x1, "adv" if v.adv_query else "clean"),
            amoc.embed(target, x2, "adv" if v.adv_key else "clean"),
            bank,
            0.2,
        )
        after = amoc.info_nce(
            amoc.embed(net, a1, "adv" if v.adv_query else "clean"),
            amoc.embed(target, a2, "adv" if v.adv_key else "clean"),
            bank,
            0.2,
        )
        net.train(), target.train()
        assert after > before + 1e-3, name
        assert (a1 is x1) != v.adv_query and (a2 is x2) != v.adv_key


@pytest.mark.parametrize(
    "epoch, lr",
    [
        (0, 1e-4),
        (1, 0.01),
        (9, 0.09),
        (10, 0.1),
        (11, 0.0999931652496),
        (50, 0.0894570254698),
        (105, 0.05),
        (150, 0.0161359214187),
        (199, 6.83475038e-6),
    ],
)
def test_learning_rate_equals_printed_values(epoch, lr):
    assert amoc.lr_at(epoch, 200, 0.1, 10) == pytest.approx(lr, rel=1e-8)


def test_network_sizes_are_the_papers():
    net = amoc.network("resnet18")
    assert sum(p.numel() for p in net[0].parameters()) == 11_178_432
    assert sum(p.numel() for p in net[1].parameters()) == 328_320


def test_defaults_are_the_papers_run():
    args = amoc.parser().parse_args([])
    assert vars(args) | dict(
        variant="ACC",
        epochs=200,
        batch_size=256,
        lr=0.1,
        warmup=10,
        weight_decay=5e-4,
        temperature=0.2,
        ema=0.999,
        bank_size=32768,
        lam=0.5,
        eps=8,
        norm="linf",
        step_size=None,
        steps=5,
        arch="resnet18",
        data="cifar10",
    ) == vars(args)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--variant", "ABC"], "--variant ABC: choose one of CCC, CAC"),
        (["--eps", "-8"], "--eps -8: must be"),
        (["--steps", "-1"], "--steps -1: must be"),
        (["--temperature", "0"], "--temperature 0"),
        (["--bank-size", "0"], "--bank-size 0"),
        (["--lam", "1.5"], "--lam 1.5: must be a number from 0 to 1"),
        (["--lr", "-1"], "--lr -1: must be"),
    ],
)
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(amoc, *flags)
    read_flags(amoc, "--steps", "0")  # noise instead of an attack


def test_a_variant_is_what_its_letters_say():
    """Query, key, bank; attacked is A. And the branch that L_*'s query passes through is exported."""
    attacked_query = amoc.VARIANTS["ACC"]
    clean_query = amoc.VARIANTS["CAA"]
    assert attacked_query == (True, False, False, False) and attacked_query.export == "adv"
    assert clean_query == (False, True, True, False) and clean_query.export == "clean"
    assert amoc.VARIANTS["AAC"] == (True, True, False, False)
    assert amoc.VARIANTS["ACA_PLUS"] == (True, False, True, True)
    assert not amoc.VARIANTS["CCC"].second_loss
    assert all(v.second_loss for name, v in amoc.VARIANTS.items() if name != "CCC")
    assert amoc.VARIANTS["CCA"] == (False, False, True, False) and amoc.VARIANTS["CCA"].export == "clean"
    assert [name for name, v in amoc.VARIANTS.items() if not v.attacked] == ["CCC", "CCA"]
