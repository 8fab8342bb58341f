import pytest
import torch
from torch import nn

from common.deepfool import deepfool
from tests.recipes import X, Z

x0 = 0.25 + 0.5 * X(6, 3, 4, 4)  # away from the box


def linear(classes=5):
    W = 0.1 * Z(classes, 48)
    return lambda x: x.flatten(1) @ W.T, W


def small_net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 12)).to(dtype)


def test_one_step_on_a_linear_model_lands_at_1_02_of_the_distance():
    net, W = linear()
    f = net(x0)
    y = f.argmax(1)
    x_adv = deepfool(net, x0, y)
    for i in range(len(x0)):
        others = [k for k in range(5) if k != y[i]]
        distance = {k: (f[i, y[i]] - f[i, k]) / ((W[k] - W[y[i]]).abs().sum() + 1e-8) for k in others}
        k = min(distance, key=distance.get)
        expected = 1.02 * (distance[k] + 1e-4) * (W[k] - W[y[i]]).sign()
        torch.testing.assert_close((x_adv[i] - x0[i]).flatten(), expected, rtol=0, atol=1e-9)
        assert net(x_adv).argmax(1)[i] == k


def test_equals_the_paper_read_aloud():
    """Image by image, class by class, each with a forward pass of its own."""
    net, x = small_net(), X(5, 3, 4, 4)
    y = net(x).argmax(1)
    y[1] = (y[1] + 1) % 12  # wrong from the start
    out = deepfool(net, x, y)
    for i in range(5):
        z, total = x[i : i + 1], torch.zeros(1, 3, 4, 4, dtype=x.dtype)
        order = net(z)[0].argsort(descending=True)[:10]
        for _ in range(50):
            if net(z).argmax(1) != y[i]:
                break
            found = []
            for k in order[1:]:
                v = z.clone().requires_grad_()
                f = net(v)[0]
                gap = f[k] - f[order[0]]
                (g,) = torch.autograd.grad(gap, v)
                found.append((abs(gap.item()) / (g.abs().sum().item() + 1e-8), g))
            distance, g = min(found, key=lambda d: d[0])
            total = total + (distance + 1e-4) * g.sign()
            z = (x[i : i + 1] + 1.02 * total).clamp(0, 1)
        torch.testing.assert_close(out[i : i + 1], z, rtol=0, atol=1e-9)
    assert torch.equal(out[1], x[1]) and (net(out).argmax(1) != y).all()


def test_radius_cuts_the_result_and_no_trace_is_left():
    net, x = small_net(), X(5, 3, 4, 4)
    before, y = x.clone(), net(x).argmax(1)
    free, cut = deepfool(net, x, y), deepfool(net, x, y, eps=0.01)
    assert (free - x).abs().max() > 0.01
    torch.testing.assert_close(cut, x + (free - x).clamp(-0.01, 0.01), rtol=0, atol=0)
    assert torch.equal(x, before) and not cut.requires_grad and all(p.grad is None for p in net.parameters())


def test_no_steps_give_the_images_back():
    net, x = small_net(), X(5, 3, 4, 4)
    assert torch.equal(deepfool(net, x, net(x).argmax(1), steps=0), x)


def test_agrees_with_foolbox():
    foolbox = pytest.importorskip("foolbox")
    net, x = small_net(torch.float32), X(40, 3, 4, 4).float()
    y = net(x).argmax(1)
    y[:3] = (y[:3] + 1) % 12
    attack = foolbox.attacks.LinfDeepFoolAttack(steps=50, overshoot=0.02, candidates=10)
    model = foolbox.PyTorchModel(net.eval(), bounds=(0, 1), device="cpu")
    raw, cut, fooled = attack(model, x, y, epsilons=[0.02])
    torch.testing.assert_close(deepfool(net, x, y), raw[0], rtol=0, atol=1e-6)
    ours = deepfool(net, x, y, eps=0.02)
    torch.testing.assert_close(ours, cut[0], rtol=0, atol=1e-6)
    assert torch.equal(net(ours).argmax(1) != y, fooled[0]) and 3 < fooled.sum() < 40
