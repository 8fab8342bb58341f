import pytest
import torch
from torch import nn

from evaluation.deepfool import deepfool
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


def unfallen(classes=12):
    """Logits with a gradient, whose first is far ahead."""
    W = 1e-3 * Z(classes, 48)
    return lambda x: x.flatten(1) @ W.T.to(x) + 100 * torch.eye(classes)[0].to(x)


def test_a_point_that_stands_walks_50_steps_of_one_forward_and_9_backward_passes(monkeypatch):
    """And is looked at once more after the last of them."""
    asked = []
    gradients = []
    grad = torch.autograd.grad

    def spy(x):
        asked.append(len(x))
        return unfallen()(x)

    def counted(*args, **options):
        gradients.append(args)
        return grad(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    deepfool(spy, x0, torch.zeros(6, dtype=torch.long))
    assert asked == 51 * [6] and len(gradients) == 50 * 9


def test_only_the_ten_highest_classes_of_the_clean_image_are_candidates():
    """The eleventh class has by far the nearest boundary, and is not among them."""
    x = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64)
    steep = 1.0 + torch.arange(12.0, dtype=torch.float64)
    steep[10] = 1e4

    def net(x):
        return (x.flatten(1).mean(1, keepdim=True) - 0.5) * steep - 0.01 * torch.arange(12.0)

    y = torch.tensor([0])
    for candidates, want in ((10, 0.01 / 1), (11, 0.1 / (1e4 - 1))):
        x_adv = deepfool(net, x, y, candidates=candidates)
        far = (x_adv - x).mean().item()
        assert far == pytest.approx(1.02 * (want + 1e-4), rel=1e-6)


def test_points_that_have_fallen_leave_and_stay_as_they_are():
    net, x = small_net(), X(5, 3, 4, 4)
    y = net(x).argmax(1)
    asked = []

    def spy(v):
        asked.append(v.detach().clone())
        return net(v)

    together = deepfool(spy, x, y)
    assert [len(v) for v in asked] == sorted((len(v) for v in asked), reverse=True) and len(asked[-1]) < 5
    for i in range(5):
        alone = deepfool(net, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [slice(None), slice(0, 1), slice(4, 5)])
def test_an_iterate_whose_logits_are_not_finite_ends_the_walk(column, value):
    """Here after one step, for every second image; argmax would make class 0 of NaN, and walk on into NaN."""
    asked = []

    def net(x):
        asked.append(len(x))
        logits = unfallen(5)(x)
        broken = torch.zeros_like(logits, dtype=torch.bool)
        if len(asked) == 2:
            broken[0::2, column] = True
        return logits.masked_fill(broken, value)

    x_adv = deepfool(net, x0, torch.zeros(6, dtype=torch.long), steps=3)
    assert asked == [6, 6, 3, 3] and x_adv.isfinite().all()
    one = deepfool(unfallen(5), x0, torch.zeros(6, dtype=torch.long), steps=1)
    three = deepfool(unfallen(5), x0, torch.zeros(6, dtype=torch.long), steps=3)
    torch.testing.assert_close(x_adv[0::2], one[0::2], rtol=0, atol=1e-12)
    torch.testing.assert_close(x_adv[1::2], three[1::2], rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_finite_in_one_pixel_does_not_stop_the_walk():
    plain, _ = linear()
    net = lambda x: plain(x) + (0 * x[:, 0, 0, :1]).sqrt() * torch.arange(5.0)  # noqa: E731
    x_adv = deepfool(net, x0, net(x0).argmax(1))
    assert x_adv.isfinite().all() and (net(x_adv).argmax(1) != net(x0).argmax(1)).all()
    assert torch.equal(x_adv[:, 0, 0, 0], x0[:, 0, 0, 0])


def test_integer_labels_lists_and_arrays_are_taken():
    net = small_net()
    y = net(x0).argmax(1)
    want = deepfool(net, x0, y)
    for labels in (y.int(), y.to(torch.uint8), y.tolist(), y.numpy(), y.numpy().astype("uint16")):
        assert torch.equal(deepfool(net, x0, labels), want)
    assert torch.equal(deepfool(net, x0.numpy(), y), want)
    outside = x0.clone()
    outside[0, 0, 0, 0] = 1 + 9e-7
    clipped = outside.clamp(0, 1)
    y = net(clipped).argmax(1)
    assert torch.equal(deepfool(net, outside, y), deepfool(net, clipped, y))


@pytest.mark.parametrize("change, message", [
    (dict(net=lambda x: x.flatten(1)[:, :1]), r"logits \(6, 1\): an attack needs two classes or more"),
    (dict(net=lambda x: (x.flatten(1), x)), r"returns a tuple; .*net\(x\)\[0\]"),
    (dict(net=lambda x: {"logits": x.flatten(1)}), r"returns a dict; .*net\(x\)\['logits'\]"),
    (dict(net=lambda x: x), r"it must give logits \(N, C\)"),
    (dict(net=lambda x: x.flatten(1) * torch.nan), "finite logits for the clean images.* first for image 0"),
    (dict(x=x0.half()), r"torch.float16 .*x.float\(\)"), (dict(x=(255 * x0).byte()), r"x.float\(\) / 255"),
    (dict(x=255 * x0), r"\[0, 1\]"), (dict(x=x0 * torch.nan), r"\[0, 1\]"),
    (dict(x=x0[:0]), "0 images and 6 labels"), (dict(x=x0[:0], y=torch.arange(0)), "at least one"),
    (dict(y=torch.eye(6)), r"y.argmax\(1\)"), (dict(y=torch.arange(6.0)), r"y.long\(\)"),
    (dict(y=torch.zeros(6, 1).long()), r"y.flatten\(\)"),
    (dict(y=torch.full((6,), 48)), "labels go from 48 to 48"),
    (dict(eps=float("inf")), "eps must be finite"), (dict(eps=float("nan")), "eps must be finite"),
    (dict(eps=-0.1), "not negative"), (dict(eps=8), "eps is 8 .*8 / 255"),
    (dict(overshoot=float("nan")), "overshoot must be finite"),
    (dict(overshoot=-1), "overshoot must be finite"),
    (dict(steps=-1), "steps must be an integer, at least 0"), (dict(steps=1.5), "steps must be an integer"),
    (dict(steps=float("inf")), "steps must be an integer"),
    (dict(candidates=1), "candidates must be an integer, at least 2"),
])
def test_bad_input_is_named(change, message):
    arguments = dict(net=lambda x: x.flatten(1), x=x0, y=torch.arange(6)) | change
    with pytest.raises(ValueError, match=message):
        deepfool(**arguments)


@pytest.mark.outside
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
