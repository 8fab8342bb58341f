"""ACL: robust pre-training by adversarial contrastive learning (Jiang et al. 2020, arXiv
2010.13337).

SimCLR asks that two augmentations of an image agree. ACL asks that two attacked augmentations agree
as well, where the attack maximises that same contrastive loss. Its dual-stream form, DS, trains a
clean and an attacked SimCLR loss together. All weights are shared, but where a variant has both clean
and attacked views, every BatchNorm, of the encoder and of the projector, comes twice: one for each.

    paper                       this file
    f, g                        net: encoder and projector; embed gives z, not normalised
    BN of clean, attacked x     BatchNorm branches "clean", "adv"
    x_i, x_j                    x1, x2: the two views of an image
    L_NT                        nt_xent
    inner maximum               attack
    S2S, A2A, A2S, DS           VARIANTS: for each term of the loss, the kinds of its two views; S is
                                standard (clean), A attacked, and DS the dual stream

The paper refers to SimCLR for the optimiser, the augmentation and the projector; the numbers are
those of the authors' code: a projector of three layers with BatchNorm, LARS on all parameters
(SimCLR itself leaves BatchNorm and biases out), an attack of 5 steps of 2/255, and the mean of the
two terms in DS. A2A and A2S, which their command line does not reach, are as the paper describes
them. We depart from that code in three places:
    - The attack starts inside [0, 1]. Their code takes its first gradient at x + noise, not
      clipped.
    - A vector is kept out of its own denominator by a mask. Their code subtracts the constant
      e^(1/T).
    - The attack makes no gradient of the weights, and in A2S the embedding of the clean view is
      computed once per attack. In eval mode the result is the same up to rounding. Counting a
      backward pass to the pixels as one forward pass and a whole one as two, a DS step costs 32
      forward passes instead of 42, A2A 26 instead of 36, A2S 17; SimCLR's costs 6.

The loss that the attack maximises is symmetric: both views are anchors, and the attacked views of
the other images are negatives. (Eq. 4 of Qi & Shah 2022, arXiv 2210.13463, has one anchor, and
negatives that stand still.)

    python acl.py                                        the paper's DS: CIFAR-10, ResNet-18, 1000 epochs
    torchrun --standalone --nproc-per-node 4 acl.py      on 4 GPUs, 128 of the 512 images on each (see below)
    python acl.py --variant s2s --out runs/s2s           SimCLR, the clean base
    python acl.py --norm l2 --eps 128 --out runs/l2      l2 128/255 (ours)
    python eval.py runs/acl/encoder.pt --preset robustssl-slf robustssl-alf --milestones 10 20
    python eval.py runs/acl/encoder.pt --preset acl-aff-100
    python eval.py runs/acl/encoder.pt --preset acl-probe --bn clean

RUSH (Sec. 4.3 of the survey by Qi & Shah) replaces the attack by noise on one view: x2 <- x2 + N(0,
s^2), in units in which pixels are in [0, 1]. As in randomised smoothing, nothing is clipped. The s
below is ours:

    python acl.py --variant s2s --noise-sigma 0.25 --out runs/rush

A ViT has no BatchNorm, so clean and attacked images share all of the encoder, and only the
projector has its BatchNorms twice:

    python acl.py --arch vit_tiny --optimizer adamw --lr 1e-3 --weight-decay 0.05 --out runs/acl-vit

The encoder is exported without the projector, with BatchNorm branch adv in A2A, A2S and DS, and clean
in S2S: at test time branch adv sees clean images too. (The authors' linear probe reads branch clean,
as --preset acl-probe --bn clean does after DS and A2S; A2A has no such branch.)

On several processes order, augmentation and noise are those of one process. The losses have the
negatives of all of them, the attack those of its own process. Each BatchNorm sees the images of its
own process, or with --sync-bn (on GPUs) those of all; the running statistics of all processes are
averaged after each step.

In the log, chance is ln(2B - 1) for every term, with B images per step. All terms fall below it; in DS,
loss_adv stays above loss_clean. Where all embeddings are alike, a term stays at chance. With --eps 0 the
"attacked" images are the clean ones, seen through branch adv; with --steps 0 they are moved by the random
start alone (with --no-random-start, not at all).

Measured on one CPU thread (Intel Xeon) and 10,000 images of CIFAR-10 (JPEG), with --arch slim
--batch-size 64 --warmup 0 --lr 1.5 --steps 2 --step-size 4, in 5.0 CPU minutes (10 epochs; mean of 2
seeds): a linear probe (eval.py's preset amoc-slf, 2,000 test images) reaches 42.1 %, and 15.5 % under
PGD-20 at 8/255. s2s reaches 47.0 and 0.1 in 4.6 CPU minutes (28 epochs); a random encoder, 27.4 and 0.

On all 50,000 images, judged on all 10,000 test images (one seed each), it reaches 46.0 and 18.2 in 17
CPU minutes (6 epochs), a2a 47.0 and 19.2 in 20 (11), s2s 56.0 and 0.0 in 20 (20). This has not been run
on a GPU yet, and l2, AdamW and --noise-sigma not at all. Fan et al. (2021, arXiv 2111.01124) report
77.88, and 42.87 under PGD-20 (1000 epochs).
"""
import argparse
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_color_jitter, random_grayscale, random_resized_crop
from common.log import Log
from common.pgd import ball_point, eval_mode, pgd
from common.pictures import attack_key, difference, save_rows
from common.resnet import BranchNorm, branch
from common.speed import compile_networks, graphed

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in the authors' code
STD = (0.229, 0.224, 0.225)

