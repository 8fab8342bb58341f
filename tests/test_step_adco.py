"""Two whole steps of AdCo against the method written out: plain loops in float64, nothing of adco.py or
common/."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import adco
from common.bank import Bank
from common.resnet import BranchNorm
from tests import steps2 as plain
from tests.scripts import named_by

FLAGS = dict(ema=0.9, temperature=0.3, bank_temperature=0.2, bank_lr=0.4, bank_momentum=0.8,
             bank_decay=0.03, lr=0.1, weight_decay=0.02, optimizer="sgd", norm="linf", eps=0.0, step_size=25.0,
             steps=3, clean_weight=0.0)


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def embed(f, x, order, mode, bn=None):
    """u(f(x)), rows in the order of x. In training BatchNorm sees two groups of the images in `order`, and
    each moves the running statistics by half of their usual way. `bn`: the branch of the norm."""
    z = {}
    norm = f"0.norm.branches.{bn}" if bn else "0.norm"
    half = (len(x) + 1) // 2
    for group in (order[:half], order[half:]):
        h = torch.nn.functional.conv2d((x[group] - f["0.mean"]) / f["0.std"], f["0.conv.weight"])
        h = plain.batch_norm(f, norm, h, mode, share=0.5)
        h = h.relu().mean((2, 3))
        for i, row in zip(group, plain.unit(plain.linear(f, "1", h))):
            z[i] = row
    return torch.stack([z[i] for i in range(len(x))])


def contrast(q, k, bank, T, flags):
    """Eq. 3, and for each query the probability of each row of the bank."""
    n = plain.unit(bank)
    total = 0.0
    probabilities = []
    for i in range(len(q)):
        positive = torch.exp(q[i] @ k[i] / T)
        rows = [torch.exp(q[i] @ n[j] / T) for j in range(len(n))]
        keys = [torch.exp(q[i] @ key / T) for key in k] if flags.batch_negatives else [positive]
        total = total - torch.log(positive / (sum(keys) + sum(rows)))
        probabilities.append([row / (sum(keys) + sum(rows)) for row in rows])
    return total / len(q), probabilities


def ascent(q, k, bank, T, flags):
    """The gradient of Eq. 3 in the rows w_j = |w_j| n_j: Eq. 7's mean of p q, less its part along n_j."""
    _, p = contrast(q, k, bank, T, flags)
    g = torch.zeros_like(bank)
    for j, w in enumerate(bank):
        n = w / w.norm()
        pull = sum(p[i][j] * q[i] for i in range(len(q))) / len(q)
        g[j] = (pull - (n @ pull) * n) / (T * w.norm())
    return g


def attack(f, x, k, bank, noise, flags, bn):
    """PGD in the pixels of the query, running statistics in BatchNorm."""
    def loss_of(x_adv, k):
        return contrast(embed(f, x_adv, range(len(x)), "eval", bn), k, bank, flags.temperature, flags)[0]

    return plain.attack(loss_of, x, k, noise, flags)


