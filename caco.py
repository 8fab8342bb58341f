"""CaCo: cooperative positives and adversarial negatives from one bank (Wang et al. 2022, arXiv 2203.14370).

As in AdCo a bank of free vectors gives the negatives and climbs the loss while the network descends it. Here
it gives the positive too: the row nearest to the key of the *other* view. The positive moves towards its
query, because that lowers the loss; the negatives do too, because that raises it.

An adversarial positive (--positives adversarial) flees instead: a published ablation, of which "the survey"
(Qi & Shah 2022, arXiv 2210.13463) reports an accuracy close to zero. In our small runs fewer and fewer rows
were positives, but after 14 epochs the encoder was as good.

    paper (equations: the survey's)     here
    f_q, f_k                            net, target: encoder, projector; embed() adds u(z) = z / |z|
    the memory bank                     n, the unit rows of bank.rows, which are free in length
    the positive, picked in the bank    positives
    contrastive loss over the bank      contrastive_loss
    Eq. 12 for positives, Eq. 7 else    the bank's gradient of cooperative_loss; bank_step
    Eq. 13 for positives, Eq. 7 else    that of contrastive_loss

The body of the paper was not at hand: the equations are the survey's, ImageNet's numbers the authors' code's,
CIFAR-10's (the defaults) ours. From the code are also the choice by largest cosine, the derivative through it
(Eqs. 7, 12 are those of free vectors), the loss as *sum* of both views, and the bank's rate, momentum and
warm-up. Departures from it:
    - one temperature, as in the paper (their code has two flags, equal in every recipe), so that one backward
      gives the gradients of both players;
    - 256 steps of MoCo with the key network's momentum (theirs: bank size / batch size steps, .999), then
      keys of the network that they leave fill the bank (theirs keeps MoCo's queue, perhaps out of reach);
    - the batch is that of all processes (theirs: of each host), and all have one bank (theirs do not where
      the fill leaves Gaussian rows);
    - LARS, in the ImageNet recipe, has the learning rate inside its momentum buffer and the ratio trust |w| /
      (|g| + decay |w|) (theirs, MoCo v3's: the rate outside, trust |w| / |g + decay w|).

Several processes: each BatchNorm sees the images of its own process, or with --sync-bn (on GPUs) those of
all, as in the authors' code.

Logged of the bank: bank_change, what its step adds to a view's loss (below 0: it cooperates); rotation,
radians per step; norm; unique, the rows that are positives of a view; p, the mean probability of a positive;
cosine, the mean largest one of a query with any row: near 0 the bank is out of reach.

    python caco.py                                       CIFAR-10, ResNet-18, 200 epochs
    python caco.py --positives adversarial --out runs/eq13    Eq. 13
    python caco.py --data path/to/imagenet --arch resnet50 --stem imagenet --image-size 224 --blur \
--batch-size 1024 --optimizer lars --lr 1.2 --lr-final 0.012 --warmup 10 --weight-decay 1.5e-6 --dim 256 \
--bank-size 65536 --bank-lr 3 --fill-steps 64
    python eval.py runs/caco/encoder.pt --preset knn amoc-slf

Measured on a CPU thread (Intel Xeon), 0.3 M-parameter encoder, 10,000 images of CIFAR-10 (JPEG), 4.1 minutes
(14 epochs): linear probe 43.3, 232 of 256 positives unique; Eq. 13 43.7, 86 unique; MoCo in 3.0 minutes 42.5.
Not yet run on a GPU; the paper has 71.3 on ImageNet (linear, 200 epochs).
"""
import argparse
import itertools
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import (
    random_color_jitter, random_gaussian_blur, random_grayscale, random_resized_crop, random_solarize)
from common.bank import Bank, bank_argmax, bank_logsumexp
from common.log import Log

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, from the authors' code
TWO_VIEWS = [  # side where --image-size is 224, area of the crop, saturation, p of blur (--blur), of solarise
    (224, (0.2, 1.0), 0.2, 1.0, 0.0), (224, (0.2, 1.0), 0.2, 0.1, 0.2)]
