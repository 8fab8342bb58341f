"""Hard negatives by rule: IFM, HCL, debiased contrastive learning and MoCHi, on MoCo or SimCLR.

AdCo (adco.py) trains its negatives to be hard. These four make them hard by a rule. Each changes one
thing of one base, so that one flag of one script tells them apart:

    --negatives plain       the base itself: MoCo v2 (He et al. 2020, arXiv 1911.05722, with the projector
                            and the temperature of Chen, Fan et al. 2020, arXiv 2003.04297), or SimCLR
                            (Chen, Kornblith et al. 2020, arXiv 2002.05709)
                ifm         scores are shifted: the positive's down, the negatives' up (Robinson, Sun et
                            al. 2021, arXiv 2106.11230)
                hcl         negatives weigh more the nearer they are, and what those of the query's own
                            class would contribute is subtracted (Robinson, Chuang et al. 2021, arXiv
                            2010.04592)
                debiased    only the latter (Chuang et al. 2020, arXiv 2007.00224)
                mochi       mixtures of the nearest negatives, and of these with the query, join them
                            (Kalantidis et al. 2020, arXiv 2010.01028)

    papers                              this file
    f_q, f_k                            net, target: an encoder and a projector each
    u(z) = z / |z|                      embed: the network's output, normalised
    s+, s_j                             the cosines q.k and q.n_j of a positive and of a negative
    the queue; the 2B - 2 of a batch    bank: its rows; None
    InfoNCE, NT-Xent                    info_nce
    IFM: s+ - eps, s_j + eps            ifm_loss; eps is --shift
    HCL: beta, tau+                     hcl_loss, --beta, --tau; debiased where beta is 0
    MoCHi: its N, s and s'              --hardest, --mix, --mix-query; hardest, mix_negatives, mochi_loss
                                        (elsewhere N is the number of negatives)

The base is MoCo (--base moco): the negatives are a queue of old keys, which a slowly moving copy of
the network has made. With --base simclr they are the other images of the batch, there is no copy, and
both views are anchors; MoCHi needs a queue. The authors of HCL and of debiased contrastive learning
have SimCLR, those of MoCHi MoCo, those of IFM both.

Everything that is not a rule is as in adco.py, with the flags of the same names and their defaults:
the augmentation, the projector, SGD and its schedule, the momentum of the key network, which moves
before the keys are made, the size of the bank, and BatchNorm in groups of at most 32 images, which the
second views enter in random order. (With common statistics the network could tell a query's key by
its batch.) So but for two things these runs (MoCo is --negatives plain; amoc.py --variant CCC also blurs,
warms up, and has one BatchNorm for the batch) and AdCo's differ in their negatives alone. AdCo begins with
256 steps of MoCo (--fill-steps), after which its key network is set to the query network, while this bank
of K rows begins with noise, which is overwritten after K / B steps of B images. And each loss has its own
temperature. If --temperature is not given it is 0.2 on MoCo for plain, ifm and mochi, and 0.5 for the rest
and on SimCLR. These are the papers' values on the bases that they used (those on SimCLR for CIFAR-10). No
paper has HCL or debiased on MoCo: 0.5 there is ours, SimCLR's, and such a run differs from the others in
its temperature too.

Where the papers are silent we follow their authors' code: IFM's loss is a mean weighted by 1 and
alpha, not a sum, so that a step keeps its size; HCL's gradient flows through its weights; and where
its sum over N negatives is at its floor, N e^(-1/T), the negatives have no gradient. Of MoCHi there is
no such code. Ours are:
    - HCL's sums are taken in logarithms, so that no temperature overflows.
    - MoCHi's i and j of a mixture are drawn independently, and may be the same row.
    - MoCHi's mixtures are constants: their gradient does not flow back into the query that is mixed in.

On MoCo a step costs 4 forward passes (a whole backward pass counts two), on SimCLR 6. No rule adds
a pass. But MoCHi's mixtures take time (in the runs below an epoch with them took about twice as long) and
memory: B (s + s') D floats, 100 MB with the defaults, and a few times that in between. No image is
attacked.

    python hardneg.py                                    MoCHi on MoCo: CIFAR-10, ResNet-18, 200 epochs
    python hardneg.py --negatives plain --out runs/moco    MoCo
    python hardneg.py --negatives ifm --out runs/ifm
    python hardneg.py --negatives hcl --base simclr --out runs/hcl    HCL on the base of its paper
    python hardneg.py --arch vit_tiny --optimizer adamw --lr 5e-4 --weight-decay 0.05 --warmup 10 \
--out runs/hardneg-vit
    python hardneg.py --data path/to/imagenet --arch resnet50 --stem imagenet --image-size 224 --blur \
--lr 0.03 --lr-final 6e-4 --weight-decay 1e-4 --ema 0.999 --bank-size 65536 --out runs/hardneg-imagenet
    python eval.py runs/hardneg/encoder.pt --preset knn amoc-slf

The encoder of the query network is exported, without the projector. At test time its grouped BatchNorm is
a plain one, with running statistics, which nothing reads before.

On several processes the order of the images, their augmentation and the random numbers of mixtures are
those of one process; the order in which BatchNorm takes the second views is not. The queue is equal on
all of them, SimCLR's negatives are those of all, and each group of BatchNorm has images of one process
alone, so that few images on each make smaller groups.

The log tells how hard the negatives are: mass is their share of the softmax, at the temperature of
AdCo's bank, 0.05, whatever the loss's own is; accuracy is how often a query's key is nearer than all of
them; cosine is the mean largest cosine of a query with one. adco.py's log has the same, of its
bank after the bank's step, so that these runs compare with AdCo's. IFM's shift and HCL's weights belong
to the loss and do not enter. MoCHi's mixtures do: they are nearer to the query than what they are made
of, so from --mix-from on loss, mass and cosine jump up, and accuracy falls.

Chance for the loss, all embeddings equal, is ln(N + 1) with N negatives, and for IFM more: the screen
says it. On MoCo the bank is noise for the first K / B steps, and the loss is low in them; the log, which
has means over epochs, may not show it. Then, in a healthy run, the loss falls; accuracy wavers (3 to 7 % in
the runs below with plain, IFM and HCL, 1 to 4 with debiased, 0 to 0.3 with mixtures), for the negatives get
harder too, and cosine is 0.88 to 0.97 at the end. Where all embeddings are alike the loss stays at chance,
cosine at 1 and accuracy at 0.

Measured on one CPU thread (Intel Xeon), with a 0.3 M-parameter encoder and 10,000 images of
CIFAR-10 (JPEG), on MoCo, in 4 to 5 CPU minutes (25 epochs, MoCHi 15; mean of 2 seeds): a linear probe
reaches 42.7 % with plain, 43.0 with IFM, 41.5 with HCL, 40.5 with debiased and 39.3 with MoCHi, which
mixes from epoch 4. AdCo reaches 42.5 in 3.4 (19 epochs after its 256 steps of MoCo; adco.py's 44.4 is one
seed of 25 epochs). Only debiased and MoCHi are clearly behind. This has not been run on a GPU yet, and on
SimCLR and with AdamW not at all. Robinson, Sun et al. report 81.4 on ImageNet-100 for IFM (linear
probe, ResNet-50; MoCo v2 80.5), and Kalantidis et al. 68.0 on ImageNet for MoCHi (linear probe, 200
epochs).
"""
import argparse
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import (
    random_color_jitter, random_gaussian_blur, random_grayscale, random_resized_crop)
