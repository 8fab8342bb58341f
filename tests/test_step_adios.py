"""Two whole steps of ADIOS against the method written out: plain loops in float64, nothing of adios.py or
common/."""
import copy
import math
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import adios
from common import optim
from common.vit import ViT
from common.unet import UNet
from tests import steps2 as plain
from tests.scripts import named_by

FLAGS = dict(temperature=0.3, mask_weight=0.7, lr=0.02, mask_lr=0.005, weight_decay=0.05, single=False)
TAU = 0.9  # of this step
MASKS = 3  # of an image, in most of these steps


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def project(f, x, mode):
    """Encoder and projector; mode: of the norms, as in `plain.batch_norm`."""
    h = torch.nn.functional.conv2d((x - f["0.mean"]) / f["0.std"], f["0.conv.weight"])
    h = plain.batch_norm(f, "0.norm", h, mode).relu().mean((2, 3))
    return plain.linear(f, "1", h)


def predict(f, z, mode):
    h = plain.batch_norm(f, "2.norm", plain.linear(f, "2.hidden", z), mode).relu()
    return plain.linear(f, "2.out", h)


def draw(f, x):
    """The masker: what part of each pixel each of its masks removes, (B, N, S, S)."""
    h = torch.nn.functional.conv2d((x - f["mean"]) / f["std"], f["conv.weight"], f["conv.bias"], padding=1)
    if h.shape[1] == 1:
        return 1 / (1 + torch.exp(-h))  # one mask is free of others
    weights = torch.exp(h)
    return weights / weights.sum(1, keepdim=True)


def occlude(x, mask, colour):
    """Pixels of x (B, 3, S, S) turn into `colour` by the part `mask` (B, S, S)."""
    views = []
    for image, removed in zip(x, mask):
        channels = [pixels + removed * (c - pixels) for pixels, c in zip(image, colour.flatten())]
        views.append(torch.stack(channels))
    return torch.stack(views)


def penalty(masks):
    """Sum over masks, mean over images."""
    total = 0.0
    for image in masks:
        for mask in image:
            total = total + 1 / torch.sin(math.pi * mask.mean()).clamp(min=1e-4) / len(masks)
    return total


def cos(a, b):
    return a @ b / (a.norm() * b.norm())


def simclr(z1, z2, T):
    rows = [*z1, *z2]
    total = 0.0
    for i, anchor in enumerate(rows):
        similar = [torch.exp(cos(anchor, row) / T) for row in rows]
        others = sum(similar) - similar[i]
        total = total - torch.log(similar[(i + len(z1)) % len(rows)] / others)
    return total / len(rows)


def mean_cos(p, z):
    return sum(cos(a, b) for a, b in zip(p, z.detach())) / len(p)


