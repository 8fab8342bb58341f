"""AMOC: adversarial momentum-contrastive pretraining (Xu & Yang 2020, arXiv 2012.13154).

MoCo, made robust. A slowly moving copy of the encoder makes keys; banks of old keys supply the negatives, so
256 images per step are enough. The clean MoCo loss L_CCC is joined by the same loss with an attacked query
and/or key, L_*, the attack being PGD on L_* itself. Clean and attacked images have their own BatchNorm branch
(statistics and affine), and clean and attacked keys their own bank.

    paper                       here
    f_q, f_k                    net, target: encoder and projector; embed() adds u(z) = z / |z|
    BN of clean, attacked x     branch "clean", "adv"
    x_q, x_k; + delta           x1, x2; x1_adv, x2_adv
    Eq. 3.1  InfoNCE            info_nce
    Eq. 3.2  momentum update    optim.ema in train_step
    Eq. 3.3  inner maximum      attack
    Eq. 3.4  the joint loss     train_step: lam L_CCC + (1 - lam) L_*
    M_clean, M_adv              bank_clean, bank_adv
    CCC, ACC, ...               VARIANTS: the letters are query, key, bank; C is clean, A is adversarial

Where the paper is silent we take the authors' code: the attack (5 steps of 2/255 from a uniform start, eval
mode), BatchNorm of the keys in train mode without shuffling, SGD and its schedule, the projector's sizes, the
normalisation. Neither gives the blur's kernel a size; ours, 13, reaches three sigma at the largest sigma.
Where we depart from the authors' code:
    - keys join the bank at the end of the step, as the paper says (in their code before the logits: a query's
      own key is also its negative);
    - a view that is not attacked enters the attack clean (in their code with a random start too);
    - what does not depend on the perturbation is computed once per attack, and `pgd` makes no weight
      gradient: the same in eval mode, up to rounding, and for ACC 18 instead of 29 forwards per step (a
      backward to the pixels counts 1, a whole one 2).

Exported is the BN branch of the attacked query, adv, and clean where no query is attacked (CCC, CAC, CAA).
In ACA nothing ever enters M_adv: it stays Gaussian noise (the paper's Remark 1). ACA_PLUS, which the code has
and the paper has not, fills it with the keys of attacked queries.

Several processes: each BatchNorm sees the images of its own process, or with --sync-bn (on GPUs) those of
all. On 8 GPUs a query and its key are then normalised among the same 32 images, by which a network can tell
the key from the bank's: the leak against which MoCo shuffles keys among its GPUs. With --sync-bn it is 256
images, as in the authors' code, which runs on one GPU.

    python amoc.py                                       the paper's ACC: CIFAR-10, ResNet-18, 200 epochs
    torchrun --standalone --nproc-per-node 8 amoc.py     the same on 8 GPUs, 32 of the 256 images on each
    python amoc.py --variant CCC --out runs/moco         MoCo, the clean base
    python eval.py runs/amoc/encoder.pt --preset amoc-slf

Measured on a CPU thread (Intel Xeon), 0.3 M-parameter encoder, 10,000 images of CIFAR-10 (JPEG), 3.9 minutes
(11 epochs, 2 attack steps; 2 seeds): linear probe 35.8 standard, 14.5 under PGD-20 at 8/255. CCC in 4.6
minutes: 43.0 and 2.6; a random encoder: 27.4 and 0. Not yet run on a GPU; the paper has 78.74 and 36.87 (ACC,
200 epochs).
"""
import argparse
import math
import pathlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_color_jitter, random_gaussian_blur, random_grayscale, random_resized_crop
from common.bank import Bank, bank_logsumexp
from common.log import Log
from common.pgd import eval_mode, pgd
from common.resnet import branch

MEAN, STD = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2617)  # CIFAR-10's, from the authors' code


class Variant(NamedTuple):
    adv_query: bool
    adv_key: bool
    adv_bank: bool  # L_* reads M_adv
    extra_key: bool  # f_k(x1_adv), the attacked query seen as a key, feeds M_adv
    export: str  # BN branch of the exported encoder

    @property
    def adversarial(self):
        return self.adv_query or self.adv_key


