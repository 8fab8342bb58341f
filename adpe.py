"""AdPE: adversarial positional embeddings (Wang et al. 2023, arXiv 2303.07598), on a masked
autoencoder.

A masked patch is easily copied from its neighbours. AdPE tells masked tokens wrong positions,
shifted so that rebuilding them becomes hard: local correlation no longer helps, and the network must
look at the whole image. The adversary is delta, a few numbers (by default two in each block) that all
images share. The aim is better features, not robustness.

    min over the weights, max over delta:
        mean over masked patches, and over the D values of a patch, of (prediction - target)^2,
        with |delta_b| <= eps in each block b

The target is the patch standardised over its D values, as in MAE. Only masked tokens are moved. With
relative positions they are moved as queries: the logits of a masked query i and any patch key j, masked
or not, read the offset pos_i - pos_j + delta. Other queries, and the cls token, see true positions.

    paper                       this file
    MAE+                        MAEPlus: mask tokens enter before the encoder, which sees all positions
    p[u, v]                     table of common.vit.Relative, one in each block (iRPE, arXiv 2107.14222)
    g                           relative_index
    p[g(x), g(y)]               lookup, bilinear
    delta in p[g(x), g(y)]      MAEPlus.biases: masked queries i read the offset pos_i - pos_j + delta
    four kinds of delta         --position, --mode; delta_shape
    max over delta              ascend (--adversary persistent) or attack (--adversary pgd)
    projection, epsilon         common.pgd.project, --radius

With --position absolute, delta moves the sine-cosine embedding of a masked token as it enters the
encoder: it is added to the embedding, or to the position from which the embedding is made. With
--position relative every block, the decoder's too, has a table p and a delta of its own, and adds
q_i . r_ij to its logits, with r_ij = p[g(pos_i - pos_j)]. The tables start at zero, where a shift of
coordinates has no gradient yet.

By "paper" we mean its abstract and a survey by the same group (Qi & Shah 2022, arXiv 2210.13463); we
had the code but not the body of the paper. Relative coordinates are the default since they are the
best of the four in the survey's Table 4. In the code delta persists: each update moves it one step of
Adam uphill, with the gradient of the weights' own backward pass, and projects it. The survey's
Table 1 has such a projected step on a delta that is kept, and its text, that PGD and the updates of
the weights alternate, fits that too. A new delta for each batch, found by several steps (--adversary
pgd), is ours. We depart from the code:
    - The l2 projection is finite at delta = 0; theirs divides 0 by 0. In absolute embedding, delta
      starts at 0 and is added to the mask token; theirs starts at random and replaces it.
    - A whole index reads exactly one entry of the table, as iRPE's rounded index does. Offsets -1, 0
      and 1 have whole indices. Farther offsets have indices that grow as a logarithm (iRPE's), and
      from 7 patches on read the last entry, where a shift has no gradient. In their code whole
      indices fall between two entries, far offsets read zeros beside the table, and the table is
      transposed.
    - In relative embedding there is a delta for each entry of a table. Their code has one for all
      entries, which shifts all logits of a query alike, so that the softmax cancels it.
    - Crops are cut from the central square of a picture, reduced to --image-size; theirs from the
      whole picture.

The first command is the code's ImageNet recipe, which leaves norm and eps to the user: eps 1.0 is the
default of the code, linf is ours. Other flags that the command does not give have the code's values, as
have the betas 0.9 and 0.95 of both optimizers. The other commands are ours, for CIFAR-10; the help of each
flag says whose its default is.

    torchrun --standalone --nproc-per-node 8 adpe.py --data path/to/imagenet --arch vit_base \
--image-size 112 --crops 4 --min-scale 0.08 --decoder 512 8 16 --batch-size 4096 --lr 2.4e-3 --adv-lr 2.4e-3
    python adpe.py                                            relative coordinates, persistent
    python adpe.py --radius 0 --out runs/mae-plus             MAE+, the clean base
    python eval.py runs/adpe/encoder.pt --preset mae-tune-cifar mae-slf-cifar knn

Counting a backward pass to delta as one forward pass and a whole one as two, MAE+ costs three
passes through encoder and decoder. But its encoder sees all tokens, and so costs about 4 times as
much as MAE's, which sees the visible ones alone. The persistent adversary adds no pass (but with
relative positions, each block computes its logits of positions twice); pgd with K steps costs 2 K + 3.
Patch tokens, target, mask and the undisturbed r_ij are computed once.

On several processes the loss is a mean over the patches of each, and then over processes. All have
one delta: the persistent one climbs the mean of their gradients; pgd's is that of the first process,
moved by the sum of them. There is no BatchNorm.

The encoder is exported without delta and decoder: at test time no token is masked, and every token
gets its true position. An encoder with relative positions cannot become a timm ViT, which has
no tables.

In the log, a loss of 1 - 1/D is what predicting each patch's mean gives; it falls below that within the
first epochs, and a loss that is not finite ends the run. In the first run below, where 1 - 1/D is 0.979,
the loss was 0.94 in epoch 0, 0.64 in epoch 1 and 0.41 at the end, almost as with MAE+ (0.40). Whether the
adversary lives shows only in positions.png, which draws delta. With relative coordinates it can move only
once the tables have left zero. A persistent delta that never moves, or stays at one point of its ball's
edge, is no longer an adversary: the network gets used to it. With --adversary pgd the picture is of the
last batch's delta. With --radius 0 nothing is moved; --steps concerns pgd alone, whose delta is random
with --steps 0 (0 with --no-random-start too).

Measured on one CPU thread with 10,000 images of CIFAR-10 (JPEG) and --arch vit_slim --decoder 64 1 4
--batch-size 64 --lr 2e-3 --adv-lr 2e-3 --warmup 1 --epochs 12, in 10 CPU minutes (mean of 2 seeds): a
linear probe reaches 42.4 %, fine-tuning 48.2. MAE+ reaches 42.2 and 48.8 in 9 CPU minutes (14 epochs); a
random encoder, 34.8 and 40.4. This has not been run on a GPU yet. Neither the abstract nor the survey
has a figure for CIFAR-10.
"""
import argparse
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_resized_crop
from common.log import Log
from common.pgd import pgd, project, uniform
from common.pictures import save_rows
from common.speed import compile_networks
from common.vit import (
    PatchDecoder, check_masked, coordinates, patchify, relative_bias, relative_logits, sincos_at, unpatchify)

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in MAE's code
STD = (0.229, 0.224, 0.225)


