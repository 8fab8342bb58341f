"""RoCL: robust contrastive learning (Kim, Tack & Hwang 2020, arXiv 2006.07589).

SimCLR, made robust. Without labels an image can still be taken for another image: the instance-wise attack
moves one view x1 so as to maximise its contrastive loss against the other view x2. The attacked view then
joins the two as a third positive, and a small regulariser ties it to its target once more. One encoder, one
BatchNorm for clean and attacked images alike, in-batch negatives; no bank, no momentum network.

    paper                       here
    f, g                        net: encoder and projector; embed() gives z, un-normalised
    t(x), t'(x)                 x1, x2
    t(x)^adv                    x_adv
    L_con                       nt_xent of two views, which the attack maximises
    L_RoCL                      loss_rocl: nt_xent of the three views x1, x2, x_adv
    L_reg, lambda               loss_reg, --reg-weight

We know the equations from later restatements ("the survey": Qi & Shah 2022, arXiv 2210.13463), all
hyper-parameters from the authors' code. Where we depart from that code:
    - the gradient flows through both factors of a similarity (their code detaches the second: the same loss,
      another gradient);
    - one temperature serves all three losses (their code writes 0.5 into two of them), and the regulariser
      has the whole batch's negatives (theirs: those of one GPU);
    - LARS has the learning rate inside its momentum buffer (theirs: outside, and 1e-8 in its ratio), which
      is the same as long as the rate is constant;
    - z of the attack's target is computed once per attack, and `pgd` makes no weight gradient: the same in
      eval mode, up to rounding, and 30 instead of 43 forwards per step (a backward to the pixels counts 1, a
      whole one 2).

In one thing we follow the code against the paper: with three views each positive has a term of its own,
-log(e^positive / sum over all others), where the paper takes the log of the positives' sum. All published
weights are of this form; with two views both are the same.

The loss that the attack maximises is symmetric: the target is an anchor too, and the attacked views of other
images are negatives (the survey's Eq. 4 has one anchor, and negatives that stand still).

BatchNorm: the attack runs in eval mode and changes nothing. The regulariser's pass [x_adv; x2] and the main
pass [x1; x2; x_adv] each have their own batch statistics and each move the running ones.

Several processes share their negatives, except within the attack, whose negatives are the images of its own
process (in the authors' run 256, on each of 2 GPUs). Each BatchNorm sees the images of its own process, or
with --sync-bn (on GPUs) those of all, as in the authors' code.

    python rocl.py                                       the authors' run: CIFAR-10, ResNet-18, 1000 epochs
    torchrun --standalone --nproc-per-node 2 rocl.py --sync-bn    the same on 2 GPUs, 256 images on each
    python rocl.py --reg-weight 0 --out runs/rocl-0      without the regulariser
    python eval.py runs/rocl/encoder.pt --preset rocl-slf rocl-alf

Measured on a CPU thread (Intel Xeon), 0.3 M-parameter encoder, 10,000 images of CIFAR-10 (JPEG), 4.7 minutes
(10 epochs, 2 attack steps; 2 seeds): linear probe 43.7 standard, 13.0 under PGD-20 at 8/255; SimCLR in that
time 47.0 and 0.1, a random encoder 27.4 and 0. Not yet run on a GPU; the authors have 83.71 and 40.27 (1000
epochs).
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
from common.pgd import eval_mode, pgd


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size):
    """One view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]; the crop is last."""
    x = random_color_jitter(to_float(x), rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_resized_crop(x, rng, size, scale=(0.08, 1.0), flip=0.5)
    return x.contiguous(memory_format=torch.channels_last)


def embed(net, *views):
    """z of each view (B, 3, S, S), all in one pass: (B, 128) each, in the views' dtype."""
    with run.autocast(views[0].device):
        z = net(torch.cat(views))
    return z.to(views[0].dtype).chunk(len(views))


def nt_xent(views, temperature):
    """Mean over anchors i of the sum over their positives j of -log(e^(u_i.u_j/T) / sum_k!=i e^(u_i.u_k/T)).

    views: V tensors (B, D), normalised here to u. Every view of every image is an anchor; its positives are
    the other V - 1 views of the image, and stay in the denominator. Chance is (V - 1) ln(V B - 1).
    """
    u = F.normalize(torch.stack(views), dim=2)  # (V, B, D)
    pos = (u * (u.sum(0) - u)).sum(2) / temperature  # (V, B): the sum over the other views
    rows = u.flatten(0, 1)  # (V B, D)
    scores = rows @ rows.T / temperature  # (V B, V B)
    scores.fill_diagonal_(-math.inf)  # nothing is in its own denominator
    return (len(u) - 1) * scores.logsumexp(1).mean() - pos.mean()


def attack(net, x1, x2, noise, args):
    """x_adv (B, 3, S, S): x1 moved within eps to maximise the loss of the pair (x_adv, target), target x2
    unless --attack-to says otherwise. It starts at x1 + eps `noise`, noise (B, 3, S, S) in [-1, 1], or under
    --no-random-start at x1.

    Eval mode: an embedding then depends on its own image only, so the target's is a constant, and no running
    statistic changes.
    """
    eps = args.eps / 255
    start = (x1 + eps * noise).clamp(0, 1) if args.random_start else x1
    with eval_mode(net):
        z = embed(net, x2 if args.attack_to == "other" else x1)[0].detach()
        return pgd(lambda x: nt_xent([*embed(net, x), z], args.temperature),
                   x1, eps, args.step_size / 255, args.steps, start=start)


