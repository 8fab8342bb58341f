"""AdvCL: contrastive pre-training that keeps its robustness (Fan et al. 2021, arXiv 2111.01124).

Robustness learnt without labels should survive a linear classifier. To SimCLR are added views made from the
whole image (an attacked and a high-frequency copy), beside the two strong crops, and an adversarial
classification loss on k-means pseudo-labels, so that pre-training already resembles the task. Clean views,
the contrastive attack and the classification attack have a BatchNorm branch each.

    paper                       here
    f, g, classifier            net["encoder"], net["projector"], net["classifier"]
    tau_1(x), tau_2(x)          x1, x2: strong crops
    x                           x: pad, crop, flip
    x + delta                   "x+d", and x_ce, each with a perturbation and a BN branch of its own
    x_h, x_l                    high_frequency(x), and the rest
    Eq. 5  loss of V views      multiview_loss
    Eq. 9  inner maxima         attack, of either loss
    CE on pseudo-labels         cluster_loss; pseudo_labels
    lambda                      --cluster-weight
    rows of Table 4             --views

The supplement was not at hand; hyper-parameters, the strong crop, the three branches and the single BatchNorm
of the projector are the authors' code's. So is the scale of the loss: a mean over anchors and positives
times T / 0.07 (the paper sums): lambda and the learning rate were chosen for it. Where we depart from it:
    - pseudo-labels come from our k-means on a teacher's features, not from an ImageNet encoder; without a
      teacher the classification term is off, and the log says so;
    - the attack leaves no trace: it normalises by batch statistics, as theirs does, and updates no running
      ones (in their code most of what the adv branch averages comes from unfinished attacks);
    - it starts inside [0, 1]; what it does not change is embedded once: the same, up to rounding, as batch
      statistics depend on the batch alone, and 35 instead of 50 forwards per step (a backward to the pixels
      counts 1, a whole one 2).

BatchNorm: each view is a batch of its own, in the attack too.

Several processes share their negatives, except within the attack. Each BatchNorm sees the images of its own
process, or with --sync-bn (on GPUs) those of all.

    python acl.py --variant s2s --out runs/s2s                a teacher
    python advcl.py --teacher runs/s2s/encoder.pt             CIFAR-10, ResNet-18, 1000 epochs
    torchrun --standalone --nproc-per-node 4 advcl.py         without pseudo-labels, on 4 GPUs
    python advcl.py --views x1+d x2+d x1 x2 --out runs/four   another row of Table 4
    python eval.py runs/advcl/encoder.pt --preset advcl-slf robustssl-alf

Measured on a CPU thread (Intel Xeon), 0.3 M-parameter encoder, 10,000 images of CIFAR-10 (JPEG), 4.6 minutes
(11 epochs, 2 attack steps, no pseudo-labels): linear probe 44.8 standard, 13.3 under PGD-20 at 8/255, another
seed 40.8 and 13.5; SimCLR 47.0 and 0.1. Not yet run on a GPU; the paper has 77.73 and 48.89 (1000 epochs;
with pseudo-labels 50.45 under PGD-20).
"""
import argparse
import hashlib
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, files, optim, run
from common.augment import (
    random_color_jitter, random_flip, random_grayscale, random_pad_crop, random_resized_crop, resize)
from common.kmeans import kmeans
from common.log import Log
from common.pgd import frozen_stats, pgd
from common.resnet import branch

