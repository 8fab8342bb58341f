"""What the tests of whole training steps share: a tiny network for the script under test, and its arithmetic
written out for the oracle that stands beside it.

An oracle is a method's step as the paper has it, in plain loops. It calls no script and nothing of `common`.
A network is to it a dict of tensors `w`, named as in the state dict of the tiny network; a step replaces the
parameters and the running statistics that it moves.
"""
import inspect
from collections import OrderedDict

import torch
from torch import nn

from common.resnet import BranchNorm
from tests.scripts import TINY, tiny_npz


# ----------------------------------------------------------------------------------------------------------
# For the script: a tiny network, inputs, comparisons
# ----------------------------------------------------------------------------------------------------------
def sequential(**layers):
    """An nn.Sequential whose layers have names."""
    return nn.Sequential(OrderedDict(layers))


def norm(width, branches=None):
    """A BatchNorm of rows (B, width), in `branches` if there are any."""
    if branches is None:
        return nn.BatchNorm1d(width)
    return BranchNorm(width, branches, nn.BatchNorm1d)


def encoder(pixels, width, branches=None):
    """Images of so many `pixels` -> (B, width): linear, BatchNorm, ReLU."""
    linear = nn.Linear(pixels, width, bias=False)
    return sequential(flatten=nn.Flatten(), linear=linear, norm=norm(width, branches), relu=nn.ReLU())


def head(width, hidden, out, branches=None):
    """(B, width) -> (B, out): linear, BatchNorm, ReLU, linear."""
    return sequential(inner=nn.Linear(width, hidden), norm=norm(hidden, branches), relu=nn.ReLU(),
                 outer=nn.Linear(hidden, out))


@torch.no_grad()
def scrambled(net, seed):
    """`net` in float64, every number of it drawn anew: no two BatchNorms or branches have the same affine,
    running statistics or number of batches, and no two networks of different seeds the same weights."""
    generator = torch.Generator().manual_seed(seed)
    net.double()
    for position, (name, value) in enumerate(net.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            value.fill_(seed + position)
        elif name.endswith("running_var") or "norm" in name and name.endswith("weight"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator, dtype=value.dtype))
        else:
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype))
            value.mul_(1.5 / value[0].numel() ** 0.5 if value.dim() == 2 else 0.4)
    return net


def images(shape, seed):
    """Pixels in [0, 1), float64."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(shape, seed):
    """Numbers from -1 to 1, float64."""
    return 2 * images(shape, seed) - 1


def set_lr(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr


def plain(net):
    """The state of `net` as an oracle's dict: copies, of which the parameters take gradients."""
    w = {name: value.detach().clone() for name, value in net.state_dict().items()}
    for name in parameters(w):
        w[name].requires_grad_()
    return w


def momenta(net, opt):
    """{name of the parameter: its momentum}, of those that the optimizer `opt` has moved."""
    found = {}
    for name, parameter in net.named_parameters():
        for value in opt.state.get(parameter, {}).values():
            found[name] = value
    return found


def assert_same(found, wanted, what):
    """Two dicts of tensors, with the same names: equal but for the rounding."""
    assert found.keys() == wanted.keys(), what
    for name in wanted:
        torch.testing.assert_close(found[name].detach(), wanted[name].detach(), rtol=1e-9, atol=1e-12,
                                   msg=lambda text: f"{what}, {name}: {text}")


class Stop(Exception):
    """Ends a run at its first step."""


def first_step(script, monkeypatch, tmp_path, *flags):
    """What a tiny run of `script` hands to its first `train_step`, by the names of its parameters."""
    seen = {}
    signature = inspect.signature(script.train_step)

    def train_step(*arguments, **named_arguments):
        seen.update(signature.bind(*arguments, **named_arguments).arguments)
        raise Stop

    monkeypatch.setattr(script, "train_step", train_step)
    images = tiny_npz(tmp_path / "images.npz", 16)
    try:
        script.main(["--data", images, *TINY, "--out", str(tmp_path / "run"), *flags])
    except Stop:
        pass
    return seen


