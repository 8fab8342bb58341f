"""Two whole steps of unified.py against the method written out: plain loops in float64, nothing of unified.py or
common/."""
from types import SimpleNamespace

import pytest
import torch

import unified
from common import optim
from common.vit import ViT
from tests import steps2 as plain
from tests.scripts import named_by

FLAGS = dict(mask_ratio=0.5, norm_pix=True, lr=0.02, weight_decay=0.3, norm="linf", eps=60.0, steps=2, lam=0.7,
             con_weight=1.3, temperature=0.4, attack="joint", share=False)
SIDE = 2
HEADS = 2  # of both transformers, which have one block


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def kept_patches(u, ratio):
    """The places that stay visible, those of smallest u (L,), smallest first."""
    L = len(u)
    return sorted(range(L), key=lambda place: float(u[place]))[:int(L * (1 - ratio))]


def encode(f, patches, places):
    """Tokens (1 + n, 8) of the patches at these places of an image (L, D), in pixels, the cls token first."""
    tokens = [f["encoder.cls_token"][0, 0] + f["encoder.pos_embed"][0, 0]]
    for place in places:
        colours = (patches[place] - f["encoder.mean"]) / f["encoder.std"]
        token = plain.patch_embedding(f, "encoder.patch_embed.proj", colours)
        tokens.append(token + f["encoder.pos_embed"][0, 1 + place])
    h = plain.transformer_block(f, "encoder.blocks.0", torch.stack(tokens), HEADS)
    return plain.layer_norm(f, "encoder.norm", h)


def embedding(f, patches, places):
    """z of an image, of which these patches are seen: the projected mean of their tokens."""
    mean = encode(f, patches, places)[1:].mean(0)
    return plain.linear(f, "projector.2", torch.relu(plain.linear(f, "projector.0", mean)))


def rebuild(f, patches, kept):
    """All patches (L, D) from those that are kept."""
    h = plain.linear(f, "decoder.embed", encode(f, patches, kept))
    tokens = [h[0]]
    for place in range(len(f["decoder.positions"]) - 1):
        tokens.append(h[1 + kept.index(place)] if place in kept else f["mask_token"][0, 0])
    h = torch.stack(tokens) + f["decoder.positions"]
    h = plain.transformer_block(f, "decoder.blocks.0", h, HEADS)
    return plain.linear(f, "decoder.pred", plain.layer_norm(f, "decoder.norm", h))[1:]


def contrast(z1, z2, temperature):
    """Every view of every image is an anchor; the image's other view is its positive. All but the anchor is
    in the denominator."""
    u = [plain.unit(z[None])[0] for z in (*z1, *z2)]
    total = 0.0
    for i in range(len(u)):
        positive = (i + len(z1)) % len(u)
        denominator = sum((u[i] @ u[j] / temperature).exp() for j in range(len(u)) if j != i)
        total = total - (u[i] @ u[positive]) / temperature + denominator.log()
    return total / len(u)


def attack(loss_of, patches, noise, flags):
    """PGD in all pixels of an image's patches (B, L, D)."""
    eps = flags.eps / 255
    step_size = 5 / 8 * eps if flags.step_size is None else flags.step_size / 255
    moved = (patches + eps * noise).clamp(0, 1)
    for _ in range(flags.steps):
        moved = moved.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(moved), moved)
        images = []
        for i in range(len(patches)):
            if flags.norm == "linf":
                delta = (moved[i] + step_size * g[i].sign() - patches[i]).clamp(-eps, eps)
            else:
                delta = moved[i] + step_size * g[i] / g[i].norm() - patches[i]
                delta = delta * min(1, eps / delta.norm())
            images.append((patches[i] + delta).clamp(0, 1))
        moved = torch.stack(images).detach()
    plain.some_not_all((moved == 0) | (moved == 1))
    return moved


