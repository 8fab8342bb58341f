"""BYORL: bootstrap your own robust latents (Gowal et al. 2021, "Self-supervised Adversarial Robustness for
the Low-label, High-data Regime", ICLR 2021; Sec. 4.2 of Qi & Shah 2022, arXiv 2210.13463).

BYOL, made robust. An online network predicts what a slowly moving copy of it, the target, says about another
view of the same image; there are no labels and no negatives. Here the online network's view is first moved,
within eps, to where its prediction disagrees most with the target's clean projection, and it learns from
there.

    paper                       here
    e, g, q                     net[0], net[1], net[2]: encoder, projector, predictor
    gamma                       target: a copy of net[:2]
    v, v'                       x1, x2
    Eq. 4  the loss             byol_loss
    Eq. 5, 6  the attack        attack: it starts in the ball, and ascends the loss
    Eq. 7  BYORL's objective    train_step, symmetrised: the sum of both directions
    tau                         --ema, on a cosine to 1

As printed, Eq. 6 adds the gradient of the cosine, which would make the views agree; we take that for a
misprint, and maximise. Where the paper is silent, or its appendix was not at hand, we take BYOL's (arXiv
2006.07733) conventions: BatchNorm in the heads, LARS with trust 0.001 that leaves biases and norms alone,
warm-up over 10 epochs, the target's BatchNorm in train mode; and a common augmentation for CIFAR without
blur, the second view solarised now and then. Departures from the paper:
    - the encoder: ResNet-18 (the paper's: a pre-activation ResNet-34, two to four times as wide), and 200
      epochs (the paper: 1000);
    - the attack: 5 steps of a fixed length (the paper: 40, of AutoPGD's adaptive length, 21 times BYOL's
      cost).
The target is never attacked: the paper found that unstable.

BatchNorm: there is one set, and the online network sees attacked views only, so that attacked images are what
the exported statistics describe. The attack runs in train mode: it uses batch statistics, as the update does,
so that moving one image shifts the others' normalisation; running statistics do not change. Each view has a
pass of its own.

Several processes: each BatchNorm sees the images of its own process, or with --sync-bn (on GPUs) those of
all.

The target is clean and constant, and computed once per step. A step costs 28 forwards: 2 of the target, 2 * 6
online, 2 * 5 backwards to the pixels, and 2 whole backwards that count 2 each; BYOL's costs 8. The log tells
how far the projections are spread, and a run whose projections are all alike ends.

    python byorl.py                                      linf 8/255: CIFAR-10, ResNet-18, 200 epochs
    torchrun --standalone --nproc-per-node 4 byorl.py    the same on 4 GPUs, 128 of the 512 images on each
    python byorl.py --norm l2 --eps 128 --out runs/l2    l2 128/255
    python byorl.py --eps 0 --out runs/byol              BYOL, the clean base
    python byorl.py --steps 2 --out runs/byorl-2         the attack of Rebuffi et al. 2023, App. C
    python eval.py runs/byorl/encoder.pt --preset amoc-slf amoc-alf

Measured on a CPU thread (Intel Xeon), 0.3 M-parameter encoder, 10,000 images of CIFAR-10 (JPEG), 7.6 minutes
(16 epochs, 2 attack steps): linear probe 29.2 standard, 18.5 under PGD-20 at 8/255; BYOL in 6.6 minutes 43.8
and 0, a random encoder 27.4 and 0: robust at once, but slow to learn. With --lr 0.5 and 48 epochs, in 27
minutes, 37.0 and 18.4. Not yet run on a GPU.
"""
import argparse
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_color_jitter, random_grayscale, random_resized_crop, random_solarize, resize
from common.log import Log, check_spread
from common.pgd import eval_mode, frozen_stats, ball_point, pgd

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size, solarize):
    """One view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]; `solarize` is a
    probability."""
    x = random_resized_crop(x, rng, size, scale=(0.08, 1.0), flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.2, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_solarize(x, rng, p=solarize)
    return x.contiguous(memory_format=torch.channels_last)


def embed(net, x):
    """net(x) of x (B, 3, S, S): (B, 256), un-normalised, in x's dtype."""
    with run.autocast(x.device):
        z = net(x)
    return z.to(x.dtype)


def byol_loss(p, z):
    """Eq. 4: mean over the batch of 2 - 2 cos(p, z), from 0 to 4; p, z (B, D), z a constant."""
    return (2 - 2 * (F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1)).mean()


def attack(net, x, z, noise, args):
    """Eq. 5: x (B, 3, S, S) moved within eps to where the prediction is furthest from the clean target z (B,
    256). It starts at x + eps `noise`, noise (B, 3 S S) in the unit ball, or under --no-random-start at x.

    Train mode: batch statistics are part of what is attacked. No running statistic changes.
    """
    eps = args.eps / 255
    step_size = 1.25 * eps / max(1, args.steps) if args.step_size is None else args.step_size / 255
    start = (x + eps * noise.view(x.shape)).clamp(0, 1) if args.random_start else x
    with frozen_stats(net):
        return pgd(lambda x: byol_loss(embed(net, x), z),
                   x, eps, step_size, args.steps, args.norm, start=start)


def train_step(net, target, opt, x1, x2, noise, tau, args):
    """One iteration on two views (B, 3, S, S); `noise` (B, 2, 3 S S), in the unit ball, starts the attack."""
    with torch.no_grad():
        z1, z2 = embed(target, x1), embed(target, x2)
    x1_adv = attack(net, x1, z2, noise[:, 0], args)
    x2_adv = attack(net, x2, z1, noise[:, 1], args)
    loss = byol_loss(embed(net, x1_adv), z2) + byol_loss(embed(net, x2_adv), z1)  # Eq. 7
    blind = sum(2 - 2 * F.normalize(z, dim=1).mean(0).norm() for z in (z1, z2))  # of the best constant p

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    optim.ema(target, net[:2], tau)
    dist.average_buffers(net, target)  # else the ranks' running statistics drift apart
    return {"loss": loss, "blind": blind}


def lr_at(step, steps, lr, warmup):
    """Linear from 0 over the first `warmup` of `steps` steps, then a cosine to 0."""
    return optim.warmup_cosine(step, steps, warmup, lr)


def tau_at(step, steps, tau):
    """From `tau` at step 0 along half a cosine to 1 at the end."""
    return optim.cosine(step / steps, tau, 1.0)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="byorl", arch="resnet18")
    p.add_argument("--hidden", type=run.integer(1), default=4096,
                   help="width within projector and predictor")
    p.add_argument("--epochs", type=run.integer(0), default=200, help="0 exports the random encoder")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images a step, over all processes")
    p.add_argument("--lr", type=run.number(), default=2.0, help="of LARS, at its peak")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="epochs")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=5e-4)
    p.add_argument("--ema", type=run.number(0, 1), default=0.996, help="tau, at the start")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf",
                   help="of the attack: linf, or l2 (then --eps 128)")
    p.add_argument("--eps", type=run.number(0, 1e6), default=8.0,
                   help="radius of the attack, in 1/255; 0: BYOL")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attack, in 1/255; default: 1.25 eps / steps")
    p.add_argument("--steps", type=run.integer(0), default=5, help="of the attack")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (paper); without, at the "
                        "image: with --steps 1 and --step-size equal to --eps that is FGSM")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view; default: that of the data's images, of a folder's 32")
    return p


