"""CLAE: contrastive learning with adversarial examples (Ho & Vasconcelos 2020, arXiv 2010.12050).

SimCLR asks that two augmentations of an image agree. CLAE asks in addition that one of them agrees
with an attacked copy of itself. The attack is the cheapest there is, one signed step uphill on the
contrastive loss of the view and its copy. Its aim is accuracy, not robustness. The copy starts at the
view itself: their cosine is at its maximum, 1, where it has no gradient. So, to first order, the step
moves the copy's embedding towards those of the other images, and a copy nearer to them is a harder
example.

    in formulas                   this file
    z                             embed: the output of net, encoder and projector, not normalised
    a = t(x), b = t'(x)           x1, x2: the two views of an image
    a' = a + eps sign(gradient    x1_adv, of attack, clipped to [0, 1]
      of NT(z_a, z_a') in a')
    NT(z_a, z_b)                  nt_xent
    NT(z_a, z_b) + alpha NT(z_a, z_a')    objective
    BN of clean, attacked x       BatchNorm branches "clean", "adv": weights and statistics of their own

The body of the paper was not at hand: this follows its authors' code, in its variant for SimCLR. We
depart from it in these places:
    - eps is a difference of pixel values in [0, 1], and the attacked view stays in [0, 1]. Theirs is
      0.03 of normalised values, which is 3.8/255, and is not clipped.
    - No running statistic moves in the attack. Their code runs it in train mode, so that each of its
      two passes moves those of branch adv.
    - Both views go through BatchNorm as one batch of 2B images. Theirs go one after the other.
    - The last, short batch of an epoch is used; theirs is dropped. Convolutions start as He et al.
      have it, theirs as PyTorch does.
    - At its start the copy is the view, so one pass gives both embeddings of the attack; their code
      makes two. The result is the same.

The attack runs branch adv in train mode, as their code does: its BatchNorms normalise by the batch, as
they do where the copy enters the loss. In eval mode the attack would find a different copy: the running
statistics of that branch, with a momentum of 0.01, lag hundreds of steps behind the weights, and no
training pass reads them. The attack does not climb quite the second term of the loss. There z_a comes
through branch clean; in the attack both embeddings come through branch adv, or their cosine would not
be 1. Each step moves the running statistics of branch clean by 2B images, those of branch adv by B. A
ViT has no BatchNorm, and so no branches.

    python clae.py                                       CIFAR-10, ResNet-18, 100 epochs
    torchrun --standalone --nproc-per-node 2 clae.py     on 2 GPUs, 128 of the 256 images on each
    python clae.py --alpha 0 --out runs/simclr           SimCLR, the clean base: nothing is attacked
    python clae.py --random --out runs/random            a control: steps of equal length in random directions
    python clae.py --eps 0 --out runs/copy               another: the third view is a copy of the first
    python clae.py --arch vit_tiny --out runs/clae-vit   a ViT (never run)
    python eval.py runs/clae/encoder.pt --preset knn amoc-slf

The attack's step is a sign, so its ball is linf's, and there is no --norm.

A step costs 11 forward passes, counting a backward pass to the pixels as one and a whole one as two: 2
for the attack and 9 for the update. With --random it costs 9, and with --alpha 0, SimCLR's, 6.

The encoder is exported without the projector, with BatchNorm branch clean, which is the one that
eval.py reads, in eval mode.

On several processes order, augmentation and the directions of --random are those of one process. The
losses have the negatives of all of them, the attack those of its own process. Each BatchNorm sees the
images of its own process, or with --sync-bn (on GPUs) those of all.

In the log, chance is ln(2B - 1) for loss_clean and for loss_adv, with B images per step, and loss is
loss_clean + alpha loss_adv. Both fall below chance as it learns; where all embeddings are alike, they
stay there. gain is what the attack adds to NT of the view and its copy, both through branch adv, on up
to 64 training images, the same ones at the end of every epoch. It is above 0; with --random it is near
0, and with --eps 0 it is 0.

Measured on one CPU thread (Intel Xeon) and 10,000 images of CIFAR-10 (JPEG), with --arch slim
--batch-size 64 --lr 1e-3 --lr-final 0 --epochs 14, in 5.1 CPU minutes (one seed): a linear probe
(eval.py's preset amoc-slf, 2,000 test images) reaches 41.8 %, with --random 42.9 and with --eps 0 42.9.
Under PGD-20 at 4/255 it keeps 19.0, and they 1.8 and 0.6; at 8/255 6.6, and they nothing. So in this
short run the attack does not raise accuracy, which is its aim, but does raise robustness; one point is
within what a seed may change. On all 50,000 images, judged on all 10,000 test images (one seed), CLAE
reaches 49.7, and 7.0 under PGD-20 at 8/255, in 20 CPU minutes (13 epochs). SimCLR (--alpha 0) was not
measured with this script. This has not been run on a GPU yet, and on a ViT not at all. The survey by Qi
& Shah 2022 (arXiv 2210.13463, Table 3, under the heading "robust linear") has 76.70 % on CIFAR-10 and
55.52 on CIFAR-100, of a linear probe on clean images. Those are the authors' figures, and their code
keeps the epoch of the probe that is best on the test images. Ours is always the last.
"""
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_color_jitter, random_grayscale, random_resized_crop
from common.log import Log
from common.pgd import check_box, frozen_stats, pgd
from common.pictures import attack_key, difference, save_rows
from common.resnet import BranchNorm, branch
from common.speed import compile_networks, graphed

