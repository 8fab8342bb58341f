"""ADIOS: adversarial masking for self-supervised learning (Shi et al. 2022, arXiv 2201.13100).

A small U-Net, the masker, draws N soft masks over an image. The encoder must recognise the image with each of
them cut out; the masker learns to make that as hard as possible. What is missed most is an object, and so
masks come to follow objects. A penalty forbids masks that hide everything or nothing.

    paper                       here
    encoder; occlusion model    net, with its heads; masker: propose() gives the removed part of each pixel
    the min-max objective       disagreement, in both steps of train_step
    penalty, lambda             mask_penalty, --mask-weight
    ADIOS-s                     --single: each image is shown with one of its masks, drawn at random

--objective is simclr (arXiv 2002.05709), byol (2006.07733), simsiam (2011.10566) or mae ("the survey": Qi &
Shah 2022, 2210.13463, Eq. 11: pixels, by a ViT; the MLP on each token is ours). As in the authors' code x1
is whole and x2 masked (the survey writes the same x for both); simsiam masks both, mae has x1 alone.

Controls: --masker random (hard masks with smooth outlines, of equal mean area), and none: a loss of one term,
not N, whose steps at equal --lr are smaller.

Beyond the abstract we know the authors' code; our CIFAR-10 numbers are no paper's. Departures from the code:
    - the penalty's sine is floored at 1e-4, flat below (theirs adds 1e-10, and float32 rewards a mask that
      hides everything); no entropy of areas, seldom on in theirs; no blur; the U-Net always has GroupNorm;
    - running statistics move in the encoder's step only; simsiam's predictor follows the schedule too;
    - the learning rates reach their peaks with epoch --warmup, counted from 0 (theirs one epoch before);
    - the masks, whole views and BYOL's target of them are computed once for all N masks: the same, up to
      rounding; 24 forwards, not 38, for simclr with N = 4 (a backward to the pixels counts 1, a whole one 2).
A removed pixel becomes the mean colour.

BatchNorm: train mode, one pass per input.

Several processes share their negatives. Each BatchNorm sees the images of its own process, or with --sync-bn
(on GPUs) those of all.

    python adios.py                                      SimCLR + ADIOS: CIFAR-10, ResNet-18, 200 epochs
    torchrun --standalone --nproc-per-node 2 adios.py    the same on 2 GPUs, 128 of the 256 images on each
    python adios.py --masker none --out runs/simclr      SimCLR, the base
    python eval.py runs/adios/encoder.pt --preset knn amoc-slf --attacks clean

Measured on a CPU thread (Intel Xeon), --data shapes --single, 2.5 minutes: the best mask covers the drawn
figure with an intersection over union of 0.72, random masks 0.24. More in the README. Not yet run on a GPU.
"""
import argparse
import copy
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_color_jitter, random_grayscale, random_resized_crop, resize
from common.log import Log, check_spread
from common.pgd import eval_mode, frozen_stats
from common.unet import UNet
from common.vit import VITS, patchify, unpatchify

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's

