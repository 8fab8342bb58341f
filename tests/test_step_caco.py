"""Two whole steps of CaCo against the method written out: plain loops in float64, nothing of caco.py or
common/."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import caco
from common.bank import Bank
from tests import steps2 as plain
from tests.scripts import named_by

FLAGS = dict(temperature=0.3, bank_momentum=0.8, lr=0.1, weight_decay=0.02, cooperation=1.0,
             optimizer="sgd", norm="linf", eps=0.0, step_size=25.0, steps=3)
EMA = 0.9
BANK_LR = 0.4  # of this epoch


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def embed(f, x, mode="train"):
    """u(f(x)), all norms in that mode."""
    h = torch.nn.functional.conv2d((x - f["0.mean"]) / f["0.std"], f["0.conv.weight"])
    h = plain.batch_norm(f, "0.norm", h, mode).relu().mean((2, 3))
    h = plain.batch_norm(f, "1.norm", plain.linear(f, "1.hidden", h), mode).relu()
    return plain.unit(plain.linear(f, "1.out", h))


def nearest(k, bank):
    """For each key the row of the bank with the largest cosine."""
    found = []
    for key in k:
        cosines = [float(key @ w / w.norm()) for w in bank]
        found.append(cosines.index(max(cosines)))
    return found


def contrast(q, y, bank, T):
    """The loss over the bank's rows alone, and for each query the probability of each row."""
    total = 0.0
    probabilities = []
    for i in range(len(q)):
        rows = [torch.exp(q[i] @ w / w.norm() / T) for w in bank]
        probabilities.append([row / sum(rows) for row in rows])
        total = total - torch.log(probabilities[i][y[i]])
    return total / len(q), probabilities


def direction(q, y, bank, T, flags):
    """Eqs. 7 and 12: where the rows w_j = |w_j| n_j are to go, less what is along n_j. A negative goes to
    the query by p, the query's positive by c (1 - p): with c = -1, Eq. 13, it flees."""
    _, p = contrast(q, y, bank, T)
    c = flags.cooperation
    h = torch.zeros_like(bank)
    for j, w in enumerate(bank):
        n = w / w.norm()
        pull = 0.0
        for i in range(len(q)):
            pull = pull + (c * (1 - p[i][j]) if j == y[i] else p[i][j]) * q[i] / len(q)
        h[j] = (pull - (n @ pull) * n) / (T * w.norm())
    return h


def step(net, target, bank, past, names, x, noise, flags):
    """Changes net, target, bank {"rows", "velocity"} and the optimizer's past; returns what is logged, and
    the positives."""
    T = flags.temperature
    old = bank["rows"]
    plain.moving_average(target, net, names, EMA)
    k1, k2 = [embed(target, view).detach() for view in x[:2]]
    y1 = nearest(k2, old)
    y2 = nearest(k1, old)  # of the other view's keys
    if flags.eps:
        meets = [[y1], [y2]] + [[y1, y2]] * (len(x) - 2)

        def loss_of(view, ys):
            q = embed(net, view, "eval")
            return sum(contrast(q, y, old, T)[0] for y in ys)

        x = [plain.attack(loss_of, view, ys, start, flags) for view, ys, start in zip(x, meets, noise)]
    weights = plain.with_gradient(net, names)
    q = [embed(net, view) for view in x]

    big = [(q[0], y1), (q[1], y2)]
    small = [(view, y) for view in q[2:] for y in (y1, y2)]
    loss = 0.0
    h = 0.0
    for pairs, share in ((big, 1 / 2 if small else 1), (small, 1 / max(1, len(small)))):
        for queries, y in pairs:  # a sum of two views; multi-crop: a mean of big ones and one of small ones
            loss = loss + share * contrast(queries, y, old, T)[0]
            h = h + share * direction(queries.detach(), y, old, T, flags)
    before = sum(contrast(queries.detach(), y, old, T)[0] for queries, y in big) / 2

    grads = torch.autograd.grad(loss, weights)
    if flags.optimizer == "sgd":
        plain.sgd(net, names, grads, past, flags.lr, 0.9, flags.weight_decay)
    elif flags.optimizer == "adamw":
        plain.adamw(net, names, grads, past, flags.lr, flags.weight_decay, second=0.999)
    else:
        plain.lars(net, names, grads, past, flags.lr, flags.weight_decay, trust=0.001, clip=False)
    bank["velocity"] = flags.bank_momentum * bank["velocity"] - h
    bank["rows"] = old - BANK_LR * bank["velocity"]

    n = plain.unit(bank["rows"])
    losses = []
    probabilities = []
    cosines = []
    for queries, y in big:
        found, p = contrast(queries.detach(), y, bank["rows"], T)
        losses.append(found)
        probabilities += [p[i][y[i]] for i in range(len(y))]
        cosines += [max(query @ row for row in n) for query in queries.detach()]
    return {
        "loss": loss,
        "bank_change": sum(losses) / 2 - before,
        "p": sum(probabilities) / len(probabilities),
        "unique": len(set(y1)),
        "cosine": sum(cosines) / len(cosines),
        "rotation": sum((a - b).norm() for a, b in zip(n, plain.unit(old))) / len(n),
        "norm": sum(row.norm() for row in bank["rows"]) / len(n),
    }, (y1, y2)


