"""AdPE: adversarial positional embeddings (Wang et al. 2023, arXiv 2303.07598), on a masked autoencoder.

A masked patch is easily copied from its neighbours. Here masked tokens are told wrong positions, shifted so
that rebuilding gets hard: local correlation no longer helps, the whole image must. The adversary is a handful
of numbers, delta, shared by all images. The aim is better features, not robustness.

    paper                       here
    MAE+                        MAEPlus: mask tokens enter before the encoder, which sees all positions
    p[u, v], g                  Relative.table and relative_index in common.vit (iRPE, arXiv 2107.14222)
    delta in p[g(x), g(y)]      MAEPlus.biases: masked queries i read the offset pos_i - pos_j + delta
    four kinds of delta         --position, --mode; DELTAS
    max over delta              ascend (--adversary persistent) or attack (--adversary pgd)
    projection, epsilon         common.pgd.project, --radius

absolute: a masked token's sine-cosine embedding, as it enters the encoder, is moved by delta, or is that of
position + delta. relative: every block, the decoder's too, has a table p and a delta of its own, and adds
q_i . r_ij, r_ij = p[g(pos_i - pos_j)], to its logits; tables start at zero, where a shift has no gradient.

We had the abstract, a survey of the same group (Qi & Shah 2022, arXiv 2210.13463), and the code. In the code
delta persists: each update moves it one step of Adam uphill, with the gradient of the weights' own backward,
and projects it; the survey's Table 1 has such a projected step on a delta that is kept. Its text says that
PGD and the weights' updates alternate: --adversary pgd takes that for an attack on each batch. eps is the
code's default. Departures from the code:
    - L2 projection is finite at delta = 0; in absolute embedding delta starts at 0 and is added to the mask
      token (in their code it is random and replaces it);
    - an index of the table that is a whole number reads that entry alone, as those of the offsets -1, 0 and 1
      do; farther offsets have indices that grow as a logarithm (iRPE's), and from 3 up read the last entry
      (in their code indices are shifted, far offsets fade out, rows and columns are exchanged);
    - relative embedding: a delta for each table entry (theirs: one for all, which the softmax cancels).

No BatchNorm, no dropout: train and eval mode agree.

The first command is the code's ImageNet recipe, on images decoded at 112 pixels; the defaults are ours.

    torchrun --standalone --nproc-per-node 8 adpe.py --data path/to/imagenet --arch vit_base \
--image-size 112 --crops 4 --min-scale 0.08 --decoder 512 8 16 --batch-size 4096 --lr 2.4e-3 --adv-lr 2.4e-3
    python adpe.py                                            relative coordinates, persistent
    python adpe.py --radius 0 --out runs/mae-plus             MAE+, the clean base
    python eval.py runs/adpe/encoder.pt --preset mae-tune-cifar mae-slf-cifar knn

Measured on a CPU thread, vit_slim, 10,000 images of CIFAR-10 (JPEG), 10 minutes, 2 seeds: linear probe 42.4,
fine-tuned 48.2; MAE+ 42.2 and 48.8, a random encoder 34.8 and 40.4. Not yet run on a GPU.
"""
import argparse
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_resized_crop
from common.log import Log
from common.pgd import pgd, project, uniform
from common.vit import (
    PatchDecoder, check_masked, coordinates, patchify, relative_logits, sincos_at, unpatchify)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in MAE's code
DELTAS = {  # shape of delta for encoder width D and `widths`, that of a head in each block
    ("absolute", "embedding"): lambda D, widths: (1, D),
    ("absolute", "coordinate"): lambda D, widths: (1, 2),
    ("relative", "embedding"): lambda D, widths: (len(widths), max(widths), 7, 7),  # 7 x 7: Relative.table
    ("relative", "coordinate"): lambda D, widths: (len(widths), 2),
}


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size, min_scale, crops):
    """Crops of the uint8 images x (B, 3, H, W): floats (crops B, 3, size, size) in [0, 1]."""
    return torch.cat([random_resized_crop(x, rng, size, (min_scale, 1.0), flip=0.5, filter="bicubic")
                      for _ in range(crops)])


