"""ADIOS: adversarial masking for self-supervised learning (Shi et al. 2022, arXiv 2201.13100).

A small U-Net, the masker, draws N soft masks over an image. The encoder must recognise the image
with each of them cut out, and the masker learns to make that as hard as possible:

    encoder   min  sum_n loss_n               loss_n between the whole views and those without mask n
    masker    min  lambda penalty - sum_n loss_n

An object is what costs most to lose, so the masks are expected to follow objects. The penalty keeps
them from hiding everything or nothing.

    paper                       this file
    encoder                     net: encoder, projector and, for byol and simsiam, predictor
    occlusion model             masker; propose gives the part of each pixel that is removed
    the min-max objective       disagreement, in both steps of train_step
    penalty, lambda             mask_penalty, --mask-weight
    ADIOS-s                     --single: each image is shown with one of its masks, drawn at random

--objective is simclr (arXiv 2002.05709), byol (2006.07733), simsiam (2011.10566) or mae (the survey
by Qi & Shah 2022, 2210.13463, Eq. 11: the error in pixels, by a ViT; that an MLP on each token
rebuilds them is ours). Of the two random views of an image, x1 stays whole and x2 is masked, as in the
authors' code (the survey writes the same x for both); simsiam masks both, and mae has x1 alone.

Several masks are a softmax, which shares each pixel out among them. Eq. 11 has one mask; a softmax
over one would always remove everything, so with --masks 1 it is a sigmoid instead. The penalty of
this one mask is least where it removes half of the image. (The survey's mask is the part that is
kept, ours the part that is removed.)

There are two controls, both ours. --masker random has hard masks, where the largest of N smooth random
fields (grids of 4 x 4 numbers, enlarged) removes a pixel, so that each removes 1/N of the pixels on
average (half, with --masks 1). --masker none has no masks: its loss is one term instead of N.

Of the paper we had the abstract only, and besides it the authors' code. The numbers for CIFAR-10
come from neither and are ours. From the code (its recipe for simclr, where recipes differ) are the
heads, N = 4, the strengths of crop, jitter and grey, the mean colour that fills a mask, the start of
the warm-up at 0.003, tau's cosine to 1, and LARS with momentum 0.9, trust 0.02 and clipping. We
depart from the code:
    - The sine of the penalty is floored at 1e-4, and flat below. Their code adds 1e-10 to it; but
      in float32 the sine of pi is slightly negative, so that a mask that hides everything is
      rewarded.
    - There is no entropy term of the areas, which is on in 2 of their 15 recipes, no blur, and no
      linear classifier that is trained alongside; and the U-Net always has GroupNorm.
    - Running statistics move in the encoder's step only; theirs move in the masker's too. The rate
      of simsiam's predictor follows the schedule; in the paper of SimSiam it is constant.
    - The learning rates reach their peaks with epoch --warmup, counted from 0; in their code one
      epoch before.
    - The masks, and BYOL's target of the whole view, are computed once. So are the whole views in
      each of the two steps, and not once for every mask. Losses and gradients are the same up to
      rounding. But a whole view moves the running statistics once per step, not once for every mask.

Counting a backward pass to the pixels as one forward pass and a whole one as two, a step of simclr
with N = 4 costs 24 forward passes, in their code 38 (2 of them for the classifier); with --single 9.
SimCLR's costs 6. In general a step costs 5 N + 4 with simclr, 6 N + 4 with byol, 10 N + 8 with
simsiam and 5 N with mae, where --single has N = 1. The passes of the U-Net come on top.

    python adios.py                                      SimCLR + ADIOS: CIFAR-10, ResNet-18, 200 epochs
    torchrun --standalone --nproc-per-node 2 adios.py    the same on 2 GPUs, 128 of the 256 images on each
    python adios.py --masker none --out runs/simclr      SimCLR, the base
    python adios.py --objective mae --masks 1 --arch vit_tiny --out runs/one-mask    the survey's Eq. 11
    python eval.py runs/adios/encoder.pt --preset knn amoc-slf --attacks clean

On several processes simclr has the negatives of all of them. Each BatchNorm sees the images of its
own process, or with --sync-bn (on GPUs) those of all.

What is exported is the encoder, without heads and masker: at test time images are whole. Its running
statistics are of whole and masked images mixed: with N masks, mostly of masked ones.

In the log, loss falls below chance (printed at the start), but not far, as the masker holds it up: in the
runs on CIFAR-10 below, its means by epoch went from 18.9 to 18.1 with four masks (chance is 19.4 there),
and with --single from 4.71 to 4.38, where random masks ended at 4.27 and none at 4.03 (chance 4.84).
loss_mask is the same loss after the encoder's step (with --single, for other masks); for byol it is about
half of that. penalty is at least N / sin(pi / N), also with --single, and at least 1 with --masks 1;
twice that for simsiam, which masks both views. Where it is far above that (at most 1e4 per mask) some
masks hide everything or nothing; at the floor of the sine the penalty no longer pulls them back. Masks of
equal area reach the minimum whether they follow objects or not, so look at masks.png. std and rank say
how far the projections are spread (for mae, the features), and a run in which they are all alike ends.

Measured on one CPU thread (Intel Xeon) with --arch slim (0.3 M parameters) --batch-size 64 --warmup 0
--lr 0.4 --mask-width 8 --mask-lr 0.5 --mask-weight 0.3; the defaults have not been run. With --data
shapes --single, in 3.6 CPU minutes, the best mask covers the drawn figure with an intersection over
union of 0.78, random masks with 0.26, and the best central square with 0.44. But the features are no
better for it: a linear probe there has 51.0 %, with random masks 55.4, by SimCLR 77.0 (one seed each).
On 10,000 images of CIFAR-10 (JPEG), with --single, it reaches 40.1 % after 12 epochs, with random masks
39.5 and by SimCLR 40.8 (means of 2 seeds); one seed's masks follow the object in the middle, the other's
are nearly the same for all images. With four masks per image, after 6 epochs in the same time, it
reaches 35.7 (one seed). More is in results/README.md. This has not been run on a GPU yet, and --masks 1
and objectives other than SimCLR not at all.
"""
import argparse
import copy
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_color_jitter, random_grayscale, random_resized_crop, resize
from common.log import Log, check_spread
from common.pgd import eval_mode, frozen_stats, frozen_weights
from common.pictures import save_rows
from common.speed import compile_networks
from common.unet import UNet
from common.vit import VITS, patchify, unpatchify

MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10
STD = (0.2470, 0.2435, 0.2616)

# Which views are masked: 0 is x1, 1 is x2.
MASKED = {"simclr": (1,), "byol": (1,), "simsiam": (0, 1), "mae": (0,)}
# Of the authors' code, lambda rounded; mae's are ours.
DECAY = {"simclr": 1e-4, "byol": 1e-5, "simsiam": 1e-5, "mae": 1e-4}  # the default --weight-decay
LAMBDA = {"simclr": 0.9, "byol": 0.4, "simsiam": 0.2, "mae": 0.9}  # the default --mask-weight
HEADS = {  # sizes of the layers of projector and predictor, as in the authors' code
    "simclr": [(2048, 128)],
    "byol": [(4096, 256), (8192, 256)],
    "simsiam": [(2048, 2048, 2048), (512, 2048)],
}


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size):
    """One view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]."""
    x = random_resized_crop(x, rng, size, scale=(0.08, 1.0), flip=0.5)
    x = random_color_jitter(x, rng, 0.8, 0.8, 0.8, 0.2, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    return x.contiguous(memory_format=torch.channels_last)


def embed(net, x):
    """net(x) of x (B, ...): (B, ...), not normalised, in x's dtype."""
    with run.autocast(x.device):
        return net(x).to(x.dtype)


def propose(masker, x):
    """Masks (B, N, S, S) of x (B, 3, S, S), in [0, 1]. Several have the sum 1 at every pixel; where N
    is 1, the mask is free."""
    logits = embed(masker, x)
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def occlude(x, mask, fill):
    """x (B, 3, H, W) with the part `mask` (B, H, W) of each pixel replaced by the colour `fill` (3,
    1, 1), which is the mean of the data."""
    return x * (1 - mask[:, None]) + fill * mask[:, None]


def mask_penalty(masks):
    """Sum over n, mean over images, of 1 / sin(pi s_n), s_n the fraction of the image that mask n
    covers, the sine floored at 1e-4, flat below. masks (B, N, H, W). The minimum, at equal areas,
    is N / sin(pi / N); where N is 1 it is 1, at an area of a half."""
    return (1 / (math.pi * masks.mean((2, 3))).sin().clamp_min(1e-4)).sum(1).mean()


def simclr_loss(z1, z2, temperature):
    """Mean over all 2B anchors i of -log( e^(u_i.u_p/T) / sum_k!=i e^(u_i.u_k/T) ), p the other
    view of i. z1, z2 (B, D) are normalised here to u. Chance is ln(2B - 1)."""
    u1 = F.normalize(z1, dim=1)
    u2 = F.normalize(z2, dim=1)
    rows = torch.cat([u1, u2])  # (2B, D)
    scores = rows @ rows.T / temperature  # (2B, 2B)
    scores.fill_diagonal_(-math.inf)  # nothing is in its own denominator
    return scores.logsumexp(1).mean() - (u1 * u2).sum(1).mean() / temperature


def simsiam_loss(p, z):
    """Mean over the batch of -cos(p, z); p, z (B, D). z is taken as a constant."""
    return -(F.normalize(p, dim=1) * F.normalize(z.detach(), dim=1)).sum(1).mean()


def byol_loss(p, z):
    """Mean over the batch of 2 - 2 cos(p, z); p, z (B, D). z is taken as a constant."""
    return 2 + 2 * simsiam_loss(p, z)


def rebuild(net, x):
    """Encoder (a ViT) and decoder of each token: x (B, 3, H, W) -> (B, 3, H, W)."""
    with run.autocast(x.device):
        tokens = net[0].embed(patchify(x, net[0].patch)) + net[0].pos_embed[:, 1:]
        patches = net[1](net[0].encode(tokens))[:, 1:]
    return unpatchify(patches.to(x.dtype), net[0].patch)


def simsiam_objective(net, x1, x2, occluded):
    """SimSiam's loss over all pairs of the views x1, x2 and their masked ones, mean over the pairs
    of each mask; a prediction is never compared with the same view's own projection."""
    f = net[:2]
    q = net[2]
    z1 = embed(f, x1)
    z2 = embed(f, x2)
    p1 = embed(q, z1)
    p2 = embed(q, z2)
    loss = 0
    for x in occluded:
        x1_masked, x2_masked = x.chunk(2)
        z1_masked = embed(f, x1_masked)
        z2_masked = embed(f, x2_masked)
        p1_masked = embed(q, z1_masked)
        p2_masked = embed(q, z2_masked)
        # z is a constant: half of the pairs have no gradient to the masks, and add to the masker's
        # value alone.
        pairs = [
            (p1_masked, z2), (p2_masked, z1), (p2, z1_masked), (p1, z2_masked),
            (p1, z2), (p2, z1), (p1_masked, z2_masked), (p2_masked, z1_masked),
        ]
        loss = loss + sum(simsiam_loss(p, z) for p, z in pairs) / len(pairs)
    return loss


def disagreement(net, target, x1, x2, z1_target, occluded, *, objective, temperature, for_masker):
    """Minimised by the encoder and maximised by the masker: the sum over N masks of the objective,
    between the whole views x1, x2 (B, 3, S, S) and `occluded`, a list over masks of the V masked
    views (V B, 3, S, S).

    `for_masker` leaves out byol's term that has no gradient to the masks, about half of the value.
    """
    if objective == "mae":
        return sum((rebuild(net, x) - x1).square().mean() for x in occluded)  # Eq. 11 of the survey
    if objective == "simclr":
        z1 = dist.gather(embed(net, x1))  # negatives of all processes
        return sum(simclr_loss(z1, dist.gather(embed(net, x)), temperature) for x in occluded)
    if objective == "simsiam":
        return simsiam_objective(net, x1, x2, occluded)
    loss = sum(byol_loss(embed(net, x), z1_target) for x in occluded)
    if for_masker:
        return loss
    p1 = embed(net, x1)
    return loss + sum(byol_loss(p1, embed(target, x)) for x in occluded)


def train_step(net, target, masker, opt, opt_mask, x1, x2, control_masks, pick, *,
               objective, single, mask_weight, temperature, tau):
    """One iteration on two views (B, 3, S, S) of B images: the encoder's step and then, unless
    there are `control_masks` (V B, N, S, S), the masker's; the losses to be logged. With control
    masks the masker is MeanColour, and opt_mask None.

    With `single`, `pick` (B, 2), uniform in [0, 1), draws one mask per image for the encoder's step
    (column 0), and another for the masker's (column 1).
    """
    views = [(x1, x2)[i] for i in MASKED[objective]]
    x = torch.cat(views)  # (V B, 3, S, S)
    masks = propose(masker, x) if control_masks is None else control_masks  # (V B, N, S, S)
    z1_target = None if target is None else embed(target, x1)

    def loss_of(masks, u, for_masker):
        if single:
            chosen = (u * masks.shape[1]).long().repeat(len(views))
            masks = masks[torch.arange(len(masks), device=chosen.device), chosen][:, None]
        occluded = [occlude(x, mask, masker.mean) for mask in masks.unbind(1)]
        return disagreement(net, target, x1, x2, z1_target, occluded,
                            objective=objective, temperature=temperature, for_masker=for_masker)

    # The encoder descends; the masks are constants for it. It is in train mode, and each input is a
    # batch of its own: its running statistics mix whole and masked images, with N masks mostly masked
    # ones. BYOL's target is in train mode too; its running statistics are never used.
    loss = loss_of(masks.detach(), pick[:, 0], for_masker=False)
    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    nets = [net] if target is None else [net, target]
    dist.average_buffers(*nets)  # else the running statistics of the processes drift apart
    losses = {"loss": loss}

    # The masker ascends against the encoder as it now is, which is a constant for it: only the
    # masker's weights get a gradient. Batches are normalised by their own statistics, and the
    # running ones stay. The target moves last, so that z1_target serves both steps.
    if control_masks is None:
        with frozen_stats(net), frozen_weights(net):
            loss_mask = loss_of(masks, pick[:, 1], for_masker=True)
        penalty = len(views) * mask_penalty(masks)  # of both views, where both are masked
        opt_mask.zero_grad()
        (mask_weight * penalty - loss_mask).backward()
        dist.average_grads(masker.parameters())
        opt_mask.step()
        losses |= {"loss_mask": loss_mask, "penalty": penalty}
    if target is not None:
        optim.ema(target, net[:2], tau)
    return losses


def lr_at(epoch, epochs, lr, warmup):
    """The learning rate of `epoch`: linear over the first `warmup`, from 0.003 (`lr` where that is
    less), then a cosine to 0."""
    if epoch < warmup:
        return lr + (min(lr, 0.003) - lr) * (1 - epoch / warmup)
    return optim.cosine((epoch - warmup) / (epochs - warmup), lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="adios", arch="resnet18")
    p.add_argument("--objective", choices=MASKED, default="simclr",
                   help="the self-supervised loss that is attacked (paper; mae is the survey's)")
    p.add_argument("--masker", choices=("learned", "random", "none"), default="learned",
                   help="random or none, which are controls (ours), or learned (paper)")
    p.add_argument("--masks", type=run.integer(1), default=4,
                   help="N; several are a softmax, one (the survey's) is a sigmoid; default (authors' code)")
    p.add_argument("--single", action=argparse.BooleanOptionalAction, default=False,
                   help="one mask per image: ADIOS-s (paper)")
    p.add_argument("--mask-weight", type=run.number(),
                   help="lambda; default: 0.9 with simclr, 0.4 with byol, 0.2 with simsiam (authors' code, "
                        "rounded), 0.9 with mae (ours)")
    p.add_argument("--mask-width", type=run.integer(1), default=16, help="channels of the masker (ours)")
    p.add_argument("--mask-lr", type=run.number(), default=0.03,
                   help="of the masker's LARS, at its peak (ours)")
    p.add_argument("--epochs", type=run.integer(0), default=200,
                   help="0 exports the random encoder; default (ours)")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images per step, over all processes (ours)")
    p.add_argument("--lr", type=run.number(), default=0.2, help="of the encoder's LARS, at its peak (ours)")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="in epochs (authors' code)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6),
                   help="of both networks; default: 1e-5 with byol and simsiam, 1e-4 with simclr (authors' "
                        "code) and with mae (ours)")
    p.add_argument("--temperature", type=run.number(above=0), default=0.2, help="of simclr (authors' code)")
    p.add_argument("--ema", type=run.number(0, 1), default=0.99,
                   help="tau of byol, at the start (authors' code)")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if args.objective == "mae" and args.arch not in VITS:
        raise ValueError(f"--arch {args.arch}: --objective mae needs one of {', '.join(VITS)}")


