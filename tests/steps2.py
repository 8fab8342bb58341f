"""Plain pieces for the tests of whole steps of adco, caco, adv_mae, adpe and adios (test_step_*.py):
textbook formulas in float64, nothing of common/.

The state of a network is a dict from names to tensors, `f` below: its parameters, running statistics and
constants.
"""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

MEAN = (0.5, 0.4, 0.3)
STD = (0.3, 0.25, 0.2)  # of the channels: all different


# ----------------------------------------------------------------------------------------------------------
# What the scripts are given
# ----------------------------------------------------------------------------------------------------------
def arguments(script, flags):
    """The script's own namespace for a dict of flags."""
    argv = []
    for name, value in flags.items():
        name = name.replace("_", "-")
        if value is True:
            argv.append(f"--{name}")
        elif value is False:
            argv.append(f"--no-{name}")
        else:
            argv += [f"--{name}", str(value)]
    return script.parser().parse_args(argv)


class Encoder(nn.Module):
    """Images (B, 3, S, S) -> normalisation, convolution, a norm, ReLU, mean over the image: (B, width)."""

    def __init__(self, width, norm):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN, dtype=torch.float64).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD, dtype=torch.float64).view(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.norm = norm(width)

    def forward(self, x):
        x = (x - self.mean) / self.std
        return self.norm(self.conv(x)).relu().mean((2, 3))


def randomised(net, seed, scale=1.0):
    """The network in float64, with random weights, biases and running statistics."""
    g = torch.Generator().manual_seed(seed)
    net = net.double()
    with torch.no_grad():
        for name, w in net.named_parameters():
            if w.requires_grad:
                noise = torch.randn(w.shape, generator=g, dtype=torch.float64)
                w.copy_(scale * noise / max(1, w[0].numel()) ** 0.5)
                if "norm" in name and name.endswith("weight"):
                    w.add_(1)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=g, dtype=torch.float64))
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=g, dtype=torch.float64))
    return net


def images(n, side, seed):
    """Images (n, 3, side, side), each with a hue of its own, and some of its pixels black or white."""
    g = torch.Generator().manual_seed(seed)
    hue = torch.rand(n, 3, 1, 1, generator=g, dtype=torch.float64)
    pixels = torch.rand(n, 3, side, side, generator=g, dtype=torch.float64)
    return (0.8 * pixels + 0.8 * hue - 0.3).clamp(0, 1)


def optimizers_of_main(script, flags, folder, monkeypatch):
    """What `main` hands to its first step: (networks, optimizers), each in order."""
    class Reached(Exception):
        pass

    def first_step(*given, **named):
        raise Reached(*given, *named.values())

    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(4)
    np.savez(folder / "images.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    monkeypatch.setattr(script, "train_step", first_step)
    with pytest.raises(Reached) as reached:
        script.main(["--data", str(folder / "images.npz"), "--image-size", "16", "--batch-size", "4",
                     "--epochs", "1", "--device", "cpu", "--out", str(folder / "run"), *flags])
    given = reached.value.args
    networks = [part for part in given if isinstance(part, nn.Module)]
    return networks, [part for part in given if isinstance(part, torch.optim.Optimizer)]


def settings(opt, net):
    """{name of a parameter: how the optimizer treats it}."""
    names = {id(w): name for name, w in net.named_parameters()}
    found = {}
    for group in opt.param_groups:
        for w in group["params"]:
            found[names[id(w)]] = {key: value for key, value in group.items() if key != "params"}
    return found


# ----------------------------------------------------------------------------------------------------------
# States, and their comparison
# ----------------------------------------------------------------------------------------------------------
def state(net):
    """All tensors of a network by name, but for counters of batches, which nothing reads."""
    named = [*net.named_parameters(), *net.named_buffers()]
    return {name: t.detach().clone() for name, t in named if not name.endswith("num_batches_tracked")}


def trained(net):
    """Names of the parameters that an optimizer may move."""
    return [name for name, w in net.named_parameters() if w.requires_grad]


def memory(opt, net):
    """{name of a parameter: what the optimizer remembers of it}."""
    names = {id(w): name for name, w in net.named_parameters()}
    return {names[id(w)]: copy.deepcopy(dict(of_w)) for w, of_w in opt.state.items()}


def same(found, want, where="", atol=1e-11):
    """Nested dicts have equal keys and, to rounding in float64, equal numbers."""
    if isinstance(want, dict):
        assert found.keys() == want.keys(), f"{where}: {sorted(found)} and {sorted(want)}"
        for key in want:
            same(found[key], want[key], f"{where} {key}", atol)
        return
    found, want = (torch.as_tensor(value).detach().double() for value in (found, want))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=atol, msg=lambda text: f"{where}: {text}")


