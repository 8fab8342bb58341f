"""AdCo: a memory bank of trained, adversarial negatives (Hu et al. 2021, arXiv 2011.08435).

AdCo is MoCo with another bank. The bank is no queue of old keys: its K rows are free vectors that
climb the contrastive loss while the network descends it. One pass through the network gives both
gradients. The aim is better features, not robustness. The hybrid (--eps; Section 6.1 of the survey
by Qi & Shah 2022, arXiv 2210.13463) also attacks the query's pixels.

    paper (equations: the survey's)   this file
    f_q, f_k                          net, target: an encoder and a projector each
    u(z) = z / |z|                    embed: the network's output, normalised
    {z_neg}                           n, the unit rows of bank.rows, which are free in length
    Eq. 3     contrastive loss        contrastive_loss
    Eq. 5     FGSM on the query       attack, with one step of --step-size equal to --eps, --no-random-start
    Eqs. 4, 6 PGD on the query        attack, with --norm
    Eq. 7     ascent of the bank      the gradient of contrastive_loss in the bank; bank_step
    Sec. 2.4.2, clean and attacked q  (1 - w) loss_adv + w loss_clean, w of --clean-weight
    BN of clean, attacked x           BatchNorm branches "clean", "adv", where w is not 0

By "paper" we mean its abstract and that survey, which is by the same group; we had the code but not
the body of the paper. The equations are the survey's, the numbers for ImageNet the authors' code's.
The defaults are for CIFAR-10; whose each is, its help text says; the hybrid's numbers are ours. We also
follow the code in four things: the derivative is that through the cosine (Eq. 7 is that of a free
vector), the bank has a temperature of its own, it has momentum and decay, and both gradients are taken
at one point (the paper alternates). We depart from the code:
    - Only the bank gives negatives, as in the paper. In their code the keys of the batch are
      negatives too, which is --batch-negatives here.
    - After 256 steps of MoCo the key network is set to the query network, and the bank is filled with
      its keys. Their code keeps MoCo's queue. In our short runs those keys, made before that jump, lay
      near no query: they had no softmax mass, hence no gradient, and the bank was dead
      (results/dead-bank.txt).
    - On any number of GPUs BatchNorm sees groups of at most 32 images, and the keys in random order.
      This imitates their 8 GPUs. With common statistics the network could tell a query's key by its
      batch.
    - While the bank is filled for multi-crop, keys have full size (in their code, 96 pixels). And all
      processes have one bank (in their code, rows that the fill does not reach stay Gaussian and differ
      between processes).

The hybrid learns from attacked queries alone. With --clean-weight w, between 0 and 1, it learns from
clean ones too, and both drive network and bank. Clean and attacked images then pass through BatchNorm
branches of their own. The key network sees clean images only, through branch clean. After the MoCo
steps branch adv starts as a copy of branch clean, so that the first attacks meet a network that works.
The attack is in eval mode, which is ours: there an image changes neither another's embedding nor a
running statistic. With a bank temperature of 0.02 the bank's mass in an early trial of a hybrid (FGSM at
4/255) was 0.15, and falling; therefore the commands below have 0.12.

A step costs 4 forward passes, as MoCo's does (a whole backward pass counts two); the hybrid's costs
14 with 5 attack steps, counting a backward pass to the pixels as one forward pass, and 17 with clean
queries besides. With --symmetric a step costs 8, with --multi-crop about 9, as smaller crops cost
less. Before epoch 0 come the 256 steps of MoCo, and K / B forward passes that fill the bank.

    python adco.py                                       CIFAR-10, ResNet-18, 200 epochs
    python hardneg.py --negatives plain --out runs/moco    MoCo, the clean base, at its own temperature
    python adco.py --eps 8 --bank-temperature 0.12 --out runs/hybrid    the hybrid
    python adco.py --eps 8 --steps 1 --step-size 8 --no-random-start --bank-temperature 0.12 \
--out runs/fgsm    the hybrid by FGSM
    python adco.py --norm l2 --eps 128 --bank-temperature 0.12 --out runs/adco-l2    the hybrid in l2, 128/255
    python adco.py --eps 8 --clean-weight 0.5 --bank-temperature 0.12 --out runs/both    clean and attacked
    python adco.py --arch vit_tiny --optimizer adamw --lr 5e-4 --weight-decay 0.05 --warmup 10 \
--out runs/adco-vit
    python adco.py --data path/to/imagenet --arch resnet50 --stem imagenet --image-size 224 --blur --lr 0.03 \
--lr-final 6e-4 --weight-decay 1e-4 --ema 0.999 --bank-size 65536 --bank-temperature 0.02 --bank-lr 3 \
--out runs/adco-imagenet
    python eval.py runs/adco/encoder.pt --preset knn amoc-slf

The encoder of the query network is exported, without projector and bank. At test time its grouped
BatchNorm is a plain one, with running statistics: the hybrid's are of attacked queries. With
--clean-weight it is exported with branch adv, through which attacked queries pass; `eval.py --bn clean`
reads the other one.

On several processes order, augmentation and noise are those of one process; the order in which BatchNorm
takes the keys is not. Gradients, the bank's too, are means over all, so that the bank is equal everywhere,
and --batch-negatives takes the keys of all. Each group of BatchNorm has images of one process alone.

The log tells how the bank lives; the ranges are of the means over an epoch in our runs. mass is its share
of the softmax: 0.80 to 0.9997. In the longest run it sank from 0.99 to 0.80; what matters is that it does
not fall towards 0. bank_gain is what the bank's step adds to its loss, above 0 when all is well (0.004 to
0.25); rotation is how far its rows turn, in radians per step (0.0005 to 0.009); norm is their length (0.6
to 1.2). accuracy is how often the key is nearer to the query than every row of the bank: 0.01 to 0.31 (the
maintainers report 0.8 to 0.9 in healthy runs, and 0.99 with a dead bank); cosine is the mean cosine of a
query with the nearest row. mass, accuracy and cosine are of the first query crop alone, after the bank's
step, and with --clean-weight of the attacked queries.

Chance for the loss is ln(K + 1), for each of multi-crop's five terms; with --batch-negatives it is
ln(K + M), M the keys of the batch. The loss may rise although all is well, since the bank climbs it:
that of the hybrid below went from 6.28 in epoch 1 to 7.29 in epoch 11. With --clean-weight the log has
both losses. Without --eps nothing is attacked.

Measured on one CPU thread (Intel Xeon), with --arch slim (0.3 M parameters) and 10,000 images of
CIFAR-10 (JPEG), in 4.9 CPU minutes (25 epochs): a linear probe reaches 44.4 %, with a mass of 0.97. MoCo
(amoc.py --variant CCC --warmup 0, which also blurs) reaches 42.5 in 3.0 CPU minutes; the hybrid (12
epochs of --eps 8 --steps 2 --step-size 4 --bank-temperature 0.12) 37.6, and 14.8 under PGD-20 at 8/255,
where MoCo has 0.5; one seed each.

On all 50,000 images, judged on all 10,000 test images (one seed each), AdCo reaches 52.8 in 21 CPU
minutes (28 epochs), and the hybrid 45.6 and 19.3 in 19 (15). More is in results/README.md, also on
--clean-weight: with 0.5 the hybrid is a little more accurate and a little less robust. This has not been
run on a GPU yet, and l2, AdamW, --symmetric, --multi-crop and --batch-negatives in no whole run. The
paper reports 68.6 on ImageNet (linear probe, 200 epochs).
"""
import argparse
import contextlib
import itertools
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import (
    random_color_jitter, random_gaussian_blur, random_grayscale, random_resized_crop)