# ----------------------------------------------------------------------------------------------------------
# The method: positions
# ----------------------------------------------------------------------------------------------------------
def relative_index(offsets, alpha=1.9, beta=3.8, gamma=15.2):  # iRPE's numbers, as in the authors' code
    """g: the real index of an offset in patches, per coordinate. It is the offset itself up to
    `alpha`; then it grows as a logarithm that reaches `beta` at `gamma`, and stays. Rounded it is
    iRPE's piecewise index."""
    far = offsets.abs().clamp_min(alpha)  # the logarithm of 0 would make the gradient NaN
    index = alpha + (beta - alpha) / math.log(gamma / alpha) * (far / alpha).log()
    return torch.where(offsets.abs() <= alpha, offsets, offsets.sign() * index.clamp_max(beta))


def entry_weights(index, K):
    """Linear weights (..., 2K+1) of entries -K, ..., K at a real `index` (...), clamped to [-K, K].
    At integers one weight is 1 and the others 0; the derivative there is one-sided. An index that
    is NaN makes all weights NaN."""
    place = index.clamp(-K, K) + K
    # For an index that is NaN some entry must be named; the NaN stays in `fraction`.
    low = place.detach().nan_to_num().floor().clamp_max(2 * K - 1)
    fraction = (place - low)[..., None]
    low = F.one_hot(low.long(), 2 * K + 1).to(fraction)
    return (1 - fraction) * low + fraction * low.roll(1, -1)


def lookup_weights(indices, K):
    """Bilinear weights (..., (2K+1)^2) of a table's entries at `indices` (..., 2), as (row,
    column)."""
    rows, columns = entry_weights(indices, K).unbind(-2)
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)