MULTI_CROP = 2 * [(224, (0.14, 1.0), 0.4, 0.5, 0.0)] + 6 * [(96, (0.05, 0.14), 0.4, 0.5, 0.0)]


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, view, size, args):
    """One view of the uint8 images x (B, 3, H, W), a row of the tables above: floats in [0, 1]."""
    side, scale, saturation, blur, solarize = view
    x = random_resized_crop(x, rng, round(size * side / 224), scale=scale, flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, saturation, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_gaussian_blur(x, rng, sigma=(0.1, 2.0), p=blur * args.blur, kernel_size=13)
    return random_solarize(x, rng, p=solarize).contiguous(memory_format=torch.channels_last)


def views(x, rng, size, args):
    """The views of x, a list: two that have keys, then (--multi-crop) six small ones."""
    return [augment(x, rng, view, size, args) for view in (MULTI_CROP if args.multi_crop else TWO_VIEWS)]


def embed(net, x):
    """u(f(x)) of x (B, 3, S, S): (B, D), unit rows, in x's dtype."""
    with run.autocast(x.device):
        z = net(x)
    return F.normalize(z.to(x.dtype), dim=1)


def positives(k, bank):
    """For each key of k (N, D) the row of bank (K, D) with the largest cosine, the first of several: (N,)."""
    return bank_argmax(k, F.normalize(bank, dim=1))


def nll(q, positive, n, temperature):
    """-ln p_i of each query, p_i the softmax probability of its positive among the unit rows n: (N,)."""
    return bank_logsumexp(q, n, temperature) - (q * n[positive]).sum(1) / temperature


def contrastive_loss(q, positive, bank, temperature):
    """-mean_i log( e^(q_i.n_y/T) / sum_j e^(q_i.n_j/T) ), y = positive_i, n_j = bank_j / |bank_j|.
    q (N, D) unit rows, positive (N,), bank (K, D) any rows. Chance is ln K. In `bank`: Eq. 7, and Eq. 13.
    """
    return nll(q, positive, F.normalize(bank, dim=1), temperature).mean()


def cooperative_loss(q, positive, bank, temperature):
    """`contrastive_loss`, with the gradient of the positives in `bank` reversed by adding twice its opposite:
    Eq. 12, (1 - p_i) q_i/T. A step that climbs `bank`'s gradient brings all rows nearer to the queries."""
    n = F.normalize(bank, dim=1)
    losses = nll(q, positive, n, temperature)
    c = -2 * torch.expm1(-losses.detach()) / temperature  # 2 (1 - p_i) / T
    s = (q.detach() * n[positive]).sum(1)
    return (losses + c * (s - s.detach())).mean()


LOSSES = {"cooperative": cooperative_loss, "adversarial": contrastive_loss}  # of --positives


def make_bank(size, dim):
    """The bank, rows (size, dim) of noise at first, with the `velocity` of its rows, zero."""
    bank = Bank(size, dim)
    bank.register_buffer("velocity", torch.zeros_like(bank.rows))
    return bank


def bank_step(bank, velocity, grad, lr, momentum):
    """A step of SGD up `grad`, all (K, D): the new bank and velocity."""
    velocity = momentum * velocity - grad
    return bank - lr * velocity, velocity


def train_step(net, target, opt, bank, x, ema, bank_lr, args):
    """One iteration on the views x, a list: two that have keys, and any number of small ones. `bank` is one
    of make_bank."""
    q, T, loss_of = [embed(net, view) for view in x], args.temperature, LOSSES[args.positives]
    optim.ema(target, net, ema)
    k1, k2 = (embed(target, view) for view in x[:2])  # without gradient: no parameter of target asks for one
    w = bank.rows.detach().requires_grad_()
    y1, y2 = positives(k2, w), positives(k1, w)  # swapped
    rows = torch.cat(q[:2]), torch.cat([y1, y2])  # both views as one batch: twice its mean is their sum
    loss_view = loss_of(*rows, w, T)
    small = len(x) - 2  # each meets both positives
    loss = loss_view + (loss_of(torch.cat(2 * q[2:]), torch.cat(small * [y1] + small * [y2]), w, T)
                        if small else loss_view)
    opt.zero_grad()
    loss.backward()  # the network will descend it, the bank climb
    dist.average_grads([*net.parameters(), w])
    opt.step()
    bank.rows, bank.velocity = bank_step(w.detach(), bank.velocity, w.grad, bank_lr, args.bank_momentum)
    dist.average_buffers(net, target)  # else the ranks' running statistics drift apart
    return {"loss": loss, **alarms(*rows, loss_view, w, bank.rows, T)}


@torch.no_grad()
def alarms(q, positive, loss, before, bank, temperature):
    """How alive the `bank` is after its step, which began at `before` with `loss`."""
    n = F.normalize(bank, dim=1)
    losses = nll(q, positive, n, temperature)
    first = positive[: len(positive) // 2].sort().values  # of one view
    return {"bank_change": losses.mean() - loss, "p": losses.neg().exp().mean(),
            "unique": 1.0 + (first.diff() != 0).sum(), "cosine": (q * n[bank_argmax(q, n)]).sum(1).mean(),
            "rotation": (n - F.normalize(before, dim=1)).norm(dim=1).mean(), "norm": bank.norm(dim=1).mean()}


def fill(net, target, opt, bank, images, size, args, env):
    """Before epoch 0, --fill-steps steps of MoCo, then keys of the network that they leave: the bank."""
    batches = (batch for epoch in itertools.count(args.epochs)  # those the run does not reach
               for batch in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world))
    for x, _, rng in itertools.islice(batches, args.fill_steps):
        run.stop_if_signalled(args, env, None, 0)
        x1, x2, *_ = views(x, rng, size, args)
        optim.ema(target, net, args.ema)
        q, k, T = embed(net, x1), embed(target, x2), args.fill_temperature
        loss = F.softplus(bank_logsumexp(q, bank.rows, T) - (q * k).sum(1) / T).mean()
        opt.zero_grad()
        loss.backward()
        dist.average_grads(net.parameters())
        opt.step()
        bank.push(k)
    dist.average_buffers(net)  # else the ranks' running statistics drift apart
    target.load_state_dict(net.state_dict())
    with torch.no_grad():
        new = 0  # rows of the bank
        while new < args.bank_size:  # the last batch of an epoch may be short
            x, _, rng = next(batches)
            run.stop_if_signalled(args, env, None, 0)
            bank.push(embed(target, views(x, rng, size, args)[1]))
            new += len(x) * env.world


def lr_at(epoch, epochs, lr, warmup, final):
    """By epoch: `warmup` equal steps up to `lr`, then a cosine towards `final`."""
    if epoch < warmup:
        return lr * (epoch + 1) / warmup
    return optim.cosine((epoch - warmup) / (epochs - warmup), lr, final)


def ema_at(epoch, epochs, start):
    """Momentum of the key network by epoch: half a cosine from `start` to 1."""
    return optim.cosine(epoch / epochs, start, 1.0)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="caco", arch="resnet18")
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    p.add_argument("--stem", help="cifar, imagenet, small; default: the architecture's own")
    p.add_argument("--positives", choices=LOSSES, default="cooperative", help=" ".join(LOSSES))
    p.add_argument("--multi-crop", help="six small views besides the two", **switch)
    p.add_argument("--epochs", type=run.integer(0), default=200, help="0 exports the random encoder")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images a step, over all processes")
    p.add_argument("--optimizer", choices=("sgd", "lars"), default="sgd", help="sgd lars")
    p.add_argument("--lr", type=run.number(), default=0.06, help="at its peak")
    p.add_argument("--lr-final", type=run.number(), default=0.0)
    p.add_argument("--warmup", type=run.integer(0), default=0, help="epochs")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=5e-4)
    p.add_argument("--ema", type=run.number(0, 1), default=0.99,
                   help="of the key network, at the start")
    p.add_argument("--temperature", type=run.number(above=0), default=0.08)
    p.add_argument("--dim", type=run.integer(1), default=128, help="D, length of the rows")
    p.add_argument("--bank-size", type=run.integer(1), default=4096, help="K")
    p.add_argument("--bank-lr", type=run.number(), default=0.3)
    p.add_argument("--bank-warmup", type=run.integer(0), default=10, help="epochs")
    p.add_argument("--bank-momentum", type=run.number(0, 1), default=0.9)
    p.add_argument("--fill-steps", type=run.integer(0), default=256, help="of MoCo, before epoch 0")
    p.add_argument("--fill-temperature", type=run.number(above=0), default=0.2)
    p.add_argument("--blur", help="as on ImageNet", **switch)
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view; default: that of the data's images, of a folder's 32")
    return p