MEAN = (0.5, 0.5, 0.5)  # as in the authors' code
STD = (0.5, 0.5, 0.5)


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size):
    """One view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]. No blur."""
    x = random_resized_crop(x, rng, size, scale=(0.08, 1.0), flip=0.5)
    x = random_color_jitter(x, rng, 0.8, 0.8, 0.8, 0.2, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    return x.contiguous(memory_format=torch.channels_last)


def embed(net, x, bn):
    """z of x (B, 3, S, S) through BatchNorm branch `bn`: (B, 64), not normalised, in x's dtype."""
    with branch(net, bn), run.autocast(x.device):
        z = net(x)
    return z.to(x.dtype)


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


def objective(z1, z2, z_adv, temperature, alpha):
    """NT(z_a, z_b) + alpha NT(z_a, z_a') of z1, z2, z_adv (B, D), with gradient through all three.

    The attacked view is compared with the view that it is made of, z1, and not with the other one. Where
    `alpha` is 0, z_adv is not read and may be None.
    """
    loss = nt_xent(z1, z2, temperature)
    if alpha:
        loss = loss + alpha * nt_xent(z1, z_adv, temperature)
    return loss


@graphed  # with --graph, on CUDA, recorded once and then replayed; the result is the same
def attack(net, x, noise, *, eps, temperature, random=False):
    """x (B, 3, S, S) in [0, 1] after one step of eps uphill on NT(z_x, z), where z is the embedding of the
    moving copy, and z_x, that of x, is held constant. eps is in the units of x.

    With `random` the step is eps sign(`noise`) instead, noise shaped as x; without it, noise is not read.
    """
    if random:
        check_box(x, 0.0, 1.0)  # as pgd does
        return (x.detach() + eps * noise.sign()).clamp(0, 1)

    def loss_of_copy(x_adv):
        # z is z_x too, as the one step starts at x. For more steps, embed x once, before pgd.
        z = embed(net, x_adv, "adv")
        return nt_xent(z.detach(), z, temperature)

    # Train mode: batch statistics are part of what is attacked. No running statistic changes.
    with frozen_stats(net):
        return pgd(loss_of_copy, x, eps, step_size=eps, steps=1, start=x)


def train_step(net, opt, x1, x2, noise, *, temperature, alpha, eps, random):
    """One iteration on two views (B, 3, S, S) of B images; the losses to be logged. `noise` is as in
    `attack`."""
    if alpha:
        x1_adv = attack(net, x1, noise, eps=eps, temperature=temperature, random=random)
    # Embeddings of all processes' images. The gradient flows through all three, and not into the
    # perturbation.
    z1, z2 = embed(net, torch.cat([x1, x2]), "clean").chunk(2)  # one batch to BatchNorm
    z1 = dist.gather(z1)
    z2 = dist.gather(z2)
    z_adv = None
    if alpha:
        z_adv = dist.gather(embed(net, x1_adv, "adv"))
    loss = objective(z1, z2, z_adv, temperature, alpha)
    losses = {"loss": loss}
    if alpha:
        with torch.no_grad():  # the two terms again, for the log: `objective` returns their sum
            losses["loss_clean"] = nt_xent(z1, z2, temperature)
            losses["loss_adv"] = nt_xent(z1, z_adv, temperature)

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    dist.average_buffers(net)  # else the running statistics of the processes drift apart
    return losses


def lr_at(epoch, epochs, lr, final):
    """The learning rate of `epoch`: a cosine from `lr` towards `final`."""
    return optim.cosine(epoch / epochs, lr, final)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="clae", arch="resnet18", graph=True)
    p.add_argument("--epochs", type=run.integer(0), default=100,
                   help="0 exports the random encoder; default (authors' code)")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images per step, over all processes (authors' code)")
    p.add_argument("--lr", type=run.number(), default=3e-4, help="of Adam, at the start (authors' code)")
    p.add_argument("--lr-final", type=run.number(),
                   help="of Adam, at the end of a cosine; default: that of the start (authors' code)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=0.0,
                   help="of Adam; their code reads one and does not use it (authors' code)")
    p.add_argument("--temperature", type=run.number(above=0), default=0.5, help="T (authors' code)")
    p.add_argument("--alpha", type=run.number(), default=1.0,
                   help="weight of the attacked view's loss; 0 is SimCLR, without an attack (authors' code)")
    p.add_argument("--eps", type=run.number(0, 255), default=4.0,
                   help="the step of the attack, in 1/255; theirs is 3.8 (ours)")
    p.add_argument("--random", action="store_true",
                   help="steps of the same length in random directions, as a control (ours)")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def network(arch):
    """An encoder with BatchNorm branches clean and adv, and a projector without BatchNorm: images
    (B, 3, S, S) -> (B, 64)."""
    encoder = encoders.make(arch, branches=("clean", "adv"), mean=MEAN, std=STD)
    projector = encoders.mlp(encoder.dim, encoder.dim, 64)
    for module in encoder.modules():
        if isinstance(module, BranchNorm):
            # As in the authors' code. Only --bn adv of eval.py reads the statistics that it moves.
            module.branches["adv"].momentum = 0.01
    return nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)