VARIANTS = {
    "CCC": Variant(False, False, False, False, "clean"),
    "CAC": Variant(False, True, False, False, "clean"),
    "CAA": Variant(False, True, True, False, "clean"),
    "ACC": Variant(True, False, False, False, "adv"),
    "ACA": Variant(True, False, True, False, "adv"),
    "AAC": Variant(True, True, False, False, "adv"),
    "AAA": Variant(True, True, True, False, "adv"),
    "ACA_PLUS": Variant(True, False, True, True, "adv"),
}


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size):
    """One view of the uint8 images x (B, 3, H, W), as in MoCo v2: floats (B, 3, size, size) in [0, 1]."""
    x = random_resized_crop(x, rng, size, scale=(0.2, 1.0), flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_gaussian_blur(x, rng, sigma=(0.1, 2.0), p=0.5, kernel_size=13)
    return x.contiguous(memory_format=torch.channels_last)


def embed(net, x, bn):
    """u(f(x)) of x (B, 3, S, S) through BatchNorm branch `bn`: (B, 128), unit rows, in x's dtype."""
    with branch(net, bn), run.autocast(x.device):
        z = net(x)
    return F.normalize(z.to(x.dtype), dim=1)


def info_nce(q, k, bank, temperature):
    """Eq. 3.1: -mean_i log( e^(q_i.k_i/T) / (e^(q_i.k_i/T) + sum_j e^(q_i.M_j/T)) ).

    q, k (N, D) unit rows, bank (K, D): negatives only. Chance is ln(K + 1).
    """
    pos = (q * k).sum(1) / temperature  # (N,)
    neg = bank_logsumexp(q, bank, temperature)  # (N,)
    return F.softplus(neg - pos).mean()  # -log(e^pos / (e^pos + e^neg)) = log(1 + e^(neg - pos))


def attack(net, target, x1, x2, noise, bank, args):
    """Eq. 3.3: the views that the variant attacks, moved within eps to maximise L_*; gives (x1_adv, x2_adv).
    They start at the images + eps `noise`, noise (B, 2, 3, S, S) in [-1, 1], or under --no-random-start at
    the images.

    L_CCC is constant in the perturbation, so L_* alone is maximised. Eval mode: an embedding then depends on
    its own image only, so the embedding of the view that stands still is a constant, and no running statistic
    changes.
    """
    v, T = VARIANTS[args.variant], args.temperature
    eps, step_size, steps = args.eps / 255, args.step_size / 255, args.steps
    start1 = (x1 + eps * noise[:, 0]).clamp(0, 1) if args.random_start else x1
    start2 = (x2 + eps * noise[:, 1]).clamp(0, 1) if args.random_start else x2
    with eval_mode(net, target):
        if v.adv_query and v.adv_key:  # both at once

            def loss(x):
                a1, a2 = x.chunk(2)
                return info_nce(embed(net, a1, "adv"), embed(target, a2, "adv"), bank, T)

            x = pgd(loss, torch.cat([x1, x2]), eps, step_size, steps, start=torch.cat([start1, start2]))
            return x.chunk(2)
        if v.adv_query:
            k = embed(target, x2, "clean").detach()
            return pgd(lambda x: info_nce(embed(net, x, "adv"), k, bank, T),
                       x1, eps, step_size, steps, start=start1), x2
        q = embed(net, x1, "clean").detach()
        return x1, pgd(lambda x: info_nce(q, embed(target, x, "adv"), bank, T),
                       x2, eps, step_size, steps, start=start2)


def train_step(net, target, opt, bank_clean, bank_adv, x1, x2, noise, args):
    """One iteration on two views (B, 3, S, S); `noise` (B, 2, 3, S, S) in [-1, 1] starts the attack."""
    v, T = VARIANTS[args.variant], args.temperature
    bank = bank_adv if v.adv_bank else bank_clean
    if v.adversarial:  # first: it uses the running statistics of the step before, and changes none
        x1_adv, x2_adv = attack(net, target, x1, x2, noise, bank.rows, args)

    q = embed(net, x1, "clean")
    with torch.no_grad():
        k = embed(target, x2, "clean")
    loss = loss_clean = info_nce(q, k, bank_clean.rows, T)
    losses = {"loss": loss_clean}
    if v.adversarial:
        q_a = embed(net, x1_adv, "adv") if v.adv_query else q
        with torch.no_grad():
            k_a = embed(target, x2_adv, "adv") if v.adv_key else k
            k_push = embed(target, x1_adv, "adv") if v.extra_key else k_a
        loss_adv = info_nce(q_a, k_a, bank.rows, T)
        loss = args.lam * loss_clean + (1 - args.lam) * loss_adv  # Eq. 3.4
        losses = {"loss": loss, "loss_clean": loss_clean, "loss_adv": loss_adv}

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    optim.ema(target, net, args.ema)  # Eq. 3.2
    dist.average_buffers(net, target)  # else the ranks' running statistics drift apart
    bank_clean.push(k)
    if v.adv_key or v.extra_key:  # CAC and AAC fill it, and never read it
        bank_adv.push(k_push)
    return losses


def lr_at(epoch, epochs, lr, warmup):
    """By epoch: linear over the first `warmup`, from a thousandth of `lr`, then a cosine towards zero."""
    if epoch < warmup:
        return lr * max(epoch / warmup, 0.001)
    return optim.cosine((epoch - warmup) / (epochs - warmup), lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="amoc", arch="resnet18")
    p.add_argument("--variant", choices=VARIANTS, default="ACC", help=" ".join(VARIANTS))
    p.add_argument("--epochs", type=run.integer(0), default=200, help="0 exports the random encoder")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images a step, over all processes")
    p.add_argument("--lr", type=run.number(), default=0.1, help="of SGD, at its peak")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="epochs")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=5e-4)
    p.add_argument("--temperature", type=run.number(above=0), default=0.2)
    p.add_argument("--ema", type=run.number(0, 1), default=0.999, help="m of Eq. 3.2")
    p.add_argument("--bank-size", type=run.integer(1), default=32768, help="K, of each bank")
    p.add_argument("--lam", type=run.number(0, 1), default=0.5,
                   help="weight of the clean loss, Eq. 3.4")
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