MASKED = {"simclr": (1,), "byol": (1,), "simsiam": (0, 1), "mae": (0,)}  # the views masked: 0 is x1, 1 x2
HEADS = {  # sizes of the layers of projector and predictor
    "simclr": [(2048, 128)], "byol": [(4096, 256), (8192, 256)], "simsiam": [(2048, 2048, 2048), (512, 2048)]}


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size):
    """One view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]."""
    x = random_resized_crop(x, rng, size, scale=(0.08, 1.0), flip=0.5)
    x = random_color_jitter(x, rng, 0.8, 0.8, 0.8, 0.2, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    return x.contiguous(memory_format=torch.channels_last)


def embed(net, x):
    """net(x), in the precision of x."""
    with run.autocast(x.device):
        return net(x).to(x.dtype)


def propose(masker, x):
    """Masks (B, N, S, S) of x (B, 3, S, S): positive, and their sum is 1 at every pixel."""
    return embed(masker, x).softmax(1)


def occlude(x, mask, fill):
    """x (B, 3, H, W) with the part `mask` (B, H, W) of each pixel replaced by the colour `fill` (3, 1, 1)."""
    return x * (1 - mask[:, None]) + fill * mask[:, None]


def mask_penalty(masks):
    """Sum over n, mean over images, of 1 / sin(pi s_n), s_n the fraction of the image that mask n covers, the
    sine floored at 1e-4, flat below. masks (B, N, H, W). The minimum, at equal areas, is N / sin(pi / N)."""
    return (1 / (math.pi * masks.mean((2, 3))).sin().clamp_min(1e-4)).sum(1).mean()


def simclr_loss(z1, z2, temperature):
    """Mean over all 2B anchors i of -log( e^(u_i.u_p/T) / sum_k!=i e^(u_i.u_k/T) ), p the other view of i.
    z1, z2 (B, D) are normalised here to u. Chance is ln(2B - 1)."""
    u1, u2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    rows = torch.cat([u1, u2])  # (2B, D)
    scores = rows @ rows.T / temperature  # (2B, 2B)
    scores.fill_diagonal_(-math.inf)  # nothing is in its own denominator
    return scores.logsumexp(1).mean() - (u1 * u2).sum(1).mean() / temperature


def simsiam_loss(p, z):
    """Mean over the batch of -cos(p, z); p, z (B, D). z is taken as a constant."""
    return -(F.normalize(p, dim=1) * F.normalize(z.detach(), dim=1)).sum(1).mean()


def byol_loss(p, z):
    """Mean over the batch of 2 - 2 cos(p, z); p, z (B, D). z is taken as a constant."""
    return 2 + 2 * simsiam_loss(p, z)


def rebuild(net, x):
    """Encoder (a ViT) and decoder of each token: x (B, 3, H, W) -> (B, 3, H, W)."""
    with run.autocast(x.device):
        tokens = net[0].embed(patchify(x, net[0].patch)) + net[0].pos_embed[:, 1:]
        patches = net[1](net[0].encode(tokens))[:, 1:]
    return unpatchify(patches.to(x.dtype), net[0].patch)


def disagreement(net, target, x1, x2, z1_target, occluded, for_masker, args):
    """Minimised by the encoder, maximised by the masker: the sum over N masks of the objective, between whole
    views x1, x2 (B, 3, S, S) and `occluded`, a list over masks of the V masked views (V B, 3, S, S).
    `for_masker` leaves out byol's term without gradient to the masks, about half of the value."""
    if args.objective == "mae":
        return sum((rebuild(net, x) - x1).square().mean() for x in occluded)  # Eq. 11 of the survey
    if args.objective == "simclr":
        z1 = dist.gather(embed(net, x1))
        return sum(simclr_loss(z1, dist.gather(embed(net, x)), args.temperature) for x in occluded)
    if args.objective == "byol":
        loss = sum(byol_loss(embed(net, x), z1_target) for x in occluded)
        if for_masker:
            return loss
        p1 = embed(net, x1)
        return loss + sum(byol_loss(p1, embed(target, x)) for x in occluded)
    f, q = net[:2], net[2]
    z1, z2 = embed(f, x1), embed(f, x2)
    p1, p2, loss = embed(q, z1), embed(q, z2), 0
    for x in occluded:
        z1m, z2m = (embed(f, view) for view in x.chunk(2))
        p1m, p2m = embed(q, z1m), embed(q, z2m)
        pairs = (p1m, z2), (p2m, z1), (p2, z1m), (p1, z2m), (p1, z2), (p2, z1), (p1m, z2m), (p2m, z1m)
        loss = loss + sum(simsiam_loss(p, z) for p, z in pairs) / len(pairs)
    return loss


def chance(args):
    """For the log: the loss of an encoder that knows nothing of its images, all terms together."""
    n = 1 if args.single or args.masker == "none" else args.masks
    ln = math.log(2 * args.batch_size - 1)
    return {
        "simclr": f"chance loss {n} ln(2B - 1) = {n * ln:.3f}",
        "byol": f"chance loss {4 * n}, where predictions are orthogonal to their targets; 0 at best",
        "simsiam": f"chance loss 0, where predictions are orthogonal to their targets; {-n} at best",
        "mae": f"chance loss {n} times the pixels' variance, where each is taken for the mean colour",
    }[args.objective]


def train_step(net, target, masker, opt, opt_mask, x1, x2, given, pick, tau, args):
    """One iteration on two views (B, 3, S, S): the encoder's step and, unless masks are `given`, the
    masker's. Under --single `pick` (B, 2) in [0, 1) chooses the mask of an image, for either step."""
    views = [(x1, x2)[i] for i in MASKED[args.objective]]
    x = torch.cat(views)  # (V B, 3, S, S)
    masks = propose(masker, x) if given is None else given  # (V B, N, S, S)

    def loss_of(masks, u, for_masker):
        if args.single:
            n = (u * masks.shape[1]).long().repeat(len(views))
            masks = masks[torch.arange(len(masks), device=n.device), n][:, None]
        occluded = [occlude(x, m, masker.mean) for m in masks.unbind(1)]
        return disagreement(net, target, x1, x2, z1_target, occluded, for_masker, args)

    z1_target = embed(target, x1) if target else None
    loss = loss_of(masks.detach(), pick[:, 0], False)
    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    nets = [net, target] if target else [net]
    dist.average_buffers(*nets)  # else the ranks' running statistics drift apart
    losses = {"loss": loss}
    if given is None:
        with frozen_stats(net):
            loss_mask = loss_of(masks, pick[:, 1], True)
        penalty = len(views) * mask_penalty(masks)  # of both views, where both are masked
        opt_mask.zero_grad()
        (args.mask_weight * penalty - loss_mask).backward(inputs=list(masker.parameters()))
        dist.average_grads(masker.parameters())
        opt_mask.step()
        losses |= {"loss_mask": loss_mask, "penalty": penalty}
    if target:
        optim.ema(target, net[:2], tau)
    return losses


def lr_at(epoch, epochs, lr, warmup):
    """By epoch: linear over the first `warmup`, from 0.003 (`lr` where that is less), then a cosine to 0."""
    if epoch < warmup:
        return lr + (min(lr, 0.003) - lr) * (1 - epoch / warmup)
    return optim.cosine((epoch - warmup) / (epochs - warmup), lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="adios", arch="resnet18")
    p.add_argument("--objective", choices=MASKED, default="simclr", help=" ".join(MASKED))
    p.add_argument("--masker", choices=("learned", "random", "none"), default="learned",
                   help="learned; controls: random, none")
    p.add_argument("--masks", type=run.integer(1), default=4, help="N")
    p.add_argument("--single", action=argparse.BooleanOptionalAction, default=False, help="ADIOS-s")
    p.add_argument("--mask-weight", type=run.number(), default=0.9, help="lambda (byol .4, simsiam .2)")
    p.add_argument("--mask-width", type=run.integer(1), default=16, help="c, channels of the masker")
    p.add_argument("--mask-lr", type=run.number(), default=0.03,
                   help="of the masker's LARS, at its peak")
    p.add_argument("--epochs", type=run.integer(0), default=200, help="0 exports the random encoder")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images a step, over all processes")
    p.add_argument("--lr", type=run.number(), default=0.2, help="of the encoder's LARS, at its peak")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="epochs")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=1e-4,
                   help="of both (byol, simsiam 1e-5)")
    p.add_argument("--temperature", type=run.number(above=0), default=0.2, help="of simclr")
    p.add_argument("--ema", type=run.number(0, 1), default=0.99, help="tau of byol, at the start")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view; default: that of the data's images, of a folder's 32")
    return p


