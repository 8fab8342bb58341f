"""The mathematics of adco.py against the paper read aloud: slow float64 loops, and printed values."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import adco
from common import dist, encoders
from common.pgd import eval_mode, pgd
from common.resnet import BranchNorm
from tests.processes import in_two_processes
from tests.recipes import X, Z, unit
from tests.test_docs import commands
from tests.scripts import named_by, read_flags


def S(n, d, p):
    """sin(p + 1.3 i + .7 j + .31 i j), (n, d)."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(p + 1.3 * i + 0.7 * j + 0.31 * i * j)


q, k = unit(S(4, 6, 0)), unit(S(4, 6, 0.5))
W = S(9, 6, 2) * (0.5 + 0.25 * torch.arange(9, dtype=torch.float64))[:, None]


def loss_of_rows(q, k, bank, T, keys=None):
    """The loss of rows of any length, as train_step reads them."""
    return adco.contrastive_loss(q, k, unit(bank), T, keys)


def slow_loss(q, k, bank, T, keys=None):
    """Eq. 3, one query and one negative at a time."""
    total = 0.0
    for i in range(len(q)):
        positive = torch.exp(torch.dot(q[i], k[i]) / T)
        own = positive if keys is None else sum(torch.exp(torch.dot(q[i], key) / T) for key in keys)
        negative = sum(torch.exp(torch.dot(q[i], w / w.norm()) / T) for w in bank)
        total = total - torch.log(positive / (own + negative))
    return total / len(q)


@pytest.mark.parametrize("T, keys, value, dq, dW", [
    (0.12, None, 0.5990924317947495, (1.448199738608355, 0.16620956453269448),
     (0.7331388771079249, 0.12678272063632612, -0.002102697021237912)),
    (0.02, None, 0.8700570445147147, (10.683585669408249, 0.4306411827241079),
     (5.045499572794837, 0.8663388662455525, -8.9089e-16)),
    (0.12, k, 0.6017615322287864, (1.452428270512172, 0.16764013400318123),
     (0.7320357011723938, 0.12655932915739876, -0.002091625699788997))])
def test_the_loss_equals_slow_loops_and_the_printed_value_and_gradients(T, keys, value, dq, dW):
    grads = []
    for loss_of in (loss_of_rows, slow_loss):
        a, w = q.clone().requires_grad_(), W.clone().requires_grad_()
        loss = loss_of(a, k, w, T, keys)
        assert loss.item() == pytest.approx(value, rel=1e-9)
        grads.append(torch.autograd.grad(loss, (a, w)))
    for fast, slow in zip(*grads):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    a, w = grads[0]
    assert (a.norm().item(), a[2, 1].item()) == pytest.approx(dq, rel=1e-9, abs=1e-12)
    assert (w.norm().item(), w[0, 0].item(), w[8, 5].item()) == pytest.approx(dW, rel=1e-9, abs=1e-12)


def bank_gradient(q, k, bank, T):
    w = bank.clone().requires_grad_()
    return torch.autograd.grad(loss_of_rows(q, k, w, T), w)[0]


def test_survey_eq_7_is_the_banks_gradient_before_the_cosines_jacobian():
    """Eq. 7 moves a free negative along (1/T) E[p z]; as the rows are read through n = w / |w|, the part along n
    drops out and the rest is divided by |w|."""
    T = 0.05
    G = torch.zeros_like(W)
    for i in range(4):
        logits = torch.stack([torch.dot(q[i], k[i]), *(torch.dot(q[i], w / w.norm()) for w in W)]) / T
        p = logits.softmax(0)[1:]
        for j in range(9):
            G[j] += p[j] * q[i] / 4 / T
    n = W / W.norm(dim=1, keepdim=True)
    want = (G - (n * G).sum(1, keepdim=True) * n) / W.norm(dim=1, keepdim=True)
    got = bank_gradient(q, k, W, T)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (got * W).sum(1).abs().max() < 1e-12  # no step changes a length at first order


def test_the_banks_gradient_equals_finite_differences():
    assert torch.autograd.gradcheck(lambda w: loss_of_rows(q, k, w, 0.2), W.clone().requires_grad_())