def step(net, target, bank, past, names, x_q, x_k, order, noise, flags):
    """Changes net, target, bank {"rows", "velocity"} and the optimizer's past; returns what is logged."""
    clean, adv = ("clean", "adv") if flags.clean_weight else (None, None)
    plain.moving_average(target, net, names, flags.ema)
    keys = [embed(target, x, order, "train", clean).detach() for x in x_k]
    if flags.multi_crop:
        keys = keys * len(x_q)
    x_clean = x_q
    if flags.eps:
        x_q = [attack(net, x, k, bank["rows"], start, flags, adv) for x, k, start in zip(x_q, keys, noise)]

    weights = plain.with_gradient(net, names)
    queries = [embed(net, x, range(len(x)), "train", adv) for x in x_q]
    share = 0.5 if flags.symmetric else 1.0  # a mean of both directions, but a sum over crops
    w = flags.clean_weight
    terms = [("loss_adv", (1 - w) * share, q, k) for q, k in zip(queries, keys)]
    if w:
        for x, k in zip(x_clean, keys):
            terms.append(("loss_clean", w * share, embed(net, x, range(len(x)), "train", clean), k))
    loss = 0.0
    before = 0.0
    g = 0.0
    of_kind = {"loss_adv": 0.0, "loss_clean": 0.0}
    for kind, weight, q, k in terms:
        found = contrast(q, k, bank["rows"], flags.temperature, flags)[0]
        of_kind[kind] = of_kind[kind] + share * found.detach()
        loss = loss + weight * found
        q = q.detach()
        before = before + weight * contrast(q, k, bank["rows"], flags.bank_temperature, flags)[0]
        g = g + weight * ascent(q, k, bank["rows"], flags.bank_temperature, flags)
    grads = torch.autograd.grad(loss, weights)
    if flags.optimizer == "sgd":
        plain.sgd(net, names, grads, past, flags.lr, 0.9, flags.weight_decay)
    else:
        plain.adamw(net, names, grads, past, flags.lr, flags.weight_decay, second=0.999)
    old = bank["rows"]
    bank["velocity"] = flags.bank_momentum * bank["velocity"] - g + flags.bank_decay * old
    bank["rows"] = old - flags.bank_lr * bank["velocity"]

    after = 0.0
    for _, weight, q, k in terms:
        after = after + weight * contrast(q.detach(), k, bank["rows"], flags.bank_temperature, flags)[0]
    q = queries[0].detach()
    k = keys[0]
    n = plain.unit(bank["rows"])
    _, p = contrast(q, k, bank["rows"], flags.bank_temperature, flags)
    largest = [max(q[i] @ row for row in n) for i in range(len(q))]
    hits = [float(q[i] @ k[i] > largest[i]) for i in range(len(q))]
    return {
        "loss": loss, **(of_kind if w else {}),
        "mass": sum(sum(row) for row in p) / len(p),
        "bank_gain": after - before,
        "rotation": sum((a - b).norm() for a, b in zip(n, plain.unit(old))) / len(n),
        "norm": sum(row.norm() for row in bank["rows"]) / len(n),
        "accuracy": sum(hits) / len(hits),
        "cosine": sum(largest) / len(largest),
    }


# ----------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------
def optimizer(net, args):
    return adco.optimizer(net, args)


def bank_of(rows, velocity):
    bank = Bank(*rows.shape).double()
    bank.register_buffer("velocity", velocity.clone())
    bank.rows = rows.clone()
    return bank


def step_of_the_script(net, target, opt, bank, x_q, x_k, order, noise, args):
    order = torch.tensor(order)
    settings = named_by(adco.train_step, adco, args)
    return adco.train_step(net, target, opt, bank, x_q, x_k, order, noise if args.eps else None, **settings)


def network(seed, branches):
    def branched(width):
        return BranchNorm(width, ("clean", "adv"), adco.GroupedNorm)

    net = nn.Sequential(plain.Encoder(4, branched if branches else adco.GroupedNorm), nn.Linear(4, 3))
    return plain.randomised(net, seed, scale=1.5)


HYBRID = dict(eps=40.0)
L2 = dict(norm="l2", eps=300.0, step_size=150.0)


@pytest.mark.parametrize("more", [
    {}, dict(symmetric=True), dict(multi_crop=True), dict(batch_negatives=True),
    dict(symmetric=True, batch_negatives=True), dict(multi_crop=True, batch_negatives=True), HYBRID,
    dict(symmetric=True, **HYBRID), dict(multi_crop=True, batch_negatives=True, **HYBRID), L2,
    dict(multi_crop=True, **L2), dict(optimizer="adamw", lr=0.02), dict(clean_weight=0.3, **HYBRID),
    dict(clean_weight=0.3, symmetric=True, batch_negatives=True, **HYBRID),
    dict(clean_weight=0.6, multi_crop=True, **L2)],
    ids=lambda more: " ".join(more) or "plain")