def step(f, past, names, x1, x2, u, noise, flags):
    """Changes the network f and the optimizer's past; returns what is logged."""
    first, second = (torch.stack([plain.patches_of(image, SIDE) for image in x]) for x in (x1, x2))
    clean = (first - f["encoder.mean"]) / f["encoder.std"]
    kept = [kept_patches(row, flags.mask_ratio) for row in u]
    removed = [[place for place in range(len(row)) if place not in seen] for row, seen in zip(u, kept)]
    everywhere = range(first.shape[1])

    def of_second():
        return [embedding(f, patches, everywhere) for patches in second]

    def losses_of(patches, z2):
        seen = kept if flags.share else [everywhere] * len(kept)
        z1 = [embedding(f, *pair) for pair in zip(patches, seen)]
        pred = torch.stack([rebuild(f, *pair) for pair in zip(patches, kept)])
        return contrast(z1, z2, flags.temperature), plain.rebuilding_loss(pred, clean, removed, flags.norm_pix)

    attacked = first
    if flags.attack != "none":
        z2 = [z.detach() for z in of_second()]

        def climbed(patches):
            loss_con, loss_mae = losses_of(patches, z2)
            return {"joint": flags.con_weight * loss_con + flags.lam * loss_mae, "con": loss_con,
                    "mae": loss_mae}[flags.attack]

        attacked = attack(climbed, first, noise, flags)
    weights = plain.with_gradient(f, names)
    loss_con, loss_mae = losses_of(attacked, of_second())
    loss = flags.con_weight * loss_con + flags.lam * loss_mae
    plain.adamw(f, names, torch.autograd.grad(loss, weights), past, flags.lr, flags.weight_decay)
    return {"loss": loss, "loss_con": loss_con, "loss_mae": loss_mae}


# ----------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------
def network():
    encoder = ViT("toy", SIDE, 8, 1, HEADS, 6, plain.MEAN, plain.STD, "sincos", False, False)
    net = plain.randomised(unified.Unified(encoder, (12, 1, HEADS)), 1)
    return plain.use_own_positions(net, net.encoder, net.decoder)


@pytest.mark.parametrize("more", [
    {}, {"attack": "con"}, {"attack": "mae"}, {"attack": "none"}, {"share": True, "norm_pix": False},
    {"norm": "l2", "eps": 255 * 1.5}, {"steps": 3, "step_size": 25.0}],
    ids=lambda more: " ".join(f"{key}={value}" for key, value in more.items()) or "joint")
def test_two_steps_are_the_methods(more):
    given = {**FLAGS, **more}
    flags = SimpleNamespace(**{"step_size": None, **given})
    args = plain.arguments(unified, given)
    net = network()
    opt = torch.optim.AdamW(optim.groups(net.named_parameters(), flags.weight_decay), flags.lr, betas=(0.9, 0.95))
    names = plain.trained(net)
    f = plain.state(net)
    past = {}
    start = dict(f)
    for t in range(2):
        g = torch.Generator().manual_seed(t)
        x1, x2 = plain.images(6, 6, 10 + t).chunk(2)
        u = torch.rand(3, 9, generator=g, dtype=torch.float64)
        noise = 2 * torch.rand(3, 9, 12, generator=g, dtype=torch.float64) - 1
        if flags.norm == "l2":
            noise = 0.95 * plain.unit(noise.flatten(1)).view_as(noise)
        logged = step(f, past, names, x1, x2, u, noise, flags)
        found = unified.train_step(net, opt, x1, x2, u, noise, **named_by(unified.train_step, unified, args))
        plain.same(found, logged, f"step {t}, logged")
        # AdamW makes more of a gradient of 1e-16: in truth that of the bias of all keys is 0
        plain.same(plain.state(net), f, f"step {t}, net", atol=1e-8)
        plain.same(plain.memory(opt, net), past, f"step {t}, optimizer")
    plain.all_moved(start, f, names)


def test_a_run_has_the_optimizer_of_these_steps(tmp_path, monkeypatch):
    given = ["--arch", "vit_slim", "--lr", "0.03", "--weight-decay", "0.02", "--warmup", "0"]
    (net,), (opt,) = plain.optimizers_of_main(unified, given, tmp_path, monkeypatch)
    found = plain.settings(opt, net)
    assert type(opt) is torch.optim.AdamW and found.keys() == set(plain.trained(net))
    for name, treated in found.items():
        decay = 0.02 if net.get_parameter(name).dim() > 1 else 0.0
        want = dict(lr=0.03, betas=(0.9, 0.95), weight_decay=decay, maximize=False)
        assert {key: treated[key] for key in want} == want, name