from common.bank import Bank, bank_logsumexp, bank_summary, through_unit_rows, unit_rows
from common.log import Log
from common.pgd import ball_point, eval_mode, pgd
from common.pictures import attack_key, difference, save_rows
from common.resnet import BranchNorm, branch
from common.speed import compile_networks, graphed
from common.vit import check_crops

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in the authors' code
STD = (0.229, 0.224, 0.225)

# Multi-crop: the side of a crop where the image's is 224, and the share of the area that it takes.
CROPS = {224: (0.2, 1.0), 192: (0.172, 0.86), 160: (0.143, 0.715), 128: (0.114, 0.571), 96: (0.086, 0.429)}


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
class GroupedNorm(nn.BatchNorm2d):
    """BatchNorm that sees groups of 2 to 32 images, at least two groups where it can: within one group
    the order of the keys would change nothing."""

    folds = True  # in eval mode it is a plain BatchNorm: see conv_norm of common/resnet.py

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        # None where they are to stay: within frozen_stats of common/pgd.py, which is not used here
        mean = self.running_mean if self.track_running_stats else None
        var = self.running_var if self.track_running_stats else None
        count = max(1, min(max(2, math.ceil(len(x) / 32)), len(x) // 2))
        sizes = [(len(x) + i) // count for i in reversed(range(count))]  # equal, or the first have one more
        groups = x.split(sizes)  # unlike tensor_split, whose backward pass adds up whole batches
        outputs = []
        for group in groups:  # together they move the running statistics about as far as one batch does
            outputs.append(F.batch_norm(group, mean, var, self.weight, self.bias, True,
                                        self.momentum / len(groups), self.eps))
        return torch.cat(outputs)


def augment(x, rng, side, size, blur):
    """One view of the uint8 images x (B, 3, H, W), of `side` where `size` is 224: floats in [0,
    1]."""
    x = random_resized_crop(x, rng, round(size * side / 224), scale=CROPS[side], flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_gaussian_blur(x, rng, sigma=(0.1, 2.0), p=0.5 if blur else 0.0, kernel_size=13)
    return x.contiguous(memory_format=torch.channels_last)


def views(x, rng, size, *, symmetric, multi_crop, blur):
    """Images for the queries, and for the key of each (in multi-crop one key for all): two
    lists."""
    sides = [*CROPS, 224] if multi_crop else [224, 224]
    crops = [augment(x, rng, side, size, blur) for side in sides]
    x_q = crops[:-1]
    x_k = crops[-1]
    if symmetric:
        return [*x_q, x_k], [x_k, *x_q]
    return x_q, [x_k]


def embed(net, x, bn=None):
    """u(f(x)) of x (B, 3, S, S) through BatchNorm branch `bn` (None: there are no branches): (B, 128),
    unit rows, in x's dtype."""
    chosen = contextlib.nullcontext() if bn is None else branch(net, bn)
    with chosen, run.autocast(x.device):
        z = net(x)
    return F.normalize(z.to(x.dtype), dim=1)


def contrastive_loss(q, k, n, temperature, keys=None):
    """Eq. 3: -mean_i log( e^(q_i.k_i/T) / (e^(q_i.k_i/T) + sum_j e^(q_i.n_j/T)) ).

    q, k (N, D) and n (K, D) have unit rows. With `keys` (M, D), all of the batch and so among them
    the own ones, sum_m e^(q_i.keys_m/T) replaces the first term of the denominator. Chance is
    ln(K + 1), and with keys ln(K + M).
    """
    positive, own = of_the_batch(q, k, temperature, keys)
    return (torch.logaddexp(own, bank_logsumexp(q, n, temperature)) - positive).mean()


def of_the_batch(q, k, temperature, keys):
    """Of each query (N,): q.k/T, and the logarithm of what the batch has in the denominator of
    Eq. 3."""
    positive = (q * k).sum(1) / temperature
    return positive, positive if keys is None else bank_logsumexp(q, keys, temperature)


def make_bank(size, dim):
    """The bank: rows (size, dim), noise at first, and their `velocity`, zero."""
    bank = Bank(size, dim)
    bank.register_buffer("velocity", torch.zeros_like(bank.rows))
    return bank


@torch.no_grad()
def bank_step(rows, velocity, grad, lr, momentum, weight_decay):
    """A step of SGD up `grad`, while the decay still shrinks the rows. It changes rows and velocity;
    all are (K, D)."""
    velocity.mul_(momentum).sub_(grad).add_(rows, alpha=weight_decay)
    rows.sub_(velocity, alpha=lr)


def objective(triples, n, temperature, symmetric):
    """Eq. 3 of all (q, k, keys) in `triples`: the mean of a symmetric loss's two, the sum of
    multi-crop's."""
    losses = [contrastive_loss(q, k, n, temperature, keys) for q, k, keys in triples]
    return sum(losses) / (len(losses) if symmetric else 1)


def mixed(loss_adv, loss_clean, clean_weight):
    """Section 2.4.2: the loss of attacked queries and that of clean ones, together."""
    return (1 - clean_weight) * loss_adv + clean_weight * loss_clean


@graphed  # with --graph, on CUDA, recorded once and then replayed; the result is the same
def attack(net, x, k, keys, n, noise, *, temperature, norm, eps, step_size, steps, bn=None):
    """Eq. 6: the query's images x (B, 3, S, S) in [0, 1] moved within eps so as to maximise Eq. 3.

    eps and step_size are in the units of x, each image in a ball of its own. The search starts at x +
    eps `noise`, noise of x's shape in the unit ball of the `norm`, or, where noise is None, at x. k,
    keys and n are constants, as in `contrastive_loss`; `bn` is as in `embed`.
    """
    start = x if noise is None else (x + eps * noise).clamp(0, 1)

    def loss_of_query(x_adv):
        return contrastive_loss(embed(net, x_adv, bn), k, n, temperature, keys)

    # In eval mode an image changes neither another's embedding nor a running statistic.
    with eval_mode(net):
        return pgd(loss_of_query, x, eps, step_size, steps, norm, start=start)


@torch.no_grad()
def embed_keys(target, x_k, order, bn=None):
    """Keys (B, 128) of each of x_k (B, 3, S, S), which BatchNorm groups in `order`, a permutation
    of B; `bn` is as in `embed`."""
    return [embed(target, x[order], bn)[order.argsort()] for x in x_k]


def batch_keys(k, batch_negatives):
    """With `batch_negatives` the keys k (B, 128) of all processes, which call it together; else
    None."""
    return dist.gather(k) if batch_negatives else None


def branches(clean_weight):
    """The BatchNorm branches of clean and of attacked images; without clean queries there are none."""
    return ("clean", "adv") if clean_weight else (None, None)


def train_step(net, target, opt, bank, x_q, x_k, order, noise, *, ema, temperature, bank_temperature, bank_lr,
               bank_momentum, bank_decay, symmetric, batch_negatives, clean_weight, norm, eps, step_size,
               steps):
    """One iteration on lists of images, of the queries x_q and of the keys x_k; the losses to be
    logged.

    `bank` is one of make_bank, `order` as in embed_keys. `noise`, a list like x_q, starts the
    attacks, of which there are none where eps is 0; None: they start at the images. Where
    `clean_weight` is not 0 the networks need BatchNorm branches "clean" and "adv".
    """
    bn_clean, bn_adv = branches(clean_weight)
    if len(x_q) % len(x_k):
        raise ValueError(f"{len(x_q)} queries and {len(x_k)} keys: must be as many, or a multiple")
    # The key network moves first (its parameters; its running statistics are its own). Both networks see
    # their images in train mode, each image once (clean and attacked ones are two); attacks are in eval mode.
    optim.ema(target, net, ema)
    k = embed_keys(target, x_k, order, bn_clean)
    pairs = [(key, batch_keys(key, batch_negatives)) for key in k]
    pairs *= len(x_q) // len(x_k)  # in multi-crop all queries have one key
    n, length = unit_rows(bank.rows)
    x_clean = x_q
    if eps:
        starts = [None] * len(x_q) if noise is None else noise
        x_q = [attack(net, x, key, keys, n, start, temperature=temperature, norm=norm,
                      eps=eps, step_size=step_size, steps=steps, bn=bn_adv)
               for x, (key, keys), start in zip(x_q, pairs, starts, strict=True)]
    q = [embed(net, x, bn_adv) for x in x_q]

    # Two players, one point: the network descends `loss`, for which the bank is a constant; the
    # bank climbs `loss_bank`, for which the embeddings are constants, at a temperature of its own.
    loss = objective([(query, *pair) for query, pair in zip(q, pairs)], n, temperature, symmetric)
    free = n.detach().requires_grad_()
    constants = [(query.detach(), *pair) for query, pair in zip(q, pairs)]
    loss_bank = objective(constants, free, bank_temperature, symmetric)
    losses = {"loss": loss}
    clean = []
    if clean_weight:
        # Section 2.4.2 of the survey: the clean queries meet the same keys and rows.
        q_clean = [embed(net, x, bn_clean) for x in x_clean]
        with_keys = [(query, *pair) for query, pair in zip(q_clean, pairs)]
        loss_clean = objective(with_keys, n, temperature, symmetric)
        clean = [(query.detach(), *pair) for query, pair in zip(q_clean, pairs)]
        loss_adv = loss
        loss = mixed(loss_adv, loss_clean, clean_weight)
        losses = {"loss": loss, "loss_clean": loss_clean, "loss_adv": loss_adv}
        loss_bank = mixed(loss_bank, objective(clean, free, bank_temperature, symmetric), clean_weight)

    opt.zero_grad()
    (loss + loss_bank).backward()
    dist.average_grads([*net.parameters(), free])
    opt.step()
    # The gradient in n becomes that in the rows themselves, through n = row / |row|.
    grad = through_unit_rows(free.grad, n, length)
    bank_step(bank.rows, bank.velocity, grad, bank_lr, bank_momentum, bank_decay)
    dist.average_buffers(net, target)  # else the running statistics of the processes drift apart
    found = alarms(constants, clean, loss_bank, n, bank.rows, bank_temperature, symmetric, clean_weight)
    return {**losses, **found}


@torch.no_grad()
def alarms(triples, clean, loss_bank, before, rows, temperature, symmetric, clean_weight):
    """How alive the bank's `rows` are after their step, which began with `loss_bank` at the unit rows
    `before`. `triples` are of the queries, `clean` of the clean ones beside attacked ones."""
    n, length = unit_rows(rows)
    losses = []
    for q, k, keys in triples:
        positive, own = of_the_batch(q, k, temperature, keys)
        negative, nearest = bank_summary(q, n, temperature)
        losses.append((torch.logaddexp(own, negative) - positive).mean())
        if len(losses) == 1:
            mass = (negative - own).sigmoid().mean()
            accuracy = (positive > nearest).float().mean()
            cosine = nearest.mean() * temperature
    loss_after = sum(losses) / (len(losses) if symmetric else 1)
    if clean_weight:
        loss_after = mixed(loss_after, objective(clean, n, temperature, symmetric), clean_weight)
    return {
        "mass": mass,
        "bank_gain": loss_after - loss_bank,
        "rotation": (n - before).norm(dim=1).mean(),
        "norm": length.mean(),
        "accuracy": accuracy,
        "cosine": cosine,
    }


def lr_at(epoch, epochs, lr, warmup, final):
    """The learning rate of `epoch`: `warmup` equal steps up to `lr`, then a cosine towards
    `final`."""
    if epoch < warmup:
        return lr * (epoch + 1) / warmup
    return optim.cosine((epoch - warmup) / (epochs - warmup), lr, final)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="adco", arch="resnet18", graph=True)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    p.add_argument("--stem", help="cifar, imagenet, small; default: the architecture's own")
    p.add_argument("--symmetric", help="both views are queries and keys (authors' code)", **switch)
    p.add_argument("--multi-crop", help="five crops of falling size are queries (authors' code)", **switch)
    p.add_argument("--batch-negatives", **switch,
                   help="the keys of the batch are negatives too (authors' code)")
    p.add_argument("--epochs", type=run.integer(0), default=200,
                   help="0 exports the random encoder; default (authors' code)")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images per step, over all processes (authors' code)")
    p.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd",
                   help="adamw, for a ViT, does not decay biases and norms (ours); sgd has momentum 0.9 "
                        "(authors' code)")
    p.add_argument("--lr", type=run.number(), default=0.06, help="at its peak (ours)")
    p.add_argument("--lr-final", type=run.number(), default=0.0, help="at the end (ours)")
    p.add_argument("--warmup", type=run.integer(0), default=0,
                   help="in epochs; the steps that fill the bank, before it, have the full rate (ours)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=5e-4, help="(ours)")
    p.add_argument("--ema", type=run.number(0, 1), default=0.99, help="momentum of the key network (ours)")
    p.add_argument("--temperature", type=run.number(above=0), default=0.12,
                   help="of the network's loss, and of the attack (authors' code)")
    p.add_argument("--bank-temperature", type=run.number(above=0), default=0.05,
                   help="of the loss that the bank climbs (ours)")
    p.add_argument("--bank-size", type=run.integer(1), default=4096, help="K (ours)")
    p.add_argument("--bank-lr", type=run.number(), default=0.5, help="constant over the run (ours)")
    p.add_argument("--bank-momentum", type=run.number(0, 1), default=0.9, help="(authors' code)")
    p.add_argument("--bank-decay", type=run.number(0, 1e6), default=1e-4, help="(authors' code)")
    p.add_argument("--fill-steps", type=run.integer(0), default=256,
                   help="of MoCo, before epoch 0; with 0 the bank gets keys of an untrained network (ours)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf",
                   help="of the attack; with l2, for example --eps 128 (ours)")
    p.add_argument("--eps", type=run.number(0, 1e6), default=0.0,
                   help="radius of the attack, in 1/255; 0: no attack (ours)")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attack, in 1/255; default: for l2 1.25 eps / steps, for linf 2, which suits "
                        "--eps 8 and 5 steps: change it with either (ours)")
    p.add_argument("--steps", type=run.integer(0), default=5,
                   help="of the attack; 0: the random start alone (ours)")
    p.add_argument("--clean-weight", type=run.number(0, 1), default=0.0,
                   help="w, the weight of the loss of clean queries, beside 1 - w of attacked ones; "
                        "0: no clean queries (ours)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (ours); without it, at "
                        "the image: with --steps 1 and --step-size equal to --eps, in linf, that is FGSM")
    p.add_argument("--blur", help="blur views, as on ImageNet (authors' code)", **switch)
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if args.clean_weight == 1:
        raise ValueError("--clean-weight 1: gives attacked queries no weight, and branch adv, which is "
                         "exported, no gradient; use --eps 0 instead")
    if args.symmetric and args.multi_crop:
        raise ValueError("--symmetric and --multi-crop: choose one")
    if args.norm == "linf" and args.eps > 255:
        raise ValueError(f"--eps {args.eps:g}: with --norm linf at most 255, the range of a pixel")
    if args.clean_weight and not args.eps:
        raise ValueError(f"--clean-weight {args.clean_weight:g}: needs --eps above 0, as without an attack "
                         "all queries are clean")


def network(arch, stem=None, clean_weight=0.0):
    """An encoder with grouped BatchNorm, where `clean_weight` is not 0 in branches clean and adv, and a
    projector without BatchNorm: images (B, 3, S, S) -> (B, 128)."""
    names = ("clean", "adv") if clean_weight else ()
    encoder = encoders.make(arch, branches=names, stem=stem, mean=MEAN, std=STD)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GroupedNorm  # the same state, another forward
    projector = encoders.mlp(encoder.dim, encoder.dim, 128)
    return nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)


def optimizer(net, args):
    if args.optimizer == "adamw":
        groups = optim.groups(net.named_parameters(), args.weight_decay)
        return torch.optim.AdamW(groups, args.lr)
    return torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)


def fill(net, target, opt, bank, images, size, args, env):
    """Before epoch 0: --fill-steps steps of MoCo; then the bank is filled with keys of the network
    they leave."""
    bn_clean, bn_adv = branches(args.clean_weight)  # no image is attacked here
    # Batches of the epochs after the last one, so that the run itself repeats none of them.
    batches = data.endless_batches(images, args.batch_size, args.seed, args.epochs, env.rank, env.world)
    for x, _, rng in itertools.islice(batches, args.fill_steps):
        run.stop_if_signalled(args, env, None, 0)
        x_q, x_k = views(x, rng, size, **view_settings(args))
        optim.ema(target, net, args.ema)
        (k,) = embed_keys(target, x_k[:1], random_order(x, rng), bn_clean)
        q = embed(net, x_q[0], bn_clean)
        keys = batch_keys(k, args.batch_negatives)
        loss = contrastive_loss(q, k, bank.rows, args.temperature, keys)  # until now, rows have length 1
        opt.zero_grad()
        loss.backward()
        dist.average_grads(net.parameters())
        opt.step()
        bank.push(k)
    dist.average_buffers(net)  # else the running statistics of the processes drift apart
    for module in net.modules():
        if isinstance(module, BranchNorm):
            module.branches[bn_adv].load_state_dict(module.branches[bn_clean].state_dict())
    target.load_state_dict(net.state_dict())  # with this jump all keys in the bank are old
    new_rows = 0
    while new_rows < args.bank_size:
        x, _, rng = next(batches)  # the last batch of an epoch may be short
        run.stop_if_signalled(args, env, None, 0)
        _, x_k = views(x, rng, size, **view_settings(args))
        (k,) = embed_keys(target, x_k[:1], random_order(x, rng), bn_clean)
        bank.push(k)
        new_rows += len(x) * env.world


def random_order(x, rng):
    """The order in which BatchNorm groups the keys of images x (B, ...): a permutation of B."""
    return rng.uniform(1, device=x.device)[:, 0].argsort()


def view_settings(args):
    """The named arguments of `views` as the flags have them."""
    return dict(symmetric=args.symmetric, multi_crop=args.multi_crop, blur=args.blur)


def start_noise(x, norm, rng):
    """Where the attack on the images x (B, 3, S, S) of a query starts: x's shape, each image uniform in a
    unit ball of the `norm`."""
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


def chance(args):
    """For the log: the loss of embeddings that are all alike, all terms together."""
    terms = len(CROPS) if args.multi_crop else 1
    others = args.batch_size if args.batch_negatives else 1
    name = "M" if args.batch_negatives else "1"
    factor = f"{terms} " if terms > 1 else ""
    return f"chance loss {factor}ln(K + {name}) = {terms * math.log(args.bank_size + others):.3f}"


def pictures(net, target, bank, images, size, args):
    """Rows for `save_rows` of up to eight images: both views; and of the hybrid the attacked query,
    from the image itself, and what the attack added."""
    x, _, rng = data.sample(images, 8, args.seed)
    x_q, x_k = views(x, rng, size, **view_settings(args))
    x1 = x_q[0]
    x2 = x_k[0]
    rows = [("x1", x1), ("x2", x2)]
    if args.eps:
        bn_clean, bn_adv = branches(args.clean_weight)
        with eval_mode(target):
            k = embed(target, x2, bn_clean).detach()
        keys = k if args.batch_negatives else None
        n, _ = unit_rows(bank.rows)
        x_adv = attack(net, x1, k, keys, n, None, bn=bn_adv, **attack_settings(args))
        full_scale = args.eps / 255 if args.norm == "linf" else None
        rows += [("x1_adv", x_adv), ("x1_adv - x1", difference(x_adv, x1, full_scale))]
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

    net = run.to_device(network(args.arch, args.stem, args.clean_weight), args, env)
    target = run.to_device(network(args.arch, args.stem, args.clean_weight), args, env).requires_grad_(False)
    target.load_state_dict(net.state_dict())
    bank = make_bank(args.bank_size, 128).to(device)
    opt = optimizer(net, args)
    compile_networks(args, env, net, target)
    if args.multi_crop:
        check_crops(net[0], [round(size * side / 224) for side in CROPS])

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    state = dict(net=net, target=target, bank=bank, opt=opt, log=log)
    step = run.resume(args, env, state)
    log.start(step, chance(args))
    if args.epochs and not (out / "last.pt").exists():
        fill(net, target, opt, bank, images, size, args, env)

    settings = dict(ema=args.ema, bank_temperature=args.bank_temperature, bank_lr=args.bank_lr,
                    bank_momentum=args.bank_momentum, bank_decay=args.bank_decay, symmetric=args.symmetric,
                    batch_negatives=args.batch_negatives, clean_weight=args.clean_weight,
                    **attack_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, args.warmup, args.lr_final)
        optim.set_lr(opt, lr)
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            x_q, x_k = views(x, rng, size, **view_settings(args))
            order = random_order(x, rng)
            noise = None
            if args.eps and args.random_start:
                noise = [start_noise(view, args.norm, rng) for view in x_q]
            losses = train_step(net, target, opt, bank, x_q, x_k, order, noise, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        mass = log.mean("mass")
        log.epoch(epoch, step, lr=lr)
        if env.rank == 0 and mass < 0.05:  # it is above 0.8 where our banks live
            print(f"the bank is dead: mass {mass:.3f}; try more --fill-steps, a higher --bank-temperature")
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again.
            rows = pictures(net, target, bank, images, size, args)
            if env.rank == 0:
                key = attack_key(args.norm, args.eps) if args.eps else None
                save_rows(out / "views.png", rows, key)
            run.save(args, env, state, step)
    if env.rank == 0:
        branched = any(isinstance(module, BranchNorm) for module in net.modules())  # a ViT has none
        bn = "adv" if branched else None
        encoders.export(net[0], out / "encoder.pt", bn, image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder" + (f"; BN branch {bn}" if bn else ""))


if __name__ == "__main__":
    run.cli(main)
