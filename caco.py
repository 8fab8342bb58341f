"""CaCo: cooperative positives and adversarial negatives from one bank (Wang et al. 2022, arXiv
2203.14370).

As in AdCo, a bank of free vectors gives the negatives, and climbs the contrastive loss while the
network descends it. In CaCo the bank gives the positive too: the row nearest to the key of the
*other* view. That row cooperates: it moves towards its query, which lowers the loss, while the
negatives move towards the queries because that raises it.

Which way it moves, and how strongly, is --cooperation, from -1 to 1. 1 is CaCo. With 0 its query does
not move it at all, but as a negative of other queries it still moves. With -1 it flees from its query:
that is an adversarial positive, for which the survey (Qi & Shah 2022, arXiv 2210.13463) reports an
accuracy close to zero. What our small runs saw stands at the end.

    paper (equations: the survey's)     this file
    f_q, f_k                            net, target: an encoder and a projector each
    u(z) = z / |z|                      embed: the network's output, normalised
    the memory bank                     n, the unit rows of bank.rows, which are free in length
    the positive, picked in the bank    positives
    contrastive loss over the bank      contrastive_loss
    Eq. 12 positives, Eq. 7 negatives   the bank's gradient of cooperative_loss; bank_step
    Eq. 13 positives, Eq. 7 negatives   that of contrastive_loss: cooperative_loss, --cooperation -1
    Eqs. 4 to 6, attack on pixels       attack, with --eps

The body of the paper was not at hand. The equations are the survey's, the numbers for ImageNet the
authors' code's. The defaults are for CIFAR-10; whose each is, its help text says. Also from the code
are the choice of the positive by largest cosine, the derivative through the cosine (Eqs. 7, 12 and 13
are those of free vectors), the loss as the *sum* of both views, in multi-crop as the mean over the two
views plus the mean over the pairs of a small view and a key, the bank's momentum and warm-up, that it
has no decay (their code reads a flag for it and does not use it), the augmentations, the projector, and the
cosine of the key network's momentum. BatchNorm is common to the batch of a process; on several,
--sync-bn makes it common to all, as in their code. We depart from that code:
    - There is one temperature, as in the survey, so that one backward pass gives the gradients of
      both players. Their code has two flags for it, which are equal in every recipe.
    - After 256 steps of MoCo (--fill-steps) at the peak learning rate, with --ema, the bank is
      filled with keys of the network they leave. Their code makes bank size / batch size steps with
      momentum 0.999, and keeps MoCo's queue, whose older keys may be far from all queries.
    - A batch is that of all processes, and all have one bank. In their code it is that of each
      host, and banks differ where the fill leaves Gaussian rows.
    - LARS, in the ImageNet recipe, has the learning rate inside its momentum buffer and the ratio
      trust |w| / (|g| + decay |w|). Theirs, MoCo v3's, has the rate outside and trust |w| / |g +
      decay w|.

With --eps the pixels of all views are attacked as well, which is ours: by PGD on contrastive_loss,
while the bank and the positives, those of clean keys, stand still. The attacked queries then drive
network and bank. There is one set of BatchNorms, which in the query network sees attacked images.

A step costs 8 forward passes (a whole backward pass counts two): twice those of MoCo, since both views
are queries and both have keys. With multi-crop it costs 11.3, a small view counted by its area. With
--eps it costs 28 on two views: each of the 5 attack steps is 2 passes of each view, counting a
backward pass to the pixels as one. Before epoch 0 come the 256 steps of MoCo, of 4 passes each, and K / B
forward passes that fill the bank.

    python caco.py                                       CIFAR-10, ResNet-18, 200 epochs
    python caco.py --cooperation -1 --out runs/eq13      Eq. 13
    python caco.py --cooperation 0 --out runs/frozen     no row is moved as a positive
    python caco.py --eps 8 --out runs/caco-pixels        bank and pixels
    python caco.py --norm l2 --eps 128 --out runs/caco-l2    pixels in l2, 128/255
    python caco.py --arch vit_tiny --optimizer adamw --lr 5e-4 --weight-decay 0.05 --warmup 10 \
--out runs/caco-vit
    python caco.py --data path/to/imagenet --arch resnet50 --stem imagenet --image-size 224 --blur \
--batch-size 1024 --optimizer lars --lr 1.2 --lr-final 0.012 --warmup 10 --weight-decay 1.5e-6 --dim 256 \
--bank-size 65536 --bank-lr 3 --fill-steps 64 --out runs/caco-imagenet
    python eval.py runs/caco/encoder.pt --preset knn amoc-slf

The encoder of the query network is exported, without projector and bank. At test time its BatchNorms use
their running statistics: with --eps, those of attacked views.

On several processes order, augmentation and noise are those of one process, and the bank is equal on all
of them. Each BatchNorm sees the images of its own process, or with --sync-bn (on GPUs) those of all.

The log tells how the bank lives: bank_change is what its step adds to a view's loss (below 0 where the
cooperating positives weigh more than the negatives, above it where they do not, or where --cooperation is
below 0). After that step: rotation is how far the directions of its rows moved, about the angle in
radians; norm is their length; unique is how many rows are positives of a view, on one process; p is the
mean probability of a positive; cosine is the mean largest cosine of a query with any row. The positives
are those chosen before the step, and all of this is of the two large views alone. The screen calls the
bank dead where cosine is below 0.2, or unique below a fifth of what it could be (the images of one
process, or K if that is less); but not where --cooperation is below 0, which drives both down. Chance for
the loss is 2 ln K, 16.6. In the run below the loss went from 14.9 to 13.7 by epoch 7 and ended at 14.1,
bank_change lay between -0.01 and -0.11, cosine between 0.87 and 0.93, p below 0.005, and norm grew to
1.4.

Measured on one CPU thread (Intel Xeon), with a 0.3 M-parameter encoder and 10,000 images of CIFAR-10
(JPEG), in 4.1 CPU minutes (14 epochs): a linear probe reaches 43.3 %, with 232 of 256 positives unique;
with Eq. 13 it reaches 43.7, with 86 unique. MoCo (amoc.py --variant CCC --warmup 0, which also blurs)
reaches 42.5 in 3.0 CPU minutes. At constant rates (--lr-final 0.06 --bank-warmup 0), after 16 epochs,
--cooperation 1, 0, -0.25 and -1 reach 43.5, 44.9, 44.3 and 43.7 (means of two seeds): no difference that
two seeds could show, and no collapse. Attacked pixels (7 epochs of --eps 8 --steps 2 --step-size 4) give
38.1, and 11.3 under PGD-20 at 8/255, where CaCo alone has 1.3.

On all 50,000 images, judged on all 10,000 test images, CaCo reaches 52.6 and 0.3 in 20 CPU minutes (17
epochs, one seed). This has not been run on a GPU yet, and LARS, AdamW, l2 and multi-crop in no whole
run. The paper reports 71.3 on ImageNet (linear probe, 200 epochs).
"""
import argparse
import itertools
import math
import pathlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import (
    random_color_jitter, random_gaussian_blur, random_grayscale, random_resized_crop, random_solarize)
