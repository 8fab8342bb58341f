"""Adversarial RotNet (Rebuffi et al. 2023, "Adversarially Self-Supervised Pre-training Improves
Accuracy and Robustness", Eq. 5), on RotNet (Gidaris et al. 2018, arXiv 1803.07728). With --target
labels it also trains a supervised encoder adversarially, for comparison.

RotNet turns each image by 0, 1, 2 or 3 quarter turns, and learns to tell by how many. For that a
network must know what things look like upright. Adversarial RotNet attacks the turned image, so
that the network cannot lean on fragile cues, such as colour fringes and the statistics of edges.
There are no negatives, no second view and no target network, so it is among the cheapest
adversarial pretext tasks.

With --target labels the same loop learns the classes instead. This is adversarial training (Madry
et al. 2018, arXiv 1706.06083), or with --loss trades TRADES (Zhang et al. 2019, arXiv 1901.08573).

    paper                       this file
    f                           net: an encoder and a linear head
    rot(x, 90 y)                rotate, by y quarter turns counter-clockwise; y is drawn for each image
    max over delta in S         attack: --norm, --eps, K = --steps
    Eq. 5                       loss in train_step with --loss ce: the cross-entropy at the attacked image
    TRADES, Eq. 5 of Zhang      trades: both terms carry gradient to the weights

The perturbation is added after the rotation, and there is no clean term. Eq. 2 of the paper prints
the gradient's sign for both norms; we take its direction for l2, as BYORL, by the same group, does.
Where the paper is silent we choose: the attack climbs the cross-entropy of the hard label, in eval
mode, and is clipped to [0, 1]. We leave out its RandAugment, some of whose operations turn the
image themselves, and for simplicity the moving average of its weights. Each image has one rotation
per step; Gidaris et al. put all four into a batch. The attack of TRADES starts at a random point of
the ball, where theirs starts at Gaussian noise of 0.001.

No run of the paper is at 32 x 32. The defaults are ours, for CIFAR-10: a small ViT, and light
colour jitter, for colour is a shortcut; linf 4/255 is the paper's best radius at 224 pixels. The
first command is the paper's recipe without RandAugment and moving average, with MAE's warm-up; crops
are cut from the central square of a picture, reduced to --image-size. The two with --target labels
are adversarial training by PGD-10, as is usual on CIFAR-10, and the supervised row of Rebuffi et al.
(linf 6/255 and K = 2 are theirs) by our recipe for CIFAR-10. Of TRADES we have the loss and beta; for
an attack like that of adversarial training, give --eps, --step-size and --steps as there:

    torchrun --standalone --nproc-per-node 8 rotnet.py --data path/to/imagenet --arch vit_base \
--image-size 224 --crop resized --jitter 0 --epochs 300 --batch-size 4096 --lr 1.6e-3 --weight-decay 0.3 \
--smoothing 0.1 --drop-path 0.1
    python rotnet.py                                     linf 4/255, K = 2: CIFAR-10, 400 epochs
    python rotnet.py --norm l2 --eps 145 --out runs/l2   l2 0.57: the paper's 4 at 224 pixels, times 32/224
    python rotnet.py --eps 0 --out runs/rotnet-clean     RotNet, the clean base
    python rotnet.py --target labels --arch resnet18 --optimizer sgd --lr 0.1 --weight-decay 5e-4 \
--batch-size 128 --epochs 200 --warmup 0 --milestones 100 150 --jitter 0 --eps 8 --step-size 2 --steps 10 \
--out runs/adversarial-training
    python rotnet.py --target labels --eps 6 --out runs/supervised
    python eval.py runs/rotnet/encoder.pt --preset knn mae-tune-cifar mae-slf-cifar

A step costs 2 K + 3 forward passes, 7 with K = 2, counting a backward pass to the pixels as one
forward pass and a whole one as two; RotNet's costs 3, since with --eps 0 nothing is attacked, and
TRADES' 2 K + 7. The encoder is exported without the head. At test time a ResNet normalises whatever
it sees by the running statistics of training: those of attacked images, with --eps 0 of clean ones,
with TRADES of both. A ViT has none.

On several processes, gradients and running statistics are averaged. The order of the images, their
augmentation, the rotations and the noise are the same as on one process; drop path is not. Each
BatchNorm sees the images of its own process, or with --sync-bn (on GPUs) those of all.

In the log, chance is ln C for the loss and 1/C for both accuracies, where C is the number of
classes: 1.386 and 0.25 for rotations. accuracy is that of attacked images, in train mode;
clean_accuracy, which should soon be above it, is that of up to 256 training images, in eval mode,
after each epoch. In the first run below the loss goes from 1.41 to 1.24, accuracy from 0.28 to 0.40,
and clean_accuracy from 0.46 to 0.52. A loss that stays at chance asks for a lower --lr or a smaller
--eps. With --steps 0 the images are moved by the random start alone (with --no-random-start, not at
all).

Measured on one CPU thread (Intel Xeon) and 10,000 images of CIFAR-10 (JPEG), with --arch slim
--batch-size 64 --optimizer sgd --lr 0.05 --weight-decay 5e-4 --warmup 0 --eps 8 --step-size 4, in 9.9
CPU minutes (30 epochs): a linear probe (eval.py's preset amoc-slf, 2,000 test images) reaches 32.6 %,
and 20.7 under PGD-20 at 8/255. RotNet reaches 44.9 and 0.1 in 10.1 CPU minutes (60 epochs); a random
encoder, 27.4 and 0. With --norm l2 --eps 128 --step-size 64 it is 38.1, and 12.2 under the same PGD-20
(linf). With --target labels, for 8 to 10 CPU minutes, adversarial training reaches 53.8 and 21.8, TRADES
52.9 and 18.5, and no attack 74.3 and 0.

On all 50,000 images, judged on all 10,000 test images (one seed each), adversarial RotNet reaches 36.3
and 20.4 in 18 CPU minutes (18 epochs), RotNet 49.9 and 0.0 in 16 (35), adversarial training 66.1 and
26.1 in 20 (19), TRADES 64.5 and 23.0 in 17 (12). Nothing has run on a GPU yet. The paper's 97.29 on
CIFAR-10 is of a ViT-B/16, pretrained on ImageNet, at 224 pixels.
"""
import argparse
import hashlib
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_color_jitter, random_flip, random_pad_crop, random_resized_crop, resize
from common.log import Log
from common.pgd import ball_point, eval_mode, pgd
from common.pictures import attack_key, difference, save_rows
from common.speed import compile_networks, graphed
from common.vit import VITS

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in MAE's code
STD = (0.229, 0.224, 0.225)


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size, crop, jitter):
    """A view of the uint8 images x (B, 3, H, W), upright: floats (B, 3, size, size) in [0, 1]. With
    `crop` "padded" it is the image at that size, padded by 4 pixels and cut; with "resized" a part of
    the image."""
    if crop == "resized":
        x = random_resized_crop(x, rng, size, scale=(0.2, 1.0), flip=0.5)
    else:
        x = random_flip(random_pad_crop(resize(x, size), rng, padding=4), rng)
    if jitter:  # hue a quarter of the rest, and p = 0.8, as in SimCLR
        x = random_color_jitter(x, rng, jitter, jitter, jitter, jitter / 4, p=0.8)
    return x