# ----------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------
def optimizer(net, args):
    return caco.optimizer(net, args)


def bank_of(rows, velocity):
    bank = Bank(*rows.shape).double()
    bank.register_buffer("velocity", velocity.clone())
    bank.rows = rows.clone()
    return bank


def step_of_the_script(net, target, opt, bank, x, noise, args):
    settings = named_by(caco.train_step, caco, args, ema=EMA, bank_lr=BANK_LR)
    return caco.train_step(net, target, opt, bank, x, noise if args.eps else None, **settings)


class Projector(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 12, bias=False)
        self.norm = nn.BatchNorm1d(12)
        self.out = nn.Linear(12, 3, bias=False)

    def forward(self, h):
        return self.out(self.norm(self.hidden(h)).relu())


def network(seed):
    return plain.randomised(nn.Sequential(plain.Encoder(4, nn.BatchNorm2d), Projector()), seed)


@pytest.mark.parametrize("small", [0, 2], ids=["two views", "multi-crop"])
@pytest.mark.parametrize("more", [
    {}, dict(cooperation=-1.0), dict(cooperation=-0.25), dict(optimizer="lars", lr=30.0),
    dict(optimizer="adamw"), dict(eps=40.0), dict(norm="l2", eps=300.0, step_size=150.0, cooperation=-0.25, lr=0.03)],
    ids=lambda more: " ".join(map(str, more.values())) or "plain")
def test_two_steps_are_the_methods(more, small):
    given = {**FLAGS, **more}
    flags = SimpleNamespace(**given)
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(7, 3, generator=g, dtype=torch.float64) * (0.5 + 0.25 * torch.arange(7.0))[:, None]
    velocity = 0.3 * torch.randn(7, 3, generator=g, dtype=torch.float64)

    args = plain.arguments(caco, given)
    net = network(13)
    target = network(113).requires_grad_(False)
    bank = bank_of(rows, velocity)
    opt = optimizer(net, args)
    names = plain.trained(net)
    want = dict(net=plain.state(net), target=plain.state(target), past={})
    want["bank"] = dict(rows=rows, velocity=velocity)
    start = {key: dict(part) for key, part in want.items()}
    for t in range(2):
        sides = [6, 6] + small * [4]
        x = [plain.images(6, side, 10 * i + t) for i, side in enumerate(sides)]
        noise = [plain.noise(view, flags.norm, g) for view in x]
        logged, (y1, y2) = step(want["net"], want["target"], want["bank"], want["past"], names, x, noise, flags)
        assert y1 != y2 and min(len(set(y1)), len(set(y2))) > 2  # else the views could be confused
        found = step_of_the_script(net, target, opt, bank, x, noise, args)
        plain.same(found, logged, f"step {t}, logged")
        plain.same(plain.state(net), want["net"], f"step {t}, net")
        plain.same(plain.state(target), want["target"], f"step {t}, target")
        plain.same(plain.state(bank), want["bank"], f"step {t}, bank")
        plain.same(plain.memory(opt, net), want["past"], f"step {t}, optimizer")
    moving = [name for name in start["net"] if name not in ("0.mean", "0.std")]
    plain.all_moved(start["net"], want["net"], moving)
    plain.all_moved(start["target"], want["target"], moving)
    plain.all_moved(start["bank"], want["bank"], ["rows", "velocity"])
    assert logged["unique"] < 6 and 0.02 < logged["p"] < 0.98


@pytest.mark.parametrize("kind, class_of, treated", [
    ("sgd", torch.optim.SGD, dict(lr=0.03, momentum=0.9, weight_decay=0.02)),
    ("adamw", torch.optim.AdamW, dict(lr=0.03, betas=(0.9, 0.999), weight_decay=0.02)),
    ("lars", caco.optim.LARS, dict(lr=0.03, momentum=0.9, weight_decay=0.02, trust=0.001, clip=False))])
def test_a_run_has_the_optimizer_of_these_steps(kind, class_of, treated, tmp_path, monkeypatch):
    given = ["--arch", "slim", "--lr", "0.03", "--weight-decay", "0.02", "--bank-size", "8",
             "--fill-steps", "0", "--optimizer", kind]
    (net, target, bank), (opt,) = plain.optimizers_of_main(caco, given, tmp_path, monkeypatch)
    assert type(opt) is class_of and bank.velocity.abs().sum() == 0
    assert not any(w.requires_grad for w in target.parameters())
    for name, w in net.named_parameters():
        found = plain.settings(opt, net)[name]
        want = treated
        if kind == "lars" and w.dim() < 2:
            want = {**treated, "trust": None, "weight_decay": 0.0}
        if kind == "adamw" and w.dim() < 2:
            want = {**treated, "weight_decay": 0.0}
        assert {key: found[key] for key in want} == want, name