def network(arch, objective, size):
    """Encoder and heads: images (B, 3, S, S) -> features (B, dim) -> projections (-> predictions).
    For mae, a ViT and an MLP on each of its tokens."""
    if objective == "mae":
        encoder = encoders.make(arch, mean=MEAN, std=STD, size=size)
        return nn.Sequential(encoder, encoders.mlp(encoder.dim, 512, 3 * encoder.patch**2))
    encoder = encoders.make(arch, mean=MEAN, std=STD)
    norm = None if objective == "simclr" else nn.BatchNorm1d
    net = nn.Sequential(encoder)
    dim = encoder.dim
    for sizes in HEADS[objective]:
        net.append(encoders.mlp(dim, *sizes, norm=norm))
        dim = sizes[-1]
    if objective == "simsiam":
        net[1].append(nn.BatchNorm1d(net[1][-1].out_features, affine=False))
    return net.to(memory_format=torch.channels_last)


class MeanColour(nn.Module):
    """What takes the masker's place where nobody learns the masks: only the colour of what they remove."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)


def control(rng, size, args, device):
    """Masks (V B, N, S, S) of V views that nobody learns, random or none; None for the masker's
    own."""
    if args.masker == "learned":
        return None
    views = len(MASKED[args.objective])
    shares = max(args.masks, 2)  # with --masks 1 a second field wins where nothing is removed
    u = rng.uniform(views, shares, 4, 4, device=device)
    fields = F.interpolate(u.transpose(0, 1).flatten(0, 1), size=2 * [size], mode="bicubic")
    masks = F.one_hot(fields.argmax(1), shares).movedim(3, 1).float()  # 1 where the field is the largest
    masks = masks[:, : args.masks]
    return masks if args.masker == "random" else torch.zeros_like(masks[:, :1])


def attack_settings(args):
    """The named arguments of `train_step` that come straight from the flags."""
    weight = LAMBDA[args.objective] if args.mask_weight is None else args.mask_weight
    return dict(objective=args.objective, single=args.single, mask_weight=weight,
                temperature=args.temperature)


def chance(args):
    """For the log: the loss of an encoder that knows nothing of its images, all terms together."""
    terms = 1 if args.single or args.masker == "none" else args.masks
    if args.objective == "simclr":
        return f"chance loss {terms} ln(2B - 1) = {terms * math.log(2 * args.batch_size - 1):.3f}"
    if args.objective == "byol":
        return f"chance loss {4 * terms}, where predictions are orthogonal to their targets; 0 at best"
    if args.objective == "simsiam":
        return f"chance loss 0, where predictions are orthogonal to their targets; {-terms} at best"
    return f"chance loss {terms} times the variance of the pixels, which the mean colour everywhere gives"


@torch.no_grad()
def pictures(masker, images, size, args):
    """Rows for `save_rows` of up to eight images: a view, its N masks (white is removed), and the
    view without each."""
    x, _, rng = data.sample(images, 8, args.seed)
    x = augment(x, rng, size)
    control_masks = control(rng, size, args, x.device)
    masks = propose(masker, x) if control_masks is None else control_masks[: len(x)]
    rows = [("view", x)]
    for number, mask in enumerate(masks.unbind(1), 1):
        rows.append((f"mask {number}", mask[:, None].expand_as(x)))
    for number, mask in enumerate(masks.unbind(1), 1):
        rows.append((f"without {number}", occlude(x, mask, masker.mean)))
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

    net = run.to_device(network(args.arch, args.objective, size), args, env)
    target = copy.deepcopy(net[:2]).requires_grad_(False) if args.objective == "byol" else None
    decay = DECAY[args.objective] if args.weight_decay is None else args.weight_decay
    lars = dict(lr=0.0, momentum=0.9, weight_decay=decay, trust=0.02, clip=True)
    opt = optim.LARS(optim.lars_groups(net), **lars)
    if args.masker == "learned":
        masker = UNet(args.masks, args.mask_width, size, MEAN, STD).to(device)
        opt_mask = optim.LARS(optim.lars_groups(masker), **lars)
        compile_networks(args, env, net[0], masker)
    else:
        masker = MeanColour().to(device)
        opt_mask = None
        compile_networks(args, env, net[0])

    all_steps = steps_per_epoch * args.epochs
    log = Log(args, env, all_steps, images)
    state = dict(net=net, opt=opt, log=log)
    if args.masker == "learned":
        state["masker"] = masker
        state["opt_mask"] = opt_mask
    if target is not None:
        state["target"] = target
    step = run.resume(args, env, state)
    sample, _, _ = data.sample(images, 256, args.seed)
    log.start(step, chance(args))

    settings = attack_settings(args)
    for epoch in range(step // steps_per_epoch, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, args.warmup)
        mask_lr = lr_at(epoch, args.epochs, args.mask_lr, args.warmup)
        optim.set_lr(opt, lr)
        if opt_mask is not None:
            optim.set_lr(opt_mask, mask_lr)
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            tau = optim.cosine(step / all_steps, args.ema, 1.0)
            x1 = augment(x, rng, size)
            x2 = augment(x, rng, size)  # another view: `rng` has moved on
            control_masks = control(rng, size, args, device)
            pick = rng.uniform(2, device=device)
            losses = train_step(net, target, masker, opt, opt_mask, x1, x2, control_masks, pick,
                                tau=tau, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.check()  # a loss that is not finite stops the run here, not in what follows
        with eval_mode(net), torch.no_grad():
            z = net[: 1 if args.objective == "mae" else 2](resize(sample, size))
        log.epoch(epoch, step, lr=lr, mask_lr=mask_lr, **check_spread(z, args))
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them again.
            rows = pictures(masker, images, size, args)
            if env.rank == 0:
                save_rows(out / "masks.png", rows)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