from common.bank import Bank, bank_argmax, bank_logsumexp, bank_summary, through_unit_rows, unit_rows
from common.log import Log
from common.pgd import ball_point, eval_mode, pgd
from common.pictures import attack_key, difference, save_rows
from common.speed import compile_networks, graphed
from common.vit import check_crops

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in the authors' code
STD = (0.229, 0.224, 0.225)


class View(NamedTuple):
    """How a view is made."""

    side: int  # of the crop, where --image-size is 224
    area: tuple  # the share of the image that the crop takes
    saturation: float
    blur: float  # probability, with --blur
    solarize: float  # probability


TWO_VIEWS = [View(224, (0.2, 1.0), 0.2, 1.0, 0.0), View(224, (0.2, 1.0), 0.2, 0.1, 0.2)]
MULTI_CROP = 2 * [View(224, (0.14, 1.0), 0.4, 0.5, 0.0)] + 6 * [View(96, (0.05, 0.14), 0.4, 0.5, 0.0)]


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, view, size, blur):
    """The `view` of the uint8 images x (B, 3, H, W): floats in [0, 1]."""
    x = random_resized_crop(x, rng, round(size * view.side / 224), scale=view.area, flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, view.saturation, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_gaussian_blur(x, rng, sigma=(0.1, 2.0), p=view.blur if blur else 0.0, kernel_size=13)
    x = random_solarize(x, rng, p=view.solarize)
    return x.contiguous(memory_format=torch.channels_last)


def views(x, rng, size, *, multi_crop, blur):
    """The views of x, a list: two that have keys, and with `multi_crop` six small ones after
    them."""
    return [augment(x, rng, view, size, blur) for view in (MULTI_CROP if multi_crop else TWO_VIEWS)]


def embed(net, x):
    """u(f(x)) of x (B, 3, S, S): (B, D), unit rows, in x's dtype."""
    with run.autocast(x.device):
        z = net(x)
    return F.normalize(z.to(x.dtype), dim=1)


def positives(k, n):
    """For each key of k (N, D) the unit row of n (K, D) with the largest cosine (any of them where
    several are equal): (N,)."""
    return bank_argmax(k, n)


def surprise(q, positive, n, temperature):
    """-ln p_i of each query of q (N, D), where p_i is the softmax probability of its positive among
    the unit rows n (K, D): (N,)."""
    return bank_logsumexp(q, n, temperature) - (q * n[positive]).sum(1) / temperature


def contrastive_loss(q, positive, n, temperature):
    """-mean_i log( e^(q_i.n_y/T) / sum_j e^(q_i.n_j/T) ), y = positive_i.

    q (N, D) and n (K, D) have unit rows, positive (N,) comes from `positives`. Chance is ln K. With
    p_ij = e^(q_i.n_j/T) / sum_k e^(q_i.n_k/T), query i adds to the gradient in a negative n_j
    p_ij q_i / (N T) (Eq. 7), and to that in its positive -(1 - p_iy) q_i / (N T) (Eq. 13).
    """
    return surprise(q, positive, n, temperature).mean()


def cooperative_loss(q, positive, n, temperature, cooperation=1.0):
    """The value of `contrastive_loss` and its gradient in q; but in n that of a query's own positive
    is c (1 - p_i) q_i / (N T), c = `cooperation` in [-1, 1], p_i the positive's probability.

    c = 1 is Eq. 12: a bank that climbs this gradient brings all its rows nearer to the queries. With
    c = 0 a row stands still as a positive, though it still moves as another query's negative. c = -1
    is Eq. 13, and this function contrastive_loss.

    contrastive_loss has -(1 - p_i) q_i / (N T) there, to which (1 + c) (1 - p_i) q_i / (N T) is added.
    The added term is 0 in value, and a constant for q.
    """
    losses = surprise(q, positive, n, temperature)
    surplus = -torch.expm1(-losses.detach())  # 1 - p_i, as p_i = e^-loss
    weight = (1 + cooperation) * surplus / temperature
    cosine = (q.detach() * n[positive]).sum(1)
    added = weight * (cosine - cosine.detach())
    return (losses + added).mean()


def make_bank(size, dim):
    """The bank: rows (size, dim), noise at first, and their `velocity`, zero."""
    bank = Bank(size, dim)
    bank.register_buffer("velocity", torch.zeros_like(bank.rows))
    return bank


@torch.no_grad()
def bank_step(rows, velocity, grad, lr, momentum):
    """A step of SGD up `grad`. It changes rows and velocity; all are (K, D)."""
    velocity.mul_(momentum).sub_(grad)
    rows.sub_(velocity, alpha=lr)


@graphed  # with --graph, on CUDA, recorded once and then replayed; the result is the same
def attack(net, x, positive, n, noise, *, temperature, norm, eps, step_size, steps):
    """A view x (B, 3, S, S) in [0, 1], moved within eps so as to maximise contrastive_loss.

    eps and step_size are in the units of x, each image in a ball of its own. The search starts at x +
    eps `noise`, noise of x's shape in the unit ball of the `norm`, or, where noise is None, at x.
    `positive` (P, B) holds P positives of each image, all of which count; they and the unit rows
    n (K, D) are constants.
    """
    start = x if noise is None else (x + eps * noise).clamp(0, 1)

    def loss_of_view(x_adv):
        q = embed(net, x_adv).repeat(len(positive), 1)
        return contrastive_loss(q, positive.flatten(), n, temperature)

    # In eval mode an image changes neither another's embedding nor a running statistic.
    with eval_mode(net):
        return pgd(loss_of_view, x, eps, step_size, steps, norm, start=start)


def train_step(net, target, opt, bank, x, noise, *, cooperation, temperature, ema, bank_lr, bank_momentum,
               norm, eps, step_size, steps):
    """One iteration on the views x, a list: two that have keys, and any number of small ones; the
    losses to be logged.

    `bank` is one of make_bank. `noise`, a list like x, starts the attacks, of which there are none
    where eps is 0; None: they start at the views.
    """
    # The key network moves first (its parameters; its running statistics are its own). Both networks see
    # their views once in train mode; attacks are in eval mode. Keys get no gradient.
    optim.ema(target, net, ema)
    with torch.no_grad():
        k1 = embed(target, x[0])
        k2 = embed(target, x[1])

    # The positive of a view is found by the key of the other one.
    n, length = unit_rows(bank.rows)
    positives1 = positives(k2, n)
    positives2 = positives(k1, n)
    if eps:
        both = torch.stack([positives1, positives2])
        meets = [both[:1], both[1:]] + [both] * (len(x) - 2)  # in multi-crop a small view meets both
        starts = [None] * len(x) if noise is None else noise
        x = [attack(net, view, positive, n, start, temperature=temperature, norm=norm,
                    eps=eps, step_size=step_size, steps=steps)
             for view, positive, start in zip(x, meets, starts, strict=True)]
    q = [embed(net, view) for view in x]

    # The sum of both views' losses is twice the mean over both. In multi-crop it is once that mean, and the
    # mean over all pairs of a small view and a key besides.
    queries = torch.cat(q[:2])
    chosen = torch.cat([positives1, positives2])
    free = n.detach().requires_grad_()
    loss_view = cooperative_loss(queries, chosen, free, temperature, cooperation)
    loss = 2 * loss_view
    small = q[2:]
    if small:
        queries_small = torch.cat([*small, *small])
        chosen_small = torch.cat([positives1] * len(small) + [positives2] * len(small))
        loss_small = cooperative_loss(queries_small, chosen_small, free, temperature, cooperation)
        loss = loss_view + loss_small

    # Two players, one backward pass: both gradients are taken at one point. The network descends
    # the loss, and the bank climbs it; its positives have the gradient that cooperative_loss gave them.
    opt.zero_grad()
    loss.backward()
    dist.average_grads([*net.parameters(), free])
    opt.step()
    # The gradient in n becomes that in the rows themselves, through n = row / |row|.
    grad = through_unit_rows(free.grad, n, length)
    bank_step(bank.rows, bank.velocity, grad, bank_lr, bank_momentum)
    dist.average_buffers(net, target)  # else the running statistics of the processes drift apart
    return {"loss": loss, **alarms(queries, chosen, loss_view, n, bank.rows, temperature)}


@torch.no_grad()
def alarms(q, positive, loss, before, rows, temperature):
    """How alive the bank's `rows` are after their step, which began with `loss` at the unit rows
    `before`."""
    n, length = unit_rows(rows)
    y, nearest = bank_summary(q, n, temperature)
    losses = y - (q * n[positive]).sum(1) / temperature
    of_one_view = positive[: len(positive) // 2].sort().values
    return {
        "bank_change": losses.mean() - loss,
        "p": losses.neg().exp().mean(),
        "unique": 1.0 + (of_one_view.diff() != 0).sum(),
        "cosine": nearest.mean() * temperature,
        "rotation": (n - before).norm(dim=1).mean(),
        "norm": length.mean(),
    }


def lr_at(epoch, epochs, lr, warmup, final):
    """The learning rate of `epoch`: `warmup` equal steps up to `lr`, then a cosine towards
    `final`."""
    if epoch < warmup:
        return lr * (epoch + 1) / warmup
    return optim.cosine((epoch - warmup) / (epochs - warmup), lr, final)


def ema_at(epoch, epochs, start):
    """The momentum of the key network in `epoch`: half a cosine from `start` to 1."""
    return optim.cosine(epoch / epochs, start, 1.0)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="caco", arch="resnet18", graph=True)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    p.add_argument("--stem", help="cifar, imagenet, small; default: the architecture's own")
    p.add_argument("--cooperation", type=run.number(-1, 1), default=1.0,
                   help="c: how strongly the bank's step moves a positive towards its query; 0: not at all; "
                        "-1: away from it, Eq. 13 of the survey; default (paper)")
    p.add_argument("--multi-crop", help="six small views besides the two (authors' code)", **switch)
    p.add_argument("--epochs", type=run.integer(0), default=200,
                   help="0 exports the random encoder; default (paper)")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images per step, over all processes (ours)")
    p.add_argument("--optimizer", choices=("sgd", "lars", "adamw"), default="sgd",
                   help="lars, for ImageNet (authors' code); adamw, for a ViT, does not decay biases and "
                        "norms (ours); sgd has momentum 0.9 (ours)")
    p.add_argument("--lr", type=run.number(), default=0.06, help="at its peak (ours)")
    p.add_argument("--lr-final", type=run.number(), default=0.0, help="at the end (ours)")
    p.add_argument("--warmup", type=run.integer(0), default=0,
                   help="in epochs; the steps that fill the bank, before it, have the full rate (ours)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=5e-4, help="(ours)")
    p.add_argument("--ema", type=run.number(0, 1), default=0.99,
                   help="momentum of the key network, at the start (authors' code)")
    p.add_argument("--temperature", type=run.number(above=0), default=0.08, help="T (authors' code)")
    p.add_argument("--dim", type=run.integer(1), default=128, help="D, length of the bank's rows (ours)")
    p.add_argument("--bank-size", type=run.integer(1), default=4096, help="K (ours)")
    p.add_argument("--bank-lr", type=run.number(), default=0.3, help="after its warm-up, constant (ours)")
    p.add_argument("--bank-warmup", type=run.integer(0), default=10, help="in epochs (authors' code)")
    p.add_argument("--bank-momentum", type=run.number(0, 1), default=0.9, help="(authors' code)")
    p.add_argument("--fill-steps", type=run.integer(0), default=256,
                   help="of MoCo, before epoch 0; with 0 the bank gets keys of an untrained network (ours)")
    p.add_argument("--fill-temperature", type=run.number(above=0), default=0.2,
                   help="of MoCo's loss (authors' code)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf",
                   help="of the attack; with l2, for example --eps 128 (ours)")
    p.add_argument("--eps", type=run.number(0, 1e6), default=0.0,
                   help="radius of the attack, in 1/255; 0: no attack (ours)")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attack, in 1/255; default: for linf 2, for l2 1.25 eps / steps (ours)")
    p.add_argument("--steps", type=run.integer(0), default=5,
                   help="of the attack; with 0 views are moved by the random start alone (ours)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (ours); without it, at "
                        "the image: with --steps 1 and --step-size equal to --eps, in linf, that is FGSM")
    p.add_argument("--blur", help="blur views, as on ImageNet (authors' code)", **switch)
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if args.norm == "linf" and args.eps > 255:
        raise ValueError(f"--eps {args.eps:g}: with --norm linf at most 255, the range of a pixel")


def network(arch, stem=None, dim=128):
    """An encoder, and a projector of three layers with BatchNorm between: images (B, 3, S, S) ->
    (B, dim)."""
    encoder = encoders.make(arch, stem=stem, mean=MEAN, std=STD)
    width = encoder.dim
    projector = nn.Sequential(
        nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, dim, bias=False))
    return nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)


