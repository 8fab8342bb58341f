"""Two whole steps of AdPE against the method written out: plain loops in float64, nothing of adpe.py or
common/."""
import math
from types import SimpleNamespace

import pytest
import torch

import adpe
from common import optim
from common.vit import ViT
from tests import steps2 as plain
from tests.scripts import named_by

FLAGS = dict(mask_ratio=0.5, lr=0.02, weight_decay=0.3, adv_lr=0.1, radius=0.7, norm="linf", steps=3,
             position="relative", mode="coordinate", adversary="persistent")
SIDE = 2
GRID = 3
HEADS = 2  # of a patch; of patches; of both transformers, which have one block
BLOCKS = ("encoder.blocks.0", "decoder.blocks.0")  # each has a row of delta
SEED = 12  # of starts of which, in every form, the projection has something to do
FORMS = [(position, mode) for position in ("relative", "absolute") for mode in ("coordinate", "embedding")]


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def index(offset):
    """iRPE's index of an offset in patches: itself, but beyond 1.9 a logarithm that ends at 3.8."""
    if abs(offset) <= 1.9:
        return offset
    far = 1.9 + (3.8 - 1.9) * torch.log(abs(offset) / 1.9) / math.log(15.2 / 1.9)
    return torch.sign(offset) * far.clamp(max=3.8)


def lookup(table, row, column):
    """table (d, 7, 7), bilinear between the four entries around (row, column) from its centre."""
    row = row.clamp(-3, 3) + 3
    column = column.clamp(-3, 3) + 3
    i = min(int(row), 5)
    j = min(int(column), 5)
    a = row - i
    b = column - j
    upper = (1 - b) * table[:, i, j] + b * table[:, i, j + 1]
    lower = (1 - b) * table[:, i + 1, j] + b * table[:, i + 1, j + 1]
    return (1 - a) * upper + a * lower


def readings(f, block, delta, flags):
    """What a block reads in its table at all offsets of the grid: (2 GRID - 1, 2 GRID - 1, d). `delta` is
    the block's row, or None."""
    table = f[f"{block}.attn.relative.table"]
    shift = torch.zeros(2, dtype=torch.float64)
    if delta is not None and flags.mode == "embedding":
        table = table + delta[:len(table)]
    elif delta is not None:
        shift = delta
    found = []
    for down in range(1 - GRID, GRID):
        row = []
        for right in range(1 - GRID, GRID):
            row.append(lookup(table, index(down + shift[0]), index(right + shift[1])))
        found.append(torch.stack(row))
    return torch.stack(found)


def vectors(cls, clean, moved, masked):
    """r_ij (1 + L, 1 + L, d) of an image: readings at place i minus place j, the moved ones for masked i
    alone; where one of both is the cls token, a vector of its own."""
    places = torch.arange(GRID * GRID)
    rows = [torch.stack([cls] * (1 + len(places)))]
    for i in range(len(places)):
        read = moved if i in masked else clean
        row = read[i // GRID - places // GRID + GRID - 1, i % GRID - places % GRID + GRID - 1]
        rows.append(torch.cat([cls[None], row]))
    return torch.stack(rows)


def rebuild(f, patches, masked, delta, read, flags):
    """All patches of an image, of which the encoder sees mask tokens at the places `masked`. delta: None, or
    a row for each block; in the absolute modes one. read: of each block the clean and the moved readings."""
    tokens = [f["encoder.cls_token"][0, 0] + f["encoder.pos_embed"][0, 0]]
    for place, patch in enumerate(patches):
        row = place // GRID
        column = place % GRID
        position = plain.sincos(row, column, f["encoder.pos_embed"].shape[2])
        if place not in masked:
            colours = (patch - f["encoder.mean"]) / f["encoder.std"]
            tokens.append(plain.patch_embedding(f, "encoder.patch_embed.proj", colours) + position)
            continue
        if flags.position == "absolute" and delta is not None:
            if flags.mode == "embedding":
                position = position + delta[0]
            else:
                position = plain.sincos(row + delta[0, 0], column + delta[0, 1], len(position))
        tokens.append(f["mask_token"][0, 0] + position)
    h = torch.stack(tokens)
    relative = [None, None]
    if flags.position == "relative":
        relative = []
        for block, (clean, moved) in zip(BLOCKS, read):
            relative.append(vectors(f[f"{block}.attn.relative.cls"], clean, moved, masked))
    h = plain.transformer_block(f, BLOCKS[0], h, HEADS, relative[0])
    h = plain.linear(f, "decoder.embed", plain.layer_norm(f, "encoder.norm", h)) + f["decoder.positions"]
    h = plain.transformer_block(f, BLOCKS[1], h, HEADS, relative[1])
    return plain.linear(f, "decoder.pred", plain.layer_norm(f, "decoder.norm", h))[1:]


def project(delta, flags):
    """Each row of delta into its ball."""
    rows = []
    for row in delta:
        if flags.norm == "linf":
            rows.append(row.clamp(-flags.radius, flags.radius))
        else:
            rows.append(row * min(1, flags.radius / max(row.norm(), 1e-12)))
    return torch.stack(rows)


def attack(loss_of, noise, flags):
    """PGD in delta, a row at a time, from noise in the ball."""
    step_size = 5 / 8 * flags.radius if flags.step_size is None else flags.step_size
    delta = flags.radius * noise
    for _ in range(flags.steps):
        delta = delta.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(delta), delta)
        rows = []
        for row, up in zip(delta.detach(), g):
            rows.append(row + step_size * (up.sign() if flags.norm == "linf" else up / up.norm()))
        delta = project(rows, flags)
    return delta