def test_closed_forms():
    same = unit(torch.ones(4, 8, dtype=torch.float64))
    bank = 3 * same[:1].expand(16, 8)
    assert loss_of_rows(same, same, bank, 0.12).item() == pytest.approx(math.log(17))
    assert loss_of_rows(same, same, bank, 0.12, same).item() == pytest.approx(math.log(20))
    e = torch.eye(17, dtype=torch.float64)
    value = loss_of_rows(e[:1], e[:1], 5 * e[1:], 0.12).item()
    assert value == pytest.approx(math.log(1 + 16 * math.exp(-1 / 0.12)), rel=1e-12)


def test_the_loss_is_the_same_under_autocast_and_finite_at_any_temperature():
    a, b, w = q.float().requires_grad_(), k.float(), W.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cast, low = loss_of_rows(a, b, w, 0.02, b), loss_of_rows(a, -a.detach(), w, 0.001)
    assert cast == loss_of_rows(a, b, w, 0.02, b)
    low.backward()
    assert low.isfinite() and a.grad.isfinite().all() and w.grad.isfinite().all()


STEP = dict(lr=0.02, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("steps, directions, values", [
    (1, 1, (7.717215347175207, 0.4609531352025046, -0.06414543782083668, 0.7095735644887649)),
    (3, 1, (7.712151449663641, 0.4891507050154293, -0.06408638742919853, 1.0839628125868241)),
    (1, 2, (7.717149529159941, 0.4579571864463916, -0.06414542981958511))])
def test_bank_steps_equal_printed_values_and_sgd_that_maximises(steps, directions, values):
    T, w, v, rows = 0.05, W.clone(), torch.zeros_like(W), nn.Parameter(W.clone())
    opt = torch.optim.SGD([rows], maximize=True, **STEP)
    for _ in range(steps):
        pairs = [(q, k), (k, q)][:directions]
        rows.grad = sum(bank_gradient(*pair, w, T) for pair in pairs) / directions
        adco.bank_step(w, v, rows.grad, **STEP)
        opt.step()
        torch.testing.assert_close(w, rows.data, rtol=1e-12, atol=1e-12)
    found = [w.norm().item(), w[0, 0].item(), w[8, 5].item(), loss_of_rows(q, k, w, T).item()]
    assert found[: len(values)] == pytest.approx(list(values), rel=1e-9)
    assert found[3] > loss_of_rows(q, k, W, T).item() == pytest.approx(0.6367563904844573, rel=1e-9)


class Linear(nn.Module):
    """The network of the printed values: x -> Z x."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(Z(6, 48))

    def forward(self, x):
        return x.flatten(1) @ self.W.T


x1 = X(4, 3, 4, 4)
x2 = x1.flip(3)
key = unit(Linear()(x2)).detach()
START = S(4, 48, 1).view(4, 3, 4, 4)


def arguments(**flags):
    return SimpleNamespace(**{**vars(adco.parser().parse_args([])), "eps": 8.0, **flags})


def attack(net, x, k, keys, bank, noise, args):
    return adco.attack(net, x, k, keys, unit(bank), noise, **adco.attack_settings(args))


def train_step(net, target, opt, bank, x_q, x_k, order, noise, args):
    settings = named_by(adco.train_step, adco, args)
    return adco.train_step(net, target, opt, bank, x_q, x_k, order, noise, **settings)


def test_the_hybrids_attack_equals_printed_values():
    net = Linear()
    x_adv = attack(net, x1, key, None, W, START, arguments())
    d = (x_adv - x1).flatten(1)
    assert [(d * S(4, 48, 3)).sum().item(), d.abs().sum().item()] == pytest.approx(
        [-0.5178698677543978, 4.465596782585069], rel=1e-9)
    assert slow_loss(unit(net(x1)), key, W, 0.12).item() == pytest.approx(0.10132713234927593, rel=1e-9)
    loss = slow_loss(unit(net(x_adv)), key, W, 0.12)
    assert loss.item() == pytest.approx(0.20168206510609865, rel=1e-9)
    assert torch.autograd.grad(loss, net.W)[0].norm().item() == pytest.approx(0.7148191607210505, rel=1e-9)
    g = bank_gradient(unit(net(x_adv)).detach(), key, W, 0.02)
    assert g.norm().item() == pytest.approx(0.045378809810428564, rel=1e-9)
    fgsm = attack(net, x1, key, None, W, 0 * START, arguments(steps=1, step_size=8.0))
    assert ((fgsm - x1).flatten(1) * S(4, 48, 3)).sum().item() == pytest.approx(-0.13961055101384331, rel=1e-9)
    assert slow_loss(unit(net(fgsm)), key, W, 0.12).item() == pytest.approx(0.23449000222372507, rel=1e-9)


def test_the_hybrids_attack_sees_the_keys_that_are_negatives():
    net, keys = Linear(), unit(S(6, 6, 3))
    fgsm = arguments(steps=1, step_size=8.0)
    x_adv = attack(net, x1, key, keys, W, None, fgsm)
    x = x1.clone().requires_grad_()
    (g,) = torch.autograd.grad(slow_loss(unit(net(x)), key, W, 0.12, keys), x)
    torch.testing.assert_close(x_adv, (x1 + 8 / 255 * g.sign()).clamp(0, 1), rtol=0, atol=1e-12)
    assert not torch.equal(x_adv, attack(net, x1, key, None, W, None, fgsm))


def memory(rows):
    bank = adco.make_bank(*rows.shape).to(rows.dtype)
    bank.rows.copy_(rows)
    return bank


def step(net, target, x_q, x_k, bank=None, **flags):
    """A real train_step. The network's optimizer only records."""
    bank = bank or memory(W)
    args = arguments(**{"ema": 0.0, **flags})
    opt = torch.optim.SGD(net.parameters(), 0.0)
    order = torch.arange(len(x_q[0])).flip(0)
    noise = [START[: len(x)] for x in x_q] if args.eps else None
    return train_step(net, target, opt, bank, x_q, x_k, order, noise, args), bank


@pytest.mark.parametrize("flags, weight", [
    ({}, [1]), ({"eps": 0.0}, [1]), ({"eps": 0.0, "batch_negatives": True}, [1]),
    ({"eps": 0.0, "symmetric": True}, [0.5, 0.5]), ({"multi_crop": True, "eps": 0.0}, [1, 1, 1])])
def test_a_step_is_descent_of_the_network_and_ascent_of_the_bank_at_one_point(flags, weight):
    net, target, slow = Linear(), Linear().requires_grad_(False), Linear()
    x_q = {1: [x1], 2: [x1, x2], 3: [x1, x1.flip(2), x2]}[len(weight)]
    x_k = [x2, x1][: 2 if "symmetric" in flags else 1]
    losses, bank = step(net, target, x_q, x_k, bank_lr=0.3, bank_decay=0.1, **flags)
    loss, climb, w = 0.0, 0.0, W.clone().requires_grad_()
    for i, (share, x) in enumerate(zip(weight, x_q)):
        k = unit(Linear()(x_k[i % len(x_k)])).detach()
        if flags.get("eps", 8.0):
            x = attack(slow, x, k, None, W, START, arguments())
        keys = k if "batch_negatives" in flags else None
        loss = loss + share * slow_loss(unit(slow(x)), k, W, 0.12, keys)
        climb = climb + share * slow_loss(unit(slow(x)).detach(), k, w, 0.05, keys)
    loss.backward()
    assert losses["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(net.W.grad, slow.W.grad, rtol=1e-9, atol=1e-12)
    velocity = 0.1 * W - torch.autograd.grad(climb, w)[0]
    torch.testing.assert_close(bank.velocity, velocity, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bank.rows, W - 0.3 * velocity, rtol=1e-9, atol=1e-12)
    assert target.W.grad is None


@pytest.mark.parametrize("flags, queries, keys", [
    ({}, 1, 1), ({"symmetric": True}, 2, 2), ({"multi_crop": True}, 3, 1)])
def test_a_step_gathers_each_key_once_and_never_within_an_attack(flags, queries, keys, monkeypatch):
    """A process that attacks alone, as for a picture, must not wait for the others."""
    gathered, attack = [], adco.attack

    def alone(*args, **settings):
        before = len(gathered)
        x_adv = attack(*args, **settings)
        assert len(gathered) == before
        return x_adv

    monkeypatch.setattr(dist, "gather", lambda z: gathered.append(z) or z)
    monkeypatch.setattr(adco, "attack", alone)
    x_q, x_k = [x1, x2, x1][:queries], [x2, x1][:keys]
    step(Linear(), Linear().requires_grad_(False), x_q, x_k, batch_negatives=True, **flags)
    assert len(gathered) == keys


def test_a_symmetric_step_is_one_pass_over_stacked_rows():
    q1, q2, k1, k2 = (unit(S(4, 6, p)) for p in (0, 0.4, 0.1, 0.5))
    w = W.clone().requires_grad_()
    both = adco.objective([(q1, k2, None), (q2, k1, None)], unit(w), 0.05, True)
    stacked = loss_of_rows(torch.cat([q1, q2]), torch.cat([k2, k1]), w, 0.05)
    assert both.item() == pytest.approx(stacked.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(f, w)[0] for f in (both, stacked)), rtol=1e-12, atol=1e-12)


def test_the_alarms_are_what_they_are_called():
    losses, bank = step(Linear(), Linear().requires_grad_(False), [x1], [x2], eps=0.0, bank_lr=0.2)
    query, n, old = unit(Linear()(x1)).detach(), unit(bank.rows), unit(W)
    s = torch.cat([(query * key).sum(1, keepdim=True), query @ n.T], 1)
    assert losses["mass"].item() == pytest.approx((s / 0.05).softmax(1)[:, 1:].sum(1).mean().item(), rel=1e-9)
    gain = slow_loss(query, key, bank.rows, 0.05) - slow_loss(query, key, W, 0.05)
    assert losses["bank_gain"].item() == pytest.approx(gain.item(), rel=1e-9) and gain > 0
    angle = 2 * torch.asin((n - old).norm(dim=1) / 2)
    assert losses["rotation"].item() == pytest.approx(angle.mean().item(), rel=1e-2)
    assert losses["norm"].item() == pytest.approx(bank.rows.norm(dim=1).mean().item(), rel=1e-12)
    assert losses["accuracy"].item() == (s.argmax(1) == 0).double().mean().item()
    assert losses["cosine"].item() == pytest.approx(s[:, 1:].amax(1).mean().item(), rel=1e-9)
    far = memory(-1.0 * key.mean(0).expand(9, 6))
    dead, _ = step(Linear(), Linear().requires_grad_(False), [x1], [x2], far, eps=0.0)
    assert dead["mass"] < 1e-6 and dead["bank_gain"].abs() < 1e-6 and dead["accuracy"] == 1


def test_momentum_update_comes_before_the_keys():
    net, target = Linear(), Linear().requires_grad_(False)
    with torch.no_grad():
        net.W += 1
    losses, _ = step(net, target, [x1], [x2], eps=0.0, ema=0.9)
    torch.testing.assert_close(target.W, Z(6, 48) + 0.1)
    want = slow_loss(unit(net(x1)), unit(x2.flatten(1) @ (Z(6, 48) + 0.1).T), W, 0.12)
    assert losses["loss"].item() == pytest.approx(want.item(), rel=1e-9)


def test_batchnorm_sees_groups_and_keys_in_another_order():
    torch.manual_seed(0)
    net, x = adco.network("slim"), torch.rand(80, 3, 16, 16)
    before = copy.deepcopy(net.state_dict())
    z = net(x)
    parts = [27, 27, 26]  # at most 32
    alone = adco.encoders.make("slim", mean=adco.MEAN, std=adco.STD)
    alone.load_state_dict({key[2:]: v for key, v in before.items() if key[0] == "0"})
    torch.testing.assert_close(z, torch.cat([net[1](alone(part)) for part in x.split(parts)]))
    net.load_state_dict(before)
    order = torch.randperm(80)
    keys = adco.embed_keys(net, [x], order)[0]
    want = torch.empty_like(keys)
    want[order] = torch.cat([F.normalize(net[1](alone(part)), dim=1) for part in x[order].split(parts)])
    torch.testing.assert_close(keys, want)
    assert not torch.allclose(keys, F.normalize(z, dim=1), atol=1e-3)


@pytest.mark.parametrize("n, groups", [(2, 1), (3, 1), (4, 2), (32, 2), (64, 2), (65, 3), (256, 8)])
def test_groups_are_of_2_to_32(n, groups):
    norm = adco.GroupedNorm(2, momentum=1.0)
    x = torch.randn(n, 2, 3, 3)
    parts = x.tensor_split(groups)
    assert all(2 <= len(part) <= 32 for part in parts)
    torch.testing.assert_close(norm(x), torch.cat([F.batch_norm(p, None, None, training=True) for p in parts]))


def real():
    torch.manual_seed(0)
    net = adco.network("slim")
    g = torch.Generator().manual_seed(1)
    x1, x2, noise = torch.rand(3, 8, 3, 32, 32, generator=g)
    target = copy.deepcopy(net).requires_grad_(False)
    return net, target, memory(torch.randn(32, 128, generator=g)), x1, x2, 2 * noise - 1


def test_the_attack_climbs_and_leaves_no_trace_and_its_constants_change_no_bit():
    net, target, bank, x1, x2, noise = real()
    k = F.normalize(target(x2), dim=1).detach()
    before, args, eps = copy.deepcopy(net.state_dict()), arguments(), 8 / 255
    x_adv = attack(net, x1, k, None, bank.rows, noise, args)
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and all(m.training for m in net.modules())
    assert (x_adv - x1).abs().max() <= eps + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1

    def loss(x):
        return slow_loss(F.normalize(net(x), dim=1), k, bank.rows, 0.12)

    with eval_mode(net):
        assert loss(x_adv) > loss(x1) + 1e-3
        again = pgd(lambda x: loss_of_rows(adco.embed(net, x), k, bank.rows, 0.12),
                    x1, eps, 2 / 255, 5, start=(x1 + eps * noise).clamp(0, 1))
    assert torch.equal(x_adv, again)


@pytest.mark.parametrize("flags, terms, others", [
    ([], 1, 1), (["--symmetric"], 1, 1), (["--multi-crop"], 5, 1), (["--batch-negatives"], 1, 4),
    (["--multi-crop", "--batch-negatives"], 5, 4), (["--symmetric", "--batch-negatives"], 1, 4)])
def test_the_chance_loss_that_is_printed_is_that_of_embeddings_that_are_all_alike(flags, terms, others):
    args = adco.parser().parse_args(["--bank-size", "9", "--batch-size", "4", *flags])
    rows = torch.eye(6, dtype=torch.float64)[:1].expand(4, 6)
    queries = 5 if args.multi_crop else 2 if args.symmetric else 1
    triples = [(rows, rows, adco.batch_keys(rows, args.batch_negatives))] * queries
    loss = adco.objective(triples, rows[:1].expand(9, 6), 0.12, args.symmetric)
    assert loss.item() == pytest.approx(terms * math.log(9 + others), rel=1e-9)
    assert adco.chance(args).endswith(f" = {loss.item():.3f}")


def test_without_clean_queries_a_network_has_no_branches():
    plain, both = (adco.network("slim", None, w).state_dict().keys() for w in (0.0, 0.5))
    assert plain == adco.network("slim").state_dict().keys() and not any("branches" in key for key in plain)
    assert both > {key.replace(".bn1.", ".bn1.branches.adv.") for key in plain if ".bn1." in key}


def test_clean_queries_of_weight_one_are_adco_without_an_attack():
    """The two reductions of (1 - w) L(attacked) + w L(clean), for both players."""
    found = {}
    for name, flags in (("plain", {"eps": 0.0}), ("clean", {"clean_weight": 1.0}), ("hybrid", {}),
                        ("nearly", {"clean_weight": 1e-12})):
        net = Linear()
        losses, bank = step(net, Linear().requires_grad_(False), [x1], [x2], **flags)
        found[name] = [losses["loss"].detach(), net.W.grad, bank.rows, losses["bank_gain"]]
    for name, wanted in (("clean", "plain"), ("nearly", "hybrid")):
        for a, b in zip(found[name], found[wanted]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(found["plain"][1], found["hybrid"][1], rtol=1e-2)


def test_both_branches_are_grouped_and_begin_with_the_statistics_of_the_fill(tmp_path, monkeypatch):
    seen, fill = {}, adco.fill

    def spy(net, *rest):
        fill(net, *rest)
        for module in net.modules():
            if isinstance(module, BranchNorm):
                clean, adv = module.branches["clean"], module.branches["adv"]
                assert type(clean) is type(adv) is adco.GroupedNorm and clean.running_mean.abs().sum() > 0
                for key, value in clean.state_dict().items():
                    assert torch.equal(value, adv.state_dict()[key])
                    assert value.data_ptr() != adv.state_dict()[key].data_ptr()
                seen[module] = clean

    monkeypatch.setattr(adco, "fill", spy)
    adco.main(["--data", "shapes", "--limit", "16", "--arch", "slim", "--batch-size", "16", "--epochs", "1",
               "--bank-size", "8", "--fill-steps", "2", "--eps", "8", "--steps", "1", "--clean-weight", "0.5",
               "--device", "cpu", "--out", str(tmp_path)])
    assert len(seen) > 5


def test_a_vit_has_no_branch_to_export(tmp_path):
    adco.main(["--data", "shapes", "--limit", "16", "--arch", "vit_slim", "--batch-size", "16", "--epochs", "1",
               "--bank-size", "8", "--fill-steps", "1", "--eps", "8", "--steps", "1", "--clean-weight", "0.5",
               "--optimizer", "adamw", "--lr", "0.001", "--device", "cpu", "--out", str(tmp_path)])
    assert encoders.load_encoder(tmp_path / "encoder.pt").branch is None


def on_ranks(rank, world):
    """Three steps on this process's share of eight images, linear networks and a bank."""
    x, g = X(8, 3, 4, 4).chunk(world)[rank], torch.arange(8 // world)
    net, target, bank = Linear(), Linear().requires_grad_(False), memory(W)
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    args = arguments(batch_negatives=True, bank_lr=0.3)
    for _ in range(3):
        losses = train_step(net, target, opt, bank, [x], [x.flip(3)], g, [0 * x], args)
    return losses["loss"].detach(), net.W.detach(), bank.rows, bank.velocity


def test_two_ranks_keep_equal_banks_and_take_the_steps_of_one(tmp_path):
    loss, *want = on_ranks(0, 1)
    both = in_two_processes(on_ranks, tmp_path)
    torch.testing.assert_close((both[0][0] + both[1][0]) / 2, loss, rtol=1e-10, atol=1e-12)
    for a, b, c in zip(both[0][1:], both[1][1:], want):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)


def test_the_fill_leaves_equal_networks_and_a_bank_of_their_keys(tmp_path, monkeypatch):
    """An older network's keys would be out of the queries' reach."""
    seen, keys = {}, []
    fill, embed_keys = adco.fill, adco.embed_keys

    def spy_keys(target, x_k, order, bn):
        keys.append(([p.clone() for p in target.parameters()], embed_keys(target, x_k, order, bn)))
        return keys[-1][1]

    def spy(net, target, opt, bank, images, size, args, env):
        monkeypatch.setattr(adco, "embed_keys", spy_keys)
        fill(net, target, opt, bank, images, size, args, env)
        monkeypatch.setattr(adco, "embed_keys", embed_keys)
        seen["mass"] = opt.state_dict()["state"][0]["momentum_buffer"].abs().sum()
        seen["nets"] = all(torch.equal(a, b) for a, b in zip(net.parameters(), target.parameters()))
        seen["bank"] = copy.deepcopy(bank)
        assert len(keys) == 4 + 3 and all(
            all(map(torch.equal, weights, net.parameters())) for weights, _ in keys[4:])
        rows = {tuple(row) for row in bank.rows.tolist()}
        assert rows <= {tuple(row) for _, (k,) in keys[4:] for row in k.tolist()} and len(rows) == 40

    monkeypatch.setattr(adco, "fill", spy)
    adco.main(["--data", "shapes", "--limit", "32", "--arch", "slim", "--batch-size", "16", "--epochs", "1",
               "--bank-size", "40", "--fill-steps", "4", "--device", "cpu", "--out", str(tmp_path)])
    assert seen["mass"] > 0 and seen["nets"] and seen["bank"].pointer == (4 + 3) * 16 % 40
    assert seen["bank"].velocity.abs().sum() == 0
    torch.testing.assert_close(seen["bank"].rows.norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("mass, lines", [(0.01, 1), (0.5, 0)])
def test_a_dead_bank_is_named_in_one_line_an_epoch(tmp_path, capsys, monkeypatch, mass, lines):
    monkeypatch.setattr(adco, "alarms", lambda *_: {"mass": torch.tensor(mass)})
    adco.main(["--data", "shapes", "--limit", "32", "--arch", "slim", "--batch-size", "16", "--epochs", "1",
               "--bank-size", "8", "--fill-steps", "1", "--device", "cpu", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("the bank is dead: mass 0.010") == lines


@pytest.mark.parametrize("epoch, lr", [
    (0, 0.03), (1, 0.02999818649748041), (50, 0.02569446968344225), (100, 0.0153), (199, 0.0006018135025195893)])
def test_learning_rate_equals_printed_values(epoch, lr):
    assert adco.lr_at(epoch, 200, 0.03, 0, 6e-4) == pytest.approx(lr, rel=1e-9)


def test_network_sizes_are_the_authors():
    assert sum(p.numel() for p in adco.network("resnet18").parameters()) == 11_497_152
    assert sum(p.numel() for p in adco.network("resnet50", "imagenet").parameters()) == pytest.approx(27.97e6, rel=1e-3)
    plain = encoders.make("slim", mean=adco.MEAN, std=adco.STD)
    plain.load_state_dict(adco.network("slim")[0].state_dict())


def test_views_of_the_crops_have_the_published_sides():
    class Half:
        def uniform(self, *shape, device="cpu"):
            return torch.full((2, *shape), 0.5)

    x = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    x_q, x_k = adco.views(x, Half(), 224, **adco.view_settings(arguments(multi_crop=True)))
    assert [v.shape[3] for v in x_q] == [224, 192, 160, 128, 96] and [v.shape[3] for v in x_k] == [224]
    x_q, x_k = adco.views(x, Half(), 32, **adco.view_settings(arguments(symmetric=True)))
    assert x_q[0] is x_k[1] and x_q[1] is x_k[0] and x_q[0].shape == (2, 3, 32, 32)


def test_defaults():
    want = dict(epochs=200, batch_size=256, lr=0.06, lr_final=0, weight_decay=5e-4, ema=0.99, bank_size=4096,
                temperature=0.12, bank_temperature=0.05, bank_lr=0.5, bank_momentum=0.9, bank_decay=1e-4,
                fill_steps=256, norm="linf", eps=0, step_size=None, steps=5, random_start=True,
                clean_weight=0, optimizer="sgd", symmetric=False, multi_crop=False,
                batch_negatives=False, arch="resnet18", data="cifar10", image_size=None, blur=False)
    args = vars(adco.parser().parse_args([]))
    assert {key: args[key] for key in want} == want


@pytest.mark.parametrize("flags, words", [
    (["--symmetric", "--multi-crop"], "--symmetric and --multi-crop: choose one"),
    (["--eps", "300"], "--eps 300: with --norm linf at most 255, the range of a pixel"),
    (["--clean-weight", "0.5"], "--clean-weight 0.5: needs --eps above 0"),
    (["--clean-weight", "1", "--eps", "8"], "--clean-weight 1: gives attacked queries no weight.*use --eps 0"),
    (["--clean-weight", "1.5", "--eps", "8"], "--clean-weight 1.5: must be a number from 0 to 1"),
    (["--optimizer", "lars"], "--optimizer lars: choose one of sgd, adamw"),
    (["--eps", "-8"], "--eps -8: must be"), (["--norm", "l1"], "--norm l1: choose one of linf, l2"), (["--steps", "-1"], "--steps -1: must be"),
    (["--fill-steps", "-1"], "--fill-steps -1: must be"),
    (["--bank-temperature", "0"], "--bank-temperature 0: must be"),
    (["--bank-momentum", "1.5"], "--bank-momentum 1.5: must be a number from 0 to 1"),
    (["--bank-lr", "-1"], "--bank-lr -1: must be")])
def test_bad_flags_of_the_method_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        read_flags(adco, *flags)


def imagenet_commands(script):
    """The flags of each command line on ImageNet in the docstring."""
    return [flags for _, flags in commands(script.__doc__) if "imagenet" in flags]


def run_on_jpegs(script, flags, folder):
    """Two steps of a command line, on a tree of JPEGs and with a slim encoder; returns the run's folder."""
    rng = np.random.default_rng(0)
    for i in range(8):
        path = folder / "tree" / "train" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (240, 300 - i, 3), dtype=np.uint8)).save(path)
    script.main([*flags, "--data", str(folder / "tree"), "--arch", "slim", "--batch-size", "4", "--epochs", "1",
                 "--bank-size", "16", "--fill-steps", "4", "--workers", "0", "--device", "cpu", "--out",
                 str(folder / "run")])
    return folder / "run"


@pytest.mark.parametrize("more", [[], ["--multi-crop"], ["--symmetric"], ["--eps", "4", "--steps", "1"]])
def test_the_imagenet_command_runs_on_jpegs(more, tmp_path):
    ((*flags,),) = imagenet_commands(adco)
    assert adco.parser().parse_args(flags).bank_size == 65536
    out = run_on_jpegs(adco, [*flags, *more], tmp_path)
    exported = torch.load(out / "encoder.pt", weights_only=True)
    assert exported["stem"] == "imagenet" and Image.open(out / "views.png").size[0] > 4 * 224
