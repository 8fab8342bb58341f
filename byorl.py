"""BYORL: bootstrap your own robust latents (Gowal et al. 2021, "Self-supervised Adversarial
Robustness for the Low-label, High-data Regime", ICLR 2021; Sec. 4.2 of the survey by Qi & Shah 2022,
arXiv 2210.13463).

BYORL makes BYOL robust. An online network predicts what a slowly moving copy of it, the target,
says about another view of the same image; there are no labels and no negatives. BYORL first moves
the online network's view, within eps, to where its prediction disagrees most with the target's
clean projection, and learns from there. The target is never attacked: the paper found that
unstable.

    paper                       this file
    e, g, q                     net[0], net[1], net[2]: encoder, projector, predictor
    gamma                       target: a copy of net[:2]
    v, v'                       x1, x2: the two views of an image
    Eq. 4  the loss             byol_loss
    Eq. 5, 6  the attack        attack: it starts in the ball, and ascends the loss
    Eq. 7  BYORL's objective    loss in train_step, symmetrised: the sum of both directions
    tau                         --ema, on a cosine to 1

As printed, Eq. 6 adds the gradient of the cosine, which would make the views agree. We take that for a
misprint, and maximise the loss. Where the main text is silent (we did not have the appendix), we take the
conventions of BYOL (arXiv 2006.07733): the sum (not the mean) of both directions, BatchNorm in the heads,
LARS with trust 0.001, which neither scales nor decays biases and norms, warm-up over 10 epochs, the
target's BatchNorm in train mode. The augmentation is a common one for CIFAR, without blur; the second
view is solarised with probability 0.2. We depart from the paper in two places:
    - The encoder is a ResNet-18 and trains for 200 epochs. The paper's is a pre-activation ResNet-34, two
      to four times as wide, and trains for 1000.
    - The attack takes 5 steps of a fixed length. The paper's takes 40, of AutoPGD's adaptive length, and
      costs 21 times as much as BYOL.

The targets are clean and constant, and computed once per step. Counting a backward pass to the
pixels as one forward pass and a whole one as two, a step costs 28 forward passes with 5 attack steps.
With K of them it costs 4 K + 8: 2 of the target, 2 (K + 1) online, 2 K backward to the pixels, and 4
for the two whole backward passes. BYOL's costs 8.

    python byorl.py                                      linf 8/255: CIFAR-10, ResNet-18, 200 epochs
    torchrun --standalone --nproc-per-node 4 byorl.py    the same on 4 GPUs, 128 of the 512 images on each
    python byorl.py --norm l2 --eps 128 --out runs/l2    l2 128/255
    python byorl.py --eps 0 --out runs/byol              BYOL, the clean base
    python byorl.py --eps 0 --noise-sigma 0.25 --out runs/rush      noise in place of the attack, as below
    python byorl.py --steps 2 --out runs/byorl-2         2 steps of 5/8 eps, as in Rebuffi et al. 2023, App. C
    python byorl.py --arch vit_tiny --optimizer adamw --lr 1e-3 --weight-decay 0.05 --out runs/byorl-tiny
    python eval.py runs/byorl/encoder.pt --preset amoc-slf amoc-alf

Rebuffi et al. 2023 ("Adversarially Self-Supervised Pre-training Improves Accuracy and Robustness")
pretrain a ViT-B/16 in this way on ImageNet, at 224 pixels. Their best radii are 2/255 in linf and 2 in
l2, which is 510/255 (at 32 pixels, 73/255 is as much per pixel). The radii, --steps 2 and --image-size
224 of these commands are theirs; the rest is ours, and untested:

    torchrun --standalone --nproc-per-node 8 byorl.py --data path/to/imagenet --arch vit_base \
--optimizer adamw --lr 1e-3 --weight-decay 0.05 --image-size 224 --steps 2 --eps 2 --out runs/byorl-vit
    torchrun --standalone --nproc-per-node 8 byorl.py --data path/to/imagenet --arch vit_base \
--optimizer adamw --lr 1e-3 --weight-decay 0.05 --image-size 224 --steps 2 --norm l2 --eps 510 \
--out runs/byorl-vit-l2

With --noise-sigma s, Gaussian noise takes the place of the attack, as in RUSH (Sec. 4.3 of the survey):
the second view becomes x2 + N(0, s^2) for both networks, with pixels in [0, 1], and the first stays
clean. As in randomised smoothing, nothing is clipped. The s above is ours.

The online encoder is exported, without projector and predictor. At test time a ResNet normalises
whatever it sees by the running statistics of what the online network saw: attacked images, with --eps 0
clean ones, and with --noise-sigma clean and noisy ones. A ViT has none.

On several processes order, augmentation and noise are those of one process. Each BatchNorm sees the
images of its own process, or with --sync-bn (on GPUs) those of all. The attack is in train mode, so that
without --sync-bn it is not that of one process either. The running statistics are averaged after each
step. constant_loss is that of each process's own images, averaged over processes.

In the log, the loss is the sum of two directions: 4 where predictions are orthogonal to their
targets, 0 at best. constant_loss is that of the best prediction which knows nothing of the image. At a
random start the loss is near 4 and constant_loss near 1.7. Within the first epoch the loss drops to
about constant_loss, and only what it gains below that is learning, as long as std does not vanish.
constant_loss itself rises, so the loss may stand still while the network learns: in the last run below
(48 epochs) the loss goes from 1.67 to 1.52, and constant_loss from 1.52 to 1.91.

std (from 0 to 1) and rank (the effective number of dimensions) say how far the unit projections of 256
clean images are spread, in eval mode. A run whose std falls below 0.01 ends. In the first run below std
stays near 0.85 but rank falls from 10 to 5; in the last it rises from 30 to 35. With --steps 0 the
online views are moved by the random start alone (with --no-random-start, not at all).

Measured on one CPU thread (Intel Xeon) and 10,000 images of CIFAR-10 (JPEG), with --arch slim
--batch-size 64 --warmup 0 --hidden 512 --ema 0.99 --steps 2 --step-size 5, in 7.6 CPU minutes (16
epochs): a linear probe (eval.py's preset amoc-slf, 2,000 test images) reaches 29.1 %, and 18.4 under
PGD-20 at 8/255. BYOL reaches 43.8 and 0 in 6.6 CPU minutes (28 epochs); a random encoder, 27.4 and 0. So
BYORL keeps two thirds of its accuracy under attack, but learns slowly: with --lr 0.5 and 48 epochs, in
27 CPU minutes, it reaches 37.0 and 18.4.

On all 50,000 images, judged on all 10,000 test images (one seed each), BYORL with --lr 0.5 reaches 34.1
and 16.3 in 19 CPU minutes (7 epochs), BYOL 49.7 and 0.0 in 22 (15). This has not been run on a GPU yet,
and l2 and --noise-sigma not at all.
"""
import argparse
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import (
    random_color_jitter, random_grayscale, random_resized_crop, random_solarize, resize)