def step(f, past, past_delta, names, x, u, noise, flags):
    """Changes the network f, delta in it, and what both optimizers remember; returns what is logged."""
    patches = torch.stack([plain.patches_of(image, SIDE) for image in x])
    clean = (patches - f["encoder.mean"]) / f["encoder.std"]
    kept = int(GRID * GRID * (1 - flags.mask_ratio))
    masked = [sorted(range(len(row)), key=lambda place: float(row[place]))[kept:] for row in u]

    def loss_of(delta):
        read = []
        if flags.position == "relative":
            for i, block in enumerate(BLOCKS):
                clean_read = readings(f, block, None, flags)
                moved_read = clean_read if delta is None else readings(f, block, delta[i], flags)
                read.append((clean_read, moved_read))
        pred = torch.stack([rebuild(f, *pair, delta, read, flags) for pair in zip(patches, masked)])
        return plain.rebuilding_loss(pred, clean, masked, standardise=True)

    if flags.radius == 0:
        delta = None
    elif flags.adversary == "pgd":
        delta = f["delta"] = attack(loss_of, noise, flags)
    else:
        (delta,) = plain.with_gradient(f, ["delta"])
    weights = plain.with_gradient(f, names)
    loss = loss_of(delta)
    grads = torch.autograd.grad(loss, weights, retain_graph=True)
    if flags.radius and flags.adversary == "persistent":
        uphill = torch.autograd.grad(loss, [delta])  # at the weights from before their step
        plain.adamw(f, ["delta"], uphill, past_delta, flags.adv_lr, decay=0.0, ascend=True)
        f["delta"] = project(f["delta"], flags)
    plain.adamw(f, names, grads, past, flags.lr, flags.weight_decay)
    return {"loss": loss}


# ----------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------
def optimizers(net, flags):
    weights = [(name, w) for name, w in net.named_parameters() if w is not net.delta]
    opt = torch.optim.AdamW(optim.groups(weights, flags.weight_decay), flags.lr, betas=(0.9, 0.95))
    opt_delta = torch.optim.AdamW([net.delta], flags.adv_lr, betas=(0.9, 0.95), weight_decay=0,
                                  maximize=True)
    return opt, opt_delta


def step_of_the_script(net, opt, opt_delta, x, u, noise, args):
    settings = named_by(adpe.train_step, adpe, args)
    return adpe.train_step(net, opt, opt_delta, x, u, noise, **settings)


def network(position, mode):
    """Its blocks have heads of 4 and of 6."""
    relative = position == "relative"
    encoder = ViT("toy", SIDE, 8, 1, HEADS, 6, plain.MEAN, plain.STD, "sincos", relative, False)
    net = plain.randomised(adpe.MAEPlus(encoder, (12, 1, HEADS), position, mode), 1)
    if relative:  # in float64, too
        offsets = torch.arange(-7.0, 8.0, dtype=torch.float64)
        net.encoder.offset_weights.copy_(adpe.entry_weights(adpe.relative_index(offsets), 3))
    return plain.use_own_positions(net, net.encoder, net.decoder)


