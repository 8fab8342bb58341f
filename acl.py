"""ACL: robust pre-training by adversarial contrastive learning (Jiang et al. 2020, arXiv 2010.13337).

SimCLR asks that two augmentations of an image agree. ACL asks that two attacked augmentations agree as well,
the attack maximising that same contrastive loss. The dual-stream form trains a clean and an attacked SimCLR
loss together: all weights are shared, but every BatchNorm, of the encoder and of the projector, comes twice.

    paper                       here
    f, g                        net: encoder and projector; embed() gives z, un-normalised
    BN of clean, attacked x     branch "clean", "adv"
    x_i, x_j                    x1, x2
    L_NT                        nt_xent
    inner maximum               attack
    S2S, A2A, A2S, DS           VARIANTS: the terms of the loss, and what the two views of each are

The paper refers to SimCLR for optimiser, augmentation and projector; the numbers are those of the authors'
code: three layers with BatchNorm, LARS on all parameters (SimCLR itself leaves BatchNorm and biases out), the
attack's 5 steps of 2/255, the mean of the two terms in DS. Where we depart from that code:
    - the attack starts inside [0, 1] (theirs takes its first gradient at x + noise, not clipped);
    - a vector is left out of its own denominator by a mask (theirs subtracts the constant e^(1/T));
    - `pgd` makes no weight gradient, and in A2S z of the clean view is computed once per attack: the same in
      eval mode, up to rounding, and for DS 32 instead of 42 forwards per step (a backward to the pixels
      counts 1, a whole one 2).

The loss that the attack maximises is symmetric: both views are anchors, and the attacked views of other
images are negatives (Eq. 4 of Qi & Shah 2022, arXiv 2210.13463, has one anchor, and negatives that stand
still).

BatchNorm: two views of a kind go through the network as one batch. The attack runs in eval mode and changes
nothing; each term moves the statistics of its branches once. Exported is the branch of the attacked images
(s2s: the clean one, which the authors' own probe reads in any case).

Several processes share their negatives, except within the attack. Each BatchNorm sees the images of its own
process, or with --sync-bn (on GPUs) those of all.

    python acl.py                                        the paper's DS: CIFAR-10, ResNet-18, 1000 epochs
    torchrun --standalone --nproc-per-node 4 acl.py      the same on 4 GPUs, 128 of the 512 images on each
    python acl.py --variant s2s --out runs/s2s           SimCLR, the clean base
    python eval.py runs/acl/encoder.pt --preset robustssl-slf robustssl-alf acl-aff-100
    python eval.py runs/acl/encoder.pt --preset acl-probe --bn clean

Measured on a CPU thread (Intel Xeon), 0.3 M-parameter encoder, 10,000 images of CIFAR-10 (JPEG), 5.0 minutes
(10 epochs, 2 attack steps; 2 seeds): linear probe 42.1 standard, 15.5 under PGD-20 at 8/255; s2s in 4.6
minutes 47.0 and 0.1, a random encoder 27.4 and 0. Not yet run on a GPU; Fan et al. have 77.88 and 42.87 (1000
epochs).
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
from common.pgd import eval_mode, pgd
from common.resnet import BranchNorm, branch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, from the authors' code

VARIANTS = {  # terms of the loss: the kinds of x1 and x2, each of which is also the name of its BN branch
    "s2s": [("clean", "clean")],
    "a2a": [("adv", "adv")],
    "a2s": [("adv", "clean")],
    "ds": [("adv", "adv"), ("clean", "clean")],
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


def embed(net, x, bn):
    """z of x (B, 3, S, S) through BatchNorm branch `bn`: (B, D), in x's dtype."""
    with branch(net, bn), run.autocast(x.device):
        z = net(x)
    return z.to(x.dtype)


def embed_pair(net, x1, x2, kinds):
    """z1, z2 (B, D); views of one kind go through as one batch."""
    if kinds[0] == kinds[1]:
        return embed(net, torch.cat([x1, x2]), kinds[0]).chunk(2)
    return embed(net, x1, kinds[0]), embed(net, x2, kinds[1])


def nt_xent(z1, z2, temperature):
    """Mean over all 2B anchors i of -log( e^(u_i.u_p/T) / sum_k!=i e^(u_i.u_k/T) ), p the other view of i.

    z1, z2 (B, D), normalised here to u. Chance is ln(2B - 1).
    """
    u1, u2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    rows = torch.cat([u1, u2])  # (2B, D)
    scores = rows @ rows.T / temperature  # (2B, 2B)
    scores.fill_diagonal_(-math.inf)  # nothing is in its own denominator
    return scores.logsumexp(1).mean() - (u1 * u2).sum(1).mean() / temperature


def attack(net, x1, x2, noise, kinds, args):
    """The views of kind "adv", one or both, moved within eps to maximise the term's loss; gives both views
    (B, 3, S, S). They start at the images + eps `noise`, noise (B, 2, 3, S, S) in [-1, 1], or under
    --no-random-start at the images.

    Eval mode: an embedding then depends on its own image only, so that of a clean view is a constant, and no
    running statistic changes.
    """
    eps, step_size, T = args.eps / 255, args.step_size / 255, args.temperature
    start1 = (x1 + eps * noise[:, 0]).clamp(0, 1) if args.random_start else x1
    start2 = (x2 + eps * noise[:, 1]).clamp(0, 1) if args.random_start else x2
    with eval_mode(net):
        if kinds == ("adv", "adv"):  # both at once
            x = pgd(lambda x: nt_xent(*embed(net, x, "adv").chunk(2), T),
                    torch.cat([x1, x2]), eps, step_size, args.steps, start=torch.cat([start1, start2]))
            return x.chunk(2)
        if kinds == ("adv", "clean"):
            z2 = embed(net, x2, "clean").detach()
            x1 = pgd(lambda x: nt_xent(embed(net, x, "adv"), z2, T),
                     x1, eps, step_size, args.steps, start=start1)
        elif kinds == ("clean", "adv"):
            z1 = embed(net, x1, "clean").detach()
            x2 = pgd(lambda x: nt_xent(z1, embed(net, x, "adv"), T),
                     x2, eps, step_size, args.steps, start=start2)
        return x1, x2


