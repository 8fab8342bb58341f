"""AMOC: adversarial momentum-contrastive pretraining (Xu & Yang 2020, arXiv 2012.13154).

AMOC makes MoCo robust. As in MoCo, a slowly moving copy of the encoder makes the keys, and a bank
of old keys supplies the negatives, so 256 images per step are enough. To the clean MoCo loss,
L_CCC, it adds the same loss with an attacked query, an attacked key, or both, L_*; the attack is
PGD on L_* itself. Clean and attacked images pass through separate BatchNorm branches, and clean and
attacked keys are stored in separate banks.

    paper                       this file
    f_q, f_k                    net, target: an encoder and a projector each
    u(z) = z / |z|              embed: the network's output, normalised
    x_q, x_k                    x1, x2: the two views of an image
    x + delta                   x1_adv, x2_adv
    Eq. 3.1  InfoNCE            info_nce
    Eq. 3.2  momentum update    optim.ema in train_step
    Eq. 3.3  inner maximum      attack
    Eq. 3.4  joint loss         loss in train_step: lam L_CCC + (1 - lam) L_*
    M_clean, M_adv              bank_clean, bank_adv
    BN of clean, attacked x     BatchNorm branches "clean", "adv"
    CCC, ACC, ...               VARIANTS: the letters are query, key, bank; C is clean, A adversarial

Where the paper is silent we follow the authors' code: the numbers of the augmentation, the attack (5
steps of 2/255 from a random start, in eval mode), BatchNorm of the keys in train mode without
shuffling, SGD and its schedule, the sizes of the projector, and the normalisation. Neither says how
large the blur's kernel is; ours, 13 pixels, reaches three sigma at the largest sigma.

We depart from the authors' code in three places:
    - Keys join the bank at the end of the step, as in the paper. Their code adds them before it
      computes the loss, so that a query's own key is also among its negatives.
    - A view that is not attacked stays clean within the attack. Their code gives it a random start
      too.
    - What does not depend on the perturbation is computed once per attack, and the attack makes no
      gradient of the weights. In eval mode the result is the same up to rounding. Counting a
      backward pass to the pixels as one forward pass and a whole one as two, an ACC step costs 18
      forward passes instead of 29 (their 15 forward passes and 7 whole backward ones), CAC 16
      instead of 22, AAC 28 instead of 35; MoCo's costs 4. The third letter only says which bank is
      read, and costs nothing.

    python amoc.py                                       the paper's ACC: CIFAR-10, ResNet-18, 200 epochs
    torchrun --standalone --nproc-per-node 8 amoc.py     the same on 8 GPUs, 32 of the 256 images on each
    python amoc.py --variant CCC --out runs/moco         MoCo, the clean base
    python amoc.py --norm l2 --eps 128 --out runs/l2     l2 128/255 (ours)
    python eval.py runs/amoc/encoder.pt --preset amoc-slf

A ViT has no BatchNorm, so clean and attacked images share the whole network:

    python amoc.py --arch vit_tiny --optimizer adamw --lr 1e-3 --weight-decay 0.05 --out runs/amoc-vit

The encoder of f_q is exported without the projector, with the BatchNorm branch through which L_*
sees its query (adv in ACC): at test time this branch, with its running statistics, sees clean images
too. Where no query is attacked (CCC, CAC, CAA, CCA), branch adv of f_q is never trained, so that of
f_k keeps its initial weights too; the exported branch is then clean.

On several processes order, augmentation and noise are those of one process, and the banks are equal
on all of them. The attack is the same, too: it runs in eval mode and needs no other images of the
batch. In training each BatchNorm sees the images of its own process, or with --sync-bn (on GPUs)
those of all. On 8 GPUs without --sync-bn, a query and its key are normalised among the same 32
images. A network can use that to tell the key from the bank's rows; it is the leak for which MoCo
shuffles keys between its GPUs. With --sync-bn, or on one GPU as in the authors' code, it is weaker:
they are normalised among all 256.

In the log, chance is ln(K + 1). When all is well both losses lie below it, and loss_clean falls. Where
L_* reads the clean bank, loss_adv stays above loss_clean, and may stand still for many epochs, or rise
at first. In ACA and CCA, whose second bank stays random, loss_adv cannot fall below about 5.5 (with the
defaults), and says only how well query and key agree. CCC logs loss alone. If the losses come to rest at
chance, the bank's keys are too old for the network: try a smaller --bank-size or a smaller --ema. With
--eps 0 the "attacked" images are the clean ones, seen through branch adv; with --steps 0 they are moved
by the random start alone (with --no-random-start, not at all).

Measured on one CPU thread (Intel Xeon) and 10,000 images of CIFAR-10 (JPEG), with --arch slim
--batch-size 64 --warmup 0 --bank-size 512 --ema 0.99 --lr 0.2 --weight-decay 1e-4 --steps 2
--step-size 4: ACC reaches, in 3.9 CPU minutes (11 epochs; mean of 2 seeds), 35.8 % with a linear probe
(eval.py's preset amoc-slf, 2,000 test images), and 14.5 % under PGD-20 at 8/255. CCC makes 32 epochs in
about that time, 4.6 CPU minutes, and reaches 43.0 and 2.6; a random encoder, 27.4 and 0.

On all 50,000 images, judged on all 10,000 test images (one seed each), ACC reaches 44.5 and 18.0 in 18
CPU minutes (10 epochs), ACA 45.5 and 18.3 in 21 (12), CCC 54.1 and 0.4 in 21 (30). This has not been run
on a GPU yet, and l2 not at all. The paper reports 78.74 and 36.87 (ACC, 200 epochs).
"""
import argparse
import math
import pathlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import (
    random_color_jitter, random_gaussian_blur, random_grayscale, random_resized_crop)
