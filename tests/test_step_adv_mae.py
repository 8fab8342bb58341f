"""Two whole steps of Adversarial MAE against the method written out: plain loops in float64, nothing of
adv_mae.py or common/."""
from types import SimpleNamespace

import pytest
import torch

import adv_mae
from common import optim
from common.vit import ViT
from tests import steps2 as plain
from tests.scripts import named_by

FLAGS = dict(mask_ratio=0.5, norm_pix=True, lr=0.02, weight_decay=0.3, norm="linf", eps=60.0, steps=2,
             clean_weight=0.0)
SIDE = 2
HEADS = 2  # of a patch; of both transformers, which have one block


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def kept_patches(u, ratio):
    """The places that stay visible, those of smallest u (L,), smallest first."""
    L = len(u)
    return sorted(range(L), key=lambda place: float(u[place]))[:int(L * (1 - ratio))]


def rebuild(f, v, kept):
    """All patches (L, D) of an image from the visible ones v (Lk, D), in pixels, at the places `kept`."""
    tokens = [f["encoder.cls_token"][0, 0] + f["encoder.pos_embed"][0, 0]]
    for patch, place in zip(v, kept):
        colours = (patch - f["encoder.mean"]) / f["encoder.std"]
        token = plain.patch_embedding(f, "encoder.patch_embed.proj", colours)
        tokens.append(token + f["encoder.pos_embed"][0, 1 + place])
    h = plain.transformer_block(f, "encoder.blocks.0", torch.stack(tokens), HEADS)
    h = plain.linear(f, "decoder.embed", plain.layer_norm(f, "encoder.norm", h))
    tokens = [h[0]]
    for place in range(len(f["decoder.positions"]) - 1):
        tokens.append(h[1 + kept.index(place)] if place in kept else f["mask_token"][0, 0])
    h = torch.stack(tokens) + f["decoder.positions"]
    h = plain.transformer_block(f, "decoder.blocks.0", h, HEADS)
    return plain.linear(f, "decoder.pred", plain.layer_norm(f, "decoder.norm", h))[1:]


def attack(loss_of, v, noise, flags):
    """PGD in the pixels v (B, Lk, D) of the visible patches; FGSM starts without noise, which is then None."""
    eps = flags.eps / 255
    if eps == 0:
        return v
    if flags.step_size is not None:
        step_size = flags.step_size / 255
    else:
        step_size = eps if flags.steps == 1 else 5 / 8 * eps
    v_adv = v
    if noise is not None:
        v_adv = (v + eps * noise.view(v.shape)).clamp(0, 1)
    for _ in range(flags.steps):
        v_adv = v_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(v_adv), v_adv)
        moved = []
        for i in range(len(v)):
            if flags.norm == "linf":
                delta = v_adv[i] + step_size * g[i].sign() - v[i]
                delta = delta.clamp(-eps, eps)
            else:
                delta = v_adv[i] + step_size * g[i] / g[i].norm() - v[i]
                delta = delta * min(1, eps / delta.norm())
            moved.append((v[i] + delta).clamp(0, 1))
        v_adv = torch.stack(moved).detach()
    plain.some_not_all((v_adv == 0) | (v_adv == 1))
    if flags.norm == "linf":
        plain.some_not_all(((v_adv - v).abs() - eps).abs() < 1e-12)
    return v_adv


def step(f, past, names, x, u, noise, flags):
    """Changes the network f and the optimizer's past; returns what is logged."""
    patches = torch.stack([plain.patches_of(image, SIDE) for image in x])
    clean = (patches - f["encoder.mean"]) / f["encoder.std"]
    kept = [kept_patches(row, flags.mask_ratio) for row in u]
    removed = [[place for place in range(len(row)) if place not in seen] for row, seen in zip(u, kept)]
    v = torch.stack([patches[i, seen] for i, seen in enumerate(kept)])

    def loss_of(v):
        pred = torch.stack([rebuild(f, *pair) for pair in zip(v, kept)])
        return plain.rebuilding_loss(pred, clean, removed, flags.norm_pix)

    v_adv = attack(loss_of, v, noise, flags)
    weights = plain.with_gradient(f, names)
    loss = loss_of(v_adv)
    logged = {"loss": loss}
    if flags.clean_weight:
        of_each = {"loss_adv": loss, "loss_clean": loss_of(v)}
        loss = (1 - flags.clean_weight) * of_each["loss_adv"] + flags.clean_weight * of_each["loss_clean"]
        logged = {"loss": loss, **of_each}
    plain.adamw(f, names, torch.autograd.grad(loss, weights), past, flags.lr, flags.weight_decay)
    return logged