def check(args):
    if args.masks < 2 and args.masker != "none":
        raise ValueError(f"--masks {args.masks}: must be at least 2; a single one would remove everything")
    if args.objective == "mae" and args.arch not in VITS:
        raise ValueError(f"--arch {args.arch}: --objective mae needs one of {', '.join(VITS)}")


def network(arch, objective, size):
    """Encoder and heads: images (B, 3, S, S) -> features (B, dim) -> projections (-> predictions)."""
    encoder = encoders.make(arch, mean=MEAN, std=STD, **({"size": size} if objective == "mae" else {}))
    net, dim, norm = nn.Sequential(encoder), encoder.dim, nn.BatchNorm1d
    for sizes in HEADS.get(objective) or [(512, 3 * encoder.patch**2)]:
        net.append(encoders.mlp(dim, *sizes, norm=norm if objective in ("byol", "simsiam") else None))
        dim = sizes[-1]
    if objective == "simsiam":
        net[1].append(norm(dim, affine=False))
    return net.to(memory_format=torch.channels_last)


def control(rng, size, args, device):
    """Masks (V B, N, S, S) of V views that nobody learns, random or none; None for the masker's own."""
    if args.masker == "learned":
        return None
    u = rng.uniform(len(MASKED[args.objective]), args.masks, 4, 4, device=device)
    fields = F.interpolate(u.transpose(0, 1).flatten(0, 1), size=2 * [size], mode="bicubic")
    masks = F.one_hot(fields.argmax(1), args.masks).movedim(3, 1).float()  # the largest of smooth fields
    return masks if args.masker == "random" else torch.zeros_like(masks[:, :1])