from common.bank import Bank, bank_logsumexp
from common.log import Log
from common.pgd import ball_point, eval_mode, pgd
from common.pictures import attack_key, difference, save_rows
from common.resnet import branch
from common.speed import compile_networks, graphed

MEAN = (0.4914, 0.4824, 0.4467)  # of CIFAR-10, as in the authors' code
STD = (0.2471, 0.2435, 0.2617)


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
class Variant(NamedTuple):
    adv_query: bool  # L_* has an attacked query
    adv_key: bool  # L_* has an attacked key
    adv_bank: bool  # L_* takes its negatives from M_adv
    extra_key: bool = False  # no key is attacked, and M_adv is filled with f_k(x1_adv) instead

    @property
    def attacked(self):
        return self.adv_query or self.adv_key

    @property
    def second_loss(self):
        """Whether L_* is another loss than L_CCC, and so is computed at all."""
        return self.attacked or self.adv_bank

    @property
    def export(self):
        """The BatchNorm branch of the exported encoder: the one through which L_* sees its
        query."""
        return "adv" if self.adv_query else "clean"


VARIANTS = {
    letters: Variant(*(letter == "A" for letter in letters))
    for letters in ("CCC", "CAC", "CAA", "CCA", "ACC", "ACA", "AAC", "AAA")
}
# In ACA no key is attacked, so nothing enters M_adv, which keeps its first random rows (the paper's
# Remark 1). CCA is the same, and attacks nothing at all: it is in the paper's text and Table 1, while
# Fig. 1, Table 6 and the authors' code have CAA in its place. ACA_PLUS, which only the authors' code
# has, fills M_adv with the keys of attacked queries.
VARIANTS["ACA_PLUS"] = VARIANTS["ACA"]._replace(extra_key=True)