def lookup(table, indices):
    """p[u, v]: bilinear reading (C, ...) of table (C, 2K+1, 2K+1) at real `indices` (..., 2), as
    (row, column) from its centre, clamped to [-K, K]; differentiable in both."""
    weights = lookup_weights(indices, table.shape[1] // 2)
    with torch.autocast(table.device.type, enabled=False):  # it is small
        values = table.flatten(1) @ weights.reshape(-1, table[0].numel()).T
    return values.view(len(table), *indices.shape[:-1])


def clean_weights():
    """How an undisturbed offset of -7, ..., 7 patches reads a table, along one coordinate: (15, 7).
    Farther offsets read as 7 does. The exported encoder holds these numbers, and so needs no g."""
    offsets = torch.arange(-7.0, 8.0)
    return entry_weights(relative_index(offsets), K=3)  # a table has the entries -3, ..., 3 each way


def delta_shape(position, mode, dim, widths):
    """The shape of delta for an encoder of width `dim` and `widths`, that of a head in each block;
    a row for each block that has a delta of its own."""
    if position == "absolute":
        return (1, dim) if mode == "embedding" else (1, 2)
    if mode == "embedding":
        return len(widths), max(widths), 7, 7
    return len(widths), 2


# ----------------------------------------------------------------------------------------------------------
# The method: network, loss, adversary
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size, min_scale, crops):
    """Crops of the uint8 images x (B, 3, H, W): floats (crops B, 3, size, size) in [0, 1]."""
    return torch.cat([random_resized_crop(x, rng, size, (min_scale, 1.0), flip=0.5, filter="bicubic")
                      for _ in range(crops)])


def random_mask(u, ratio):
    """(B, L) bool: all but the int(L (1 - ratio)) patches of smallest `u` (B, L) are masked. Raises
    ValueError where all or none are."""
    kept = int(u.shape[1] * (1 - ratio))
    if not 0 < kept < u.shape[1]:
        raise ValueError(f"mask ratio {ratio}: leaves {kept} of {u.shape[1]} patches; must be some, not all")
    return u.argsort(1).argsort(1) >= kept


class MAEPlus(nn.Module):
    """An encoder of all tokens and a light decoder (width, blocks, heads); `delta` moves the masked
    tokens.

    Without BatchNorm and dropout, train and eval mode agree.
    """

    def __init__(self, encoder, decoder, position, mode):
        super().__init__()
        self.encoder = encoder
        self.position = position
        self.mode = mode
        if position == "relative":
            encoder.offset_weights.copy_(clean_weights())
        self.decoder = PatchDecoder(encoder, *decoder)
        self.blocks = [*self.encoder.blocks, *self.decoder.blocks]
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("places", coordinates(*encoder.grid).float(), persistent=False)  # (L, 2)
        widths = [block.attn.d for block in self.blocks]
        self.delta = nn.Parameter(torch.zeros(delta_shape(position, mode, encoder.dim, widths)))
        in_use = torch.ones(self.delta.shape)
        if self.delta.dim() == 4:  # a block whose heads are narrower has a narrower delta
            for row, width in zip(in_use, widths):
                row[width:] = 0
        self.register_buffer("in_use", in_use, persistent=False)

    def tokens(self, patches):
        """Patches (B, L, D) of pixels -> (B, L, dim) at their positions, none masked."""
        with run.autocast(patches.device):
            return self.encoder.embed(patches) + self.encoder.pos_embed[:, 1:]

    def vectors(self):
        """The vectors r_ij of each block at delta = 0: (1 + L, 1 + L, d) each; [] for absolute
        positions."""
        if self.position == "absolute":
            return []
        weights = self.encoder.pair_weights(*self.encoder.grid)
        return [block.attn.relative.read(weights) for block in self.blocks]

    def moved_vectors(self, block, delta):
        """The r_ij of a `block` for masked queries i: p[g(pos_i - pos_j + delta)], or, in embedding
        mode, (p + delta)[g(pos_i - pos_j)]. delta (2,) in patches, as (row, column), or (d, 7,
        7)."""
        relative = block.attn.relative
        if self.mode == "coordinate":
            offsets = self.places[:, None] - self.places + delta  # (L, L, 2)
            inner = lookup(relative.table, relative_index(offsets))
            return relative.with_cls(inner.permute(1, 2, 0))
        weights = self.encoder.pair_weights(*self.encoder.grid)
        return relative.read(weights, relative.table + delta[: block.attn.d])

    def masked_token(self, delta):
        """What stands at masked places: (1, L, dim)."""
        positions = self.encoder.pos_embed[:, 1:]
        if self.position == "absolute" and delta is not None:
            if self.mode == "coordinate":
                positions = sincos_at(self.places + delta, positions.shape[2])
            else:
                positions = positions + delta
        return self.mask_token + positions

    def biases(self, vectors, masked, delta):
        """For each block, the function from queries to their relative logits (TransformerBlock).
        Masked queries use the moved r_ij, all others, and the cls token, the clean `vectors`."""
        if delta is None or not vectors:
            return [relative_bias(clean) for clean in vectors]
        is_masked = F.pad(masked, (1, 0))[:, None, :, None]  # (B, 1, 1 + L, 1); cls is not
        biases = []
        for block, clean, block_delta in zip(self.blocks, vectors, delta):
            biases.append(either_bias(is_masked, self.moved_vectors(block, block_delta), clean))
        return biases

    def forward(self, tokens, vectors, masked, delta=None):
        """`tokens` (B, L, dim) and `vectors` as above, `masked` (B, L) bool -> all patches (B, L, 3
        patch^2)."""
        biases = self.biases(vectors, masked, delta)
        depth = len(self.encoder.blocks)
        h = torch.where(masked[:, :, None], self.masked_token(delta), tokens)
        with run.autocast(h.device):
            h = self.encoder.encode(h, biases[:depth])
            return self.decoder(self.decoder.embed(h), biases[depth:])