# The terms of the loss: the kinds of x1 and x2. A kind is also the name of the BatchNorm branch
# that a view of it passes through. A term has a column of its own in the log.
VARIANTS = {
    "s2s": [("clean", "clean")],  # SimCLR
    "a2a": [("adv", "adv")],
    "a2s": [("adv", "clean")],
    "ds": [("adv", "adv"), ("clean", "clean")],  # dual stream
}


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size):
    """One view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]. No blur."""
    x = random_resized_crop(x, rng, size, scale=(0.1, 1.0), flip=0.5, filter="bicubic")
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    return x.contiguous(memory_format=torch.channels_last)


def add_noise(x, sigma, rng):
    """x (B, 3, S, S) plus Gaussian noise of standard deviation `sigma`, in the units of x. It is not
    clipped to [0, 1], as in randomised smoothing."""
    u = 2 * rng.uniform(*x.shape[1:], device=x.device) - 1
    # erfinv is infinite at -1: the noise ends at 4.9 sigma
    return x + sigma * 2**0.5 * torch.erfinv(u.clamp(-0.999999, 0.999999))


def embed(net, x, bn):
    """z of x (B, 3, S, S) through BatchNorm branch `bn`: (B, D), not normalised, in x's dtype."""
    with branch(net, bn), run.autocast(x.device):
        z = net(x)
    return z.to(x.dtype)


def embed_pair(net, x1, x2, kinds):
    """z1, z2 (B, D) of two views through the branches of their `kinds`."""
    if kinds[0] == kinds[1]:  # one batch of both: BatchNorm normalises them together
        return embed(net, torch.cat([x1, x2]), kinds[0]).chunk(2)
    return embed(net, x1, kinds[0]), embed(net, x2, kinds[1])


def nt_xent(z1, z2, temperature):
    """Mean over all 2B anchors i of -log( e^(u_i.u_p/T) / sum_k!=i e^(u_i.u_k/T) ), p the other
    view of i.

    z1, z2 (B, D), normalised here to u. Chance is ln(2B - 1).
    """
    u1 = F.normalize(z1, dim=1)
    u2 = F.normalize(z2, dim=1)
    rows = torch.cat([u1, u2])  # (2B, D)
    scores = rows @ rows.T / temperature  # (2B, 2B)
    scores.fill_diagonal_(-math.inf)  # nothing is in its own denominator
    return scores.logsumexp(1).mean() - (u1 * u2).sum(1).mean() / temperature


@graphed  # with --graph, on CUDA, recorded once and then replayed; the result is the same
def attack(net, x1, x2, noise, kinds, *, temperature, norm, eps, step_size, steps):
    """Move the views of kind "adv", one or both, within eps so as to maximise nt_xent of the pair;
    returns both views (B, 3, S, S), the clean one as it is.

    x1, x2 are in [0, 1], and eps and step_size in the same units. The search starts at x + eps
    `noise`, noise (B, 2, 3, S, S) in the unit ball of the `norm`, or, where noise is None, at x. Each
    view of each image has a ball of its own.
    """
    start1 = x1
    start2 = x2
    if noise is not None:
        start1 = (x1 + eps * noise[:, 0]).clamp(0, 1)
        start2 = (x2 + eps * noise[:, 1]).clamp(0, 1)
    kinds = tuple(kinds)  # a list would equal none of those below
    # In eval mode an embedding depends on its own image only. So the embedding of a clean view is a
    # constant, computed once, and no running statistic changes.
    with eval_mode(net):
        if kinds == ("adv", "adv"):

            def loss_of_both(x):
                z1, z2 = embed(net, x, "adv").chunk(2)
                return nt_xent(z1, z2, temperature)

            both = torch.cat([x1, x2])
            start = torch.cat([start1, start2])
            return pgd(loss_of_both, both, eps, step_size, steps, norm, start=start).chunk(2)

        if kinds == ("adv", "clean"):
            z2 = embed(net, x2, "clean").detach()

            def loss_of_first(x1_adv):
                return nt_xent(embed(net, x1_adv, "adv"), z2, temperature)

            return pgd(loss_of_first, x1, eps, step_size, steps, norm, start=start1), x2

        if kinds == ("clean", "adv"):  # of a variant S2A, which the paper does not have
            z1 = embed(net, x1, "clean").detach()

            def loss_of_second(x2_adv):
                return nt_xent(z1, embed(net, x2_adv, "adv"), temperature)

            return x1, pgd(loss_of_second, x2, eps, step_size, steps, norm, start=start2)
    if kinds != ("clean", "clean"):
        raise ValueError(f"kinds {kinds}: each must be clean or adv")
    return x1, x2