def train_step(net, opt, x1, x2, noise, args):
    """One iteration on two views (B, 3, S, S); `noise` (B, 2, 3, S, S) in [-1, 1] starts the attack."""
    losses = {}
    for kinds in VARIANTS[args.variant]:
        pair = attack(net, x1, x2, noise, kinds, args) if "adv" in kinds else (x1, x2)
        z1, z2 = embed_pair(net, *pair, kinds)
        name = kinds[0] if kinds[0] == kinds[1] else "_".join(kinds)
        losses[f"loss_{name}"] = nt_xent(dist.gather(z1), dist.gather(z2), args.temperature)
    loss = sum(losses.values()) / len(losses)

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    dist.average_buffers(net)  # else the ranks' running statistics drift apart
    return {"loss": loss, **losses}


def lr_at(update, updates, lr, warmup):
    """Of update 1, 2, ..., `updates`: linear over the first `warmup`, then a cosine to 1e-6."""
    return optim.warmup_cosine(update, updates, warmup, lr, 1e-6)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="acl", arch="resnet18")
    p.add_argument("--variant", choices=VARIANTS, default="ds", help=" ".join(VARIANTS))
    p.add_argument("--epochs", type=run.integer(0), default=1000, help="0 exports the random encoder")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images a step, over all processes")
    p.add_argument("--lr", type=run.number(), default=5.0, help="of LARS, at its peak")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="epochs")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=1e-6)
    p.add_argument("--temperature", type=run.number(above=0), default=0.5)
    p.add_argument("--eps", type=run.number(0, 255), default=8.0,
                   help="linf radius of the attack, in 1/255")
    p.add_argument("--step-size", type=run.number(0, 255), default=2.0, help="of the attack, in 1/255")
    p.add_argument("--steps", type=run.integer(0), default=5, help="of the attack")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (authors' code); without, at the "
                        "image: with --steps 1 and --step-size equal to --eps that is FGSM")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view; default: that of the data's images, of a folder's 32")
    return p


def network(arch, variant):
    """Encoder and projector: (B, 3, S, S) in [0, 1] -> (B, D), D as the encoder's; their BatchNorms have the
    branches that the variant uses."""
    branches = sorted({kind for kinds in VARIANTS[variant] for kind in kinds})
    encoder = encoders.make(arch, branches, mean=MEAN, std=STD)
    d = encoder.dim
    projector = nn.Sequential(
        nn.Linear(d, d), BranchNorm(d, branches, nn.BatchNorm1d), nn.ReLU(),
        nn.Linear(d, d, bias=False), BranchNorm(d, branches, nn.BatchNorm1d), nn.ReLU(),
        nn.Linear(d, d, bias=False), BranchNorm(d, branches, nn.BatchNorm1d))
    return nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)


def pictures(path, net, images, size, args):
    """Rows of up to eight: x1, x2, then each attacked view and its perturbation (grey is none, full scale is
    eps)."""
    x, _, rng = next(data.batches(images, min(8, len(images)), args.seed, 0))
    x1, x2 = (augment(x, rng, size) for _ in range(2))
    rows = [x1, x2]
    attacked = [kinds for kinds in VARIANTS[args.variant] if "adv" in kinds]
    if attacked:
        noise = 2 * rng.uniform(2, *x1.shape[1:], device=x1.device) - 1
        for clean, x_adv in zip((x1, x2), attack(net, x1, x2, noise, attacked[0], args)):
            if x_adv is not clean:
                rows += [x_adv, 0.5 + (x_adv - clean) / (2 * max(args.eps / 255, 1e-8))]
    run.save_picture(torch.cat(rows), path, len(x1))


def main(argv=None):
    args = parser().parse_args(argv)
    env = run.setup(args)
    device, out = env.device, pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    steps = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch, args.variant), args, env)
    opt = optim.LARS(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    if args.compile:
        net.compile()

    log = Log(args, env, steps * args.epochs, images)
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    log.start(step, f"chance loss ln(2B - 1) = {math.log(2 * args.batch_size - 1):.3f}")

    for epoch in range(step // steps, args.epochs):
        begin = step % steps  # of the epoch's steps; not 0 where a run stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, begin):
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step + 1, steps * args.epochs, args.lr, steps * args.warmup)
            optim.set_lr(opt, lr)
            x1, x2 = (augment(x, rng, size) for _ in range(2))  # `rng` moves on between them
            noise = 2 * rng.uniform(2, *x1.shape[1:], device=device) - 1
            losses = train_step(net, opt, x1, x2, noise, args)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            if env.rank == 0:  # before the checkpoint, so that none is missing when the run goes on
                pictures(out / "views.png", net, images, size, args)
            run.save(args, env, state, step)
    if env.rank == 0:
        bn = "adv" if any("adv" in kinds for kinds in VARIANTS[args.variant]) else "clean"
        encoders.export(net[0], out / "encoder.pt", bn, image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder; BN branch {bn}")


if __name__ == "__main__":
    run.cli(main)