def random_mask(u, ratio):
    """(B, L) bool: all but the int(L (1 - ratio)) patches of smallest `u` (B, L) are masked."""
    return u.argsort(1).argsort(1) >= int(u.shape[1] * (1 - ratio))


class MAEPlus(nn.Module):
    """Encoder of all tokens and light decoder (width, blocks, heads); `delta` moves the masked ones."""

    def __init__(self, encoder, decoder, position, mode):
        super().__init__()
        self.encoder, self.position, self.mode = encoder, position, mode
        self.decoder = PatchDecoder(encoder, *decoder)
        self.blocks = [*self.encoder.blocks, *self.decoder.blocks]
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("at", coordinates(*encoder.grid).float(), persistent=False)  # (L, 2)
        widths = [block.attn.d for block in self.blocks]
        self.delta = nn.Parameter(torch.zeros(DELTAS[position, mode](encoder.dim, widths)))
        used = torch.ones(self.delta.shape)
        for row, d in zip(used, widths) if used.dim() == 4 else ():  # a narrower block, a narrower delta
            row[d:] = 0
        self.register_buffer("used", used, persistent=False)

    def tokens(self, patches):
        """Patches (B, L, D) of pixels -> (B, L, dim) at their positions, none masked."""
        with run.autocast(patches.device):
            return self.encoder.embed(patches) + self.encoder.pos_embed[:, 1:]

    def rows(self):
        """The vectors r_ij of each block at delta = 0: (1 + L, 1 + L, d) each; [] in the absolute modes."""
        return [b.attn.relative(*self.encoder.grid) for b in self.blocks if self.position == "relative"]

    def masked_token(self, delta):
        """What stands at masked places: (1, L, dim)."""
        positions = self.encoder.pos_embed[:, 1:]
        if self.position == "absolute" and delta is not None:
            coordinate = self.mode == "coordinate"
            positions = sincos_at(self.at + delta, positions.shape[2]) if coordinate else positions + delta
        return self.mask_token + positions

    def biases(self, rows, masked, delta):
        """For each block, the function from queries to their relative logits (TransformerBlock)."""
        if delta is None or not rows:
            return [lambda q, r=r: relative_logits(q, r) for r in rows]
        queries, found = F.pad(masked, (1, 0))[:, None, :, None], []  # cls is not masked
        for block, clean, shift in zip(self.blocks, rows, delta):
            how = {"shift": shift} if self.mode == "coordinate" else {"extra": shift[:block.attn.d]}
            moved = block.attn.relative(*self.encoder.grid, **how)
            found.append(lambda q, clean=clean, moved=moved: torch.where(
                queries, relative_logits(q, moved), relative_logits(q, clean)))
        return found

    def forward(self, tokens, rows, masked, delta=None):
        """`tokens` (B, L, dim) and `rows` as above, `masked` (B, L) bool -> all patches (B, L, 3 patch^2)."""
        biases, n = self.biases(rows, masked, delta), len(self.encoder.blocks)
        h = torch.where(masked[:, :, None], self.masked_token(delta), tokens)
        with run.autocast(h.device):
            return self.decoder(self.decoder.embed(self.encoder.encode(h, biases[:n])), biases[n:])


def mae_loss(pred, target, masked):
    """Squared error of pred against target (B, L, D), each target patch standardised over its D values; mean
    over D, then over the patches that are `masked` (B, L)."""
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = (pred.to(target.dtype) - target).square().mean(2)  # (B, L)
    return (error * masked).sum() / masked.sum()


def attack(net, tokens, rows, masked, target, noise, args):
    """The pgd adversary: a new delta for this batch. It starts at `noise`, of its shape and in the unit ball,
    times the radius, or under --no-random-start at 0. All processes use the delta of the first, whose
    gradient is then the sum of theirs."""
    tokens, rows = tokens.detach(), [r.detach() for r in rows]

    def loss(delta):
        return mae_loss(net(tokens, rows, masked, dist.gather(delta)[:len(delta)]), target, masked)

    step_size = 5 / 8 * args.radius if args.step_size is None else args.step_size
    zero = torch.zeros_like(noise)
    delta = pgd(loss, zero, args.radius, step_size, args.steps, args.norm,
                start=args.radius * noise if args.random_start else zero, lo=-torch.inf, hi=torch.inf)
    return dist.gather(delta)[:len(delta)]