def network(arch):
    """Encoder with BN branches clean and adv, and projector without BN: (B, 3, S, S) -> (B, 128)."""
    encoder = encoders.make(arch, branches=("clean", "adv"), mean=MEAN, std=STD)
    projector = encoders.mlp(encoder.dim, encoder.dim, 128)
    return nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)


def pictures(path, net, target, bank, images, size, args):
    """Rows of up to eight: x1, x2, then each attacked view and its perturbation (grey is none, full scale is
    eps)."""
    x, _, rng = next(data.batches(images, min(8, len(images)), args.seed, 0))
    x1, x2 = (augment(x, rng, size) for _ in range(2))
    rows = [x1, x2]
    if VARIANTS[args.variant].adversarial:
        noise = 2 * rng.uniform(2, *x1.shape[1:], device=x1.device) - 1
        for clean, x_adv in zip((x1, x2), attack(net, target, x1, x2, noise, bank.rows, args)):
            if x_adv is not clean:
                rows += [x_adv, 0.5 + (x_adv - clean) / (2 * max(args.eps / 255, 1e-8))]
    run.save_picture(torch.cat(rows), path, len(x1))


def main(argv=None):
    args = parser().parse_args(argv)
    env = run.setup(args)
    device, out = env.device, pathlib.Path(args.out)
    v = VARIANTS[args.variant]
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    steps = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch), args, env)
    target = run.to_device(network(args.arch), args, env).requires_grad_(False)
    target.load_state_dict(net.state_dict())
    bank_clean = Bank(args.bank_size, 128).to(device)
    bank_adv = Bank(args.bank_size, 128).to(device)
    opt = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    if args.compile:
        net.compile(), target.compile()

    log = Log(args, env, steps * args.epochs, images)
    state = dict(net=net, target=target, bank_clean=bank_clean, bank_adv=bank_adv, opt=opt, log=log)
    step = run.resume(args, env, state)
    log.start(step, f"chance loss ln(K + 1) = {math.log(args.bank_size + 1):.3f}")

    for epoch in range(step // steps, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, args.warmup)
        optim.set_lr(opt, lr)
        begin = step % steps  # of the epoch's steps; not 0 where a run stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, begin):
            run.stop_if_signalled(args, env, state, step)
            x1, x2 = (augment(x, rng, size) for _ in range(2))  # `rng` moves on between them
            noise = 2 * rng.uniform(2, *x1.shape[1:], device=device) - 1 if v.adversarial else None
            losses = train_step(net, target, opt, bank_clean, bank_adv, x1, x2, noise, args)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            if env.rank == 0:  # before the checkpoint, so that none is missing when the run goes on
                bank = bank_adv if v.adv_bank else bank_clean
                pictures(out / "views.png", net, target, bank, images, size, args)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", v.export, image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder; BN branch {v.export}")


if __name__ == "__main__":
    run.cli(main)