def either_bias(is_masked, moved, clean):
    """The `bias` of a TransformerBlock by r_ij `moved` where the query is masked, and `clean`
    elsewhere."""

    def bias(q):
        return torch.where(is_masked, relative_logits(q, moved), relative_logits(q, clean))

    return bias


def mae_loss(pred, target, masked):
    """Squared error of pred against target (B, L, D), each target patch standardised over its D
    values; mean over D, then over the patches that are `masked` (B, L)."""
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = (pred.to(target.dtype) - target).square().mean(2)  # (B, L)
    return (error * masked).sum() / masked.sum()


def attack(net, tokens, vectors, masked, target, noise, *, norm, radius, step_size, steps):
    """The pgd adversary: a new delta, one for all images of this batch, within `radius` (in patches,
    or in embedding units) of 0, each row of delta in a ball of its own. It starts at radius `noise`,
    noise of its shape in the unit ball, or, where noise is None, at 0.

    All processes use the delta of the first one, whose gradient is then the sum of theirs.
    """
    # The weights stand still, so that all that does not depend on delta is a constant.
    tokens = tokens.detach()
    vectors = [r.detach() for r in vectors]

    def loss_of_delta(delta):
        shared = dist.gather(delta)[:len(delta)]  # `gather` passes gradients on
        return mae_loss(net(tokens, vectors, masked, shared), target, masked)

    zero = torch.zeros_like(net.delta)
    start = zero if noise is None else radius * noise
    delta = pgd(loss_of_delta, zero, radius, step_size, steps, norm, start=start, lo=-torch.inf, hi=torch.inf)
    return dist.gather(delta)[:len(delta)]


@torch.no_grad()
def ascend(delta, opt, radius, norm):
    """The persistent adversary: one step of `opt`, which maximises the loss; then each row of delta is
    projected onto its ball."""
    opt.step()
    delta.copy_(project(delta, radius, norm))


def train_step(net, opt, opt_delta, x, u, noise, *, mask_ratio, adversary, norm, radius, step_size, steps):
    """One iteration on images x (B, 3, S, S); the loss, to be logged. u (B, L), uniform, draws the
    mask; `noise` is as in `attack`. `opt` has the weights, `opt_delta` net.delta. With radius 0 it
    is MAE+'s step."""
    if adversary not in ("persistent", "pgd"):
        raise ValueError(f"adversary {adversary!r}: choose persistent or pgd")
    patches = patchify(x, net.encoder.patch)  # (B, L, D)
    target = net.encoder.normalise(patches)
    masked = random_mask(u, mask_ratio)
    tokens = net.tokens(patches)
    vectors = net.vectors()
    delta = net.delta if radius else None
    if radius and adversary == "pgd":
        delta = attack(net, tokens, vectors, masked, target, noise,
                       norm=norm, radius=radius, step_size=step_size, steps=steps)
        net.delta.data.copy_(delta)  # for the picture
    loss = mae_loss(net(tokens, vectors, masked, delta), target, masked)

    # One backward pass for both players: the weights descend, and the persistent delta ascends.
    # Both gradients are taken at the same point, so that the order of the two updates does not
    # matter.
    opt.zero_grad()
    net.delta.grad = None
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    if radius and adversary == "persistent":
        ascend(net.delta, opt_delta, radius, norm)
    return {"loss": loss}