def rebuild(f, x):
    """A ViT of one block, and an MLP of each token, which makes its patch."""
    images = []
    for image in x:
        tokens = [f["0.cls_token"][0, 0] + f["0.pos_embed"][0, 0]]
        for place, patch in enumerate(plain.patches_of(image, 2)):
            colours = (patch - f["0.mean"]) / f["0.std"]
            token = plain.patch_embedding(f, "0.patch_embed.proj", colours)
            tokens.append(token + f["0.pos_embed"][0, 1 + place])
        h = plain.layer_norm(f, "0.norm", plain.transformer_block(f, "0.blocks.0", torch.stack(tokens), 2))
        found = torch.empty(image.shape, dtype=torch.float64)
        for place, token in enumerate(h[1:]):
            i = 2 * (place // 3)
            j = 2 * (place % 3)
            patch = plain.linear(f, "1.2", plain.linear(f, "1.0", token).relu())
            found[:, i:i + 2, j:j + 2] = patch.view(2, 2, 3).permute(2, 0, 1)
        images.append(found)
    return torch.stack(images)


def disagreement(net, target, x1, x2, z1_target, masked, mode, flags):
    """What the encoder lowers and the masker raises: a sum over masks. masked: for each mask (x1, x2) without
    what it removes. In the masker's step (mode "frozen") BYOL has no term that is constant in the masks.

    The order of the passes is ours; running statistics end by it."""
    loss = 0.0
    if flags.objective == "mae":
        for x1n, _ in masked:
            loss = loss + ((rebuild(net, x1n) - x1) ** 2).mean()
    if flags.objective == "simclr":
        z1 = project(net, x1, mode)
        for _, x2n in masked:
            loss = loss + simclr(z1, project(net, x2n, mode), flags.temperature)
    if flags.objective == "byol":
        for _, x2n in masked:
            loss = loss + 2 - 2 * mean_cos(predict(net, project(net, x2n, mode), mode), z1_target)
        if mode == "train":
            p1 = predict(net, project(net, x1, mode), mode)
            for _, x2n in masked:
                loss = loss + 2 - 2 * mean_cos(p1, project(target, x2n, mode))
    if flags.objective == "simsiam":
        z1 = project(net, x1, mode)
        z2 = project(net, x2, mode)
        p1 = predict(net, z1, mode)
        p2 = predict(net, z2, mode)
        for x1n, x2n in masked:
            z1n = project(net, x1n, mode)
            z2n = project(net, x2n, mode)
            p1n = predict(net, z1n, mode)
            p2n = predict(net, z2n, mode)
            total = mean_cos(p1n, z2) + mean_cos(p2n, z1) + mean_cos(p2, z1n) + mean_cos(p1, z2n)
            total = total + mean_cos(p1, z2) + mean_cos(p2, z1) + mean_cos(p1n, z2n) + mean_cos(p2n, z1n)
            loss = loss - total / 8
    return loss


def step(net, target, masker, past, past_masker, names, names_masker, x1, x2, given, pick, flags):
    """Changes the networks and what the optimizers remember; returns what is logged. given: masks (m1, m2)
    that are not the masker's, or None."""
    shown_masked = {"simclr": [1], "byol": [1], "mae": [0], "simsiam": [0, 1]}[flags.objective]  # which views

    def without(masks, u):
        masked = []
        for n in range(1 if flags.single else masks[0].shape[1]):
            views = []
            for x, m in zip((x1, x2), masks):
                chosen = [int(u[i] * m.shape[1]) if flags.single else n for i in range(len(x))]
                of_each = torch.stack([m[i, c] for i, c in enumerate(chosen)])
                views.append(occlude(x, of_each, masker["mean"]))
            masked.append(views)
        return masked

    weights = plain.with_gradient(net, names)
    of_masker = plain.with_gradient(masker, names_masker)
    masks = (draw(masker, x1), draw(masker, x2)) if given is None else given

    z1_target = project(target, x1, "train") if target else None
    constant = [m.detach() for m in masks]
    loss = disagreement(net, target, x1, x2, z1_target, without(constant, pick[:, 0]), "train", flags)
    grads = torch.autograd.grad(loss, weights)
    how = dict(decay=flags.weight_decay, trust=0.02, clip=True)
    plain.lars(net, names, grads, past, flags.lr, **how)
    logged = {"loss": loss}

    if given is None:
        hard = disagreement(net, target, x1, x2, z1_target, without(masks, pick[:, 1]), "frozen", flags)
        price = sum(penalty(masks[view]) for view in shown_masked)
        grads = torch.autograd.grad(flags.mask_weight * price - hard, of_masker)  # LARS descends
        plain.lars(masker, names_masker, grads, past_masker, flags.mask_lr, **how)
        logged |= {"loss_mask": hard, "penalty": price}
    if target:
        plain.moving_average(target, net, [name for name in names if name in target], TAU)
    return logged


# ----------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------
def optimizers(net, masker, flags):
    how = dict(momentum=0.9, weight_decay=flags.weight_decay, trust=0.02, clip=True)
    return (optim.LARS(optim.lars_groups(net), flags.lr, **how),
            optim.LARS(optim.lars_groups(masker), flags.mask_lr, **how))


def step_of_the_script(net, target, masker, opt, opt_mask, x1, x2, given, pick, args):
    if given is not None:  # those of the views that are masked
        given = {"simsiam": torch.cat(given), "mae": given[0]}.get(args.objective, given[1])
    settings = named_by(adios.train_step, adios, args, tau=TAU)
    return adios.train_step(net, target, masker, opt, opt_mask, x1, x2, given, pick, **settings)


class Masker(nn.Module):
    def __init__(self, masks):
        super().__init__()
        self.register_buffer("mean", torch.tensor(plain.MEAN, dtype=torch.float64).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(plain.STD, dtype=torch.float64).view(3, 1, 1))
        self.conv = nn.Conv2d(3, masks, 3, padding=1)

    def forward(self, x):
        return self.conv((x - self.mean) / self.std)


def networks(objective, masks):
    """(net, target or None, masker)"""
    if objective == "mae":
        encoder = ViT("toy", 2, 8, 1, 2, 6, plain.MEAN, plain.STD, "sincos", False, False)
        net = nn.Sequential(encoder, nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 12)))
    else:
        net = nn.Sequential(plain.Encoder(6, nn.BatchNorm2d), nn.Linear(6, 5, bias=False))
    if objective in ("byol", "simsiam"):
        hidden = nn.Linear(5, 4, bias=False)
        predictor = OrderedDict(hidden=hidden, norm=nn.BatchNorm1d(4), relu=nn.ReLU(), out=nn.Linear(4, 5))
        net.append(nn.Sequential(predictor))
    net = plain.randomised(net, 1)
    if objective == "mae":
        plain.use_own_positions(net, net[0])
    target = None
    if objective == "byol":
        target = plain.randomised(copy.deepcopy(net[:2]), 2).requires_grad_(False)
    return net, target, plain.randomised(Masker(masks), 3, scale=1.5)