def rotate(x, y):
    """x (B, C, S, S), image b turned by y_b quarters counter-clockwise; y (B,) int64, from 0 to 3."""
    turned = x
    for quarters in (1, 2, 3):
        chosen = (y == quarters).view(-1, 1, 1, 1)
        turned = torch.where(chosen, x.rot90(quarters, (2, 3)), turned)
    return turned.contiguous(memory_format=torch.channels_last)


def predict(net, x):
    """The logits of x (B, 3, S, S): (B, classes), in x's dtype."""
    with run.autocast(x.device):
        logits = net(x)
    return logits.to(x.dtype)


def cross_entropy(logits, y, smoothing=0.0):
    """Mean over the batch of the cross-entropy of logits (B, C) with y (B,), of which `smoothing` is
    spread over all C classes."""
    return F.cross_entropy(logits, y, label_smoothing=smoothing)


def divergence(logits, logits_adv):
    """KL(p(x) || p(x_adv)) of logits (B, C), mean over the batch."""
    return F.kl_div(F.log_softmax(logits_adv, 1), F.softmax(logits, 1), reduction="batchmean")


def trades(logits, logits_adv, y, beta=6.0):
    """TRADES: the cross-entropy of the clean image, and beta times the divergence between the
    predictions of the clean and the attacked one."""
    return cross_entropy(logits, y) + beta * divergence(logits, logits_adv)


@graphed  # with --graph, on CUDA, recorded once and then replayed; the result is the same
def attack(net, x, y, noise, *, loss_name="ce", norm, eps, step_size, steps):
    """The inner maximum of Eq. 5: x (B, 3, S, S) in [0, 1] moved within eps so as to maximise the
    cross-entropy with y (B,), or, where loss_name is "trades", the divergence from the clean
    prediction.

    eps and step_size are in the units of x. The search starts at x + eps `noise`, noise (B, 3 S S)
    in the unit ball of the `norm`, or, where noise is None, at x.
    """
    if loss_name not in ("ce", "trades"):
        raise ValueError(f"loss_name {loss_name!r}: choose ce or trades")
    start = x if noise is None else (x + eps * noise.view(x.shape)).clamp(0, 1)
    # In eval mode, no running statistic changes, and no image changes another's prediction. The
    # weights stand still, and so does the clean prediction: it is made once.
    with eval_mode(net):
        clean = predict(net, x).detach() if loss_name == "trades" else None

        def loss_of_images(x_adv):
            logits = predict(net, x_adv)
            return cross_entropy(logits, y) if clean is None else divergence(clean, logits)

        return pgd(loss_of_images, x, eps, step_size, steps, norm, start=start)


