"""AdCo: a memory bank of trained, adversarial negatives (Hu et al. 2021, arXiv 2011.08435).

MoCo, but the bank is no queue of old keys: its K rows are free vectors that climb the contrastive loss while
the network descends it, both from one pass through the network. The aim is better features, not robustness.
The hybrid (--eps; Section 6.1 of "the survey": Qi & Shah 2022, arXiv 2210.13463) attacks the query's pixels.

    paper (equations: the survey's)   here
    f_q, f_k                          net, target: encoder, projector; embed() adds u(z) = z / |z|
    {z_neg}                           n, the unit rows of bank.rows, which are free in length
    Eq. 3     contrastive loss        contrastive_loss
    Eq. 5     FGSM on the query       attack: --no-random-start, one step of --step-size equal to --eps
    Eq. 6     PGD on the query        attack
    Eq. 7     ascent of the bank      the gradient of contrastive_loss in the bank; bank_step

The body of the paper was not at hand: the equations are the survey's, ImageNet's numbers the authors' code's,
CIFAR-10's (the defaults) and the hybrid's ours. From the code are also the derivative through the cosine
(Eq. 7 is that of a free vector), the bank's own temperature, momentum and decay, and both gradients at one
point (the paper alternates). Departures from it:
    - only the bank gives negatives, as in the paper; --batch-negatives adds the batch's keys, as the code has
      it;
    - after 256 steps of MoCo, keys of the network as it then is fill the bank (their code keeps MoCo's
      queue): an older network's keys are near no query, have no softmax mass and so no gradient: a dead bank;
    - BatchNorm sees groups of at most 32 images, keys in random order, as on the 8 GPUs of the code: with
      common statistics the network could tell a query's key by its batch;
    - the multi-crop fill has keys of full size (their code: 96 pixels); all processes have one bank (theirs
      do not where the fill leaves Gaussian rows).

Several processes: each group of BatchNorm has images of one process alone.

Logged of the bank: mass, its share of the softmax; bank_gain, what its step adds to its loss; rotation,
radians per step; norm; accuracy, how often a query's key is nearer than all rows: 0.99 means a dead bank.

    python adco.py                                       CIFAR-10, ResNet-18, 200 epochs
    python adco.py --eps 8 --bank-temperature 0.12 --out runs/hybrid    the hybrid
    python adco.py --eps 8 --steps 1 --step-size 8 --no-random-start --out runs/fgsm    the hybrid by FGSM
    python adco.py --data path/to/imagenet --arch resnet50 --stem imagenet --image-size 224 --blur --lr 0.03 \
--lr-final 6e-4 --weight-decay 1e-4 --ema 0.999 --bank-size 65536 --bank-temperature 0.02 --bank-lr 3
    python eval.py runs/adco/encoder.pt --preset knn amoc-slf

Measured on a CPU thread (Intel Xeon), 0.3 M-parameter encoder, 10,000 images of CIFAR-10 (JPEG), 4.9 minutes
(25 epochs): linear probe 44.4, mass 0.97; MoCo in 3.0 minutes 42.5; the hybrid 37.6, and 14.8 under PGD-20 at
8/255 (MoCo 0.5). Not yet run on a GPU; the paper has 68.6 on ImageNet (linear, 200 epochs).
"""
import argparse
import itertools
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_color_jitter, random_gaussian_blur, random_grayscale, random_resized_crop
from common.bank import Bank, bank_argmax, bank_logsumexp
from common.log import Log
from common.pgd import eval_mode, pgd

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, from the authors' code
CROPS = {224: (0.2, 1.0), 192: (0.172, 0.86), 160: (0.143, 0.715), 128: (0.114, 0.571), 96: (0.086, 0.429)}


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
class GroupedNorm(nn.BatchNorm2d):
    """BatchNorm that sees groups of 2 to 32 images, at least two groups where it can."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        parts = x.tensor_split(min(max(2, math.ceil(len(x) / 32)), len(x) // 2))
        return torch.cat([F.batch_norm(part, self.running_mean, self.running_var, self.weight, self.bias,
                                       True, self.momentum / len(parts), self.eps) for part in parts])


def augment(x, rng, side, size, args):
    """One view of the uint8 images x (B, 3, H, W), of `side` where `size` is 224: floats in [0, 1]."""
    x = random_resized_crop(x, rng, round(size * side / 224), scale=CROPS[side], flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    x = random_gaussian_blur(x, rng, sigma=(0.1, 2.0), p=0.5 * args.blur, kernel_size=13)
    return x.contiguous(memory_format=torch.channels_last)


def views(x, rng, size, args):
    """Images for the queries, and for the key of each (in multi-crop one for all): two lists."""
    sides = [*CROPS, 224] if args.multi_crop else [224, 224]
    *x_q, x_k = [augment(x, rng, side, size, args) for side in sides]
    return (x_q + [x_k], [x_k] + x_q) if args.symmetric else (x_q, [x_k])


def embed(net, x):
    """u(f(x)) of x (B, 3, S, S): (B, 128), unit rows, in x's dtype."""
    with run.autocast(x.device):
        z = net(x)
    return F.normalize(z.to(x.dtype), dim=1)