def all_moved(before, after, names):
    """Each of these tensors is another one now: a test of what stands still would show little."""
    for name in names:
        assert (after[name] - before[name]).abs().max() > 1e-6, f"{name} has not moved"


def some_not_all(condition):
    """Of the numbers, some fulfil the condition and some do not."""
    assert 0 < condition.double().mean() < 1


# ----------------------------------------------------------------------------------------------------------
# Layers
# ----------------------------------------------------------------------------------------------------------
def unit(z):
    """Rows of length 1."""
    return z / (z * z).sum(1, keepdim=True).sqrt()


def linear(f, name, x):
    y = x @ f[f"{name}.weight"].T
    return y + f[f"{name}.bias"] if f"{name}.bias" in f else y


def batch_norm(f, name, x, mode, share=1.0):
    """x (n, C) or (n, C, H, W). mode "train": statistics of the batch, towards which the running ones move
    by a tenth (times `share`); "frozen": of the batch, the running ones stay; "eval": the running ones."""
    over = [0] if x.dim() == 2 else [0, 2, 3]
    shape = [1, -1] if x.dim() == 2 else [1, -1, 1, 1]
    mean = f[f"{name}.running_mean"]
    var = f[f"{name}.running_var"]
    if mode != "eval":
        mean = x.mean(over)
        var = ((x - mean.view(shape)) ** 2).mean(over)
    if mode == "train":
        n = x.numel() / x.shape[1]
        for key, new in (("running_mean", mean), ("running_var", var * n / (n - 1))):
            old = f[f"{name}.{key}"]
            f[f"{name}.{key}"] = (1 - 0.1 * share) * old + 0.1 * share * new.detach()
    y = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return y * f[f"{name}.weight"].view(shape) + f[f"{name}.bias"].view(shape)


def layer_norm(f, name, x):
    x = x - x.mean(-1, keepdim=True)
    x = x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * f[f"{name}.weight"] + f[f"{name}.bias"]


def transformer_block(f, name, x, heads, relative=None):
    """x (T, width), the tokens of one image. relative (T, T, d): vectors r_ij, q_i . r_ij is added to the
    logits."""
    q, k, v = linear(f, f"{name}.attn.qkv", layer_norm(f, f"{name}.norm1", x)).chunk(3, 1)
    d = x.shape[1] // heads
    found = []
    for head in range(heads):
        part = slice(head * d, head * d + d)
        logits = q[:, part] @ k[:, part].T
        if relative is not None:
            logits = logits + (q[:, None, part] * relative).sum(2)
        found.append((logits / math.sqrt(d)).softmax(1) @ v[:, part])
    x = x + linear(f, f"{name}.attn.proj", torch.cat(found, 1))
    hidden = F.gelu(linear(f, f"{name}.mlp.fc1", layer_norm(f, f"{name}.norm2", x)))
    return x + linear(f, f"{name}.mlp.fc2", hidden)


