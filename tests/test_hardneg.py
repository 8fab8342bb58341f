"""The mathematics of hardneg.py against the papers read aloud: slow float64 loops, and printed values."""
import math

import pytest
import torch
import torch.nn.functional as F

import acl
import adco
import amoc
import hardneg
from common import data
from tests.recipes import unit
from tests.scripts import read_flags


def S(n, d, p):
    """sin(p + 1.3 i + .7 j + .31 i j), (n, d)."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(p + 1.3 * i + 0.7 * j + 0.31 * i * j)


def fill(shape, factor):
    """The fractions of factor, 2 factor, 3 factor, ... in this shape."""
    k = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (factor * k).frac().view(shape)


def wsum(t):
    return sum(v.item() * math.cos(0.01 * k) for k, v in enumerate(t.flatten()))


q, k, bank = unit(S(4, 6, 0)), unit(S(4, 6, 0.5)), unit(S(9, 6, 2))


# The papers, one anchor and one negative at a time -----------------------------------------------------------
def anchors(q, k, bank):
    """(anchor, its positive, its negatives) of each."""
    if bank is not None:
        return [(q[i], k[i], list(bank)) for i in range(len(q))]
    rows = [*q, *k]
    n = len(q)
    found = []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = [rows[j] for j in range(2 * n) if j not in (i, partner)]
        found.append((rows[i], rows[partner], others))
    return found


def slow_cross_entropy(positive, negatives):
    e = torch.exp(positive)
    return -torch.log(e / (e + sum(torch.exp(s) for s in negatives)))


def slow_info_nce(q, k, bank, T):
    terms = [slow_cross_entropy(a @ p / T, [a @ n / T for n in others]) for a, p, others in anchors(q, k, bank)]
    return sum(terms) / len(terms)


def slow_ifm(q, k, bank, T, eps, alpha=1.0, ifm_only=False):
    """Every positive moved by -eps of its anchor, every negative by +eps, anew for each anchor."""
    total = 0.0
    found = anchors(q, k, bank)
    for a, p, others in found:
        moved = slow_cross_entropy((a @ p - eps) / T, [(a @ n + eps) / T for n in others])
        plain = slow_cross_entropy(a @ p / T, [a @ n / T for n in others])
        total = total + (moved if ifm_only else (plain + alpha * moved) / (1 + alpha))
    return total / len(found)


def slow_hcl(q, k, bank, T, beta, tau):
    total = 0.0
    found = anchors(q, k, bank)
    on_the_floor = 0
    for a, positive, others in found:
        p = torch.exp(a @ positive / T)
        n = [torch.exp(a @ other / T) for other in others]
        N = len(n)
        R = sum(x ** (1 + beta) for x in n) / (sum(x**beta for x in n) / N)
        G = (R - tau * N * p) / (1 - tau)
        if G < N * math.exp(-1 / T):
            G = N * math.exp(-1 / T)
            on_the_floor += 1
        total = total - torch.log(p / (p + G))
    slow_hcl.on_the_floor = on_the_floor
    return total / len(found)


# Values and gradients ---------------------------------------------------------------------------------------
IFM, HCL = (hardneg.ifm_loss, slow_ifm), (hardneg.hcl_loss, slow_hcl)
PRINTED = [
    (IFM, bank, (0.2, 0.1), 0.973571532, (1.0590197, 0.200997099), (1.50503898, -0.229582749)),
    (IFM, bank, (0.2, 0.2, 0.5), 1.13419861, (1.08978958, 0.202971811), (1.53500343, -0.261075401)),
    (IFM, bank, (0.2, 0.1, 1.0, True), 1.2668688, (1.25619093, 0.233259369), (1.76689787, -0.30466454)),
    (IFM, bank, (0.07, 0.05, 1.0), 0.983314457, (3.29388229, 0.226152474), (4.27709202, -0.036167732)),
    (IFM, None, (0.5, 0.1), 0.680144011, (0.606874744, 0.174281053), (0.595760783, -0.173401871)),
    (IFM, None, (0.5, 0.1, 1.0, True), 0.777654421, (0.668241725, 0.193721604), (0.65616094, -0.18902229)),
    (HCL, bank, (0.5, 1, 0.05), 1.64220248, (0.741216063, 0.0553090489), (0.893779896, -0.232778461)),
    (HCL, None, (0.5, 1, 0.1), 0.403798191, (1.07753334, 0.293313967), (1.01181421, -0.306959627)),
    (HCL, None, (0.5, 0, 0.1), 0.240979675, (0.606691133, 0.0477850491), (0.586823314, -0.203800983)),
    (HCL, None, (0.5, 1, 0.6), 0.13722343, (0.128273521, 0.0402756794), (0.128273521, -0.0367251972)),
    (HCL, None, (0.5, 0, 0), 0.5826336, (0.545571441, 0.154840501), (0.535420854, -0.157781452)),
    (HCL, bank, (0.5, 0, 0.05), 1.0541409, (0.629992416, 0.187072418), (0.8159208, -0.219865471)),
    (HCL, bank, (0.2, 2, 0.05), 1.94280632, (2.01649613, 0.0307958288), (2.25897256, -0.526556763)),
]


def with_gradients(loss_of, *rest, rows=None):
    """The value, and the gradients in q, k and, where there is one, the bank."""
    given = [t.clone().requires_grad_() for t in (q, k)]
    more = [] if rows is None else [rows.clone().requires_grad_()]
    loss = loss_of(*given, more[0] if more else None, *rest)
    return loss, torch.autograd.grad(loss, [*given, *more])


@pytest.mark.parametrize("functions, rows, numbers, value, dq, dk", PRINTED)
def test_losses_equal_slow_loops_and_printed_values_and_gradients(functions, rows, numbers, value, dq, dk):
    found = [with_gradients(loss_of, *numbers, rows=rows) for loss_of in functions]
    for loss, _ in found:
        assert loss.item() == pytest.approx(value, rel=1e-8)
    for fast, slow in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    to_q, to_k = found[0][1][:2]
    assert [to_q.norm().item(), to_q[2, 1].item()] == pytest.approx(dq, rel=1e-8)
    assert [to_k.norm().item(), to_k[0, 3].item()] == pytest.approx(dk, rel=1e-8)


def test_the_floor_is_where_the_printed_values_say():
    slow_hcl(q, k, None, 0.5, 0, 0.1)
    assert slow_hcl.on_the_floor == 4
    slow_hcl(q, k, None, 0.5, 1, 0.6)
    assert slow_hcl.on_the_floor == 8
    x = unit(S(8, 6, 0)), unit(S(8, 6, 0.01))  # 14 negatives
    p = torch.exp((x[0] * x[1]).sum(1) / 0.5).repeat(2)
    wanted = torch.log1p(1.894694 / p).mean()
    assert hardneg.hcl_loss(*x, None, 0.5, 0.0, 0.9).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_the_attack_of_ifm_is_the_worst_within_its_distance():
    """Whatever else moves the positive and the negatives by eps raises the loss of an anchor less."""
    torch.manual_seed(0)
    worst = hardneg.ifm_loss(q, k, bank, 0.2, 0.1, ifm_only=True)
    for _ in range(20):
        moved = k + 0.1 * unit(torch.randn(4, 6, dtype=torch.float64))
        rows = bank + 0.1 * unit(torch.randn(9, 6, dtype=torch.float64))
        assert slow_info_nce(q, moved, rows, 0.2) < worst
    torch.testing.assert_close(torch.stack([slow_info_nce(
        q[i : i + 1], k[i : i + 1] - 0.1 * q[i], bank + 0.1 * q[i], 0.2) for i in range(4)]).mean(), worst)


# Reductions -------------------------------------------------------------------------------------------------
def assert_equal_losses(first, second, rows):
    a, b = with_gradients(first, rows=rows), with_gradients(second, rows=rows)
    assert a[0].item() == pytest.approx(b[0].item(), rel=1e-12)
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss_of", [
    hardneg.info_nce,
    slow_info_nce,
    lambda q, k, n, T: hardneg.ifm_loss(q, k, n, T, 0.0, 0.7),
    lambda q, k, n, T: hardneg.ifm_loss(q, k, n, T, 0.3, 0.0),
    lambda q, k, n, T: hardneg.ifm_loss(q, k, n, T, 0.0, ifm_only=True),
    lambda q, k, n, T: hardneg.hcl_loss(q, k, n, T, 0.0, 0.0),
    lambda q, k, n, T: hardneg.hcl_loss(q, k, n, T, 1e-13, 0.0),
], ids=["info_nce", "loops", "ifm, no shift", "ifm, no weight", "ifm, only no shift", "hcl", "hcl, hardly any beta"])
@pytest.mark.parametrize("rows", [bank, None], ids=["moco", "simclr"])
def test_without_a_rule_each_loss_is_moco_or_simclr(loss_of, rows):
    def base(q, k, rows):
        return acl.nt_xent(q, k, 0.3) if rows is None else amoc.info_nce(q, k, rows, 0.3)

    if rows is None:  # acl's normalises: its gradient in q lacks the part along q
        a = with_gradients(lambda q, k, _: loss_of(F.normalize(q, dim=1), F.normalize(k, dim=1), None, 0.3))
        b = with_gradients(base)
        assert a[0].item() == pytest.approx(b[0].item(), rel=1e-11)
        for x, y in zip(a[1], b[1], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)
    else:
        assert_equal_losses(lambda q, k, n: loss_of(q, k, n, 0.3), base, rows)


def test_moco_here_is_adcos_loss_and_all_have_adcos_base():
    assert hardneg.info_nce(q, k, bank, 0.12).item() == pytest.approx(
        adco.contrastive_loss(q, k, bank, 0.12).item(), rel=1e-12)
    x = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    for blur in (False, True):
        ours = hardneg.augment(x, data.Rng((1, 2, 3), 6, slice(None)), 16, blur)
        theirs = adco.augment(x, data.Rng((1, 2, 3), 6, slice(None)), 224, 16, blur)
        assert torch.equal(ours, theirs)
    torch.manual_seed(0)
    net = hardneg.network("slim")
    torch.manual_seed(0)
    other = adco.network("slim")
    images = torch.rand(70, 3, 16, 16)
    assert torch.equal(net(images), other(images))
    for name, value in other.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
    order = torch.randperm(70)
    torch.testing.assert_close(hardneg.embed_in_order(net, images, order), adco.embed_keys(other, [images], order)[0])
    a, b = (vars(script.parser().parse_args([])) for script in (hardneg, adco))
    for name in ("epochs", "batch_size", "lr", "lr_final", "weight_decay", "ema", "bank_size", "arch", "blur"):
        assert a[name] == b[name], name
    assert hardneg.LOGGED_TEMPERATURE == b["bank_temperature"]
    assert (hardneg.MEAN, hardneg.STD) == (adco.MEAN, adco.STD)


# MoCHi ------------------------------------------------------------------------------------------------------
i4 = torch.arange(4)[:, None]
s3, s2 = torch.arange(3), torch.arange(2)
pairs = torch.stack([(i4 + s3) % 9, (2 * i4 + 3 * s3 + 1) % 9], 2)
a, partners, b = fill((4, 3), 0.618), (i4 + 2 * s2) % 9, 0.5 * fill((4, 2), 0.37)


def slow_mixed(q, bank):
    found = []
    for i in range(4):
        own = []
        for s in range(3):
            first, second = bank[(i + s) % 9], bank[(2 * i + 3 * s + 1) % 9]
            point = a[i, s] * first + (1 - a[i, s]) * second
            own.append(point / point.norm())
        for s in range(2):
            point = b[i, s] * q[i] + (1 - b[i, s]) * bank[(i + 2 * s) % 9]
            own.append(point / point.norm())
        found.append(torch.stack(own))
    return torch.stack(found)


def slow_mochi(q, k, bank, mixed, T):
    total = 0.0
    for i in range(len(q)):
        total = total + slow_cross_entropy(q[i] @ k[i] / T, [q[i] @ n / T for n in [*bank, *mixed[i]]])
    return total / len(q)


def test_the_hardest_rows_equal_printed_ones_and_a_sort():
    found = hardneg.hardest(q, bank, 3)
    assert found.tolist() == [[2, 8, 6], [0, 3, 5], [1, 4, 5], [2, 5, 8]] and found.dtype == torch.int64
    for i in range(4):
        by_hand = sorted(range(9), key=lambda j: -(q[i] @ bank[j]).item())
        assert hardneg.hardest(q, bank, 9)[i].tolist() == by_hand


def test_mixtures_equal_printed_values_and_loops():
    anchor, rows = q.clone().requires_grad_(), bank.clone().requires_grad_()
    mixed = hardneg.mix_negatives(anchor, rows, pairs, a, partners, b)
    assert mixed.shape == (4, 5, 6) and not mixed.requires_grad
    torch.testing.assert_close(mixed, slow_mixed(q, bank), rtol=1e-12, atol=1e-14)
    assert [mixed[0, 0, 0].item(), mixed[3, 4, 5].item(), wsum(mixed)] == pytest.approx(
        [0.555556039, 0.0927174903, -1.64819664], rel=1e-8)
    torch.testing.assert_close(mixed.norm(dim=2), torch.ones(4, 5, dtype=torch.float64))
    before = (q[:, None] * bank[partners]).sum(2)
    assert ((q[:, None] * mixed[:, 3:]).sum(2) >= before).all()  # towards the query
    assert ((mixed[:, 3:] * bank[partners]).sum(2) >= 0.5**0.5 * (1 + before).sqrt() - 1e-12).all()  # not past half way


def test_mochis_loss_equals_printed_values_and_loops():
    mixed = hardneg.mix_negatives(q, bank, pairs, a, partners, b)
    found = [with_gradients(loss_of, mixed, 0.2, rows=bank) for loss_of in (hardneg.mochi_loss, slow_mochi)]
    for x, y in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    loss, (to_q, to_k, _) = found[0]
    assert [loss.item(), to_q.norm().item(), to_q[2, 1].item(), to_k.norm().item(), to_k[0, 3].item()] == pytest.approx(
        [1.01874171, 1.02876314, 0.27517591, 1.5939447, -0.383113722], rel=1e-8)
    assert found[1][0].item() == pytest.approx(1.01874171, rel=1e-8)


def test_mochi_that_mixes_nothing_is_moco():
    assert hardneg.info_nce(q, k, bank, 0.2).item() == pytest.approx(0.680274262, rel=1e-8)
    nothing = torch.empty(4, 0, 6, dtype=torch.float64)
    assert_equal_losses(lambda q, k, n: hardneg.mochi_loss(q, k, n, nothing, 0.2),
                        lambda q, k, n: slow_info_nce(q, k, n, 0.2), bank)


def test_mixtures_are_of_the_hardest_rows_and_the_numbers_say_which():
    of_two = torch.tensor([[[0.0, 0.99, 0.25], [0.5, 0.34, 1.0]]], dtype=torch.float64).expand(4, 2, 3)
    of_query = torch.tensor([[[0.7, 0.6]]], dtype=torch.float64).expand(4, 1, 2)
    mixed = hardneg.mixtures(q, bank, (of_two, of_query), 3)
    nearest = [[2, 8, 6], [0, 3, 5], [1, 4, 5], [2, 5, 8]]
    for i, (first, second, third) in enumerate(nearest):
        wanted = unit(torch.stack([
            0.25 * bank[first] + 0.75 * bank[third], bank[second], 0.3 * q[i] + 0.7 * bank[third]]))
        torch.testing.assert_close(mixed[i], wanted)
    highest = torch.full((4, 1, 3), 1 - 2**-24), torch.full((4, 1, 2), 1 - 2**-24)
    for hard in (1, 3, 7, 9):
        assert hardneg.mixtures(q.float(), bank.float(), highest, hard).isfinite().all()


def test_mixing_numbers_follow_from_seed_epoch_and_position_and_begin_with_their_epoch():
    args = hardneg.parser().parse_args(["--mix", "5", "--mix-query", "2", "--mix-from", "3"])
    x = torch.zeros(8, 3, 4, 4)

    def numbers(epoch, rows=slice(None)):
        return hardneg.mixing_numbers(x[rows], data.Rng((7, epoch, 0), 8, rows), args, epoch)

    assert numbers(0) is None and numbers(2) is None
    of_two, of_query = numbers(3)
    assert of_two.shape == (8, 5, 3) and of_query.shape == (8, 2, 2)
    assert torch.equal(torch.cat([numbers(3, slice(0, 4))[0], numbers(3, slice(4, 8))[0]]), of_two)
    assert not torch.equal(numbers(4)[0], of_two) and len(of_two.unique()) == of_two.numel()
    for other in ("plain", "ifm", "hcl", "debiased"):
        args.negatives = other
        assert numbers(3) is None


# Closed forms, limits and the log ----------------------------------------------------------------------------
@pytest.mark.parametrize("base, count", [("moco", 16), ("simclr", 2 * 4 - 2)])
@pytest.mark.parametrize("negatives", ["plain", "ifm", "hcl", "debiased", "mochi"])
def test_the_chance_that_is_printed_is_the_loss_of_equal_embeddings(base, count, negatives):
    if (base, negatives) == ("simclr", "mochi"):
        return
    same = unit(torch.ones(4, 8, dtype=torch.float64))
    rows = same[:1].expand(16, 8) if base == "moco" else None
    flags = ["--base", base, "--negatives", negatives, "--bank-size", "16", "--batch-size", "4", "--hardest", "3",
             "--mix", "5", "--mix-query", "2", "--alpha", "0.4"]
    for more in ([], ["--ifm-only"], ["--temperature", "0.3"]):
        args = read_flags(hardneg, *flags, *more)
        mixed = same[:, None].expand(4, 7, 8) if negatives == "mochi" else None
        loss = hardneg.objective(same, same, rows, mixed, **hardneg.loss_settings(args))
        assert hardneg.chance_of(args, mixes=negatives == "mochi") == pytest.approx(loss.item(), rel=1e-9)
        if negatives not in ("ifm", "mochi"):
            assert loss.item() == pytest.approx(math.log(count + 1), rel=1e-9)


@pytest.mark.parametrize("rows", [bank.float(), None], ids=["moco", "simclr"])
@pytest.mark.parametrize("T", [0.001, 0.02, 50.0])
def test_losses_and_gradients_are_finite_at_any_temperature_in_float32(T, rows):
    for loss_of in (lambda q, k: hardneg.ifm_loss(q, k, rows, T, 0.1),
                    lambda q, k: hardneg.hcl_loss(q, k, rows, T, 1.0, 0.1),
                    lambda q, k: hardneg.hcl_loss(q, k, rows, T, 0.0, 0.9)):
        for sign in (1, -1):
            anchor, key = q.float().requires_grad_(), (sign * k).float().requires_grad_()
            loss = loss_of(anchor, key)
            loss.backward()
            assert loss.isfinite() and anchor.grad.isfinite().all() and key.grad.isfinite().all()


def test_hcls_value_has_no_seam_at_its_floor():
    """Just above and below where R = tau N p + (1 - tau) floor, and where nothing is left of R."""
    for tau in torch.linspace(0.0, 0.95, 40).tolist():
        for T in (0.03, 0.5):
            fast, slow = (loss_of(q, k, None, T, 1.0, tau).item() for loss_of in (hardneg.hcl_loss, slow_hcl))
            assert fast == pytest.approx(slow, rel=1e-9, abs=1e-13)


def test_hardness_is_what_it_is_called():
    mixed = hardneg.mix_negatives(q, bank, pairs, a, partners, b)
    for rows, more in ((bank, None), (bank, mixed), (bank, mixed[:, :0]), (None, None)):
        found = hardneg.hardness(q, k, rows, more)
        mass, hits, nearest = [], [], []
        for i, (anchor, positive, others) in enumerate(anchors(q, k, rows)):
            scores = torch.stack([anchor @ n for n in [*others, *(more[i] if more is not None else [])]])
            mass.append(torch.cat([(anchor @ positive)[None], scores]).div(0.05).softmax(0)[1:].sum())
            hits.append((anchor @ positive > scores.max()).double())
            nearest.append(scores.max())
        wanted = {"mass": mass, "accuracy": hits, "cosine": nearest}
        for name, values in wanted.items():
            assert found[name].item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-6), name
    of_moco, of_mochi = (hardneg.hardness(q, k, bank, more) for more in (None, mixed))
    assert 0.01 < of_moco["mass"] < of_mochi["mass"] < 0.99 and of_moco["cosine"] < of_mochi["cosine"]


# Flags ------------------------------------------------------------------------------------------------------
def test_each_rule_has_the_temperature_of_its_paper():
    found = {}
    for base in ("moco", "simclr"):
        for negatives in hardneg.TEMPERATURES[base]:
            args = read_flags(hardneg, "--base", base, "--negatives", negatives)
            found[base, negatives] = hardneg.loss_settings(args)["temperature"]
            args = read_flags(hardneg, "--base", base, "--negatives", negatives, "--temperature", "0.37")
            assert hardneg.loss_settings(args)["temperature"] == 0.37
    assert found == {
        ("moco", "plain"): 0.2, ("moco", "ifm"): 0.2, ("moco", "mochi"): 0.2, ("moco", "hcl"): 0.5,
        ("moco", "debiased"): 0.5, ("simclr", "plain"): 0.5, ("simclr", "ifm"): 0.5, ("simclr", "hcl"): 0.5,
        ("simclr", "debiased"): 0.5}


@pytest.mark.parametrize("flags, words", [
    (["--base", "simclr"], "--negatives mochi mixes rows of a queue, and --base simclr has none; use --base moco"),
    (["--bank-size", "512"], "--hardest 1024: the bank has --bank-size 512 rows only"),
    (["--epochs", "10"], "--mix-from 10: must be less than --epochs 10, or nothing is mixed"),
    (["--negatives", "hard"], "--negatives hard: choose one of plain, ifm, hcl, debiased, mochi"),
    (["--base", "byol"], "--base byol: choose one of moco, simclr"),
    (["--tau", "1"], "--tau 1: must be a number from 0 to 0.999"),
    (["--hardest", "0"], "--hardest 0: must be"), (["--mix", "-1"], "--mix -1: must be"),
    (["--shift", "-0.1"], "--shift -0.1: must be"), (["--beta", "-1"], "--beta -1: must be"),
    (["--temperature", "0"], "--temperature 0: must be")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(hardneg, *flags)
    read_flags(hardneg, "--negatives", "plain", "--bank-size", "512")  # --hardest is MoCHi's
    read_flags(hardneg, "--negatives", "plain", "--epochs", "5")
    read_flags(hardneg, "--mix", "0", "--mix-query", "0")
    read_flags(hardneg, "--epochs", "0")


@pytest.mark.parametrize("epoch, lr", [
    (0, 0.03), (1, 0.02999818649748041), (50, 0.02569446968344225), (100, 0.0153), (199, 0.0006018135025195893)])
def test_learning_rate_equals_printed_values(epoch, lr):
    assert hardneg.lr_at(epoch, 200, 0.03, 0, 6e-4) == pytest.approx(lr, rel=1e-9)