def assert_optimizer(opt, net, kind, **settings):
    """`opt` is of that `kind` and has every parameter of `net` once, under the `settings` in all groups."""
    assert type(opt) is kind
    held = [parameter for group in opt.param_groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, net.parameters()))
    for group in opt.param_groups:
        assert {name: group[name] for name in settings} == settings
    assert all(parameter.requires_grad for parameter in net.parameters())


def assert_copy(target, net):
    """`target` has the weights of `net`, tensors of its own, and takes no gradient."""
    assert_same(target.state_dict(), net.state_dict(), "target")
    for name, parameter in target.named_parameters():
        assert not parameter.requires_grad and parameter is not net.get_parameter(name)


def assert_views(*views):
    """Float images in [0, 1], of one shape, no two views the same."""
    for i, view in enumerate(views):
        assert view.shape == (16, 3, 32, 32) and view.dtype == torch.float32
        assert 0 <= view.min() and view.max() <= 1
        for other in views[:i]:
            assert not torch.allclose(view, other, atol=0.05)


def assert_noise(noise, shape):
    """Uniform in [-1, 1]: by its range, mean and variance; each image and each view has its own."""
    assert noise.shape == shape
    assert -1 <= noise.min() < -0.99 and 0.99 < noise.max() <= 1
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1 / 3) < 0.02
    assert len(noise.unique()) > 0.9 * noise.numel()


def assert_whole(net, branch=None):
    """Every module of `net` is in train mode again, and every BranchNorm at `branch`, as before the step."""
    assert all(module.training for module in net.modules())
    assert all(module.branch == branch for module in net.modules() if isinstance(module, BranchNorm))


# ----------------------------------------------------------------------------------------------------------
# For the oracle: the arithmetic of the tiny network, the attack and the optimizer. From here on nothing of
# the project is called.
# ----------------------------------------------------------------------------------------------------------
def parameters(w):
    """Names of the parameters: all but BatchNorm's running statistics and its count of batches."""
    return [name for name in w if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def batch_norm(w, name, h, mode):
    """BatchNorm `name` of rows h (B, D).

    mode  "eval": by the running statistics. "train": by those of the batch, which the running ones take up.
          "frozen": by those of the batch, and the running ones stay.
    """
    if mode == "eval":
        mean = w[f"{name}.running_mean"]
        variance = w[f"{name}.running_var"]
    else:
        mean = h.mean(0)
        variance = ((h - mean) ** 2).mean(0)
    if mode == "train":
        unbiased = variance * len(h) / (len(h) - 1)
        w[f"{name}.running_mean"] = 0.9 * w[f"{name}.running_mean"] + 0.1 * mean.detach()
        w[f"{name}.running_var"] = 0.9 * w[f"{name}.running_var"] + 0.1 * unbiased.detach()
        w[f"{name}.num_batches_tracked"] = w[f"{name}.num_batches_tracked"] + 1
    return (h - mean) / (variance + 1e-5) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]


def encode(w, x, norm, mode):
    """Features of images x by `encoder`; `norm` names its BatchNorm: "norm", "norm.branches.adv", ..."""
    h = linear(w, "encoder.linear", x.flatten(1))
    return torch.relu(batch_norm(w, f"encoder.{norm}", h, mode))


def through_head(w, name, h, norm, mode):
    """Rows h through the `head` of that `name`."""
    h = linear(w, f"{name}.inner", h)
    return linear(w, f"{name}.outer", torch.relu(batch_norm(w, f"{name}.{norm}", h, mode)))