BASE_TEMPERATURE = 0.07  # of the authors' code; see above
VIEWS = ("x1", "x2", "x1+d", "x2+d", "x+d", "xl", "xh")  # "+d": attacked, through BN branch "adv"


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def strong(x, rng, size):
    """A crop of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]. No blur."""
    x = random_resized_crop(x, rng, size, scale=(0.2, 1.0), flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    return x.contiguous(memory_format=torch.channels_last)


def augment(x, rng, size, views):
    """Of uint8 images x (B, 3, H, W): x1, x2, x (B, 3, size, size), and noise (A + 1, B, 3, size, size) in
    [-1, 1] that starts the attack on clusters and those on the A views to attack."""
    x1, x2 = (strong(x, rng, size) for _ in range(2))  # `rng` moves on between them
    x = random_flip(random_pad_crop(resize(x, size), rng, 4), rng)
    noise = rng.uniform(1 + sum(name.endswith("+d") for name in views), *x.shape[1:], device=x.device)
    return x1, x2, x, 2 * noise.transpose(0, 1) - 1


def high_frequency(x, radius=8):
    """x (B, C, H, W) less its low frequencies, integers (a, b) with a^2 + b^2 < radius^2; not clipped."""
    a, b = (torch.fft.fftfreq(n, 1 / n, device=x.device).round() for n in x.shape[2:])
    return torch.fft.ifft2(torch.fft.fft2(x) * (a[:, None] ** 2 + b**2 >= radius**2)).real


def choose(names, x1, x2, x, radius):
    """Of the views `names`, the clean ones (a list of images) and the A to attack (A, B, 3, S, S)."""
    x_h = high_frequency(x, radius)
    images = {"x1": x1, "x2": x2, "x": x, "xh": x_h, "xl": x - x_h}
    clean = [images[name] for name in names if not name.endswith("+d")]
    return clean, torch.stack([images[name[:-2]] for name in names if name.endswith("+d")])


def embed(net, x, bn):
    """z of x (B, 3, S, S) through BatchNorm branch `bn`: (B, 128), in x's dtype."""
    with branch(net, bn), run.autocast(x.device):
        z = net["projector"](net["encoder"](x))
    return z.to(x.dtype)


def multiview_loss(views, temperature):
    """Eq. 5, as mean over anchors i and their positives j of -log( e^(u_i.u_j/T) / sum_k!=i e^(u_i.u_k/T) ),
    times T / 0.07.

    views: V tensors (B, D), normalised here to u; positives are the other V - 1 views of the image. Chance is
    ln(V B - 1) T / 0.07.
    """
    u = F.normalize(torch.stack(views), dim=2)  # (V, B, D)
    pos = (u * (u.sum(0) - u)).sum(2) / temperature / (len(u) - 1)  # (V, B): the mean over the other views
    rows = u.flatten(0, 1)  # (V B, D)
    scores = rows @ rows.T / temperature  # (V B, V B)
    scores.fill_diagonal_(-math.inf)  # nothing is in its own denominator
    return (scores.logsumexp(1).mean() - pos.mean()) * temperature / BASE_TEMPERATURE


def cluster_loss(net, x, labels, clusters):
    """Mean over the K in `clusters` of the cross-entropy of K logits with labels (B, len(clusters))."""
    with branch(net, "adv_ce"), run.autocast(x.device):
        logits = net["classifier"](net["encoder"](x))  # (B, sum of all K)
    logits = logits.to(x.dtype).split(clusters, dim=1)
    return sum(F.cross_entropy(part, y) for part, y in zip(logits, labels.T)) / len(clusters)


def attack(net, loss, x, noise, args):
    """Eq. 9, inner maximum: x (..., 3, S, S) moved within eps to maximise loss(x). It starts at x + eps
    `noise`, noise of x's shape in [-1, 1], or under --no-random-start at x.

    Train mode: batch statistics are part of what is attacked. No running statistic changes.
    """
    eps = args.eps / 255
    start = (x + eps * noise).clamp(0, 1) if args.random_start else x
    with frozen_stats(net):
        x_adv = pgd(lambda flat: loss(flat.view(x.shape)), x.flatten(0, -4), eps, args.step_size / 255,
                    args.steps, start=start.flatten(0, -4))  # each view of each image has a ball of its own
    return x_adv.view(x.shape)


def contrast(net, x, constants, temperature):
    """`multiview_loss` of attacked views x (A, B, 3, S, S) and of `constants`, the z of the clean ones."""
    return multiview_loss([*(embed(net, view, "adv") for view in x), *constants], temperature)


def train_step(net, opt, x1, x2, x, labels, clusters, noise, args):
    """One iteration on two strong views and the weak one (B, 3, S, S); labels (B, len(clusters)), if any;
    `noise` (A + 1, B, 3, S, S) in [-1, 1] starts the attack on clusters and those on the A views."""
    clean, to_attack = choose(args.views, x1, x2, x, args.cutoff)
    z = [embed(net, view, "clean") for view in clean]
    constants = [v.detach() for v in z]  # batch statistics: they depend on the clean views alone
    x_adv = attack(net, lambda x: contrast(net, x, constants, args.temperature), to_attack, noise[1:], args)
    z += [embed(net, view, "adv") for view in x_adv]
    loss = loss_con = multiview_loss([dist.gather(v) for v in z], args.temperature)
    losses = {"loss_con": loss_con}
    if clusters:
        x_ce = attack(net, lambda x: cluster_loss(net, x, labels, clusters), x, noise[0], args)
        losses["loss_ce"] = cluster_loss(net, x_ce, labels, clusters)
        loss = loss_con + args.cluster_weight * losses["loss_ce"]

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    dist.average_buffers(net)  # else the ranks' running statistics drift apart
    return {"loss": loss, **losses}


def pseudo_labels(args, env, images, size):
    """(N, len(--clusters)): k-means on the teacher's normalised features of the un-augmented images. Kept in
    --out, and made anew where data, image size, teacher, clusters or seed are not those they were made with.

    Raises ValueError where the kept file cannot be read."""
    path = pathlib.Path(args.out) / "pseudo_labels.pt"
    kind = "AdvCL pseudo-label file"
    hint = "move it away, and it is made again"
    teacher = encoders.load_encoder(args.teacher).to(env.device)
    weights = hashlib.sha256(pathlib.Path(args.teacher).read_bytes()).hexdigest()
    made_with = {"data": images.checksum(), "image_size": size, "teacher": weights,
                 "clusters": args.clusters, "seed": args.seed}
    if env.rank == 0 and not (path.exists() and encoders.read(path, kind, hint)["made_with"] == made_with):
        with torch.no_grad():
            parts = images.stream(torch.arange(len(images)).split(500))
            h = torch.cat([teacher(resize(x, size)) for x, _ in parts])
        h = F.normalize(h, dim=1)  # (N, D)
        generator = torch.Generator().manual_seed(args.seed)
        labels = torch.stack([kmeans(h, k, generator) for k in args.clusters], 1).cpu()
        files.save({"format": kind, "made_with": made_with, "labels": labels}, path)
    dist.barrier()
    return encoders.read(path, kind, hint)["labels"].to(env.device)


def lr_at(step, per_epoch, epochs, lr, warmup):
    """Linear over `warmup` epochs of `per_epoch` steps, from a fiftieth of `lr` up to c(warmup), c being a
    cosine over the run from `lr` to a thousandth of it; then c at the end of the epoch."""
    def c(epoch):
        return optim.cosine(epoch / epochs, lr, lr / 1000)

    if step < warmup * per_epoch:
        return lr / 50 + (c(warmup) - lr / 50) * step / (warmup * per_epoch)
    return c(step // per_epoch + 1)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="advcl", arch="resnet18")
    p.add_argument("--views", choices=VIEWS, nargs="+", default=["x+d", "x1", "x2", "xh"],
                   help=" ".join(VIEWS))
    p.add_argument("--teacher", help="exported encoder, for the pseudo-labels")
    p.add_argument("--clusters", type=run.integer(2), nargs="+", default=[2, 10, 50, 100, 500],
                   help="K of each k-means")
    p.add_argument("--cluster-weight", type=run.number(above=0), default=0.2, help="lambda")
    p.add_argument("--cutoff", type=run.number(), default=8.0,
                   help="lowest frequency in xh, periods an image")
    p.add_argument("--epochs", type=run.integer(0), default=1000, help="0 exports the random encoder")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images a step, over all processes")
    p.add_argument("--lr", type=run.number(), default=0.5, help="of SGD, at its peak")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="epochs")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=1e-4)
    p.add_argument("--temperature", type=run.number(above=0), default=0.5)
    p.add_argument("--eps", type=run.number(0, 255), default=8.0,
                   help="linf radius of the attacks, in 1/255")
    p.add_argument("--step-size", type=run.number(0, 255), default=2.0, help="of the attacks, in 1/255")
    p.add_argument("--steps", type=run.integer(0), default=5, help="of the attacks")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attacks at a random point of the ball (authors' code); without, at the "
                        "image: with --steps 1 and --step-size equal to --eps that is FGSM")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view; default: that of the data's images, of a folder's 32")
    return p