def lr_at(epoch, epochs, lr, warmup):
    """The learning rate at the fractional `epoch`: linear from 0 over the first `warmup`, then a
    cosine to 0."""
    return optim.warmup_cosine(epoch, epochs, warmup, lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="adpe", arch="vit_tiny")
    p.add_argument("--position", choices=("relative", "absolute"), default="relative",
                   help="which positions are moved (paper)")
    p.add_argument("--mode", choices=("coordinate", "embedding"), default="coordinate",
                   help="whether their coordinates or their embeddings are moved (paper)")
    p.add_argument("--adversary", choices=("persistent", "pgd"), default="persistent",
                   help="pgd, a new delta for each batch (ours), or persistent, one that is kept (authors' "
                        "code)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf",
                   help="of delta, both in the paper; in l2 --radius 1 is a shift by one patch in any "
                        "direction, in linf by one in each coordinate; default (ours)")
    p.add_argument("--radius", type=run.number(), default=1.0,
                   help="eps, in patches, or in embedding units; 0 gives MAE+; default (authors' code)")
    p.add_argument("--adv-lr", type=run.number(), default=1e-3,
                   help="of the persistent adversary, at its peak (ours)")
    p.add_argument("--steps", type=run.integer(0), default=2, help="of the pgd adversary (ours)")
    p.add_argument("--step-size", type=run.number(),
                   help="of the pgd adversary, in the units of --radius; default: 5/8 of it (ours)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the pgd adversary at a random point of the ball (ours); without it, at 0: "
                        "with --steps 1 and --step-size equal to --radius, in linf, that is FGSM")
    p.add_argument("--decoder", type=run.integer(1), nargs=3, default=[128, 4, 4],
                   metavar=("WIDTH", "BLOCKS", "HEADS"), help="width, blocks and heads of the decoder (ours)")
    p.add_argument("--mask-ratio", type=run.number(0, 1), default=0.75,
                   help="the share of the patches that is masked (MAE's)")
    p.add_argument("--epochs", type=run.integer(0), default=400,
                   help="0 exports the random encoder; default (authors' code)")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images per step, over all processes (ours)")
    p.add_argument("--lr", type=run.number(), default=1e-3, help="of AdamW, at its peak (ours)")
    p.add_argument("--warmup", type=run.integer(0), default=20,
                   help="in epochs, also of --adv-lr (authors' code)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=0.05, help="(MAE's)")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a crop in pixels; default: that of the images, and 32 for a folder")
    p.add_argument("--crops", type=run.integer(1), default=1, help="of an image, per step (ours)")
    p.add_argument("--min-scale", type=run.number(above=0, most=1), default=0.2,
                   help="the smallest share of the image that a crop takes (ours)")
    return p


def network(args, size):
    """Tokens and masks -> rebuilt patches (`MAEPlus.forward`)."""
    encoder = encoders.make(args.arch, mean=MEAN, std=STD, size=size,
                            relative=args.position == "relative")
    return MAEPlus(encoder, args.decoder, args.position, args.mode)


def random_numbers(rng, net, args, device):
    """Uniform u (crops B, L), which draws masks; and noise of delta's shape, uniform in the unit
    ball for each of its rows, or None where nothing starts at random."""
    u = rng.uniform(args.crops, len(net.places), device=device).transpose(0, 1).flatten(0, 1)
    if args.adversary != "pgd" or not args.random_start:
        return u, None
    seed = int(2**24 * rng.shared(1)[0])  # one for all images, on all processes
    generator = torch.Generator(device).manual_seed(seed)
    noise = net.in_use * uniform(net.delta, 1.0, args.norm, generator)
    if net.delta.dim() == 4 and args.norm == "l2":
        # A point of the wide ball that is cut to fewer coordinates is no longer uniform in its ball, but
        # too near the centre. So narrower rows are drawn anew.
        for row, block in zip(noise, net.blocks):
            if block.attn.d < len(row):
                used = row[: block.attn.d]
                used.copy_(uniform(used[None], 1.0, args.norm, generator)[0])
    return u, noise


def attack_settings(args):
    """The named arguments of `attack` as the flags have them."""
    step_size = 5 / 8 * args.radius if args.step_size is None else args.step_size
    return dict(norm=args.norm, radius=args.radius, step_size=step_size, steps=args.steps)


@torch.no_grad()
def pictures(net, images, size, args):
    """Rows for `save_rows`: a panel for each row of delta, the encoder's blocks first. In coordinate
    mode it is an image whose masked patches are dark, with a white dot where each is, and a red one
    where it is told that it is (over the white one where delta is 0).

    Embeddings name no place. For relative positions the panel then shows the length of delta at each
    entry of the table; for absolute ones, how much each moved embedding (rows) is like each true one
    (columns).
    """
    depth = len(net.encoder.blocks)
    names = [f"encoder {i}" if i < depth else f"decoder {i - depth}" for i in range(len(net.delta))]
    if net.position == "absolute":
        names = ["input"]
    if net.mode == "embedding":
        clean = net.encoder.pos_embed[0, 1:]
        if net.position == "relative":
            values = net.delta.norm(dim=1, keepdim=True)
        else:
            values = (clean + net.delta) @ clean.T[None, None]
        values = F.interpolate(values / values.max().clamp_min(1e-8), scale_factor=8)
        return [(name, panel[None].expand(1, 3, -1, -1)) for name, panel in zip(names, values)]
    x, _, rng = data.sample(images, 2, args.seed)
    masked = random_mask(rng.uniform(len(net.places), device=x.device), args.mask_ratio)[0]
    patches = patchify(augment(x, rng, size, args.min_scale, 1)[:1], net.encoder.patch)
    patches[:, masked] *= 0.3
    zoom = max(1, 256 // size)
    panel = F.interpolate(unpatchify(patches, net.encoder.patch), scale_factor=zoom)
    rows = []
    for name, delta in zip(names, net.delta):
        marked = panel.clone()
        for positions, colour in ((net.places, (1.0, 1.0, 1.0)), (net.places + delta, (1.0, 0.2, 0.2))):
            centres = ((positions[masked] + 0.5) * zoom * net.encoder.patch).round().long()
            for i, j in centres.clamp(3, marked.shape[2] - 3).tolist():
                dot = torch.tensor(colour, device=marked.device).view(3, 1, 1)
                marked[0, :, i - 3:i + 3, j - 3:j + 3] = dot
        rows.append((name, marked))
    return rows


def main(argv=None):
    args = parser().parse_args(argv)
    env = run.setup(args)
    device = env.device
    out = pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    check_masked(args.arch, size, args.decoder, args.mask_ratio)
    steps_per_epoch = data.steps_per_epoch(len(images), args.batch_size, env.world)

    net = run.to_device(network(args, size), args, env)
    weights = [(name, w) for name, w in net.named_parameters() if w is not net.delta]
    opt = torch.optim.AdamW(optim.groups(weights, args.weight_decay), args.lr, betas=(0.9, 0.95))
    opt_delta = torch.optim.AdamW([net.delta], args.adv_lr, betas=(0.9, 0.95), weight_decay=0, maximize=True)
    compile_networks(args, env, net)

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    state = dict(net=net, opt=opt, opt_delta=opt_delta, log=log)
    step = run.resume(args, env, state)
    flat = 1 - 1 / (3 * net.encoder.patch**2)
    log.start(step, f"predicting each patch's mean: loss 1 - 1/D = {flat:.3f}")

    settings = dict(mask_ratio=args.mask_ratio, adversary=args.adversary, **attack_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step / steps_per_epoch, args.epochs, args.lr, args.warmup)
            adv_lr = lr_at(step / steps_per_epoch, args.epochs, args.adv_lr, args.warmup)
            optim.set_lr(opt, lr)
            optim.set_lr(opt_delta, adv_lr)
            crops = augment(x, rng, size, args.min_scale, args.crops)
            u, noise = random_numbers(rng, net, args, device)
            losses = train_step(net, opt, opt_delta, crops, u, noise, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr, adv_lr=adv_lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them again.
            rows = pictures(net, images, size, args)
            if env.rank == 0:
                save_rows(out / "positions.png", rows, enlarge=1)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net.encoder, out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