def augment(x, rng, size):
    """One view of the uint8 images x (B, 3, H, W), as in MoCo v2: floats (B, 3, size, size) in [0,
    1]."""
    x = random_resized_crop(x, rng, size, scale=(0.2, 1.0), flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_gaussian_blur(x, rng, sigma=(0.1, 2.0), p=0.5, kernel_size=13)
    return x.contiguous(memory_format=torch.channels_last)


def embed(net, x, bn):
    """u(f(x)) of x (B, 3, S, S) through BatchNorm branch `bn`: (B, 128), unit rows, in x's
    dtype."""
    with branch(net, bn), run.autocast(x.device):
        z = net(x)
    return F.normalize(z.to(x.dtype), dim=1)


def info_nce(q, k, bank, temperature):
    """Eq. 3.1: -mean_i log( e^(q_i.k_i/T) / (e^(q_i.k_i/T) + sum_j e^(q_i.M_j/T)) ).

    q, k (N, D) and bank (K, D) have unit rows. The bank holds keys of earlier steps, an older key of
    the same image perhaps among them, as in MoCo. Chance is ln(K + 1).
    """
    pos = (q * k).sum(1) / temperature  # (N,)
    neg = bank_logsumexp(q, bank, temperature)  # (N,)
    return F.softplus(neg - pos).mean()  # -log(e^pos / (e^pos + e^neg)) = log(1 + e^(neg - pos))


@graphed  # with --graph, on CUDA, recorded once and then replayed; the result is the same
def attack(net, target, x1, x2, noise, bank, *, variant, temperature, norm, eps, step_size, steps):
    """Eq. 3.3: move the views that `variant` attacks within eps so as to maximise L_*; returns
    (x1_adv, x2_adv).

    x1, x2 (B, 3, S, S) are in [0, 1], and eps and step_size in the units of these pixels. The
    search starts at x + eps `noise`, noise (B, 2, 3, S, S) in the unit ball of the `norm`, or, where
    noise is None, at x. Each view of each image has a ball of its own. `bank` (K, D) is the one that
    L_* reads. L_CCC does not depend on the perturbation, so L_* alone is maximised.
    """
    start1 = x1
    start2 = x2
    if noise is not None:
        start1 = (x1 + eps * noise[:, 0]).clamp(0, 1)
        start2 = (x2 + eps * noise[:, 1]).clamp(0, 1)
    # In eval mode an embedding depends on its own image only. So the embedding of a view that
    # stands still is a constant, computed once, and no running statistic changes.
    with eval_mode(net, target):
        if variant.adv_query and variant.adv_key:

            def loss_of_both(x):
                x1_adv, x2_adv = x.chunk(2)
                q = embed(net, x1_adv, "adv")
                k = embed(target, x2_adv, "adv")
                return info_nce(q, k, bank, temperature)

            both = torch.cat([x1, x2])
            start = torch.cat([start1, start2])
            return pgd(loss_of_both, both, eps, step_size, steps, norm, start=start).chunk(2)

        if variant.adv_query:
            k = embed(target, x2, "clean").detach()

            def loss_of_query(x1_adv):
                return info_nce(embed(net, x1_adv, "adv"), k, bank, temperature)

            return pgd(loss_of_query, x1, eps, step_size, steps, norm, start=start1), x2

        if variant.adv_key:
            q = embed(net, x1, "clean").detach()

            def loss_of_key(x2_adv):
                return info_nce(q, embed(target, x2_adv, "adv"), bank, temperature)

            return x1, pgd(loss_of_key, x2, eps, step_size, steps, norm, start=start2)
    return x1, x2


def train_step(net, target, opt, bank_clean, bank_adv, x1, x2, noise, *,
               variant, lam, temperature, ema, norm, eps, step_size, steps):
    """One iteration on two views (B, 3, S, S) of B images; the losses to be logged. `noise` as in
    `attack`."""
    bank = bank_adv if variant.adv_bank else bank_clean  # the one that L_* reads

    if variant.attacked:
        # The attack comes first: it uses the running statistics that the step before has left.
        x1_adv, x2_adv = attack(
            net, target, x1, x2, noise, bank.rows,
            variant=variant, temperature=temperature, norm=norm, eps=eps, step_size=step_size, steps=steps)

    # From here on all BatchNorms are in train mode: they normalise by the batch and move the
    # running statistics of the branch they run in. Keys get no gradient: the parameters of `target`
    # follow those of `net` by a moving average, and its running statistics are its own.
    q = embed(net, x1, "clean")
    with torch.no_grad():
        k = embed(target, x2, "clean")
    loss_clean = info_nce(q, k, bank_clean.rows, temperature)
    loss = loss_clean
    losses = {"loss": loss}
    if variant.second_loss:
        q_adv = embed(net, x1_adv, "adv") if variant.adv_query else q
        with torch.no_grad():
            k_adv = embed(target, x2_adv, "adv") if variant.adv_key else k
            if variant.extra_key:
                k_extra = embed(target, x1_adv, "adv")
        loss_adv = info_nce(q_adv, k_adv, bank.rows, temperature)
        loss = lam * loss_clean + (1 - lam) * loss_adv  # Eq. 3.4
        losses = {"loss": loss, "loss_clean": loss_clean, "loss_adv": loss_adv}

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    optim.ema(target, net, ema)  # Eq. 3.2
    dist.average_buffers(net, target)  # else the running statistics of the processes drift apart

    # Last, so that no query meets the key of this step among the negatives. The keys of all processes
    # join.
    bank_clean.push(k)
    if variant.adv_key:
        bank_adv.push(k_adv)  # in CAC and AAC too, which never read it, as in the authors' code
    elif variant.extra_key:
        bank_adv.push(k_extra)
    return losses


def lr_at(epoch, epochs, lr, warmup):
    """The learning rate of `epoch` 0, 1, ...: over the first `warmup` epochs `lr` epoch / warmup, but in
    epoch 0 a thousandth of `lr`; then a cosine towards zero."""
    if epoch < warmup:
        return lr * max(epoch / warmup, 0.001)
    return optim.cosine((epoch - warmup) / (epochs - warmup), lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="amoc", arch="resnet18", graph=True)
    p.add_argument("--variant", choices=VARIANTS, default="ACC",
                   help="letters for query, key and bank: A is adversarial, C clean; CCC is MoCo (paper)")
    p.add_argument("--epochs", type=run.integer(0), default=200,
                   help="0 exports the random encoder; default (paper)")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images per step, over all processes (authors' code)")
    p.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd",
                   help="adamw, for short runs and ViTs, does not decay biases and norms (ours); sgd has "
                        "momentum 0.9 (authors' code)")
    p.add_argument("--lr", type=run.number(), default=0.1,
                   help="at its peak; with adamw try 1e-3 (ours); with sgd (authors' code)")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="in epochs (authors' code)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=5e-4, help="(authors' code)")
    p.add_argument("--temperature", type=run.number(above=0), default=0.2, help="T of Eq. 3.1 (paper)")
    p.add_argument("--ema", type=run.number(0, 1), default=0.999, help="m of Eq. 3.2 (paper)")
    p.add_argument("--bank-size", type=run.integer(1), default=32768, help="K, of each bank (paper)")
    p.add_argument("--lam", type=run.number(0, 1), default=0.5, help="weight of L_CCC in Eq. 3.4 (paper)")
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
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if args.norm == "linf" and args.eps > 255:
        raise ValueError(f"--eps {args.eps:g}: with --norm linf at most 255, the range of a pixel")


def network(arch):
    """An encoder with BatchNorm branches clean and adv, and a projector without BatchNorm: images
    (B, 3, S, S) -> (B, 128)."""
    encoder = encoders.make(arch, branches=("clean", "adv"), mean=MEAN, std=STD)
    projector = encoders.mlp(encoder.dim, encoder.dim, 128)
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
    return dict(
        variant=VARIANTS[args.variant],
        temperature=args.temperature,
        norm=args.norm,
        eps=eps,
        step_size=step_size,
        steps=args.steps,
    )


def pictures(net, target, bank, images, size, args):
    """Rows for `save_rows` of up to eight images: both views, each attacked view, and what the
    attack added to it."""
    variant = VARIANTS[args.variant]
    x, _, rng = data.sample(images, 8, args.seed)
    x1 = augment(x, rng, size)
    x2 = augment(x, rng, size)
    rows = [("x1", x1), ("x2", x2)]
    if variant.attacked:
        noise = start_noise(x1, args.norm, rng) if args.random_start else None
        x1_adv, x2_adv = attack(net, target, x1, x2, noise, bank.rows, **attack_settings(args))
        full_scale = args.eps / 255 if args.norm == "linf" else None
        if variant.adv_query:
            rows += [("x1_adv", x1_adv), ("x1_adv - x1", difference(x1_adv, x1, full_scale))]
        if variant.adv_key:
            rows += [("x2_adv", x2_adv), ("x2_adv - x2", difference(x2_adv, x2, full_scale))]
    return rows


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    env = run.setup(args)
    device = env.device
    out = pathlib.Path(args.out)
    variant = VARIANTS[args.variant]
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    # BatchNorm in train mode needs two images per process.
    steps_per_epoch = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch), args, env)
    target = run.to_device(network(args.arch), args, env).requires_grad_(False)
    target.load_state_dict(net.state_dict())
    bank_clean = Bank(args.bank_size, 128).to(device)
    bank_adv = Bank(args.bank_size, 128).to(device)
    if args.optimizer == "adamw":
        groups = optim.groups(net.named_parameters(), args.weight_decay)
        opt = torch.optim.AdamW(groups, args.lr)
    else:
        opt = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    compile_networks(args, env, net, target)

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    state = dict(net=net, target=target, bank_clean=bank_clean, bank_adv=bank_adv, opt=opt, log=log)
    step = run.resume(args, env, state)
    log.start(step, f"chance loss ln(K + 1) = {math.log(args.bank_size + 1):.3f}")

    settings = dict(lam=args.lam, ema=args.ema, **attack_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, args.warmup)
        optim.set_lr(opt, lr)
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            x1 = augment(x, rng, size)
            x2 = augment(x, rng, size)  # another view: `rng` has moved on
            noise = start_noise(x1, args.norm, rng) if args.random_start and variant.attacked else None
            losses = train_step(net, target, opt, bank_clean, bank_adv, x1, x2, noise, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again.
            bank = bank_adv if variant.adv_bank else bank_clean
            rows = pictures(net, target, bank, images, size, args)
            if env.rank == 0:
                key = attack_key(args.norm, args.eps) if variant.attacked else None
                save_rows(out / "views.png", rows, key)
            run.save(args, env, state, step)
    if env.rank == 0:
        bn = encoders.branch_of(net[0], variant.export)
        encoders.export(net[0], out / "encoder.pt", bn, image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder" + (f"; BN branch {bn}" if bn else ""))


if __name__ == "__main__":
    run.cli(main)