# ----------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------
def optimizer(net, flags):
    groups = optim.groups(net.named_parameters(), flags.weight_decay)
    return torch.optim.AdamW(groups, flags.lr, betas=(0.9, 0.95))


def step_of_the_script(net, opt, x, u, noise, args):
    return adv_mae.train_step(net, opt, x, u, noise, **named_by(adv_mae.train_step, adv_mae, args))


def network():
    encoder = ViT("toy", SIDE, 8, 1, HEADS, 6, plain.MEAN, plain.STD, "sincos", False, False)
    net = plain.randomised(adv_mae.MAE(encoder, (12, 1, HEADS)), 1)
    return plain.use_own_positions(net, net.encoder, net.decoder)


@pytest.mark.parametrize("more", [
    *({"norm": norm, "norm_pix": norm_pix, "steps": steps}
      for norm in ("linf", "l2") for norm_pix in (True, False) for steps in (1, 2)),
    {"norm": "linf", "steps": 3, "step_size": 25.0}, {"norm": "l2", "steps": 3, "step_size": 110.0},
    {"norm": "l2", "steps": 1, "step_size": 110.0}, {"eps": 0.0},
    {"clean_weight": 0.3}, {"clean_weight": 0.8, "norm": "l2", "norm_pix": False}, {"clean_weight": 1.0}],
    ids=lambda more: " ".join(f"{key}={value}" for key, value in more.items()))
def test_two_steps_are_the_methods(more):
    given = {**FLAGS, **more}
    if given["norm"] == "l2":
        given["eps"] = 255 * 0.9
    flags = SimpleNamespace(**{"step_size": None, **given})
    args = plain.arguments(adv_mae, given)
    net = network()
    opt = optimizer(net, flags)
    names = plain.trained(net)
    f = plain.state(net)
    past = {}
    start = dict(f)
    for t in range(2):
        g = torch.Generator().manual_seed(t)
        x = plain.images(3, 6, 10 + t)
        u = torch.rand(3, 9, generator=g, dtype=torch.float64)
        noise = 2 * torch.rand(3, 4 * 12, generator=g, dtype=torch.float64) - 1
        if flags.norm == "l2":
            noise = 0.95 * plain.unit(noise)
        if flags.steps == 1 and flags.step_size is None:
            noise = None
        logged = step(f, past, names, x, u, noise, flags)
        found = step_of_the_script(net, opt, x, u, noise, args)
        plain.same(found, logged, f"step {t}, logged")
        # AdamW makes more of a gradient of 1e-16: in truth that of the bias of all keys is 0
        plain.same(plain.state(net), f, f"step {t}, net", atol=1e-8)
        plain.same(plain.memory(opt, net), past, f"step {t}, optimizer")
    plain.all_moved(start, f, names)


def test_a_run_has_the_optimizer_of_these_steps(tmp_path, monkeypatch):
    given = ["--arch", "vit_slim", "--lr", "0.03", "--weight-decay", "0.02", "--warmup", "0"]
    (net,), (opt,) = plain.optimizers_of_main(adv_mae, given, tmp_path, monkeypatch)
    found = plain.settings(opt, net)
    assert type(opt) is torch.optim.AdamW and found.keys() == set(plain.trained(net))
    for name, treated in found.items():
        decay = 0.02 if net.get_parameter(name).dim() > 1 else 0.0
        want = dict(lr=0.03, betas=(0.9, 0.95), weight_decay=decay, maximize=False)
        assert {key: treated[key] for key in want} == want, name