@torch.no_grad()
def pictures(path, masker, images, size, args):
    """Rows of up to eight: views, the N masks (white is removed), the views without each."""
    x, _, rng = next(data.batches(images, min(8, len(images)), args.seed, 0))
    x, given = augment(x, rng, size), control(rng, size, args, x.device)
    masks = propose(masker, x) if given is None else given[: len(x)]
    rows = [m[:, None].expand_as(x) for m in masks.unbind(1)]
    rows += [occlude(x, m, masker.mean) for m in masks.unbind(1)]
    run.save_picture(torch.cat([x, *rows]), path, len(x))


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    env = run.setup(args)
    device, out = env.device, pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    steps = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch, args.objective, size), args, env)
    target = copy.deepcopy(net[:2]).requires_grad_(False) if args.objective == "byol" else None
    masker = UNet(args.masks, args.mask_width, size, MEAN, STD).to(device)
    opt, opt_mask = (optim.LARS(optim.lars_groups(part), 0.0, momentum=0.9, weight_decay=args.weight_decay,
                                trust=0.02, clip=True) for part in (net, masker))
    if args.compile:
        net[0].compile(), masker.compile()

    log = Log(args, env, steps * args.epochs, images)
    state = dict(net=net, masker=masker, opt=opt, opt_mask=opt_mask, log=log)
    state |= {"target": target} if target else {}
    step = run.resume(args, env, state)
    sample, _, _ = next(data.batches(images, min(256, len(images)), args.seed, 0))
    log.start(step, chance(args))

    for epoch in range(step // steps, args.epochs):
        lr, mask_lr = (lr_at(epoch, args.epochs, peak, args.warmup) for peak in (args.lr, args.mask_lr))
        optim.set_lr(opt, lr), optim.set_lr(opt_mask, mask_lr)
        begin = step % steps  # of the epoch's steps; not 0 where a run stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, begin):
            run.stop_if_signalled(args, env, state, step)
            tau = optim.cosine(step / (steps * args.epochs), args.ema, 1.0)
            x1, x2 = (augment(x, rng, size) for _ in range(2))  # `rng` moves on between them
            given, pick = control(rng, size, args, device), rng.uniform(2, device=device)
            losses = train_step(net, target, masker, opt, opt_mask, x1, x2, given, pick, tau, args)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.check()  # a loss that is not finite stops the run here, not in what follows
        with eval_mode(net), torch.no_grad():
            z = net[: 1 if args.objective == "mae" else 2](resize(sample, size))
        log.epoch(epoch, step, lr=lr, mask_lr=mask_lr, **check_spread(z, args))
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            if env.rank == 0:  # before the checkpoint, so that none is missing when the run goes on
                pictures(out / "masks.png", masker, images, size, args)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
