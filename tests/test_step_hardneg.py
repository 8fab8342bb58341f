"""Two whole steps of hardneg.py against the methods written out: plain loops in float64, nothing of hardneg.py or
common/."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hardneg
from common.bank import Bank
from tests import steps2 as plain

B, K, HARD, MIX, MIX_QUERY = 5, 7, 3, 4, 2
FLAGS = dict(ema=0.9, temperature=0.3, lr=0.1, weight_decay=0.02, shift=0.15, alpha=0.6, beta=0.7, tau=0.02, hardest=HARD,
             mix=MIX, mix_query=MIX_QUERY, mix_from=0, bank_size=K)


# ----------------------------------------------------------------------------------------------------------
# The methods
# ----------------------------------------------------------------------------------------------------------
def embed(f, x, order):
    """u(f(x)), rows in the order of x. BatchNorm sees two groups of the images in `order`, and each moves the running
    statistics by half of their usual way."""
    z = {}
    half = (len(x) + 1) // 2
    for group in (order[:half], order[half:]):
        h = torch.nn.functional.conv2d((x[group] - f["0.mean"]) / f["0.std"], f["0.conv.weight"])
        h = plain.batch_norm(f, "0.norm", h, "train", share=0.5)
        h = h.relu().mean((2, 3))
        for i, row in zip(group, plain.unit(plain.linear(f, "1", h))):
            z[i] = row
    return torch.stack([z[i] for i in range(len(x))])


def mixtures(q, rows, two, with_query):
    """Of one query q: i, j and a of each mixture of two of its HARD nearest rows, j and 2b of each with the query."""
    q = q.detach()
    nearest = sorted(rows, key=lambda row: -(row @ q).item())[:HARD]
    found = []
    for i, j, a in two.tolist():
        found.append(a * nearest[int(HARD * i)] + (1 - a) * nearest[int(HARD * j)])
    for j, b in with_query.tolist():
        found.append(b / 2 * q + (1 - b / 2) * nearest[int(HARD * j)])
    return [point / point.norm() for point in found]


def loss_of_anchor(positive, negatives, flags):
    """Of its cosine with the positive and those with the negatives."""
    T = flags.temperature
    p = (positive / T).exp()
    n = [(s / T).exp() for s in negatives]
    N = len(n)
    if flags.negatives in ("hcl", "debiased"):
        beta = flags.beta if flags.negatives == "hcl" else 0
        weight = sum(e**beta for e in n) / N
        reweighted = sum(e ** (1 + beta) for e in n) / weight
        g = (reweighted - flags.tau * N * p) / (1 - flags.tau)
        if g < N * math.exp(-1 / T):
            g = N * math.exp(-1 / T)
        return -(p / (p + g)).log()
    loss = -(p / (p + sum(n))).log()
    if flags.negatives == "ifm":
        eps = flags.shift
        p = ((positive - eps) / T).exp()
        shifted = -(p / (p + sum(((s + eps) / T).exp() for s in negatives))).log()
        loss = shifted if flags.ifm_only else (loss + flags.alpha * shifted) / (1 + flags.alpha)
    return loss


def step(net, target, bank, past, names, x1, x2, order, numbers, flags):
    """Changes net, target, bank {"rows", "pointer"} and the optimizer's past; returns what is logged."""
    inward = range(len(x1))
    if flags.base == "moco":
        plain.moving_average(target, net, names, flags.ema)
        k = embed(target, x2, order).detach()
        weights = plain.with_gradient(net, names)
        q = embed(net, x1, inward)
        anchors = [(q[i], k[i], list(bank["rows"])) for i in inward]
        if numbers is not None:
            for i in inward:
                anchors[i][2].extend(mixtures(q[i], bank["rows"], numbers[0][i], numbers[1][i]))
    else:
        weights = plain.with_gradient(net, names)
        q = embed(net, x1, inward)
        k = embed(net, x2, order)
        anchors = []
        for i in inward:
            others = [row for j in inward if j != i for row in (q[j], k[j])]
            anchors += [(q[i], k[i], others), (k[i], q[i], others)]

    losses, masses, hits, nearest = [], [], [], []
    for anchor, positive, others in anchors:
        s = [anchor @ other for other in others]
        losses.append(loss_of_anchor(anchor @ positive, s, flags))
        hard = sum((value / 0.05).exp() for value in s)
        masses.append(hard / (hard + (anchor @ positive / 0.05).exp()))
        nearest.append(max(s))
        hits.append(float(anchor @ positive > max(s)))
    loss = sum(losses) / len(losses)
    plain.sgd(net, names, torch.autograd.grad(loss, weights), past, flags.lr, 0.9, flags.weight_decay)
    if flags.base == "moco":
        rows = bank["rows"].clone()
        for key in k:
            rows[bank["pointer"]] = key
            bank["pointer"] = (bank["pointer"] + 1) % K
        bank["rows"] = rows
    return {"loss": loss, "mass": sum(masses) / len(masses), "accuracy": sum(hits) / len(hits),
            "cosine": sum(nearest) / len(nearest)}