def ball_point(shape, used, norm, g):
    """Rows of which the first is at the edge of the unit ball, or very near, the others well within."""
    u = 2 * torch.rand(shape, generator=g, dtype=torch.float64) - 1
    u = u * used
    if norm == "linf":
        u = (1.3 * u).clamp(-1, 1)
        u[:, 0] = 0.98 * u[:, 0].sign()
        return u * used
    rows = [length * row / row.norm() for row, length in zip(u, (0.99, 0.5))]
    return torch.stack(rows)


def two_steps(more):
    given = {**FLAGS, **more}
    flags = SimpleNamespace(**{"step_size": None, **given})
    args = plain.arguments(adpe, given)
    net = network(flags.position, flags.mode)
    g = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        net.delta.copy_((flags.radius or 1) * ball_point(net.delta.shape, net.in_use, flags.norm, g))
    opt, opt_delta = optimizers(net, flags)
    names = [name for name in plain.trained(net) if name != "delta"]
    f = plain.state(net)
    past = {}
    past_delta = {}
    start = dict(f)
    for t in range(2):
        x = plain.images(2, 6, 10 + t)
        u = torch.rand(2, 9, generator=g, dtype=torch.float64)
        noise = ball_point(net.delta.shape, net.in_use, flags.norm, g)
        logged = step(f, past, past_delta, names, x, u, noise, flags)
        found = step_of_the_script(net, opt, opt_delta, x, u, noise, args)
        plain.same(found, logged, f"step {t}, logged")
        # AdamW makes more of a gradient of 1e-16: in truth that of the bias of all keys is 0
        plain.same(plain.state(net), f, f"step {t}, net", atol=1e-8)
        plain.same(plain.memory(opt, net), past, f"step {t}, optimizer")
        plain.same(plain.memory(opt_delta, net), past_delta, f"step {t}, optimizer of delta")
    plain.all_moved(start, f, names)
    if flags.radius:
        plain.all_moved(start, f, ["delta"])
        edge = f["delta"].abs() if flags.norm == "linf" else f["delta"].flatten(1).norm(dim=1)
        assert (edge > flags.radius - 1e-9).any()  # the projection had something to do
    else:
        assert torch.equal(f["delta"], start["delta"])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("adversary", ["persistent", "pgd"])
@pytest.mark.parametrize("position, mode", FORMS)
def test_two_steps_are_the_methods(position, mode, adversary, norm):
    two_steps(dict(position=position, mode=mode, adversary=adversary, norm=norm))


@pytest.mark.parametrize("more", [
    dict(radius=0.0), dict(radius=0.0, adversary="pgd"), dict(adversary="pgd", step_size=0.3, steps=2)],
    ids=str)
def test_two_steps_of_the_base_and_of_a_given_step_size(more):
    two_steps(more)


def test_a_run_has_the_optimizers_of_these_steps(tmp_path, monkeypatch):
    given = ["--arch", "vit_slim", "--lr", "0.03", "--adv-lr", "0.04", "--weight-decay", "0.02",
             "--warmup", "0"]
    (net,), (opt, opt_delta) = plain.optimizers_of_main(adpe, given, tmp_path, monkeypatch)
    assert type(opt) is type(opt_delta) is torch.optim.AdamW
    found = plain.settings(opt, net)
    of_delta = plain.settings(opt_delta, net)
    assert found.keys() == set(plain.trained(net)) - {"delta"} and of_delta.keys() == {"delta"}
    assert net.delta.abs().sum() == 0
    for name, treated in {**found, **of_delta}.items():
        want = dict(lr=0.03, betas=(0.9, 0.95), weight_decay=0.0, maximize=False)
        if name == "delta":
            want |= dict(lr=0.04, maximize=True)
        elif net.get_parameter(name).dim() > 1:
            want |= dict(weight_decay=0.02)
        assert {key: treated[key] for key in want} == want, name