def check(args):
    if len(set(args.views)) < len(args.views):
        raise ValueError(f"--views {' '.join(args.views)}: each view once")
    if len(args.views) < 2 or not any(view.endswith("+d") for view in args.views):
        raise ValueError(f"--views {' '.join(args.views)}: needs two views, one of them attacked (+d)")


def network(arch, clusters):
    """Encoder with BN branches, (B, 3, S, S) in [0, 1], not normalised, -> (B, D); projector D -> 128, its BN
    without branches; given `clusters`, classifier D -> sum of all K."""
    branches = ("adv", "clean", "adv_ce") if clusters else ("adv", "clean")
    encoder = encoders.make(arch, branches, mean=(0, 0, 0), std=(1, 1, 1))
    projector = encoders.mlp(encoder.dim, encoder.dim, 128, norm=nn.BatchNorm1d)
    net = nn.ModuleDict({"encoder": encoder, "projector": projector})
    if clusters:
        net["classifier"] = nn.Linear(encoder.dim, sum(clusters))
    return net.to(memory_format=torch.channels_last)


def pictures(path, net, images, size, args):
    """Rows of up to eight: x1, x2, x, the high frequencies (about grey), then each attacked view and its
    perturbation (grey is none, full scale is eps). Batch statistics here are those of these few."""
    x, _, rng = next(data.batches(images, min(8, len(images)), args.seed, 0))
    x1, x2, x, noise = augment(x, rng, size, args.views)
    clean, to_attack = choose(args.views, x1, x2, x, args.cutoff)
    with frozen_stats(net):
        z = [embed(net, view, "clean").detach() for view in clean]
    rows = [x1, x2, x, 0.5 + high_frequency(x, args.cutoff)]
    x_adv = attack(net, lambda x: contrast(net, x, z, args.temperature), to_attack, noise[1:], args)
    for view, adv in zip(to_attack, x_adv):
        rows += [adv, 0.5 + (adv - view) / (2 * max(args.eps / 255, 1e-8))]
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
    clusters = args.clusters if args.teacher else []

    net = run.to_device(network(args.arch, clusters), args, env)
    opt = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    if args.compile:
        net["encoder"].compile()

    log = Log(args, env, steps * args.epochs, images)
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    if clusters:  # only now: another run's labels in this folder must not be overwritten
        images.y = pseudo_labels(args, env, images, size)
    chance = math.log(len(args.views) * args.batch_size - 1) * args.temperature / BASE_TEMPERATURE
    log.start(step, f"chance loss_con ln(VB - 1) T / 0.07 = {chance:.3f}; "
              + (f"pseudo-labels, K = {clusters}" if clusters else "no --teacher, so no pseudo-labels"))

    for epoch in range(step // steps, args.epochs):
        begin = step % steps  # of the epoch's steps; not 0 where a run stopped within an epoch
        for x, y, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, begin):
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step, steps, args.epochs, args.lr, args.warmup)
            optim.set_lr(opt, lr)
            x1, x2, x, noise = augment(x, rng, size, args.views)
            losses = train_step(net, opt, x1, x2, x, y, clusters, noise, args)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Before the checkpoint, so that none is missing when the run goes on; and by all processes, as
            # a SyncBatchNorm in train mode asks them all.
            pictures(out / "views.png" if env.rank == 0 else None, net, images, size, args)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net["encoder"], out / "encoder.pt", "adv", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder; BN branch adv")


if __name__ == "__main__":
    run.cli(main)