def attack(loss, views, noises, eps, step_size, steps, norm="linf"):
    """The `views`, all at once, moved within eps uphill on loss(*views): begin at the noise, then so many
    times a step along the sign of the gradient, back into the ball, back into [0, 1]. With `norm` "l2" as
    `attack_l2` has it."""
    if norm == "l2":
        return attack_l2(loss, views, noises, eps, step_size, steps)
    moved = [(x + eps * noise).clamp(0, 1) for x, noise in zip(views, noises)]
    for _ in range(steps):
        moved = [x.detach().requires_grad_() for x in moved]
        gradients = torch.autograd.grad(loss(*moved), moved)
        for i, x in enumerate(views):
            uphill = moved[i].detach() + step_size * gradients[i].sign()
            in_the_ball = uphill.maximum(x - eps).minimum(x + eps)
            moved[i] = in_the_ball.clamp(0, 1)
    for x, x_adv in zip(views, moved):  # for the test: it would miss a clip that does nothing, or all
        at_the_edge = (x_adv == 0) | (x_adv == 1)
        far = (x_adv - x).abs() > eps - 1e-9
        assert at_the_edge.any() and (far & ~at_the_edge).any() and (~far & ~at_the_edge).any(), (
            "choose eps, step_size and steps so that some pixels end at 0 or 1, some at eps, and some inside")
    return moved


def attack_l2(loss, views, noises, eps, step_size, steps):
    """The same in l2: each view of each image has a step of that length, along its own gradient, and a ball
    of its own."""
    moved = [(x + eps * noise).clamp(0, 1) for x, noise in zip(views, noises)]
    outside, clipped = set(), set()
    for _ in range(steps):
        moved = [x.detach().requires_grad_() for x in moved]
        gradients = torch.autograd.grad(loss(*moved), moved)
        for i, x in enumerate(views):
            images = []
            for image, at, gradient in zip(x, moved[i].detach(), gradients[i]):
                away = at - image
                if gradient.any():  # not where no unit of a ReLU is alive: that image stays
                    away = away + step_size * gradient / gradient.square().sum().sqrt()
                length = away.square().sum().sqrt()
                outside.add(bool(length > eps))
                if length > eps:
                    away = away * eps / length
                images.append((image + away).clamp(0, 1))
                clipped.add(not torch.equal(images[-1], image + away))
            moved[i] = torch.stack(images)
    assert outside == {True, False} and True in clipped  # for the test, as in `attack`
    return moved


def l2_noise(noise):
    """The `noise` (..., 3, H, W), each of its images with another length from .3 to 1."""
    images = noise.flatten(0, -4)
    lengths = torch.linspace(0.3, 1, len(images), dtype=noise.dtype)
    scale = lengths / images.flatten(1).norm(dim=1)
    return (images * scale[:, None, None, None]).view(noise.shape)


def sgd(w, loss, momentum, lr, weight_decay):
    """One step of SGD with momentum 0.9. What the loss does not reach, a BatchNorm branch, stays."""
    names = parameters(w)
    gradients = torch.autograd.grad(loss, [w[name] for name in names], allow_unused=True)
    for name, g in zip(names, gradients):
        if g is not None:
            old = w[name].detach()
            momentum[name] = 0.9 * momentum.get(name, 0) + g + weight_decay * old
            w[name] = (old - lr * momentum[name]).requires_grad_()


def lars(w, loss, momentum, lr, weight_decay, trust, spare_vectors=False):
    """One step of LARS (arXiv 1708.03888) with momentum 0.9: each tensor's step is in proportion to its
    length. `spare_vectors`: biases and BatchNorm's affine are neither scaled nor decayed."""
    names = parameters(w)
    gradients = torch.autograd.grad(loss, [w[name] for name in names], allow_unused=True)
    for name, g in zip(names, gradients):
        if g is not None:
            old = w[name].detach()
            if spare_vectors and old.dim() == 1:
                step = lr * g
            else:
                ratio = trust * old.norm() / (g.norm() + weight_decay * old.norm())
                step = lr * ratio * (g + weight_decay * old)
            momentum[name] = 0.9 * momentum.get(name, 0) + step
            w[name] = (old - momentum[name]).requires_grad_()


def moving_average(target, w, m):
    """target <- m target + (1 - m) w, of the parameters that `target` has; running statistics are its own."""
    for name in parameters(target):
        target[name] = m * target[name].detach() + (1 - m) * w[name].detach()