def random_directions(x1, args, rng):
    """With --random, the directions for the views x1: shaped as they, uniform in [-1, 1]. Without it,
    None."""
    if not args.random:
        return None
    return 2 * rng.uniform(*x1.shape[1:], device=x1.device) - 1


def attack_settings(args):
    """The named arguments of `attack` as the flags have them; eps as a pixel value in [0, 1]."""
    return dict(eps=args.eps / 255, temperature=args.temperature, random=args.random)


@torch.no_grad()
def gain(net, images, size, args):
    """What the attack adds to NT of the view and its copy, both through branch adv, on up to 64 training
    images, augmented as in training."""
    x, _, rng = data.sample(images, 64, args.seed)
    x1 = augment(x, rng, size)
    x1_adv = attack(net, x1, random_directions(x1, args, rng), **attack_settings(args))
    with frozen_stats(net):
        z = embed(net, x1, "adv")
        z_adv = embed(net, x1_adv, "adv")
    return (nt_xent(z, z_adv, args.temperature) - nt_xent(z, z, args.temperature)).item()


def pictures(net, images, size, args):
    """Rows for `save_rows` of up to eight images: both views; and with --alpha the attacked one, and
    what the attack added."""
    x, _, rng = data.sample(images, 8, args.seed)
    x1 = augment(x, rng, size)
    x2 = augment(x, rng, size)
    rows = [("x1", x1), ("x2", x2)]
    if args.alpha:
        x1_adv = attack(net, x1, random_directions(x1, args, rng), **attack_settings(args))
        rows += [("x1_adv", x1_adv), ("x1_adv - x1", difference(x1_adv, x1, args.eps / 255))]
    return rows


def main(argv=None):
    args = parser().parse_args(argv)
    env = run.setup(args)
    device = env.device
    out = pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    # BatchNorm, and the negatives within the batch, need two images per process.
    steps_per_epoch = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch), args, env)
    opt = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay)
    compile_networks(args, env, net)

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    log.start(step, f"chance: loss_clean, loss_adv ln(2B - 1) = {math.log(2 * args.batch_size - 1):.3f}")

    final = args.lr if args.lr_final is None else args.lr_final
    settings = dict(alpha=args.alpha, **attack_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, final)
        optim.set_lr(opt, lr)
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            x1 = augment(x, rng, size)
            x2 = augment(x, rng, size)  # another view: `rng` has moved on
            noise = random_directions(x1, args, rng)
            losses = train_step(net, opt, x1, x2, noise, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        # `gain` and pictures are made by all processes: a SyncBatchNorm in train mode asks them all.
        gained = {"gain": gain(net, images, size, args)} if args.alpha else {}
        log.epoch(epoch, step, lr=lr, **gained)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again.
            rows = pictures(net, images, size, args)
            if env.rank == 0:
                save_rows(out / "views.png", rows, key=attack_key("linf", args.eps) if args.alpha else None)
            run.save(args, env, state, step)
    if env.rank == 0:
        bn = encoders.branch_of(net[0], "clean")
        encoders.export(net[0], out / "encoder.pt", bn, image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder" + (f"; BN branch {bn}" if bn else ""))


if __name__ == "__main__":
    run.cli(main)