from common.bank import Bank, bank_logsumexp, bank_summary
from common.log import Log
from common.pictures import save_rows
from common.speed import compile_networks

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in adco.py
STD = (0.229, 0.224, 0.225)

# --temperature where it is not given: the papers', but for hcl and debiased on MoCo, which are ours.
TEMPERATURES = {
    "moco": {"plain": 0.2, "ifm": 0.2, "hcl": 0.5, "debiased": 0.5, "mochi": 0.2},
    "simclr": {"plain": 0.5, "ifm": 0.5, "hcl": 0.5, "debiased": 0.5},
}
LOGGED_TEMPERATURE = 0.05  # of the mass in the log: that of AdCo's bank


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


def augment(x, rng, size, blur):
    """One view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]."""
    x = random_resized_crop(x, rng, size, scale=(0.2, 1.0), flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_gaussian_blur(x, rng, sigma=(0.1, 2.0), p=0.5 if blur else 0.0, kernel_size=13)
    return x.contiguous(memory_format=torch.channels_last)


def embed(net, x):
    """u(f(x)) of x (B, 3, S, S): (B, 128), unit rows, in x's dtype."""
    with run.autocast(x.device):
        z = net(x)
    return F.normalize(z.to(x.dtype), dim=1)


def embed_in_order(net, x, order):
    """The same, where BatchNorm groups the images in `order`, a permutation of B."""
    return embed(net, x[order])[order.argsort()]


# Below, q and k (B, D) have unit rows. With a bank (K, D) of unit rows, q are the anchors and these rows
# are the negatives of each. Without one, where `bank` is None, all 2B rows of q and k are anchors, each is
# the positive of its partner, and the 2B - 2 others are its negatives. M is B or 2B, the number of anchors.
def positive_cosines(q, k, bank):
    """s+ of each anchor: (M,)."""
    cosines = (q * k).sum(1)
    return cosines if bank is not None else cosines.repeat(2)


def cosines_in_batch(q, k):
    """s_j of each row of q and k with every row: (2B, 2B), -inf for itself and its partner."""
    rows = torch.cat([q, k])
    no_negatives = torch.eye(len(q), dtype=torch.bool, device=q.device).repeat(2, 2)
    return (rows @ rows.T).masked_fill(no_negatives, -math.inf)


def log_negatives(q, k, bank, temperature):
    """ln sum_j e^(s_j/T) over the negatives of each anchor: (M,)."""
    if bank is not None:
        return bank_logsumexp(q, bank, temperature)
    if len(q) < 2:
        raise ValueError("one image: it has no negatives")
    return (cosines_in_batch(q, k) / temperature).logsumexp(1)


def info_nce(q, k, bank, temperature):
    """The mean over the anchors of -log( e^(s+/T) / (e^(s+/T) + sum_j e^(s_j/T)) ): InfoNCE, or in-batch
    NT-Xent."""
    positive = positive_cosines(q, k, bank) / temperature
    return F.softplus(log_negatives(q, k, bank, temperature) - positive).mean()


def ifm_loss(q, k, bank, temperature, eps, alpha=1.0, ifm_only=False):
    """Implicit feature modification: the mean, weighted by 1 and `alpha`, of `info_nce` and of the same where
    every s+ is less by `eps` and every s_j is more. `ifm_only`: the latter alone.

    These are the products after the attack that moves the positive by -eps q and a negative by +eps q,
    which is the worst within that distance for this anchor. The moved points are not normalised again.
    """
    positive = positive_cosines(q, k, bank) / temperature
    odds = log_negatives(q, k, bank, temperature) - positive
    attacked = F.softplus(odds + 2 * eps / temperature).mean()
    if ifm_only:
        return attacked
    return (F.softplus(odds).mean() + alpha * attacked) / (1 + alpha)


def hcl_loss(q, k, bank, temperature, beta, tau):
    """The mean over the anchors of -log( p / (p + G) ), with p = e^(s+/T), n_j = e^(s_j/T), N negatives,

        R = sum_j n_j^(1 + beta) / mean_j n_j^beta
        G = max{ (R - tau N p) / (1 - tau), N e^(-1/T) }.

    `beta` is how hard the negatives are, and `tau`, below 1, the share of them that has the anchor's class.
    With beta = 0 this is debiased contrastive learning, and with tau = 0 too `info_nce`.
    """
    positive = positive_cosines(q, k, bank) / temperature  # ln p
    count = 2 * len(q) - 2 if bank is None else len(bank)
    log_g = log_negatives(q, k, bank, temperature / (1 + beta))  # ln R, where beta is 0
    if beta:
        # The weights n_j^beta / mean n^beta have a gradient too: the sum above is of weight times score.
        log_g = log_g - log_negatives(q, k, bank, temperature / beta) + math.log(count)
    if tau:
        floor = math.log(count) - 1 / temperature
        log_share = positive + math.log(tau * count) - log_g  # ln(tau N p / R); from 0 on nothing is left
        log_left = torch.log(-torch.expm1(log_share.clamp_max(-1e-12)))  # ln(1 - tau N p / R)
        log_g = torch.where(log_share < 0, log_g + log_left - math.log(1 - tau), floor).clamp_min(floor)
    return F.softplus(log_g - positive).mean()


@torch.no_grad()
def hardest(q, bank, n):
    """The `n` rows of bank (K, D) with the largest products with each row of q (B, D), the largest first:
    (B, n) int64."""
    return (q @ bank.to(q.dtype).T).topk(n, dim=1).indices


@torch.no_grad()
def mix_negatives(q, bank, pairs, a, partners, b):
    """Mixtures for each query: first u(a n_i + (1 - a) n_j) with (i, j) = pairs (B, s, 2) and a (B, s), then
    u(b q + (1 - b) n_j) with j = partners (B, s') and b (B, s'): (B, s + s', D), constant."""
    a = a[..., None]
    b = b[..., None]
    of_two = a * bank[pairs[..., 0]] + (1 - a) * bank[pairs[..., 1]]
    of_query = b * q[:, None] + (1 - b) * bank[partners]
    return F.normalize(torch.cat([of_two, of_query], 1), dim=2)


def mochi_loss(q, k, bank, mixed, temperature):
    """`info_nce` over the rows of bank (K, D) and, for each query, its own `mixed` ones (B, S, D)."""
    positive = positive_cosines(q, k, bank) / temperature
    negative = log_negatives(q, k, bank, temperature)
    if mixed.shape[1]:
        own = torch.einsum("nd,nsd->ns", q, mixed) / temperature
        negative = torch.logaddexp(negative, own.logsumexp(1))
    return F.softplus(negative - positive).mean()


def rows_at(uniform, candidates):
    """For `uniform` numbers (B, ...) in [0, 1), the row that each stands for among its query's `candidates`
    (B, n) int64: (B, ...) int64."""
    n = candidates.shape[1]
    ranks = (uniform * n).long().clamp_max(n - 1)
    return candidates.gather(1, ranks.flatten(1)).view(ranks.shape)


def mixtures(q, bank, numbers, hardest_rows):
    """MoCHi's mixtures (B, s + s', D) of the `hardest_rows` hardest rows of bank (K, D) for each query
    (B, D).

    `numbers` are uniform in [0, 1): (B, s, 3) for i, j and a; and (B, s', 2) for j and b, which is at most
    1/2, so that the query never dominates.
    """
    of_two, of_query = numbers
    nearest = hardest(q, bank, hardest_rows)
    pairs = rows_at(of_two[..., :2], nearest)
    partners = rows_at(of_query[..., 0], nearest)
    return mix_negatives(q, bank, pairs, of_two[..., 2], partners, of_query[..., 1] / 2)


def objective(q, k, bank, mixed, *, negatives, temperature, shift, alpha, ifm_only, beta, tau):
    """The loss that `negatives` names; `mixed` (B, S, D) or, before MoCHi mixes and for the others, None."""
    if negatives == "ifm":
        return ifm_loss(q, k, bank, temperature, shift, alpha, ifm_only)
    if negatives == "hcl":
        return hcl_loss(q, k, bank, temperature, beta, tau)
    if negatives == "debiased":
        return hcl_loss(q, k, bank, temperature, 0.0, tau)
    if negatives not in ("plain", "mochi"):
        raise ValueError(f"negatives {negatives!r}: choose one of plain, ifm, hcl, debiased, mochi")
    if mixed is not None:
        return mochi_loss(q, k, bank, mixed, temperature)
    return info_nce(q, k, bank, temperature)


def train_step(net, target, opt, bank, x1, x2, order, numbers, *, ema, hardest_rows, negatives,
               temperature, shift, alpha, ifm_only, beta, tau):
    """One iteration on two views (B, 3, S, S) of B images; the losses to be logged.

    `target` and `bank` are None on SimCLR. BatchNorm groups x2 in `order`, a permutation of B. `numbers`
    are as in `mixtures`; None: nothing is mixed.
    """
    rows = None
    mixed = None
    if bank is None:
        # Both views are anchors, and all processes' images are negatives.
        q = dist.gather(embed(net, x1))
        k = dist.gather(embed_in_order(net, x2, order))
    else:
        # The key network moves first (its parameters; its running statistics are its own).
        optim.ema(target, net, ema)
        with torch.no_grad():
            k = embed_in_order(target, x2, order)
        q = embed(net, x1)
        rows = bank.rows
        if negatives == "mochi" and numbers is not None:
            mixed = mixtures(q, rows, numbers, hardest_rows)
    loss = objective(q, k, rows, mixed, negatives=negatives, temperature=temperature, shift=shift,
                     alpha=alpha, ifm_only=ifm_only, beta=beta, tau=tau)

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    losses = {"loss": loss, **hardness(q, k, rows, mixed)}
    if bank is None:
        dist.average_buffers(net)  # else the running statistics of the processes drift apart
    else:
        dist.average_buffers(net, target)
        bank.push(k)  # last, so that no query meets its own key among the negatives
    return losses


@torch.no_grad()
def hardness(q, k, bank, mixed):
    """How hard the negatives of unit rows q and k are, with the rows of `mixed` (B, S, D) where it is not
    None."""
    positive = positive_cosines(q, k, bank)
    if bank is None:
        cosines = cosines_in_batch(q, k)
        negative = (cosines / LOGGED_TEMPERATURE).logsumexp(1)
        nearest = cosines.amax(1)
    else:
        negative, nearest = bank_summary(q, bank, LOGGED_TEMPERATURE)
        nearest = nearest * LOGGED_TEMPERATURE
    if mixed is not None and mixed.shape[1]:
        own = torch.einsum("nd,nsd->ns", q, mixed)
        negative = torch.logaddexp(negative, (own / LOGGED_TEMPERATURE).logsumexp(1))
        nearest = torch.maximum(nearest, own.amax(1))
    return {
        "mass": (negative - positive / LOGGED_TEMPERATURE).sigmoid().mean(),
        "accuracy": (positive > nearest).float().mean(),
        "cosine": nearest.mean(),
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
    p = run.parser(__doc__, name="hardneg", arch="resnet18")
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    p.add_argument("--negatives", choices=TEMPERATURES["moco"], default="mochi",
                   help="the rule that makes the negatives harder; plain: none, the base itself; "
                        "default (ours)")
    p.add_argument("--base", choices=TEMPERATURES, default="moco",
                   help="the negatives: moco, a queue of old keys; simclr, the other images of the batch; "
                        "default (ours)")
    p.add_argument("--stem", help="cifar, imagenet, small; default: the architecture's own")
    p.add_argument("--epochs", type=run.integer(0), default=200,
                   help="0 exports the random encoder; default (ours)")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images per step, over all processes (ours)")
    p.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd",
                   help="adamw, for a ViT, does not decay biases and norms (ours); sgd has momentum 0.9 "
                        "(ours)")
    p.add_argument("--lr", type=run.number(), default=0.06, help="at its peak (ours)")
    p.add_argument("--lr-final", type=run.number(), default=0.0, help="at the end (ours)")
    p.add_argument("--warmup", type=run.integer(0), default=0, help="in epochs (ours)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=5e-4, help="(ours)")
    p.add_argument("--ema", type=run.number(0, 1), default=0.99,
                   help="moco: momentum of the key network (ours)")
    p.add_argument("--temperature", type=run.number(above=0),
                   help="T; default: 0.2 on MoCo for plain, ifm and mochi, else 0.5 (paper; on MoCo for hcl "
                        "and debiased, ours)")
    p.add_argument("--bank-size", type=run.integer(1), default=4096, help="moco: K (ours)")
    p.add_argument("--shift", type=run.number(0, 2), default=0.1,
                   help="ifm: eps, by which the positive's cosine falls and the negatives' rise (paper)")
    p.add_argument("--alpha", type=run.number(), default=1.0,
                   help="ifm: weight of the shifted term (authors' code)")
    p.add_argument("--ifm-only", help="ifm: the shifted term alone (authors' code)", **switch)
    p.add_argument("--beta", type=run.number(0, 100), default=1.0,
                   help="hcl: a negative weighs e^(beta s/T), s its cosine; 0: all alike (authors' code)")
    p.add_argument("--tau", type=run.number(0, 0.999), default=0.1,
                   help="hcl, debiased: share of the negatives that has the query's class (authors' code)")
    p.add_argument("--hardest", type=run.integer(1), default=1024,
                   help="mochi: from how many of a query's nearest rows mixtures are made (paper)")
    p.add_argument("--mix", type=run.integer(0, 10**6), default=512,
                   help="mochi: how many mixtures of two rows a query gets (paper)")
    p.add_argument("--mix-query", type=run.integer(0, 10**6), default=256,
                   help="mochi: how many mixtures of a row and the query itself a query gets (paper)")
    p.add_argument("--mix-from", type=run.integer(0), default=10,
                   help="mochi: the first epoch, counted from 0, that has mixtures (ours)")
    p.add_argument("--blur", help="blur views, as on ImageNet (authors' code)", **switch)
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if args.negatives == "mochi":
        if args.base == "simclr":
            raise ValueError("--negatives mochi mixes rows of a queue, and --base simclr has none; "
                             "use --base moco")
        if args.hardest > args.bank_size:
            raise ValueError(f"--hardest {args.hardest}: the bank has --bank-size {args.bank_size} rows only")
        if 0 < args.epochs <= args.mix_from:
            raise ValueError(f"--mix-from {args.mix_from}: must be less than --epochs {args.epochs}, "
                             "or nothing is mixed")


def network(arch, stem=None):
    """An encoder with grouped BatchNorm, and a projector without BatchNorm: images (B, 3, S, S) ->
    (B, 128)."""
    encoder = encoders.make(arch, stem=stem, mean=MEAN, std=STD)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GroupedNorm  # the same state, another forward
    projector = encoders.mlp(encoder.dim, encoder.dim, 128)
    return nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)


def temperature_of(args):
    return args.temperature or TEMPERATURES[args.base][args.negatives]


def loss_settings(args):
    """The named arguments of `objective` as the flags have them."""
    return dict(
        negatives=args.negatives,
        temperature=temperature_of(args),
        shift=args.shift,
        alpha=args.alpha,
        ifm_only=args.ifm_only,
        beta=args.beta,
        tau=args.tau,
    )


def chance_of(args, mixes):
    """The loss where all embeddings are equal; `mixes`: mixtures are among the negatives."""
    count = args.bank_size if args.base == "moco" else 2 * args.batch_size - 2
    if mixes:
        count += args.mix + args.mix_query
    chance = math.log(count + 1)
    if args.negatives != "ifm":
        return chance
    shifted = math.log(1 + count * math.exp(2 * args.shift / temperature_of(args)))
    return shifted if args.ifm_only else (chance + args.alpha * shifted) / (1 + args.alpha)


def random_order(x, rng):
    """The order in which BatchNorm groups the second views of images x (B, ...): a permutation of B."""
    return rng.uniform(1, device=x.device)[:, 0].argsort()


def mixing_numbers(x, rng, args, epoch):
    """The numbers that `mixtures` takes for images x (B, ...), or None where `epoch` mixes nothing."""
    if args.negatives != "mochi" or epoch < args.mix_from:
        return None
    return rng.uniform(args.mix, 3, device=x.device), rng.uniform(args.mix_query, 2, device=x.device)


def pictures(images, size, args):
    """Rows for `save_rows` of up to eight images: both views."""
    x, _, rng = data.sample(images, 8, args.seed)
    x1 = augment(x, rng, size, args.blur)
    x2 = augment(x, rng, size, args.blur)
    return [("x1", x1), ("x2", x2)]


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

    net = run.to_device(network(args.arch, args.stem), args, env)
    target = None
    bank = None
    if args.optimizer == "adamw":
        groups = optim.groups(net.named_parameters(), args.weight_decay)
        opt = torch.optim.AdamW(groups, args.lr)
    else:
        opt = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    log = Log(args, env, steps_per_epoch * args.epochs, images)
    state = dict(net=net, opt=opt, log=log)
    if args.base == "moco":
        target = run.to_device(network(args.arch, args.stem), args, env).requires_grad_(False)
        target.load_state_dict(net.state_dict())
        bank = Bank(args.bank_size, 128).to(device)
        state.update(target=target, bank=bank)
        compile_networks(args, env, net, target)
    else:
        compile_networks(args, env, net)

    step = run.resume(args, env, state)
    mixes = args.negatives == "mochi"
    note = f"chance loss = {chance_of(args, mixes and args.mix_from == 0):.3f}"
    if mixes and args.mix_from:
        note += f", and from epoch {args.mix_from} on, with mixtures, {chance_of(args, mixes=True):.3f}"
    log.start(step, note)

    settings = dict(ema=args.ema, hardest_rows=args.hardest, **loss_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, args.warmup, args.lr_final)
        optim.set_lr(opt, lr)
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            x1 = augment(x, rng, size, args.blur)
            x2 = augment(x, rng, size, args.blur)  # another view: `rng` has moved on
            order = random_order(x, rng)
            numbers = mixing_numbers(x, rng, args, epoch)
            losses = train_step(net, target, opt, bank, x1, x2, order, numbers, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again.
            rows = pictures(images, size, args)
            if env.rank == 0:
                save_rows(out / "views.png", rows)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