def optimizer(net, args):
    if args.optimizer == "adamw":
        groups = optim.groups(net.named_parameters(), args.weight_decay)
        return torch.optim.AdamW(groups, args.lr)
    if args.optimizer == "lars":
        return optim.LARS(optim.lars_groups(net), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    return torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)


def fill(net, target, opt, bank, images, size, args, env):
    """Before epoch 0: --fill-steps steps of MoCo; then the bank is filled with keys of the network
    they leave."""
    # Batches of the epochs after the last one, so that the run itself repeats none of them.
    batches = data.endless_batches(images, args.batch_size, args.seed, args.epochs, env.rank, env.world)
    for x, _, rng in itertools.islice(batches, args.fill_steps):
        run.stop_if_signalled(args, env, None, 0)
        x1, x2 = views(x, rng, size, **view_settings(args))[:2]
        optim.ema(target, net, args.ema)
        q = embed(net, x1)
        k = embed(target, x2)
        positive = (q * k).sum(1) / args.fill_temperature
        negatives = bank_logsumexp(q, bank.rows, args.fill_temperature)
        loss = F.softplus(negatives - positive).mean()  # InfoNCE
        opt.zero_grad()
        loss.backward()
        dist.average_grads(net.parameters())
        opt.step()
        bank.push(k)
    dist.average_buffers(net)  # else the running statistics of the processes drift apart
    target.load_state_dict(net.state_dict())  # with this jump all keys in the bank are old
    new_rows = 0
    while new_rows < args.bank_size:
        x, _, rng = next(batches)  # the last batch of an epoch may be short
        run.stop_if_signalled(args, env, None, 0)
        x2 = views(x, rng, size, **view_settings(args))[1]
        with torch.no_grad():
            bank.push(embed(target, x2))
        new_rows += len(x) * env.world