def contrastive_loss(q, k, bank, temperature, keys=None):
    """Eq. 3: -mean_i log( e^(q_i.k_i/T) / (e^(q_i.k_i/T) + sum_j e^(q_i.n_j/T)) ), n_j = bank_j / |bank_j|.
    q, k (N, D) unit rows, bank (K, D) any rows. With `keys` (M, D), all of the batch and so among them the
    own ones, sum_m e^(q_i.keys_m/T) replaces the first term of the denominator. Chance is ln(K + 1).
    """
    positive = (q * k).sum(1) / temperature  # (N,)
    own = positive if keys is None else bank_logsumexp(q, keys, temperature)
    return (torch.logaddexp(own, bank_logsumexp(q, F.normalize(bank, dim=1), temperature)) - positive).mean()


def make_bank(size, dim):
    """The bank, rows (size, dim) of noise at first, with the `velocity` of its rows, zero."""
    bank = Bank(size, dim)
    bank.register_buffer("velocity", torch.zeros_like(bank.rows))
    return bank


def bank_step(bank, velocity, grad, lr, momentum, weight_decay):
    """A step of SGD up `grad` whose decay still shrinks, all (K, D): the new bank and velocity."""
    velocity = momentum * velocity - grad + weight_decay * bank
    return bank - lr * velocity, velocity


def objective(triples, bank, temperature, args):
    """Eq. 3 of all (q, k, keys) in `triples`: the mean of a symmetric loss's two, the sum of multi-crop's."""
    losses = [contrastive_loss(q, k, bank, temperature, keys) for q, k, keys in triples]
    return sum(losses) / (len(losses) if args.symmetric else 1)


def attack(net, x, k, keys, bank, noise, args):
    """The query's images x (B, 3, S, S) moved within eps to maximise Eq. 3; k, keys and bank are constants.
    It starts at x + eps `noise`, noise of x's shape in [-1, 1], or under --no-random-start at x.

    Eval mode: an image does not change another's embedding, nor a running statistic.
    """
    eps = args.eps / 255
    n = F.normalize(bank, dim=1)
    start = (x + eps * noise).clamp(0, 1) if args.random_start else x
    with eval_mode(net):
        return pgd(lambda x: contrastive_loss(embed(net, x), k, n, args.temperature, keys),
                   x, eps, args.step_size / 255, args.steps, start=start)


@torch.no_grad()
def embed_keys(target, x_k, order):
    """Keys (B, 128) of each of x_k (B, 3, S, S), which BatchNorm groups in `order`, a permutation of B."""
    return [embed(target, x[order])[order.argsort()] for x in x_k]


def batch_keys(k, args):
    """For --batch-negatives the keys k (B, 128) of all processes, which call it together; else None."""
    return dist.gather(k) if args.batch_negatives else None