def network(arch, hidden):
    """Encoder, projector and predictor: images (B, 3, S, S) -> (B, dim) -> (B, 256) -> (B, 256)."""
    encoder = encoders.make(arch, mean=MEAN, std=STD)
    projector = encoders.mlp(encoder.dim, hidden, 256, norm=nn.BatchNorm1d)
    predictor = encoders.mlp(256, hidden, 256, norm=nn.BatchNorm1d)
    return nn.Sequential(encoder, projector, predictor).to(memory_format=torch.channels_last)


def pictures(path, net, target, images, size, args):
    """Rows of up to eight: x1, x2, the attacked views, and their perturbations (grey is none, full scale is
    the largest)."""
    x, _, rng = next(data.batches(images, min(8, len(images)), args.seed, 0))
    x1, x2 = (augment(x, rng, size, p) for p in (0, 0.2))
    noise = ball_point(rng.uniform(2, 1 + x1[0].numel(), device=x1.device), args.norm)
    with frozen_stats(target), torch.no_grad():
        z1, z2 = embed(target, x1), embed(target, x2)
    attacked = attack(net, x1, z2, noise[:, 0], args), attack(net, x2, z1, noise[:, 1], args)
    rows = [x1, x2, *attacked]
    for x, x_adv in zip((x1, x2), attacked):
        rows.append(0.5 + (x_adv - x) / (2 * (x_adv - x).abs().max().clamp_min(1e-8)))
    run.save_picture(torch.cat(rows), path, len(x1))


def main(argv=None):
    args = parser().parse_args(argv)
    env = run.setup(args)
    device, out = env.device, pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    steps = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch, args.hidden), args, env)
    target = run.to_device(network(args.arch, args.hidden)[:2], args, env).requires_grad_(False)
    target.load_state_dict(net[:2].state_dict())
    opt = optim.LARS(optim.lars_groups(net), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    if args.compile:
        net.compile(), target.compile()

    log = Log(args, env, steps * args.epochs, images)
    state = dict(net=net, target=target, opt=opt, log=log)
    step = run.resume(args, env, state)
    sample, _, _ = next(data.batches(images, min(256, len(images)), args.seed, 0))
    log.start(step, "loss: 4 at random, `blind` where predictions know nothing of the image, 0 at best")

    for epoch in range(step // steps, args.epochs):
        begin = step % steps  # of the epoch's steps; not 0 where a run stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, begin):
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step, steps * args.epochs, args.lr, steps * args.warmup)
            optim.set_lr(opt, lr)
            tau = tau_at(step, steps * args.epochs, args.ema)
            x1, x2 = (augment(x, rng, size, p) for p in (0, 0.2))  # `rng` moves on between them
            noise = ball_point(rng.uniform(2, 1 + x1[0].numel(), device=device), args.norm)
            losses = train_step(net, target, opt, x1, x2, noise, tau, args)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.check()  # a loss that is not finite stops the run here, not in what follows
        with eval_mode(net), torch.no_grad():
            z = net[:2](resize(sample, size))
        log.epoch(epoch, step, lr=lr, ema=tau, **check_spread(z, args))
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Before the checkpoint, so that none is missing when the run goes on; and by all processes, as
            # a SyncBatchNorm in train mode asks them all.
            pictures(out / "views.png" if env.rank == 0 else None, net, target, images, size, args)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