from common.log import Log, check_spread
from common.pgd import ball_point, eval_mode, frozen_stats, pgd
from common.pictures import attack_key, difference, save_rows
from common.speed import compile_networks, graphed

MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10, whatever the data
STD = (0.2470, 0.2435, 0.2616)
SOLARIZE = (0.0, 0.2)  # how often the first and the second view are solarised


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size, solarize):
    """One view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]; `solarize`
    is a probability."""
    x = random_resized_crop(x, rng, size, scale=(0.08, 1.0), flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.2, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_solarize(x, rng, p=solarize)
    return x.contiguous(memory_format=torch.channels_last)


def add_noise(x, sigma, rng):
    """x (B, 3, S, S) plus Gaussian noise of standard deviation `sigma`, in the units of x. It is not
    clipped to [0, 1], as in randomised smoothing."""
    u = 2 * rng.uniform(*x.shape[1:], device=x.device) - 1
    return x + sigma * 2**0.5 * torch.erfinv(u.clamp(-0.999999, 0.999999))


def embed(net, x):
    """net(x) of x (B, 3, S, S): (B, 256), not normalised, in x's dtype."""
    with run.autocast(x.device):
        z = net(x)
    return z.to(x.dtype)


def byol_loss(p, z):
    """Eq. 4: mean over the batch of 2 - 2 cos(p, z), from 0 to 4; p, z (B, D), z a constant."""
    return (2 - 2 * (F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1)).mean()


def constant_loss(z):
    """The least byol_loss of a prediction that is the same for all images: the one along the mean
    of the unit z."""
    return 2 - 2 * F.normalize(z, dim=1).mean(0).norm()


@graphed  # with --graph, on CUDA, recorded once and then replayed; the result is the same
def attack(net, x, z, noise, *, norm, eps, step_size, steps):
    """Eq. 5: x (B, 3, S, S) in [0, 1] moved within eps to where the prediction is furthest from the
    clean target z (B, 256).

    eps and step_size are in the units of x. The search starts at x + eps `noise`, noise (B, 3 S S)
    in the unit ball of the `norm`, or, where noise is None, at x. The weights are constants, and get
    no gradient. Every step is clipped to [0, 1], which is ours. With eps 0 the result is x as it is;
    with --noise-sigma that may lie outside [0, 1].
    """
    if eps == 0:
        return x
    start = x if noise is None else (x + eps * noise.view(x.shape)).clamp(0, 1)

    def loss_of_view(x_adv):
        return byol_loss(embed(net, x_adv), z)

    # Train mode: batch statistics are part of what is attacked, so that moving one image shifts the
    # normalisation of the others. No running statistic changes.
    with frozen_stats(net):
        return pgd(loss_of_view, x, eps, step_size, steps, norm, start=start)


def train_step(net, target, opt, x1, x2, noise, *, tau, norm, eps, step_size, steps):
    """One iteration on two views (B, 3, S, S) of B images; the losses to be logged.

    `noise` (B, 2, 3 S S) in the unit ball starts the attacks; None: they start at the images.
    """
    with torch.no_grad():
        z1 = embed(target, x1)
        z2 = embed(target, x2)
    noise1 = None if noise is None else noise[:, 0]
    noise2 = None if noise is None else noise[:, 1]
    x1_adv = attack(net, x1, z2, noise1, norm=norm, eps=eps, step_size=step_size, steps=steps)
    x2_adv = attack(net, x2, z1, noise2, norm=norm, eps=eps, step_size=step_size, steps=steps)

    # A pass in train mode for each view. There is one set of BatchNorms: where eps is not 0 the online
    # network sees attacked images only, and the exported running statistics describe those.
    p1 = embed(net, x1_adv)
    p2 = embed(net, x2_adv)
    loss = byol_loss(p1, z2) + byol_loss(p2, z1)  # Eq. 7

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    optim.ema(target, net[:2], tau)  # parameters; its running statistics move too, but nothing reads them
    dist.average_buffers(net, target)  # else the running statistics of the processes drift apart
    return {"loss": loss, "constant_loss": constant_loss(z1) + constant_loss(z2)}


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
    p = run.parser(__doc__, name="byorl", arch="resnet18", graph=True)
    p.add_argument("--hidden", type=run.integer(1), default=4096,
                   help="width within projector and predictor (paper)")
    p.add_argument("--epochs", type=run.integer(0), default=200,
                   help="0 exports the random encoder; default (ours)")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images per step, over all processes (paper)")
    p.add_argument("--optimizer", choices=("lars", "adamw"), default="lars",
                   help="adamw, for a ViT, does not decay biases and norms (ours); lars, with BYOL's "
                        "momentum of 0.9 (paper)")
    p.add_argument("--lr", type=run.number(), default=2.0,
                   help="at its peak; with adamw try 1e-3 (ours); with lars (paper)")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="in epochs (BYOL's)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=5e-4, help="(paper)")
    p.add_argument("--ema", type=run.number(0, 1), default=0.996, help="tau, at the start (paper)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf",
                   help="of the attack; with l2, --eps 128 (paper)")
    p.add_argument("--eps", type=run.number(0, 1e6), default=8.0,
                   help="radius of the attack, in 1/255; 0 gives BYOL (paper)")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attack, in 1/255; default: 1.25 eps / steps (ours)")
    p.add_argument("--steps", type=run.integer(0), default=5, help="of the attack (ours)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (paper); without it, at "
                        "the image: with --steps 1 and --step-size equal to --eps, in linf, that is FGSM")
    p.add_argument("--noise-sigma", type=run.number(0, 1e6), default=0.0,
                   help="standard deviation of Gaussian noise on the second view, where pixels are in "
                        "[0, 1]; for --eps 0 alone (ours)")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if args.norm == "linf" and args.eps > 255:
        raise ValueError(f"--eps {args.eps:g}: with --norm linf at most 255, the range of a pixel")
    if args.noise_sigma and args.eps:
        raise ValueError(f"--noise-sigma {args.noise_sigma:g}: is for --eps 0, and --eps {args.eps:g} "
                         "attacks the views; give one or the other")


def network(arch, hidden):
    """Encoder, projector and predictor: images (B, 3, S, S) -> (B, dim) -> (B, 256) -> (B, 256); 256 is
    the paper's."""
    encoder = encoders.make(arch, mean=MEAN, std=STD)
    projector = encoders.mlp(encoder.dim, hidden, 256, norm=nn.BatchNorm1d)
    predictor = encoders.mlp(256, hidden, 256, norm=nn.BatchNorm1d)
    return nn.Sequential(encoder, projector, predictor).to(memory_format=torch.channels_last)


def start_noise(x1, norm, rng):
    """Where the attacks on the views x1 and x2 start: (B, 2, 3 S S), uniform in the unit ball of
    the `norm`."""
    # One number more than there are pixels: under l2 it sets the distance from the centre, under linf it
    # is not used.
    return ball_point(rng.uniform(2, 1 + x1[0].numel(), device=x1.device), norm)


def attack_settings(args):
    """The named arguments of `attack` as the flags have them; eps and step_size as pixel values in
    [0, 1]."""
    eps = args.eps / 255
    step_size = 1.25 * eps / max(1, args.steps) if args.step_size is None else args.step_size / 255
    return dict(norm=args.norm, eps=eps, step_size=step_size, steps=args.steps)


def pictures(net, target, images, size, args):
    """Rows for `save_rows` of up to eight images: both views, then each attacked view and what the
    attack added to it."""
    x, _, rng = data.sample(images, 8, args.seed)
    x1 = augment(x, rng, size, SOLARIZE[0])
    x2 = augment(x, rng, size, SOLARIZE[1])
    if args.noise_sigma:
        x2 = add_noise(x2, args.noise_sigma, rng)
    rows = [("x1", x1), ("x2", x2)]
    if not args.eps:
        return rows
    noise1 = None
    noise2 = None
    if args.random_start:
        noise1, noise2 = start_noise(x1, args.norm, rng).unbind(1)
    with frozen_stats(target), torch.no_grad():
        z1 = embed(target, x1)
        z2 = embed(target, x2)
    x1_adv = attack(net, x1, z2, noise1, **attack_settings(args))
    x2_adv = attack(net, x2, z1, noise2, **attack_settings(args))
    full_scale = args.eps / 255 if args.norm == "linf" else None
    for name, view, view_adv in (("x1", x1, x1_adv), ("x2", x2, x2_adv)):
        added = difference(view_adv, view, full_scale)
        rows += [(f"{name}_adv", view_adv), (f"{name}_adv - {name}", added)]
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
    # BatchNorm in train mode needs two images per process.
    steps_per_epoch = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch, args.hidden), args, env)
    target = run.to_device(network(args.arch, args.hidden)[:2], args, env).requires_grad_(False)
    target.load_state_dict(net[:2].state_dict())
    if args.optimizer == "adamw":
        groups = optim.groups(net.named_parameters(), args.weight_decay)
        opt = torch.optim.AdamW(groups, args.lr)
    else:
        opt = optim.LARS(optim.lars_groups(net), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    compile_networks(args, env, net, target)

    all_steps = steps_per_epoch * args.epochs
    log = Log(args, env, all_steps, images)
    state = dict(net=net, target=target, opt=opt, log=log)
    step = run.resume(args, env, state)
    sample, _, _ = data.sample(images, 256, args.seed)
    log.start(step, "loss: 4 at random, constant_loss where predictions know nothing of the image, 0 at best")

    settings = attack_settings(args)
    for epoch in range(step // steps_per_epoch, args.epochs):
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step, all_steps, args.lr, steps_per_epoch * args.warmup)
            optim.set_lr(opt, lr)
            tau = tau_at(step, all_steps, args.ema)
            x1 = augment(x, rng, size, SOLARIZE[0])
            x2 = augment(x, rng, size, SOLARIZE[1])  # another view: `rng` has moved on
            if args.noise_sigma:
                x2 = add_noise(x2, args.noise_sigma, rng)
            noise = start_noise(x1, args.norm, rng) if args.eps and args.random_start else None
            losses = train_step(net, target, opt, x1, x2, noise, tau=tau, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.check()  # a loss that is not finite stops the run here, not in what follows
        with eval_mode(net), torch.no_grad():
            z = net[:2](resize(sample, size))
        log.epoch(epoch, step, lr=lr, ema=tau, **check_spread(z, args))
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again. All processes draw them, since a SyncBatchNorm in train mode asks them all.
            rows = pictures(net, target, images, size, args)
            if env.rank == 0:
                key = attack_key(args.norm, args.eps) if args.eps else None
                save_rows(out / "views.png", rows, key)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