@torch.no_grad()
def ascend(delta, opt, radius, norm):
    """The persistent adversary: a step of `opt`, which maximises, then each row of delta into its ball."""
    opt.step()
    delta.copy_(project(delta, radius, norm))


def train_step(net, opt, opt_delta, x, u, noise, args):
    """One iteration on images x (B, 3, S, S); u (B, L), uniform, draws the mask, `noise` starts an attack."""
    patches = patchify(x, net.encoder.patch)  # (B, L, D)
    target, masked = net.encoder.normalise(patches), random_mask(u, args.mask_ratio)
    tokens, rows = net.tokens(patches), net.rows()
    delta = net.delta if args.radius else None
    if args.radius and args.adversary == "pgd":
        delta = attack(net, tokens, rows, masked, target, noise, args)
        net.delta.data.copy_(delta)  # for the picture
    loss = mae_loss(net(tokens, rows, masked, delta), target, masked)

    opt.zero_grad(), opt_delta.zero_grad()
    loss.backward()  # one backward for the weights, which descend, and for delta, which ascends
    dist.average_grads(net.parameters())
    opt.step()
    if args.radius and args.adversary == "persistent":
        ascend(net.delta, opt_delta, args.radius, args.norm)
    return {"loss": loss}


def lr_at(epoch, epochs, lr, warmup):
    """At the fractional `epoch`: linear from 0 over the first `warmup`, then a cosine to 0."""
    return optim.warmup_cosine(epoch, epochs, warmup, lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="adpe", arch="vit_tiny")
    p.add_argument("--position", choices=("relative", "absolute"), default="relative",
                   help="relative or absolute")
    p.add_argument("--mode", choices=("coordinate", "embedding"), default="coordinate",
                   help="coordinate or embedding")
    p.add_argument("--adversary", choices=("persistent", "pgd"), default="persistent",
                   help="persistent or pgd")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf", help="of delta: linf or l2")
    p.add_argument("--radius", type=run.number(), default=1.0,
                   help="eps: patches or embedding units; 0: MAE+")
    p.add_argument("--adv-lr", type=run.number(), default=1e-3,
                   help="of the persistent adversary, at its peak")
    p.add_argument("--steps", type=run.integer(0), default=2, help="of the pgd adversary")
    p.add_argument("--step-size", type=run.number(),
                   help="of the pgd adversary; default: 5/8 of the radius")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the pgd adversary at a random point of the ball (ours); without, at 0: with "
                        "--steps 1 and --step-size equal to --radius that is FGSM")
    p.add_argument("--decoder", type=run.integer(1), nargs=3, default=[128, 4, 4],
                   metavar=("WIDTH", "BLOCKS", "HEADS"))
    p.add_argument("--mask-ratio", type=run.number(0, 1), default=0.75,
                   help="part of the patches that is masked")
    p.add_argument("--epochs", type=run.integer(0), default=400, help="0 exports the random encoder")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images a step, over all processes")
    p.add_argument("--lr", type=run.number(), default=1e-3, help="of AdamW, at its peak")
    p.add_argument("--warmup", type=run.integer(0), default=20, help="epochs, also of --adv-lr")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=0.05)
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a crop; default: that of the data's images, of a folder's 32")
    p.add_argument("--crops", type=run.integer(1), default=1, help="of an image, a step")
    p.add_argument("--min-scale", type=run.number(above=0, most=1), default=0.2,
                   help="smallest area of a crop, of the image's")
    return p


def network(args, size):
    encoder = encoders.make(args.arch, mean=MEAN, std=STD, size=size,
                            relative=args.position == "relative")
    return MAEPlus(encoder, args.decoder, args.position, args.mode)