def sincos(row, column, dim):
    """Position as dim/4 sines and dim/4 cosines of the column, then of the row: (dim,). Tensors without
    dimension, or numbers."""
    found = []
    for place in (column, row):
        for wave in (torch.sin, torch.cos):
            for i in range(dim // 4):
                found.append(wave(torch.as_tensor(place, dtype=torch.float64) * 10000 ** (-i / (dim / 4))))
    return torch.stack(found)


def use_own_positions(net, encoder, decoder=None):
    """Let a ViT of float32 positions and colours have them in float64: the same, but for the rounding."""
    def replace(found, own):
        torch.testing.assert_close(found, own, rtol=1e-6, atol=1e-6)
        found.copy_(own)

    def positions(dim):
        rows = [torch.zeros(dim, dtype=torch.float64)]  # of the cls token
        for row in range(encoder.grid[0]):
            for column in range(encoder.grid[1]):
                rows.append(sincos(row, column, dim))
        return torch.stack(rows)

    with torch.no_grad():
        replace(encoder.pos_embed[0], positions(encoder.dim))
        if decoder is not None:
            replace(decoder.positions, positions(decoder.embed.out_features))
        replace(encoder.mean, torch.tensor(MEAN, dtype=torch.float64).repeat(encoder.patch**2))
        replace(encoder.std, torch.tensor(STD, dtype=torch.float64).repeat(encoder.patch**2))
    return net


def patches_of(image, side):
    """(L, 3 side^2) of an image (3, H, W), row by row; each is (row, column, channel), channel fastest."""
    found = []
    for i in range(0, image.shape[1], side):
        for j in range(0, image.shape[2], side):
            found.append(image[:, i:i + side, j:j + side].permute(1, 2, 0).flatten())
    return torch.stack(found)


def patch_embedding(f, name, patch):
    """A patch (3 side^2,) -> (width,), by the weights of a convolution (width, 3, side, side)."""
    kernel = f[f"{name}.weight"].permute(0, 2, 3, 1).flatten(1)
    return kernel @ patch + f[f"{name}.bias"]


def rebuilding_loss(pred, clean, removed, standardise):
    """Mean over all removed patches of the batch of the squared error, itself a mean over a patch. pred and
    clean (B, L, D); removed: for each image the places."""
    total = 0.0
    count = 0
    for i in range(len(pred)):
        for place in removed[i]:
            goal = clean[i, place]
            if standardise:
                goal = goal - goal.mean()
                goal = goal / ((goal * goal).sum() / (len(goal) - 1) + 1e-6).sqrt()
            total = total + ((pred[i, place] - goal) ** 2).mean()
            count += 1
    return total / count


# ----------------------------------------------------------------------------------------------------------
# Attacks of the pixels
# ----------------------------------------------------------------------------------------------------------
def noise(x, norm, g):
    """Points in the unit ball of the norm, one for each image of x, at different distances."""
    found = 2 * torch.rand(x.shape, generator=g, dtype=torch.float64) - 1
    if norm == "l2":
        for i, image in enumerate(found):
            found[i] = image / image.norm() * (i + 1) / len(found)
    return found


def attack(loss_of, x, meets, start, flags):
    """x, moved uphill on loss_of(x, meets) within --eps of each image, from `start`, a point of the unit ball
    for each, and kept in [0, 1]. Of all numbers some end at the edge of ball and box, and some do not."""
    eps = flags.eps / 255
    step_size = flags.step_size / 255
    x_adv = (x + eps * start).clamp(0, 1)
    far = []
    for _ in range(flags.steps):
        x_adv = x_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(x_adv, meets), x_adv)
        images = []
        for image, centre, uphill in zip(x_adv.detach(), x, g):
            if flags.norm == "linf":
                delta = (image + step_size * uphill.sign() - centre).clamp(-eps, eps)
            else:
                length = uphill.square().sum().sqrt()  # 0 where no ReLU is alive: such an image stays
                delta = image + step_size * uphill / length.clamp_min(1e-12) - centre
                length = delta.square().sum().sqrt()
                far.append(float(length > eps))
                if length > eps:
                    delta = delta * eps / length
            images.append((centre + delta).clamp(0, 1))
        x_adv = torch.stack(images)
    some_not_all((x_adv == 0) | (x_adv == 1))
    some_not_all(((x_adv - x).abs() - eps).abs() < 1e-12 if flags.norm == "linf" else torch.tensor(far))
    return x_adv


# ----------------------------------------------------------------------------------------------------------
# Optimizers: a step of one tensor
# ----------------------------------------------------------------------------------------------------------
def with_gradient(f, names):
    """Let these tensors of the state ask for gradients."""
    for name in names:
        f[name] = f[name].detach().requires_grad_()
    return [f[name] for name in names]


def sgd(f, names, grads, past, lr, momentum, decay):
    """past: {name: {"momentum_buffer": v}}, at first {}."""
    for name, g in zip(names, grads):
        w = f[name].detach()
        v = past.get(name, {"momentum_buffer": 0 * w})["momentum_buffer"]
        v = momentum * v + g + decay * w
        f[name] = w - lr * v
        past[name] = {"momentum_buffer": v}


def adamw(f, names, grads, past, lr, decay, ascend=False, second=0.95):
    """Moments .9 and `second`; tensors of one dimension do not decay."""
    for name, g in zip(names, grads):
        w = f[name].detach()
        before = past.get(name, {"step": 0, "exp_avg": 0 * w, "exp_avg_sq": 0 * w})
        t = before["step"] + 1
        g = -g if ascend else g
        m = 0.9 * before["exp_avg"] + 0.1 * g
        v = second * before["exp_avg_sq"] + (1 - second) * g * g
        if w.dim() > 1:
            w = w - lr * decay * w
        f[name] = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - second**t)).sqrt() + 1e-8)
        past[name] = {"step": t, "exp_avg": m, "exp_avg_sq": v}


def lars(f, names, grads, past, lr, decay, trust, clip):
    """Momentum .9; tensors of one dimension are neither scaled nor decayed. With `clip` no tensor steps
    faster than plain SGD."""
    for name, g in zip(names, grads):
        w = f[name].detach()
        ratio = 1.0
        if w.dim() > 1:
            length = (w * w).sum().sqrt()
            ratio = trust * length / ((g * g).sum().sqrt() + decay * length)
            if clip:
                ratio = min(ratio / lr, 1)
            g = g + decay * w
        v = 0.9 * past.get(name, {"momentum": 0 * w})["momentum"] + lr * ratio * g
        f[name] = w - v
        past[name] = {"momentum": v}


def moving_average(average, f, names, m):
    for name in names:
        average[name] = m * average[name] + (1 - m) * f[name].detach()