def train_step(net, opt, x1, x2, noise, args):
    """One iteration on two views (B, 3, S, S); `noise`, of their shape and in [-1, 1], starts the attack."""
    def loss_of(*views):
        return nt_xent([dist.gather(z) for z in embed(net, *views)], args.temperature)

    x_adv = attack(net, x1, x2, noise, args)
    losses = {}
    if args.reg_weight:  # before the main pass: running statistics depend on the order
        losses["loss_reg"] = loss_of(x_adv, x2 if args.regularize_to == "other" else x1)
    losses["loss_rocl"] = loss_of(x1, x2, x_adv)
    loss = losses["loss_rocl"] + args.reg_weight * losses.get("loss_reg", 0)

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    dist.average_buffers(net)  # else the ranks' running statistics drift apart
    return {"loss": loss, **losses}


def lr_at(epoch, epochs, lr, warmup):
    """By epoch: linear up to `lr` over the first `warmup`; then a cosine that would end `warmup` epochs after
    the run."""
    if epoch < warmup:
        return lr / 15 * (1 + 14 * (epoch + 1) / warmup)
    return optim.cosine((epoch - warmup) / epochs, lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="rocl", arch="resnet18")
    p.add_argument("--epochs", type=run.integer(0), default=1000, help="0 exports the random encoder")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images a step, over all processes")
    p.add_argument("--lr", type=run.number(), default=1.5, help="of LARS, at its peak")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="epochs")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=1e-6)
    p.add_argument("--temperature", type=run.number(above=0), default=0.5)
    p.add_argument("--reg-weight", type=run.number(), default=1 / 256, help="lambda; 0: no regulariser")
    p.add_argument("--attack-to", choices=("other", "original"), default="other",
                   help="target of the attack: other (x2) or original (x1)")
    p.add_argument("--regularize-to", choices=("other", "original"), default="other",
                   help="partner of x_adv in the regulariser, likewise")
    p.add_argument("--eps", type=run.number(0, 255), default=8.0,
                   help="linf radius of the attack, in 1/255")
    p.add_argument("--step-size", type=run.number(0, 255), default=1.785,
                   help="of the attack, in 1/255; this is 0.007")
    p.add_argument("--steps", type=run.integer(0), default=7, help="of the attack")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (authors' code); without, at the "
                        "image: with --steps 1 and --step-size equal to --eps that is FGSM")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view; default: that of the data's images, of a folder's 32")
    return p


def network(arch):
    """Encoder, without BN branches, and projector, without BN: (B, 3, S, S) in [0, 1] -> (B, 128). Images are
    not normalised."""
    encoder = encoders.make(arch, mean=(0, 0, 0), std=(1, 1, 1))
    for m in encoder.modules():
        if isinstance(m, nn.Conv2d):
            m.reset_parameters()  # PyTorch's default start, as in the authors' code
    projector = encoders.mlp(encoder.dim, 4 * encoder.dim, 128)
    return nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)


def pictures(path, net, images, size, args):
    """Rows of up to eight: x1, x2, x_adv and its perturbation (grey is none, full scale is eps)."""
    x, _, rng = next(data.batches(images, min(8, len(images)), args.seed, 0))
    x1, x2 = (augment(x, rng, size) for _ in range(2))
    x_adv = attack(net, x1, x2, 2 * rng.uniform(*x1.shape[1:], device=x1.device) - 1, args)
    rows = x1, x2, x_adv, 0.5 + (x_adv - x1) / (2 * max(args.eps / 255, 1e-8))
    run.save_picture(torch.cat(rows), path, len(x1))


def main(argv=None):
    args = parser().parse_args(argv)
    env = run.setup(args)
    device, out = env.device, pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    steps = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch), args, env)
    opt = optim.LARS(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    if args.compile:
        net.compile()

    log = Log(args, env, steps * args.epochs, images)
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    chance = 2 * math.log(3 * args.batch_size - 1), math.log(2 * args.batch_size - 1)
    log.start(step, "chance: loss_rocl 2 ln(3B - 1) = {:.3f}, loss_reg ln(2B - 1) = {:.3f}".format(*chance))

    for epoch in range(step // steps, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, args.warmup)
        optim.set_lr(opt, lr)
        begin = step % steps  # of the epoch's steps; not 0 where a run stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, begin):
            run.stop_if_signalled(args, env, state, step)
            x1, x2 = (augment(x, rng, size) for _ in range(2))  # `rng` moves on between them
            noise = 2 * rng.uniform(*x1.shape[1:], device=device) - 1
            losses = train_step(net, opt, x1, x2, noise, args)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            if env.rank == 0:  # before the checkpoint, so that none is missing when the run goes on
                pictures(out / "views.png", net, images, size, args)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