def view_settings(args):
    """The named arguments of `views` as the flags have them."""
    return dict(multi_crop=args.multi_crop, blur=args.blur)


def start_noise(x, norm, rng):
    """Where the attack on a view x (B, 3, S, S) starts: x's shape, each image uniform in a unit ball of
    the `norm`."""
    # One number more than there are pixels: under l2 it sets the distance from the centre, under linf it
    # is not used.
    return ball_point(rng.uniform(1 + x[0].numel(), device=x.device), norm).view(x.shape)


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


def pictures(net, target, bank, images, size, args):
    """Rows for `save_rows` of up to eight images: the two views; and with --eps each attacked view,
    from the view itself, and what the attack added."""
    x, _, rng = data.sample(images, 8, args.seed)
    x1, x2 = views(x, rng, size, **view_settings(args))[:2]
    rows = [("x1", x1), ("x2", x2)]
    if args.eps:
        n, _ = unit_rows(bank.rows)
        full_scale = args.eps / 255 if args.norm == "linf" else None
        for name, view, other in (("x1", x1, x2), ("x2", x2, x1)):
            with eval_mode(target):
                positive = positives(embed(target, other), n)
            x_adv = attack(net, view, positive[None], n, None, **attack_settings(args))
            rows += [(f"{name}_adv", x_adv), (f"{name}_adv - {name}", difference(x_adv, view, full_scale))]
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

    net = run.to_device(network(args.arch, args.stem, args.dim), args, env)
    target = run.to_device(network(args.arch, args.stem, args.dim), args, env).requires_grad_(False)
    target.load_state_dict(net.state_dict())
    bank = make_bank(args.bank_size, args.dim).to(device)
    opt = optimizer(net, args)
    compile_networks(args, env, net, target)
    if args.multi_crop:
        check_crops(net[0], [round(size * view.side / 224) for view in MULTI_CROP])

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    state = dict(net=net, target=target, bank=bank, opt=opt, log=log)
    step = run.resume(args, env, state)
    log.start(step, f"chance loss 2 ln K = {2 * math.log(args.bank_size):.3f}")
    if args.epochs and not (out / "last.pt").exists():
        fill(net, target, opt, bank, images, size, args, env)

    settings = dict(cooperation=args.cooperation, bank_momentum=args.bank_momentum, **attack_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, args.warmup, args.lr_final)
        optim.set_lr(opt, lr)
        ema = ema_at(epoch, args.epochs, args.ema)
        bank_lr = lr_at(epoch, args.epochs, args.bank_lr, args.bank_warmup, args.bank_lr)  # then constant
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            x_views = views(x, rng, size, **view_settings(args))
            noise = None
            if args.eps and args.random_start:
                noise = [start_noise(view, args.norm, rng) for view in x_views]
            losses = train_step(net, target, opt, bank, x_views, noise, ema=ema, bank_lr=bank_lr, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        cosine = log.mean("cosine")
        unique = log.mean("unique")
        log.epoch(epoch, step, lr=lr, bank_lr=bank_lr, ema=ema)
        # Where positives flee from their queries, few of them and a low cosine are what is asked for.
        most = min(args.batch_size / env.world, args.bank_size)  # as many positives of a view may differ
        lost = cosine < 0.2 or unique < 0.2 * most
        if env.rank == 0 and args.cooperation >= 0 and lost:
            print(f"the bank is dead: cosine {cosine:.3f}, {unique:.1f} positives; try more --fill-steps")
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again.
            rows = pictures(net, target, bank, images, size, args)
            if env.rank == 0:
                key = attack_key(args.norm, args.eps) if args.eps else None
                save_rows(out / "views.png", rows, key)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