def random_numbers(rng, net, args, device):
    """Uniform u (crops B, L), and for pgd a start: in the unit ball for each row of delta."""
    u = rng.uniform(args.crops, len(net.at), device=device).transpose(0, 1).flatten(0, 1)
    seed = int(2**24 * rng.uniform(1)[0, 0])
    generator = torch.Generator(device).manual_seed(seed)
    return u, net.used * uniform(net.delta, 1.0, args.norm, generator)


@torch.no_grad()
def pictures(path, net, images, size, args):
    """A panel a row of delta, the encoder's blocks first: masked patches dark, a white dot where each is, a
    red one where it is told it is. Of an embedding, which tells no place: if relative, the length of delta
    over the table, if absolute, the likeness of masked places (rows) to all."""
    if net.mode == "embedding":
        clean = net.encoder.pos_embed[0, 1:]
        relative = net.position == "relative"
        table = net.delta.norm(dim=1, keepdim=True) if relative else (clean + net.delta) @ clean.T[None, None]
        return run.save_picture(F.interpolate(table / table.max().clamp_min(1e-8), scale_factor=8), path, 4)
    x, _, rng = next(data.batches(images, min(2, len(images)), args.seed, 0))
    masked = random_mask(rng.uniform(len(net.at), device=x.device), args.mask_ratio)[0]
    patches = patchify(augment(x, rng, size, args.min_scale, 1)[:1], net.encoder.patch)
    patches[:, masked] *= 0.3
    zoom = max(1, 256 // size)
    panels = unpatchify(patches, net.encoder.patch).repeat(len(net.delta), 1, 1, 1)
    panels = F.interpolate(panels, scale_factor=zoom)
    for panel, delta in zip(panels, net.delta):
        for at, green_and_blue in ((net.at, 1.0), (net.at + delta, 0.2)):
            at = ((at[masked] + 0.5) * zoom * net.encoder.patch).round().long()
            for i, j in at.clamp(3, panel.shape[1] - 3).tolist():
                panel[0, i - 3:i + 3, j - 3:j + 3] = 1
                panel[1:, i - 3:i + 3, j - 3:j + 3] = green_and_blue
    run.save_picture(panels, path, 4)


def main(argv=None):
    args = parser().parse_args(argv)
    env = run.setup(args)
    device, out = env.device, pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    check_masked(args.arch, size, args.decoder, args.mask_ratio)
    steps = data.steps_per_epoch(len(images), args.batch_size, env.world)

    net = run.to_device(network(args, size), args, env)
    weights = [(name, w) for name, w in net.named_parameters() if w is not net.delta]
    opt = torch.optim.AdamW(optim.groups(weights, args.weight_decay), args.lr, betas=(0.9, 0.95))
    opt_delta = torch.optim.AdamW([net.delta], args.adv_lr, betas=(0.9, 0.95), weight_decay=0, maximize=True)
    if args.compile:
        net.compile()

    log = Log(args, env, steps * args.epochs, images)
    state = dict(net=net, opt=opt, opt_delta=opt_delta, log=log)
    step = run.resume(args, env, state)
    log.start(step, f"predicting each patch's mean: loss 1 - 1/D = {1 - 1 / (3 * net.encoder.patch**2):.3f}")

    for epoch in range(step // steps, args.epochs):
        begin = step % steps  # of the epoch's steps; not 0 where a run stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, begin):
            run.stop_if_signalled(args, env, state, step)
            lr, adv_lr = (lr_at(step / steps, args.epochs, v, args.warmup) for v in (args.lr, args.adv_lr))
            optim.set_lr(opt, lr), optim.set_lr(opt_delta, adv_lr)
            crops = augment(x, rng, size, args.min_scale, args.crops)
            u, noise = random_numbers(rng, net, args, device)
            losses = train_step(net, opt, opt_delta, crops, u, noise, args)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr, adv_lr=adv_lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            if env.rank == 0:  # before the checkpoint, so that none is missing when the run goes on
                pictures(out / "positions.png", net, images, size, args)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net.encoder, out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