def test_two_steps_are_the_methods(more):
    given = {**FLAGS, **more}
    flags = SimpleNamespace(**{"symmetric": False, "multi_crop": False, "batch_negatives": False, **given})
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(7, 3, generator=g, dtype=torch.float64) * (0.5 + 0.25 * torch.arange(7.0))[:, None]
    velocity = 0.3 * torch.randn(7, 3, generator=g, dtype=torch.float64)

    net = network(1, flags.clean_weight)
    target = network(2, flags.clean_weight).requires_grad_(False)
    bank = bank_of(rows, velocity)
    args = plain.arguments(adco, given)
    opt = optimizer(net, args)
    names = plain.trained(net)
    want = dict(net=plain.state(net), target=plain.state(target), past={})
    want["bank"] = dict(rows=rows, velocity=velocity)
    start = {key: dict(part) for key, part in want.items()}
    for t in range(2):
        x1 = plain.images(5, 6, 10 + t)
        x2 = plain.images(5, 6, 20 + t)
        x_q = [x1]
        x_k = [x2]
        if flags.symmetric:
            x_q = [x1, x2]
            x_k = [x2, x1]
        if flags.multi_crop:
            x_q = [x1, plain.images(5, 5, 30 + t), plain.images(5, 4, 40 + t)]
        order = [[3, 0, 4, 2, 1], [2, 4, 0, 1, 3]][t]
        noise = [plain.noise(x, flags.norm, g) for x in x_q]
        logged = step(want["net"], want["target"], want["bank"], want["past"], names,
                      x_q, x_k, order, noise, flags)
        found = step_of_the_script(net, target, opt, bank, x_q, x_k, order, noise, args)
        plain.same(found, logged, f"step {t}, logged")
        plain.same(plain.state(net), want["net"], f"step {t}, net")
        plain.same(plain.state(target), want["target"], f"step {t}, target")
        plain.same(plain.state(bank), want["bank"], f"step {t}, bank")
        plain.same(plain.memory(opt, net), want["past"], f"step {t}, optimizer")
    statistics = [name for name in want["net"] if ".running_" in name]
    assert len(statistics) == (4 if flags.clean_weight else 2)
    plain.all_moved(start["net"], want["net"], [*names, *statistics])
    seen = [name for name in statistics if ".adv." not in name]  # keys are clean
    plain.all_moved(start["target"], want["target"], [*names, *seen])
    if flags.clean_weight:
        still = set(statistics) - set(seen)
        assert all(torch.equal(start["target"][name], want["target"][name]) for name in still)
    plain.all_moved(start["bank"], want["bank"], ["rows", "velocity"])
    assert 0.01 < logged["mass"] < 0.99 and abs(logged["bank_gain"]) > 1e-4


@pytest.mark.parametrize("kind, class_of, want", [
    ("sgd", torch.optim.SGD, dict(lr=0.03, momentum=0.9, weight_decay=0.02, maximize=False)),
    ("adamw", torch.optim.AdamW, dict(lr=0.03, betas=(0.9, 0.999), weight_decay=0.02, maximize=False))])
def test_a_run_has_the_optimizer_of_these_steps(kind, class_of, want, tmp_path, monkeypatch):
    given = ["--arch", "slim", "--lr", "0.03", "--weight-decay", "0.02", "--bank-size", "8",
             "--fill-steps", "0", "--optimizer", kind]
    (net, target, bank), (opt,) = plain.optimizers_of_main(adco, given, tmp_path, monkeypatch)
    assert type(opt) is class_of
    assert not any(w.requires_grad for w in target.parameters()) and bank.velocity.abs().sum() == 0
    found = plain.settings(opt, net)
    for name, w in net.named_parameters():
        treated = {**want, "weight_decay": 0.0} if kind == "adamw" and w.dim() < 2 else want
        assert {key: found[name][key] for key in treated} == treated, name