@pytest.mark.parametrize("masker_learns", [True, False], ids=["learned masks", "given masks"])
@pytest.mark.parametrize("single", [False, True], ids=["all masks", "single"])
@pytest.mark.parametrize("objective", ["simclr", "byol", "simsiam", "mae"])
def test_two_steps_are_the_methods(objective, single, masker_learns):
    compare(objective, single, masker_learns, MASKS)


@pytest.mark.parametrize("objective", ["simclr", "byol", "simsiam", "mae"])
def test_two_steps_with_one_mask_a_sigmoid_are_the_methods(objective):
    compare(objective, single=False, masker_learns=True, count=1)


def compare(objective, single, masker_learns, count):
    """Two steps of the script and of the method, with `count` masks."""
    given_flags = {**FLAGS, "objective": objective, "single": single}
    flags = SimpleNamespace(**given_flags)
    args = plain.arguments(adios, given_flags)
    net, target, masker = networks(objective, count)
    opt, opt_mask = optimizers(net, masker, flags)
    names = plain.trained(net)
    names_masker = plain.trained(masker)
    parts = {"net": net, "masker": masker, **({"target": target} if target else {})}
    want = {key: plain.state(part) for key, part in parts.items()}
    past = {}
    past_masker = {}
    start = {key: dict(part) for key, part in want.items()}
    for t in range(2):
        g = torch.Generator().manual_seed(t)
        x1 = plain.images(4, 6, 10 + t)
        x2 = plain.images(4, 6, 20 + t)
        pick = torch.rand(4, 2, generator=g, dtype=torch.float64)
        assert count == 1 or {int(u * count) for u in pick[:, 0]} != {int(u * count) for u in pick[:, 1]}
        masks = None
        if not masker_learns:
            masks = [m.softmax(1) for m in torch.rand(2, 4, count, 6, 6, generator=g, dtype=torch.float64)]
        logged = step(want["net"], want.get("target"), want["masker"], past, past_masker, names, names_masker,
                      x1, x2, masks, pick, flags)
        found = step_of_the_script(net, target, masker, opt, opt_mask, x1, x2, masks, pick, args)
        plain.same(found, logged, f"step {t}, logged")
        for key, part in parts.items():
            plain.same(plain.state(part), want[key], f"step {t}, {key}")
        plain.same(plain.memory(opt, net), past, f"step {t}, optimizer")
        plain.same(plain.memory(opt_mask, masker), past_masker, f"step {t}, optimizer of the masker")
    statistics = [name for name in want["net"] if "running" in name]
    plain.all_moved(start["net"], want["net"], [*names, *statistics])
    if masker_learns:
        plain.all_moved(start["masker"], want["masker"], names_masker)
    if target:
        moving = [name for name in [*names, *statistics] if name in want["target"]]
        plain.all_moved(start["target"], want["target"], moving)


def test_a_run_has_the_optimizers_of_these_steps(tmp_path, monkeypatch):
    given = ["--arch", "slim", "--objective", "byol", "--lr", "0.03", "--mask-lr", "0.04",
             "--weight-decay", "0.02", "--warmup", "0", "--mask-width", "8"]
    (net, target, masker), opts = plain.optimizers_of_main(adios, given, tmp_path, monkeypatch)
    assert isinstance(masker, UNet) and not any(w.requires_grad for w in target.parameters())
    for part, opt, lr in zip((net, masker), opts, (0.03, 0.04)):
        found = plain.settings(opt, part)
        assert type(opt) is optim.LARS and found.keys() == set(plain.trained(part))
        for name, treated in found.items():
            want = dict(lr=lr, momentum=0.9, weight_decay=0.02, trust=0.02, clip=True)
            if part.get_parameter(name).dim() < 2:
                want |= dict(weight_decay=0.0, trust=None)
            assert {key: treated[key] for key in want} == want, name