def train_step(net, target, opt, bank, x_q, x_k, order, noise, args):
    """One iteration on lists: images of queries, of keys, noise for attacks. `bank` is one of make_bank,
    `order` as in embed_keys."""
    optim.ema(target, net, args.ema)
    pairs = [(k, batch_keys(k, args)) for k in embed_keys(target, x_k, order)]
    pairs *= len(x_q) // len(x_k)  # in multi-crop all queries have one key
    if args.eps:
        x_q = [attack(net, x, *pair, bank.rows, start, args) for x, pair, start in zip(x_q, pairs, noise)]
    q = [embed(net, x) for x in x_q]
    w = bank.rows.detach().requires_grad_()
    triples = [(query, *pair) for query, pair in zip(q, pairs)]
    loss = objective(triples, bank.rows, args.temperature, args)
    triples = [(query.detach(), *pair) for query, pair in zip(q, pairs)]
    loss_bank = objective(triples, w, args.bank_temperature, args)  # the same features, other temperature

    opt.zero_grad()
    (loss + loss_bank).backward()  # the first has no gradient in the bank, the second none in the network
    dist.average_grads([*net.parameters(), w])
    opt.step()
    bank.rows, bank.velocity = bank_step(w.detach(), bank.velocity, w.grad, args.bank_lr,
                                         args.bank_momentum, args.bank_decay)
    dist.average_buffers(net, target)  # else the ranks' running statistics drift apart
    return {"loss": loss, **alarms(triples, loss_bank, w, bank.rows, args)}


@torch.no_grad()
def alarms(triples, loss_bank, before, bank, args):
    """How alive the `bank` is after its step, which began at `before` with `loss_bank`."""
    T = args.bank_temperature
    n = F.normalize(bank, dim=1)
    q, k, keys = triples[0]
    positive = (q * k).sum(1)
    nearest = (q * n[bank_argmax(q, n)]).sum(1)
    own = positive / T if keys is None else bank_logsumexp(q, keys, T)
    return {"mass": (bank_logsumexp(q, n, T) - own).sigmoid().mean(),
            "bank_gain": objective(triples, bank, T, args) - loss_bank,
            "rotation": (n - F.normalize(before, dim=1)).norm(dim=1).mean(),
            "norm": bank.norm(dim=1).mean(), "accuracy": (positive > nearest).float().mean()}


def fill(net, target, opt, bank, images, size, args, env):
    """Before epoch 0, --fill-steps steps of MoCo, then keys of the network that they leave: the bank."""
    batches = (batch for epoch in itertools.count(args.epochs)  # those the run does not reach
               for batch in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world))
    for x, _, rng in itertools.islice(batches, args.fill_steps):
        run.stop_if_signalled(args, env, None, 0)
        (x1, *_), (x2, *_) = views(x, rng, size, args)
        optim.ema(target, net, args.ema)
        (k,) = embed_keys(target, [x2], rng.uniform(1, device=env.device)[:, 0].argsort())
        loss = objective([(embed(net, x1), k, batch_keys(k, args))], bank.rows, args.temperature, args)
        opt.zero_grad()
        loss.backward()
        dist.average_grads(net.parameters())
        opt.step()
        bank.push(k)
    dist.average_buffers(net)  # else the ranks' running statistics drift apart
    target.load_state_dict(net.state_dict())
    new = 0  # rows of the bank
    while new < args.bank_size:  # the last batch of an epoch may be short
        x, _, rng = next(batches)
        run.stop_if_signalled(args, env, None, 0)
        _, (x2, *_) = views(x, rng, size, args)
        bank.push(*embed_keys(target, [x2], rng.uniform(1, device=env.device)[:, 0].argsort()))
        new += len(x) * env.world


