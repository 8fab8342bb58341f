"""RoCL: robust contrastive learning (Kim, Tack & Hwang 2020, arXiv 2006.07589).

RoCL makes SimCLR robust. Without labels an image can still be mistaken for another image. The
instance-wise attack moves one view x1 so as to maximise its contrastive loss against the other
view, x2. The attacked view then joins the two as a third positive, and a small regulariser ties it
to x2 once more. There is one encoder with one set of BatchNorms for clean and attacked images
alike, and the negatives are the other images of the batch: no bank and no momentum network.

    paper                       this file
    f, g                        net: encoder and projector; embed gives z, not normalised
    u, T                        z / |z|, --temperature
    t(x), t'(x)                 x1, x2: the two views of an image
    t(x)^adv                    x_adv
    L_con                       nt_xent of two views, which the attack maximises
    L_RoCL                      loss_rocl in train_step: nt_xent of the three views x1, x2, x_adv
    L_reg, lambda               loss_reg in train_step, --reg-weight
    A-InfoNCE, alpha            asymmetric_loss, --asymmetry

We know the equations from later restatements (the survey by Qi & Shah 2022, arXiv 2210.13463) and
all hyper-parameters from the authors' code. We depart from that code in four places:
    - The gradient flows through both factors of a similarity, in the attack as well. Their code
      detaches the second one: the losses are the same, the gradients are not.
    - One temperature serves all three losses, and the regulariser has the negatives of the whole
      batch. Their code writes 0.5 into two of the losses, and the regulariser has the negatives of
      one GPU.
    - LARS has the learning rate inside its momentum buffer. Theirs has it outside, and adds 1e-8 to
      its ratio. While the rate is constant the two agree but for that 1e-8. When it changes, once per
      epoch, ours carries the old rate in its momentum for some twenty steps.
    - The embedding of the attack's target is computed once per attack. Their code takes the target
      through the network, forward and backward, at every step; in eval mode that alone changes nothing
      but rounding. Counting a backward pass to the pixels as one forward pass and a whole one as two,
      a step costs 30 forward passes instead of 43; SimCLR's costs 6.

In one point we follow the code against the paper. With three views every anchor i has two positives
j, and each of them gets a term of its own, -log(e^(u_i.u_j/T) / sum_k!=i e^(u_i.u_k/T)); the paper
takes one logarithm, with the sum over both positives in the numerator. All published weights are of
the code's form, and with two views the two agree. In one more point our flags differ: in their code
the regulariser ties the attacked view to x1 too where the attack's target is x1 (--attack-to original);
here --regularize-to alone decides.

The loss that the attack maximises is symmetric: the target is an anchor too, and the attacked views
of the other images are negatives. (The survey's Eq. 4 has one anchor, and negatives that stand
still.)

With --asymmetry, loss_rocl is A-InfoNCE (Yu et al. 2022, arXiv 2207.08374), where the attacked view
counts as a weaker positive. No gradient flows into the second factor of a similarity, so each term trains
its anchor alone (which undoes our first departure, in this loss). Terms between the clean views have
weight 1. Of a clean and an attacked view, the term with the clean anchor has weight --asymmetry, the one
with the attacked anchor 1 - --asymmetry. --hard moreover weighs the other images by their similarity to the
anchor, as hard-negative contrastive learning does (HCL, Robinson et al. 2021, arXiv 2010.04592).
Attack and regulariser stay RoCL's. Here we depart from A-InfoNCE's released code: HCL divides a
negative's weight by its mean over the anchor's negatives. That code takes the mean over the anchor and
its positives as well (as zeros), and over the other image's row instead of the anchor's.

    python rocl.py                                       CIFAR-10, ResNet-18, 1000 epochs, on one GPU
    torchrun --standalone --nproc-per-node 2 rocl.py --sync-bn    the authors' run: 2 GPUs, 256 images on each
    python rocl.py --reg-weight 0 --out runs/rocl-0      without the regulariser
    python rocl.py --asymmetry 0.2 --out runs/a-rocl     A-InfoNCE
    python rocl.py --asymmetry 0.2 --hard --out runs/a-rocl-hard    and with hard negatives
    python rocl.py --norm l2 --eps 128 --out runs/rocl-l2           attacked in l2, at 128/255
    python rocl.py --arch vit_tiny --optimizer adamw --lr 1e-3 --weight-decay 0.05 --out runs/rocl-vit
    python eval.py runs/rocl/encoder.pt --preset rocl-slf rocl-alf

The encoder is exported without the projector; its running statistics are of clean and attacked
images together.

On several processes order, augmentation and noise are those of one process. The losses have the
negatives of all of them. The attack has those of its own process alone: in the authors' run, of 256
images on each of 2 GPUs, and on one GPU of all 512. Each BatchNorm sees the images of its own process,
or with --sync-bn (on GPUs) those of all, as in the authors' code.

In the log, chance is 2 ln(3B - 1) for loss_rocl and ln(2B - 1) for loss_reg (which is not there with
--reg-weight 0), with B images per step. When all is well each falls below it; where all embeddings are
alike, each stays at it. With --asymmetry it is 4/3 ln(3B - 1) for loss_rocl, and with --hard 4/3
ln(3B - 2); with --hard a term is no longer the log of a probability, and may be negative. With --eps
0 the third view is x1 itself; with --steps 0 it is x1 plus the random start (with --no-random-start,
without it).

Measured on one CPU thread (Intel Xeon) and 10,000 images of CIFAR-10 (JPEG), with --arch slim
--batch-size 64 --warmup 0 --lr 1.5 --steps 2 --step-size 4, in 4.7 CPU minutes (10 epochs; mean of 2
seeds): a linear probe (eval.py's preset amoc-slf, 2,000 test images) reaches 43.7 %, and 13.0 % under
PGD-20 at 8/255. SimCLR (acl.py --variant s2s, 28 epochs) reaches 47.0 and 0.1 in 4.6 CPU minutes; a
random encoder, 27.4 and 0.

On all 50,000 images, judged on all 10,000 test images (one seed each), RoCL reaches 49.1 and 14.6 in 23
CPU minutes (8 epochs), SimCLR 56.0 and 0.0 in 20 (20). This has not been run on a GPU yet, and
A-InfoNCE, l2 and AdamW not at all. The authors report 83.71, and 40.27 under PGD-20 (1000 epochs).
"""
import argparse
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_color_jitter, random_grayscale, random_resized_crop, to_float
from common.log import Log
from common.pgd import ball_point, eval_mode, pgd
from common.pictures import attack_key, difference, save_rows
from common.speed import compile_networks, graphed
from common.vit import VITS


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size):
    """One view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]; the crop is
    last."""
    x = random_color_jitter(to_float(x), rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_resized_crop(x, rng, size, scale=(0.08, 1.0), flip=0.5)
    return x.contiguous(memory_format=torch.channels_last)


def embed(net, *views):
    """z of each view (B, 3, S, S), all of them in one pass: (B, 128) each, not normalised, in the
    views' dtype."""
    with run.autocast(views[0].device):
        z = net(torch.cat(views))
    return z.to(views[0].dtype).chunk(len(views))


def nt_xent(views, temperature):
    """Mean over anchors i of the sum over their positives j of -log(e^(u_i.u_j/T) / sum_k!=i
    e^(u_i.u_k/T)).

    views: V tensors (B, D), normalised here to u. Every view of every image is an anchor; its
    positives are the other V - 1 views of the image, and stay in the denominator. Chance is (V - 1)
    ln(V B - 1).
    """
    u = F.normalize(torch.stack(views), dim=2)  # (V, B, D)
    pos = (u * (u.sum(0) - u)).sum(2) / temperature  # (V, B): the sum over the other views
    rows = u.flatten(0, 1)  # (V B, D)
    scores = rows @ rows.T / temperature  # (V B, V B)
    scores.fill_diagonal_(-math.inf)  # nothing is in its own denominator
    return (len(u) - 1) * scores.logsumexp(1).mean() - pos.mean()


def asymmetric_loss(views, temperature, asymmetry, weight=1.0, hard=False, beta=1.0, tau=0.12):
    """A-InfoNCE (arXiv 2207.08374) of the views z1, z2, z_adv: tensors (B, D), normalised here to u.

    With S_ij = u_i.sg(u_j)/T, where sg stops the gradient, the term of an anchor i and its positive j
    is l_ij = -log(e^S_ij / sum_k!=i e^S_ik). The loss is the sum over all 3 B anchors of l between
    the clean views, plus `weight` times that of l from clean to attacked (`asymmetry`) and from
    attacked to clean (1 - asymmetry), divided by 3 B.

    hard: the denominator is p + G instead (HCL, arXiv 2010.04592), with p the mean of the two positive
    e^S, n the N = 3 B - 3 negative ones, R = sum n^(1 + beta) / mean n^beta, and
    G = max((R - tau N p) / (1 - tau), N e^(-1/T)). beta, how hard the negatives are, and tau, the share
    of them that is of the anchor's class, are those of A-InfoNCE's code. They and `weight` have no flags.

    Chance is (2 + 2 weight) / 3 times ln(3 B - 1), or with `hard` ln(3 B - 2).
    """
    u = F.normalize(torch.stack(views), dim=2)  # (3, B, D)
    B = u.shape[1]
    rows = u.flatten(0, 1)  # (3 B, D)
    scores = rows @ rows.detach().T / temperature  # (3 B, 3 B): of anchors and others
    itself = torch.eye(3 * B, dtype=torch.bool, device=u.device)
    if hard:
        image = torch.arange(B, device=u.device).repeat(3)
        same = image[:, None] == image  # the anchor and its positives
        log_denominator = hard_denominator(scores, same, itself, temperature, beta, tau)
    else:
        log_denominator = scores.masked_fill(itself, -math.inf).logsumexp(1)  # (3 B,)
    pos = scores.view(3, B, 3, B).diagonal(dim1=1, dim2=3)  # (3, 3, B): of two views of an image
    terms = (log_denominator.view(3, 1, B) - pos).sum(2)  # (3, 3): l from one view to another
    clean = terms[0, 1] + terms[1, 0]
    clean_to_adv = terms[0, 2] + terms[1, 2]
    adv_to_clean = terms[2, 0] + terms[2, 1]
    total = clean + weight * (asymmetry * clean_to_adv + (1 - asymmetry) * adv_to_clean)
    return total / (3 * B)


def hard_denominator(scores, same, itself, temperature, beta, tau):
    """ln(p + G) of `asymmetric_loss` for each anchor: (3 B,).

    scores, same and itself are (3 B, 3 B): S; whether two rows are of one image; and whether they are
    the same row.
    """
    log_p = scores.masked_fill(~same | itself, -math.inf).logsumexp(1) - math.log(2)
    N = len(scores) - 3
    log_sum = ((1 + beta) * scores).masked_fill(same, -math.inf).logsumexp(1)
    log_mean = (beta * scores).masked_fill(same, -math.inf).logsumexp(1) - math.log(N)
    # In units of the anchor's largest e^S nothing overflows, whatever the temperature.
    unit = scores.detach().masked_fill(itself, -math.inf).amax(1)
    p = (log_p - unit).exp()
    R = (log_sum - log_mean - unit).exp()
    floor = N * (-1 / temperature - unit).exp()
    G = ((R - tau * N * p) / (1 - tau)).maximum(floor)
    return unit + (p + G).log()


@graphed  # with --graph, on CUDA, recorded once and then replayed; the result is the same
def attack(net, x1, x2, noise, *, attack_to, temperature, norm, eps, step_size, steps):
    """x_adv (B, 3, S, S): x1 moved within eps so as to maximise the contrastive loss of the pair
    (x_adv, target).

    The target is x2, or with attack_to "original" x1. x1, x2 are in [0, 1], and eps and step_size
    in the same units; each image has a ball of the `norm` of its own. The search starts at x1 + eps
    `noise`, noise (B, 3, S, S) in the unit ball, or, where noise is None, at x1.
    """
    target = {"other": x2, "original": x1}[attack_to]
    start = x1 if noise is None else (x1 + eps * noise).clamp(0, 1)
    # In eval mode an embedding depends on its own image only. So the target's embedding is a
    # constant, computed once, and no running statistic changes.
    with eval_mode(net):
        (z,) = embed(net, target)
        z = z.detach()

        def loss_of_view(x_adv):
            (z_adv,) = embed(net, x_adv)
            return nt_xent([z_adv, z], temperature)

        return pgd(loss_of_view, x1, eps, step_size, steps, norm, start=start)


def train_step(net, opt, x1, x2, noise, *,
               reg_weight, regularize_to, asymmetry, hard, attack_to, temperature, norm, eps, step_size,
               steps):
    """One iteration on two views (B, 3, S, S) of B images; the losses to be logged. `noise` as in
    `attack`; without an asymmetry (None) the loss of the three views is RoCL's."""

    def embed_everywhere(*views):
        return [dist.gather(z) for z in embed(net, *views)]  # of all processes, with gradient

    # The attack comes first: it uses the running statistics that the step before has left.
    x_adv = attack(net, x1, x2, noise, attack_to=attack_to, temperature=temperature,
                   norm=norm, eps=eps, step_size=step_size, steps=steps)

    # Two passes in train mode, each normalised by its own batch: first [x_adv; x2], then [x1; x2;
    # x_adv]. Each moves the running statistics, so their order (the authors') matters, and the exported
    # ones describe a mixture of clean and attacked images. The perturbation is a constant here.
    losses = {}
    loss_reg = 0
    if reg_weight:
        clean = {"other": x2, "original": x1}[regularize_to]
        pair = embed_everywhere(x_adv, clean)
        loss_reg = nt_xent(pair, temperature)
        losses["loss_reg"] = loss_reg
    views = embed_everywhere(x1, x2, x_adv)
    if asymmetry is None:
        loss_rocl = nt_xent(views, temperature)
    else:
        loss_rocl = asymmetric_loss(views, temperature, asymmetry, hard=hard)
    loss = loss_rocl + reg_weight * loss_reg
    losses["loss_rocl"] = loss_rocl

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    dist.average_buffers(net)  # else the running statistics of the processes drift apart
    return {"loss": loss, **losses}


def lr_at(epoch, epochs, lr, warmup):
    """The learning rate of `epoch` 0, 1, ..., as in the authors' code: a straight line from lr / 15 (at
    "epoch -1") to lr in epoch `warmup` - 1; then half a cosine that takes `epochs` epochs, so that the run
    ends `warmup` epochs before it reaches 0."""
    if epoch < warmup:
        return lr / 15 * (1 + 14 * (epoch + 1) / warmup)
    return optim.cosine((epoch - warmup) / epochs, lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="rocl", arch="resnet18", graph=True)
    p.add_argument("--epochs", type=run.integer(0), default=1000,
                   help="0 exports the random encoder; default (authors' code)")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images per step, over all processes (authors' code)")
    p.add_argument("--optimizer", choices=("lars", "adamw"), default="lars",
                   help="adamw, for a ViT, does not decay biases and norms (ours); lars (authors' code)")
    p.add_argument("--lr", type=run.number(), default=1.5, help="at its peak (authors' code)")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="in epochs (authors' code)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=1e-6, help="(authors' code)")
    p.add_argument("--temperature", type=run.number(above=0), default=0.5,
                   help="of all three losses (authors' code)")
    p.add_argument("--reg-weight", type=run.number(), default=1 / 256,
                   help="lambda; 0 leaves the regulariser out (authors' code)")
    p.add_argument("--attack-to", choices=("other", "original"), default="other",
                   help="the target of the attack: the other view, x2, or x1 itself (authors' code)")
    p.add_argument("--regularize-to", choices=("other", "original"), default="other",
                   help="the partner of x_adv in the regulariser, likewise (authors' code)")
    p.add_argument("--asymmetry", type=run.number(0, 1),
                   help="alpha of A-InfoNCE, which has 0.2: of a clean and an attacked view, the weight of "
                        "the term whose anchor is the clean one; default: none, RoCL's loss (authors' code)")
    p.add_argument("--hard", action=argparse.BooleanOptionalAction, default=False,
                   help="with --asymmetry, hard negatives too, as A-InfoNCE's paper has them; default: "
                        "without (authors' code)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf",
                   help="of the attack: l2, with --eps 128 for example (ours), or linf (authors' code)")
    p.add_argument("--eps", type=run.number(0, 1e6), default=8.0,
                   help="radius of the attack, in 1/255; their 0.0314 (authors' code)")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attack, in 1/255; default: for l2 1.25 eps / steps (ours), and for linf "
                        "1.785, which is 0.007 (authors' code)")
    p.add_argument("--steps", type=run.integer(0), default=7, help="of the attack (authors' code)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (authors' code); without it, at "
                        "the image: with --steps 1 and --step-size equal to --eps, in linf, that is FGSM")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if args.norm == "linf" and args.eps > 255:
        raise ValueError(f"--eps {args.eps:g}: with --norm linf at most 255, the range of a pixel")
    if args.hard and args.asymmetry is None:
        raise ValueError("--hard: goes with --asymmetry, as in --asymmetry 0.2 --hard")


def network(arch):
    """An encoder without BatchNorm branches, and a projector without BatchNorm: images (B, 3, S, S)
    -> (B, 128). Images are not normalised."""
    encoder = encoders.make(arch, mean=(0, 0, 0), std=(1, 1, 1))
    if arch not in VITS and ":" not in arch:  # a network of one's own keeps its weights
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()  # PyTorch's default start, as in the authors' code
    projector = encoders.mlp(encoder.dim, 4 * encoder.dim, 128)
    return nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)


def start_noise(x1, norm, rng):
    """The noise from which the attack on the view x1 starts, as `attack` takes it: (B, 3, S, S), each image
    uniform in the unit ball of the `norm`."""
    # One number more than there are pixels: under l2 it sets the distance from the centre, under linf it
    # is not used.
    return ball_point(rng.uniform(1 + x1[0].numel(), device=x1.device), norm).view(x1.shape)


def attack_settings(args):
    """The named arguments of `attack` as the flags have them; eps and step_size as pixel values in
    [0, 1]."""
    eps = args.eps / 255
    if args.step_size is not None:
        step_size = args.step_size / 255
    elif args.norm == "linf":
        step_size = 1.785 / 255
    else:
        step_size = 1.25 * eps / max(1, args.steps)
    return dict(
        attack_to=args.attack_to,
        temperature=args.temperature,
        norm=args.norm,
        eps=eps,
        step_size=step_size,
        steps=args.steps,
    )


def chance(args):
    """The formula and the value of loss_rocl where all rows are alike."""
    if args.asymmetry is None:
        return "2 ln(3B - 1)", 2 * math.log(3 * args.batch_size - 1)
    if args.hard:
        return "4/3 ln(3B - 2)", 4 / 3 * math.log(3 * args.batch_size - 2)
    return "4/3 ln(3B - 1)", 4 / 3 * math.log(3 * args.batch_size - 1)


def pictures(net, images, size, args):
    """Rows for `save_rows` of up to eight images: both views; and with --eps the attacked one, and what
    the attack added, of which white and black are eps, or under l2 the largest change."""
    x, _, rng = data.sample(images, 8, args.seed)
    x1 = augment(x, rng, size)
    x2 = augment(x, rng, size)
    rows = [("x1", x1), ("x2", x2)]
    if args.eps:
        noise = start_noise(x1, args.norm, rng) if args.random_start else None
        x_adv = attack(net, x1, x2, noise, **attack_settings(args))
        full_scale = args.eps / 255 if args.norm == "linf" else None
        rows += [("x_adv", x_adv), ("x_adv - x1", difference(x_adv, x1, full_scale))]
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
    # BatchNorm, and the negatives within the batch, need two images per process.
    steps_per_epoch = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch), args, env)
    if args.optimizer == "adamw":
        groups = optim.groups(net.named_parameters(), args.weight_decay)
        opt = torch.optim.AdamW(groups, args.lr)
    else:
        opt = optim.LARS(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    compile_networks(args, env, net)

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    formula, chance_rocl = chance(args)
    chance_reg = math.log(2 * args.batch_size - 1)
    about_reg = f", loss_reg ln(2B - 1) = {chance_reg:.3f}" if args.reg_weight else ""
    log.start(step, f"chance: loss_rocl {formula} = {chance_rocl:.3f}{about_reg}")

    settings = dict(reg_weight=args.reg_weight, regularize_to=args.regularize_to, asymmetry=args.asymmetry,
                    hard=args.hard, **attack_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, args.warmup)
        optim.set_lr(opt, lr)
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            x1 = augment(x, rng, size)
            x2 = augment(x, rng, size)  # another view: `rng` has moved on
            noise = start_noise(x1, args.norm, rng) if args.random_start else None
            losses = train_step(net, opt, x1, x2, noise, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again.
            rows = pictures(net, images, size, args)
            if env.rank == 0:
                key = attack_key(args.norm, args.eps) if args.eps else None
                save_rows(out / "views.png", rows, key)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
