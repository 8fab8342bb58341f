import math

import pytest
import torch
from torch import nn

from common import optim
from tests.recipes import A


def test_cosine_starts_halves_and_ends():
    assert (
        optim.cosine(0, 3.0) == 3.0
        and optim.cosine(0.5, 3.0, 1.0) == 2.0
        and optim.cosine(1, 3.0, 1.0) == 1.0
    )
    assert optim.cosine(0.25, 1.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert optim.cosine(2, 1.0) == 0.0


def test_warmup_is_linear_then_cosine():
    values = [optim.warmup_cosine(s, 20, 5, 1.0) for s in range(21)]
    assert values[:6] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]) and values[20] == 0
    assert all(a > b for a, b in zip(values[5:], values[6:]))


def test_ema_moves_parameters_and_leaves_buffers():
    target, net = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    nn.init.constant_(net.weight, 3.0)
    net.running_mean += 5
    optim.ema(target, net, 0.9)
    torch.testing.assert_close(target.weight, torch.full((4,), 1.2))
    assert torch.equal(target.running_mean, torch.zeros(4))


def test_ema_printed_value():
    target, net = nn.Linear(4, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        target.weight.copy_(A(4, 4, 0)), net.weight.copy_(0.1 * A(4, 4, 1))
    optim.ema(target, net, 0.999)
    assert target.weight[1, 1].item() == pytest.approx(-0.3505301974736967, rel=1e-9)


def slow_lars(w, grads, lr, momentum, decay, trust):
    v = [0.0] * len(w)
    for g in grads:
        w_norm, g_norm = math.sqrt(sum(a * a for a in w)), math.sqrt(sum(a * a for a in g))
        q = trust * w_norm / (g_norm + decay * w_norm) if w_norm and g_norm else 1.0
        v = [momentum * a + lr * q * (b + decay * c) for a, b, c in zip(v, g, w)]
        w = [c - a for a, c in zip(v, w)]
    return w


@pytest.mark.parametrize("start", [A(1, 6, 0)[0], torch.zeros(6, dtype=torch.float64)])
def test_lars_equals_a_slow_loop(start):
    w = nn.Parameter(start.clone())
    opt = optim.LARS([w], lr=0.3, momentum=0.8, weight_decay=1e-2, trust=0.05)
    grads = [A(1, 6, p)[0] for p in (1, 2, 3)]
    for g in grads:
        w.grad = g.clone()
        opt.step()
    want = slow_lars(start.tolist(), [g.tolist() for g in grads], 0.3, 0.8, 1e-2, 0.05)
    torch.testing.assert_close(w.detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_lars_printed_value():
    w = nn.Parameter(A(4, 4, 0))
    w.grad = 0.1 * A(4, 4, 1)
    optim.LARS([w], lr=0.24, weight_decay=1e-6).step()
    assert w[0, 0].item() == pytest.approx(-0.00018860074348829, rel=1e-9)


def test_lars_without_trust_is_sgd():
    a, b = nn.Parameter(A(3, 3, 0)), nn.Parameter(A(3, 3, 0))
    ours, sgd = optim.LARS([a], 0.1, weight_decay=0, trust=None), torch.optim.SGD([b], 0.1, momentum=0.9)
    for p in range(3):
        a.grad, b.grad = A(3, 3, p), A(3, 3, p)
        ours.step(), sgd.step()
    torch.testing.assert_close(a, b)