def lr_at(epoch, epochs, lr, final):
    """By epoch: a cosine from `lr` towards `final`."""
    return optim.cosine(epoch / epochs, lr, final)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="adco", arch="resnet18")
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    p.add_argument("--stem", help="cifar, imagenet, small; default: the architecture's own")
    p.add_argument("--symmetric", help="both views are queries and keys", **switch)
    p.add_argument("--multi-crop", help="five crops of falling size are queries", **switch)
    p.add_argument("--batch-negatives", help="the batch's keys are negatives too", **switch)
    p.add_argument("--epochs", type=run.integer(0), default=200, help="0 exports the random encoder")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images a step, over all processes")
    p.add_argument("--lr", type=run.number(), default=0.06, help="of SGD, at its peak")
    p.add_argument("--lr-final", type=run.number(), default=0.0)
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=5e-4)
    p.add_argument("--ema", type=run.number(0, 1), default=0.99, help="of the key network")
    p.add_argument("--temperature", type=run.number(above=0), default=0.12,
                   help="of the network's loss, and of the attack")
    p.add_argument("--bank-temperature", type=run.number(above=0), default=0.05,
                   help="of the loss that the bank climbs")
    p.add_argument("--bank-size", type=run.integer(1), default=4096, help="K")
    p.add_argument("--bank-lr", type=run.number(), default=0.5, help="constant over the run")
    p.add_argument("--bank-momentum", type=run.number(0, 1), default=0.9)
    p.add_argument("--bank-decay", type=run.number(0, 1e6), default=1e-4)
    p.add_argument("--fill-steps", type=run.integer(0), default=256, help="of MoCo, before epoch 0")
    p.add_argument("--eps", type=run.number(0, 255), default=0.0,
                   help="linf radius of the attack, in 1/255; 0: none")
    p.add_argument("--step-size", type=run.number(0, 255), default=2.0, help="of the attack, in 1/255")
    p.add_argument("--steps", type=run.integer(0), default=5, help="of the attack")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (ours); without, at the "
                        "image: with --steps 1 and --step-size equal to --eps that is FGSM")
    p.add_argument("--blur", help="as on ImageNet", **switch)
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view; default: that of the data's images, of a folder's 32")
    return p


def check(args):
    if args.symmetric and args.multi_crop:
        raise ValueError("--symmetric and --multi-crop: choose one")


def network(arch, stem=None):
    """Encoder with grouped BatchNorm, and projector without BatchNorm: (B, 3, S, S) -> (B, 128)."""
    encoder = encoders.make(arch, stem=stem, mean=MEAN, std=STD)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GroupedNorm  # the same state, another forward
    projector = encoders.mlp(encoder.dim, encoder.dim, 128)
    return nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)


def pictures(path, net, target, bank, images, size, args):
    """Rows of up to eight: x1, x2; of the hybrid x1_adv and perturbation (grey: none, full scale: eps)."""
    x, _, rng = next(data.batches(images, min(8, len(images)), args.seed, 0))
    (x1, *_), (x2, *_) = views(x, rng, size, args)
    rows = [x1, x2]
    if args.eps:
        with eval_mode(target):
            k = embed(target, x2).detach()
        keys = k if args.batch_negatives else None
        x_adv = attack(net, x1, k, keys, bank.rows, torch.zeros_like(x1), args)
        rows += [x_adv, 0.5 + (x_adv - x1) / (2 * args.eps / 255)]
    run.save_picture(torch.cat(rows), path, len(x))


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    env = run.setup(args)
    device, out = env.device, pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    steps = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args.arch, args.stem), args, env)
    target = run.to_device(network(args.arch, args.stem), args, env).requires_grad_(False)
    target.load_state_dict(net.state_dict())
    bank = make_bank(args.bank_size, 128).to(device)
    opt = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    if args.compile:
        net.compile(), target.compile()

    log = Log(args, env, steps * args.epochs, images)
    state = dict(net=net, target=target, bank=bank, opt=opt, log=log)
    step = run.resume(args, env, state)
    log.start(step, f"chance loss ln(K + 1) = {math.log(args.bank_size + 1):.3f}")
    if args.epochs and not (out / "last.pt").exists():
        fill(net, target, opt, bank, images, size, args, env)

    for epoch in range(step // steps, args.epochs):
        lr = lr_at(epoch, args.epochs, args.lr, args.lr_final)
        optim.set_lr(opt, lr)
        begin = step % steps  # of the epoch's steps; not 0 where a run stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, begin):
            run.stop_if_signalled(args, env, state, step)
            x_q, x_k = views(x, rng, size, args)
            order = rng.uniform(1, device=device)[:, 0].argsort()
            noise = [2 * rng.uniform(*v.shape[1:], device=device) - 1 for v in x_q] if args.eps else None
            losses = train_step(net, target, opt, bank, x_q, x_k, order, noise, args)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        mass = log.mean("mass")
        log.epoch(epoch, step, lr=lr)
        if env.rank == 0 and mass < 0.05:  # it is 0.2 to 0.99 where the bank lives
            print(f"the bank is dead: mass {mass:.3f}; try more --fill-steps, a higher --bank-temperature")
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            if env.rank == 0:  # before the checkpoint, so that none is missing when the run goes on
                pictures(out / "views.png", net, target, bank, images, size, args)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net[0], out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