def train_step(net, opt, x1, x2, noise, *, variant, temperature, norm, eps, step_size, steps):
    """One iteration on two views (B, 3, S, S) of B images; the losses to be logged. `variant`
    is a row of VARIANTS; `noise` is as in `attack`."""
    losses = {}
    for kinds in variant:
        if not {*kinds} <= {"clean", "adv"}:
            raise ValueError(f"kinds {kinds}: each must be clean or adv")
        x1_term = x1
        x2_term = x2
        if "adv" in kinds:
            x1_term, x2_term = attack(net, x1, x2, noise, kinds, temperature=temperature,
                                      norm=norm, eps=eps, step_size=step_size, steps=steps)
        # In train mode: a term moves the running statistics of its branches once. DS has its two terms
        # in branches of their own, so their order does not matter.
        z1, z2 = embed_pair(net, x1_term, x2_term, kinds)
        name = kinds[0] if kinds[0] == kinds[1] else "_".join(kinds)
        # Negatives of all processes. The gradient flows through both views, and not into the
        # perturbation.
        losses[f"loss_{name}"] = nt_xent(dist.gather(z1), dist.gather(z2), temperature)
    loss = sum(losses.values()) / len(losses)  # the mean, as in the authors' code

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    dist.average_buffers(net)  # else the running statistics of the processes drift apart
    return {"loss": loss, **losses}


def lr_at(update, updates, lr, warmup):
    """The learning rate of update 1, 2, ..., `updates`, as in the authors' code: linear over the first
    `warmup` updates, then a cosine to 1e-6 (to `lr` where that is less)."""
    return optim.warmup_cosine(update, updates, warmup, lr, min(lr, 1e-6))


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="acl", arch="resnet18", graph=True)
    p.add_argument("--variant", choices=VARIANTS, default="ds",
                   help="the terms of the loss: s is a standard view, a an attacked one; ds has both (paper)")
    p.add_argument("--epochs", type=run.integer(0), default=1000,
                   help="0 exports the random encoder; default (paper)")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images per step, over all processes (paper)")
    p.add_argument("--optimizer", choices=("lars", "adamw"), default="lars",
                   help="adamw, for a ViT, does not decay biases and norms (ours); lars has momentum 0.9 "
                        "(authors' code)")
    p.add_argument("--lr", type=run.number(), default=5.0,
                   help="at its peak; with adamw try 1e-3 (ours); with lars (authors' code)")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="in epochs (authors' code)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=1e-6, help="(authors' code)")
    p.add_argument("--temperature", type=run.number(above=0), default=0.5, help="T (authors' code)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf",
                   help="of the attack; with l2, for example --eps 128 (ours)")
    p.add_argument("--eps", type=run.number(0, 1e6), default=8.0,
                   help="radius of the attack, in 1/255 (authors' code)")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attack, in 1/255; default: for linf 2 (authors' code), for l2 "
                        "1.25 eps / steps (ours)")
    p.add_argument("--steps", type=run.integer(0), default=5, help="of the attack (authors' code)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (authors' code); without it, at "
                        "the image: with --steps 1 and --step-size equal to --eps, in linf, that is FGSM")
    p.add_argument("--noise-sigma", type=run.number(0, 1e6), default=0.0,
                   help="standard deviation of the Gaussian noise that is added to the second view, in units "
                        "in which pixels are in [0, 1]; for --variant s2s alone (ours)")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if args.norm == "linf" and args.eps > 255:
        raise ValueError(f"--eps {args.eps:g}: with --norm linf at most 255, the range of a pixel")
    if args.noise_sigma and args.variant != "s2s":
        raise ValueError(f"--noise-sigma {args.noise_sigma:g}: is for --variant s2s, and --variant "
                         f"{args.variant} attacks views; give one or the other")


def kinds_of(variant):
    """The kinds of views that `variant` has, which are the BatchNorm branches of its networks."""
    return sorted({kind for kinds in VARIANTS[variant] for kind in kinds})


def network(arch, variant):
    """An encoder and a projector whose BatchNorms have the branches that `variant` uses: images (B,
    3, S, S) -> (B, D), D as the encoder's."""
    branches = kinds_of(variant)
    encoder = encoders.make(arch, branches, mean=MEAN, std=STD)
    dim = encoder.dim
    projector = nn.Sequential(
        nn.Linear(dim, dim), BranchNorm(dim, branches, nn.BatchNorm1d), nn.ReLU(),
        nn.Linear(dim, dim, bias=False), BranchNorm(dim, branches, nn.BatchNorm1d), nn.ReLU(),
        nn.Linear(dim, dim, bias=False), BranchNorm(dim, branches, nn.BatchNorm1d))
    return nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)