# ----------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------
def network(seed):
    net = nn.Sequential(plain.Encoder(4, hardneg.GroupedNorm), nn.Linear(4, 3))
    return plain.randomised(net, seed, scale=1.5)


def filled_bank(rows):
    """A pointer so near the end that one step wraps."""
    bank = Bank(*rows.shape).double()
    bank.rows = rows.clone()
    bank.pointer = 4
    return bank


@pytest.mark.parametrize("base, negatives, more", [
    ("moco", "plain", {}), ("moco", "ifm", {}), ("moco", "ifm", dict(ifm_only=True)), ("moco", "hcl", {}),
    ("moco", "debiased", {}), ("moco", "debiased", dict(tau=0.6)), ("moco", "mochi", {}),
    ("moco", "mochi", dict(mix_from=1)), ("simclr", "plain", {}), ("simclr", "ifm", {}), ("simclr", "hcl", {}),
    ("simclr", "hcl", dict(tau=0.1)), ("simclr", "debiased", {})],
    ids=lambda part: part if isinstance(part, str) else " ".join(f"{name} {value}" for name, value in part.items()) or "-")
def test_two_steps_are_the_methods(base, negatives, more):
    given = {**FLAGS, "ifm_only": False, "base": base, "negatives": negatives, **more}
    flags = SimpleNamespace(**given)
    args = plain.arguments(hardneg, given)
    g = torch.Generator().manual_seed(3)
    rows = plain.unit(torch.randn(K, 3, generator=g, dtype=torch.float64))

    net = network(1)
    names = plain.trained(net)
    want = dict(net=plain.state(net), target=None, bank=None, past={})
    target = bank = None
    if base == "moco":
        target = network(2).requires_grad_(False)
        bank = filled_bank(rows)
        want.update(target=plain.state(target), bank=dict(rows=rows, pointer=4))
    start = {key: dict(part) for key, part in want.items() if part is not None}
    opt = torch.optim.SGD(net.parameters(), flags.lr, momentum=0.9, weight_decay=flags.weight_decay)
    settings = dict(ema=args.ema, hardest_rows=args.hardest, **hardneg.loss_settings(args))

    for t in range(2):
        x1 = plain.images(B, 6, 10 + t)
        x2 = plain.images(B, 6, 20 + t)
        order = [[3, 0, 4, 2, 1], [2, 4, 0, 1, 3]][t]
        numbers = None
        if negatives == "mochi" and t >= flags.mix_from:
            numbers = (torch.rand(B, MIX, 3, generator=g, dtype=torch.float64),
                       torch.rand(B, MIX_QUERY, 2, generator=g, dtype=torch.float64))
        logged = step(want["net"], want["target"], want["bank"], want["past"], names, x1, x2, order, numbers, flags)
        inputs = [x1.clone(), x2.clone()]
        found = hardneg.train_step(net, target, opt, bank, *inputs, torch.tensor(order), numbers, **settings)
        assert found["accuracy"].item() == pytest.approx(logged.pop("accuracy"), rel=1e-6)  # which is float32
        plain.same({name: value for name, value in found.items() if name != "accuracy"}, logged, f"step {t}, logged")
        plain.same(plain.state(net), want["net"], f"step {t}, net")
        plain.same(plain.memory(opt, net), want["past"], f"step {t}, optimizer")
        if base == "moco":
            plain.same(plain.state(target), want["target"], f"step {t}, target")
            plain.same(bank.rows, want["bank"]["rows"], f"step {t}, bank")
            assert bank.pointer == want["bank"]["pointer"]
        assert torch.equal(inputs[0], x1) and torch.equal(inputs[1], x2)
        assert all(module.training for module in net.modules())
    moving = [*names, "0.norm.running_mean", "0.norm.running_var"]
    plain.all_moved(start["net"], want["net"], moving)
    if base == "moco":
        plain.all_moved(start["target"], want["target"], moving)
        assert all(w.grad is None for w in target.parameters())
    assert 0.01 < logged["mass"] < 0.9999


@pytest.mark.parametrize("base", ["moco", "simclr"])
def test_a_run_has_the_optimizer_of_these_steps(base, tmp_path, monkeypatch):
    given = ["--arch", "slim", "--lr", "0.03", "--weight-decay", "0.02", "--bank-size", "8", "--negatives", "plain",
             "--base", base]
    networks, (opt,) = plain.optimizers_of_main(hardneg, given, tmp_path, monkeypatch)
    net, *others = networks
    assert len(others) == (2 if base == "moco" else 0)  # target and bank
    assert type(opt) is torch.optim.SGD
    if base == "moco":
        assert not any(w.requires_grad for w in others[0].parameters()) and others[1].rows.shape == (8, 128)
    found = plain.settings(opt, net)
    want = dict(lr=0.03, momentum=0.9, weight_decay=0.02, maximize=False)
    for name, _ in net.named_parameters():
        assert {key: found[name][key] for key in want} == want, name