def train_step(net, opt, x, y, noise, *, loss_name, smoothing, beta, norm, eps, step_size, steps):
    """One iteration on images x (B, 3, S, S), turned already, and their targets y (B,); the loss
    and the accuracy to be logged. `noise` and loss_name are as in `attack`."""
    # The attack comes first: it uses the running statistics that the step before has left.
    x_adv = attack(net, x, y, noise,
                   loss_name=loss_name, norm=norm, eps=eps, step_size=step_size, steps=steps)

    if loss_name == "trades":
        logits = predict(net, x)
        logits_adv = predict(net, x_adv)
        loss = trades(logits, logits_adv, y, beta)
    else:
        logits_adv = predict(net, x_adv)
        loss = cross_entropy(logits_adv, y, smoothing)

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    dist.average_buffers(net)  # else the running statistics of the processes drift apart
    return {"loss": loss, "accuracy": (logits_adv.argmax(1) == y).float().mean()}


def lr_at(epoch, epochs, lr, warmup, milestones):
    """The learning rate at the fractional `epoch`: linear from 0 over the first `warmup`; then a
    cosine to 0, or, with `milestones`, a tenth from each of them on."""
    if not milestones:
        return optim.warmup_cosine(epoch, epochs, warmup, lr)
    if epoch < warmup:
        return lr * epoch / warmup
    return lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="rotnet", arch="vit_tiny", graph=True)
    p.add_argument("--target", choices=("rotation", "labels"), default="rotation",
                   help="what is learnt: rotations, or the classes of labelled images (paper has both)")
    p.add_argument("--loss", choices=("ce", "trades"), default="ce",
                   help="trades, for labels (ours), or ce, the cross-entropy of the attacked image (paper)")
    p.add_argument("--beta", type=run.number(), default=6.0,
                   help="weight of the divergence with --loss trades, 6 in the paper of TRADES; "
                        "default (ours)")
    p.add_argument("--smoothing", type=run.number(0, 1), default=0.0,
                   help="of the labels, in the cross-entropy, 0.1 in the paper; default (ours)")
    p.add_argument("--drop-path", type=run.number(0, 1), default=0.0,
                   help="probability to skip the last block, 0.1 in the paper; default (ours)")
    p.add_argument("--crop", choices=("padded", "resized"), default="padded",
                   help="resized, a part of the image (paper), or padded, all of it, with 4 pixels around "
                        "it (ours)")
    p.add_argument("--jitter", type=run.number(0, 1), default=0.2,
                   help="strength of the colour jitter, none in the paper; default (ours)")
    p.add_argument("--epochs", type=run.integer(0), default=400,
                   help="0 exports the random encoder; default (ours)")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images per step, over all processes (ours)")
    p.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw",
                   help="sgd, with momentum 0.9 (ours), or adamw, which does not decay biases and norms "
                        "(paper)")
    p.add_argument("--lr", type=run.number(), default=1e-3, help="at its peak (ours)")
    p.add_argument("--warmup", type=run.integer(0), default=20, help="in epochs (MAE's)")
    p.add_argument("--milestones", type=run.integer(1), nargs="+", default=[],
                   help="epochs from which the rate is a tenth; default: none, a cosine (paper)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=0.05, help="(ours)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf", help="of the attack (paper has both)")
    p.add_argument("--eps", type=run.number(0, 1e6), default=4.0,
                   help="radius of the attack, in 1/255; 0 gives RotNet, 4 is best at 224 pixels (paper)")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attack, in 1/255; default: 5/8 eps (paper)")
    p.add_argument("--steps", type=run.integer(0), default=2, help="K, of the attack (paper)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (paper); without it, at "
                        "the image: with --steps 1 and --step-size equal to --eps, in linf, that is FGSM")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if args.norm == "linf" and args.eps > 255:
        raise ValueError(f"--eps {args.eps:g}: with --norm linf at most 255, the range of a pixel")
    if args.loss == "trades" and args.target != "labels":
        raise ValueError("--loss trades: is for --target labels")
    if args.loss == "trades" and args.eps and args.steps and not args.random_start:
        raise ValueError("--loss trades: its attack cannot start at the image, where the gradient is 0; "
                         "leave out --no-random-start")
    if args.loss == "trades" and args.smoothing:
        raise ValueError("--smoothing: is for --loss ce")
    if args.milestones and min(args.milestones) < args.warmup:
        raise ValueError(f"--milestones {min(args.milestones)}: lies within the {args.warmup} epochs of "
                         "--warmup; choose later ones, or --warmup 0")


def network(arch, size, classes, drop_path=0.0):
    """An encoder and a linear head: images (B, 3, S, S) -> logits (B, classes). The features of a ViT
    are the mean of its patches' tokens, and then LayerNorm, as in MAE's fine-tuning."""
    encoder = encoders.make(arch, mean=MEAN, std=STD, size=size, fc_norm=arch in VITS)
    if drop_path and not encoders.has_blocks(encoder):
        raise ValueError(f"--drop-path: needs a network of this project, and {arch} is none")
    encoders.drop_path(encoder, drop_path)
    return nn.Sequential(encoder, nn.Linear(encoder.dim, classes)).to(memory_format=torch.channels_last)


def task(x, labels, rng, size, args):
    """What a step learns from uint8 images x (B, 3, H, W) and their `labels` (B,): views (B, 3, size,
    size) and targets (B,)."""
    x = augment(x, rng, size, args.crop, args.jitter)
    if args.target == "labels":
        return x.contiguous(memory_format=torch.channels_last), labels
    y = (4 * rng.uniform(1, device=x.device)[:, 0]).long()
    return rotate(x, y), y


def start_noise(x, norm, rng):
    """The noise from which the attack on the views x starts, as `attack` takes it: (B, 3 S S), uniform in
    the unit ball of the `norm`."""
    # One number more than there are pixels: under l2 it sets the distance from the centre, under linf it
    # is not used.
    return ball_point(rng.uniform(1 + x[0].numel(), device=x.device), norm)


def attack_settings(args):
    """The named arguments of `attack` as the flags have them; eps and step_size as pixel values in
    [0, 1]."""
    eps = args.eps / 255
    step_size = 5 / 8 * eps if args.step_size is None else args.step_size / 255
    return dict(loss_name=args.loss, norm=args.norm, eps=eps, step_size=step_size, steps=args.steps)


@torch.no_grad()
def clean_accuracy(net, images, size, args):
    """The share of up to 256 training images, augmented and turned as in training, that `net` gets
    right in eval mode."""
    x, labels, rng = data.sample(images, 256, args.seed)
    x, y = task(x, labels, rng, size, args)
    with eval_mode(net):
        return (predict(net, x).argmax(1) == y).float().mean().item()


def pictures(net, images, size, args):
    """Rows for `save_rows` of up to eight images: the view, turned; and with --eps the same attacked, and
    what the attack added."""
    x, labels, rng = data.sample(images, 8, args.seed)
    x, y = task(x, labels, rng, size, args)
    rows = [("x", x)]
    if args.eps:
        noise = start_noise(x, args.norm, rng) if args.random_start else None
        x_adv = attack(net, x, y, noise, **attack_settings(args))
        full_scale = args.eps / 255 if args.norm == "linf" else None
        rows += [("x_adv", x_adv), ("x_adv - x", difference(x_adv, x, full_scale))]
    return rows


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    env = run.setup(args)
    device = env.device
    out = pathlib.Path(args.out)
    split = "labelled" if args.target == "labels" else "train"
    images = data.load(args.data, args.data_dir, split, device, args.limit,
                       args.image_size or 32, args.workers)
    if args.target == "labels" and images.y.min() < 0:
        raise ValueError(f"--target labels: {args.data} has images without a label")
    size = run.image_size(args, images)
    # BatchNorm in train mode needs two images per process.
    steps_per_epoch = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    classes = images.classes if args.target == "labels" else 4
    net = run.to_device(network(args.arch, size, classes, args.drop_path), args, env)
    if args.optimizer == "adamw":
        groups = optim.groups(net.named_parameters(), args.weight_decay)
        opt = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95))  # as MAE's
    else:
        opt = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    compile_networks(args, env, net)

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    if args.target == "labels":  # a run is continued with the same labels only
        log.data["labels"] = hashlib.sha256(images.y.cpu().contiguous().numpy()).hexdigest()
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    log.start(step, f"chance loss ln {classes} = {math.log(classes):.3f}")

    settings = dict(smoothing=args.smoothing, beta=args.beta, **attack_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        batches = data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first)
        for x, labels, rng in batches:
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step / steps_per_epoch, args.epochs, args.lr, args.warmup, args.milestones)
            optim.set_lr(opt, lr)
            x, y = task(x, labels, rng, size, args)
            noise = start_noise(x, args.norm, rng) if args.random_start else None
            # Drop path draws from torch's own generator: seeded here, a run that is continued draws the same.
            torch.manual_seed(rng.seed + env.rank)
            losses = train_step(net, opt, x, y, noise, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr, clean_accuracy=clean_accuracy(net, images, size, args))
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