def start_noise(x1, norm, rng):
    """The noise from which the attacks on the views x1 and x2 start, as `attack` takes it: (B, 2, 3, S, S),
    each view of each image uniform in a unit ball of the `norm`."""
    # One number more than there are pixels: under l2 it sets the distance from the centre, under linf it
    # is not used.
    u = rng.uniform(2, 1 + x1[0].numel(), device=x1.device)
    return ball_point(u, norm).view(len(x1), 2, *x1.shape[1:])


def attack_settings(args):
    """The named arguments of `attack` as the flags have them; eps and step_size as pixel values in
    [0, 1]."""
    eps = args.eps / 255
    if args.step_size is not None:
        step_size = args.step_size / 255
    elif args.norm == "l2":
        step_size = 1.25 * eps / max(1, args.steps)
    else:
        step_size = 2 / 255
    return dict(temperature=args.temperature, norm=args.norm, eps=eps, step_size=step_size, steps=args.steps)


def pictures(net, images, size, args):
    """Rows for `save_rows` of up to eight images: both views, and the attacked views of the first
    term that has any, each with what the attack added."""
    x, _, rng = data.sample(images, 8, args.seed)
    x1 = augment(x, rng, size)
    x2 = augment(x, rng, size)
    if args.noise_sigma:
        x2 = add_noise(x2, args.noise_sigma, rng)
    rows = [("x1", x1), ("x2", x2)]
    noise = start_noise(x1, args.norm, rng) if args.random_start else None
    full_scale = args.eps / 255 if args.norm == "linf" else None
    for kinds in VARIANTS[args.variant]:
        if "adv" in kinds:
            x1_adv, x2_adv = attack(net, x1, x2, noise, kinds, **attack_settings(args))
            if kinds[0] == "adv":
                rows += [("x1_adv", x1_adv), ("x1_adv - x1", difference(x1_adv, x1, full_scale))]
            if kinds[1] == "adv":
                rows += [("x2_adv", x2_adv), ("x2_adv - x2", difference(x2_adv, x2, full_scale))]
            break
    return rows


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    env = run.setup(args)
    device = env.device
    out = pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    # BatchNorm, and the negatives within the batch, need two images per process.
    steps_per_epoch = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch, args.variant), args, env)
    if args.optimizer == "adamw":
        groups = optim.groups(net.named_parameters(), args.weight_decay)
        opt = torch.optim.AdamW(groups, args.lr)
    else:
        opt = optim.LARS(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    compile_networks(args, env, net)

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    log.start(step, f"chance loss ln(2B - 1) = {math.log(2 * args.batch_size - 1):.3f}")

    attacked = "adv" in kinds_of(args.variant)
    settings = dict(variant=VARIANTS[args.variant], **attack_settings(args))
    updates = steps_per_epoch * args.epochs
    for epoch in range(step // steps_per_epoch, args.epochs):
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step + 1, updates, args.lr, steps_per_epoch * args.warmup)
            optim.set_lr(opt, lr)
            x1 = augment(x, rng, size)
            x2 = augment(x, rng, size)  # another view: `rng` has moved on
            if args.noise_sigma:
                x2 = add_noise(x2, args.noise_sigma, rng)
            noise = start_noise(x1, args.norm, rng) if attacked and args.random_start else None
            losses = train_step(net, opt, x1, x2, noise, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again.
            rows = pictures(net, images, size, args)
            if env.rank == 0:
                key = attack_key(args.norm, args.eps) if attacked else None
                save_rows(out / "views.png", rows, key)
            run.save(args, env, state, step)
    if env.rank == 0:
        # The branch of the attacked images, if there are any. The authors' own linear probe reads
        # the clean one: eval.py --bn clean.
        bn = encoders.branch_of(net[0], "adv" if attacked else "clean")
        encoders.export(net[0], out / "encoder.pt", bn, image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder" + (f"; BN branch {bn}" if bn else ""))


if __name__ == "__main__":
    run.cli(main)