def network(arch, stem=None, dim=128):
    """Encoder, and projector with BatchNorm between its three layers: (B, 3, S, S) -> (B, dim)."""
    encoder = encoders.make(arch, stem=stem, mean=MEAN, std=STD)
    d = encoder.dim
    hidden = [m for _ in range(2) for m in (nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU())]
    hidden.append(nn.Linear(d, dim, bias=False))
    return nn.Sequential(encoder, nn.Sequential(*hidden)).to(memory_format=torch.channels_last)


def optimizer(net, args):
    if args.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    return optim.LARS(optim.lars_groups(net), args.lr, momentum=0.9, weight_decay=args.weight_decay)


def pictures(path, images, size, args):
    """Rows of up to eight: x1, x2."""
    x, _, rng = next(data.batches(images, min(8, len(images)), args.seed, 0))
    run.save_picture(torch.cat(views(x, rng, size, args)[:2]), path, len(x))


def main(argv=None):
    args = parser().parse_args(argv)
    env = run.setup(args)
    device, out = env.device, pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    steps = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch, args.stem, args.dim), args, env)
    target = run.to_device(network(args.arch, args.stem, args.dim), args, env).requires_grad_(False)
    target.load_state_dict(net.state_dict())
    bank = make_bank(args.bank_size, args.dim).to(device)
    opt = optimizer(net, args)
    if args.compile:
        net.compile(), target.compile()

    log = Log(args, env, steps * args.epochs, images)
    state = dict(net=net, target=target, bank=bank, opt=opt, log=log)
    step = run.resume(args, env, state)
    log.start(step, f"chance loss 2 ln K = {2 * math.log(args.bank_size):.3f}")
    if args.epochs and not (out / "last.pt").exists():
        fill(net, target, opt, bank, images, size, args, env)

    for epoch in range(step // steps, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, args.warmup, args.lr_final)
        optim.set_lr(opt, lr)
        ema = ema_at(epoch, args.epochs, args.ema)
        bank_lr = lr_at(epoch, args.epochs, args.bank_lr, args.bank_warmup, args.bank_lr)  # then constant
        begin = step % steps  # of the epoch's steps; not 0 where a run stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, begin):
            run.stop_if_signalled(args, env, state, step)
            x_views = views(x, rng, size, args)
            losses = train_step(net, target, opt, bank, x_views, ema, bank_lr, args)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        cosine = log.mean("cosine")
        unique = log.mean("unique")
        log.epoch(epoch, step, lr=lr, bank_lr=bank_lr, ema=ema)
        if env.rank == 0 and (cosine < 0.2 or unique < 0.2 * args.batch_size / env.world):
            print(f"the bank is dead: cosine {cosine:.3f}, {unique:.1f} positives; try more --fill-steps")
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            if env.rank == 0:  # before the checkpoint, so that none is missing when the run goes on
                pictures(out / "views.png", images, size, args)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
