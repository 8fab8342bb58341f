"""AdvCL: contrastive pre-training that keeps its robustness (Fan et al. 2021, arXiv 2111.01124).

Robustness that is learnt without labels should carry over to a linear classifier that is trained on
top. For this AdvCL adds two things to SimCLR. Beside the two strong crops there are views made from the
weakly augmented image: an attacked copy and a copy of its high frequencies. And there is an adversarial
classification loss on pseudo-labels from k-means, so that pre-training already resembles the task.
Clean views, the contrastive attack and the classification attack pass through a BatchNorm branch each.

    paper                       this file
    f, g, classifier            net["encoder"], net["projector"], net["classifier"]
    tau_1(x), tau_2(x)          x1, x2: strong crops
    x                           x: padded, cropped, flipped
    x + delta                   view "x+d" and x_ce; each has a perturbation and a BatchNorm branch of its own
    x_h, x_l                    high_frequency(x), and the rest of x
    Eq. 5  loss of V views      multiview_loss
    Eq. 9  inner maxima         attack, of either loss
    CE on pseudo-labels         cluster_loss; pseudo_labels, or labels_of_file
    lambda                      --cluster-weight
    rows of Table 4             --views

The supplement was not at hand. Where the help of a flag says so, its default is the authors'
code's. From their code we have the crops, strong and weak, the three branches, the sizes of the
projector, its single BatchNorm, through which every view passes as a batch of its own, and that
images are not normalised. The scale of the contrastive loss is the code's as well: a mean over anchors
and positives times T / 0.07, where the paper has a sum; lambda and the learning rate were chosen for the
code's scale. We depart from that code in three places:
    - With --teacher, pseudo-labels come from our k-means on the features of a teacher trained on
      the same images; theirs come from an encoder trained on ImageNet. --labels reads theirs too,
      converted as below. Without either the classification term is left out, and the log says so.
    - The attack leaves no trace: it normalises by batch statistics, as theirs does, but does not
      update the running ones. In their code most of what branch adv averages comes from unfinished
      attacks.
    - The attack starts inside [0, 1]; theirs takes its first gradient outside. Views that it does not
      change are embedded once, which gives the same result up to rounding. Counting a backward pass
      to the pixels as one forward pass and a whole one as two, a step costs 35 forward passes
      instead of 50, without pseudo-labels 22; SimCLR's costs 6. (With other --views: 3 for each, 10
      more for each that is attacked in 5 steps, and 13 for the pseudo-labels.)

    python acl.py --variant s2s --out runs/s2s                a teacher
    python advcl.py --teacher runs/s2s/encoder.pt             CIFAR-10, ResNet-18, 1000 epochs
    python advcl.py --labels labels.npz --out runs/labels     with the labels of a file, as below
    torchrun --standalone --nproc-per-node 4 advcl.py         without pseudo-labels, on 4 GPUs
    python advcl.py --views x1+d x2+d x1 x2 --out runs/four   another row of Table 4
    python advcl.py --norm l2 --eps 128 --out runs/advcl-l2   l2 128/255 (ours)
    python eval.py runs/advcl/encoder.pt --preset advcl-slf robustssl-alf

--labels takes an .npz with integers "labels", a row of N for each of --clusters; -1 is an image without a
label: it has no term in loss_ce, but counts in the batch statistics of branch adv_ce. The labels belong
to all N training images, in torchvision's order for cifar10 (cifar100, stl10); with --limit each image
keeps its own. For other data the file must also hold "checksum": that of the data, or of the part that
--limit leaves, as the first line of a run's log.jsonl has it. The labels of the paper's best row
(ImageNet's encoder, for CIFAR-10 in torchvision's order) are a pickle in the folder data/ of the authors'
code. Unpickling can run any program, so it is left to you:

    saved = pickle.load(open("imagenet_clPretrain_pseudo_labels.pkl", "rb"))
    labels = np.array([np.array(saved[f"pseudo_train_{k}"]) for k in (2, 10, 50, 100, 500)])
    np.savez("labels.npz", labels=labels.astype(int))

What --teacher has made is kept as pseudo_labels.pt, and can be turned into such a file by

    saved = torch.load("runs/advcl/pseudo_labels.pt")
    np.savez("labels.npz", labels=saved["labels"].T.numpy(), checksum=saved["made_with"]["data"])

A ViT has no BatchNorm, so clean and attacked images share all of it:

    python advcl.py --arch vit_tiny --optimizer adamw --lr 1e-3 --weight-decay 0.05 --out runs/advcl-vit

The encoder is exported without its heads, with BatchNorm branch adv: at test time it sees clean
images too.

On several processes order, augmentation and noise are those of one process. The contrastive loss
has the negatives of all of them, the attack those of its own process. loss_ce is a mean over the
labelled images of each process, and then over processes. Each BatchNorm sees the images of its own
process, or with --sync-bn (on GPUs) those of all.

In the log, chance for loss_con is ln(V B - 1) T / 0.07, with V views and B images per step. A healthy
loss_con falls below that, and loss_ce below the mean of ln K over --clusters; where all embeddings are
alike, loss_con stays at chance. With --eps 0 the "attacked" views are the clean ones, seen through branch
adv, and the classifier's image through branch adv_ce; with --steps 0 they are moved by the random start
alone (with --no-random-start, not at all).

Measured on one CPU thread (Intel Xeon) and 10,000 images of CIFAR-10 (JPEG), with --arch slim
--batch-size 64 --warmup 0 --lr 0.1 --steps 2 --step-size 4, without pseudo-labels, in 4.6 CPU minutes
(11 epochs): a linear probe (eval.py's preset amoc-slf, 2,000 test images) reaches 44.8 %, and 13.3 %
under PGD-20 at 8/255; with another seed 40.8 and 13.5. SimCLR (acl.py --variant s2s, 28 epochs) reaches
47.0 and 0.1 in 4.6 CPU minutes; a random encoder, 27.4 and 0.

On all 50,000 images, judged on all 10,000 test images (one seed each), AdvCL reaches 49.4 and 13.5 in 18
CPU minutes (6 epochs), with SimCLR's pseudo-labels 49.6 and 13.3 in 20 (6), SimCLR 56.0 and 0.0 in 20
(20). This has not been run on a GPU yet, and l2 and AdamW not at all. The paper reports 77.73, and 48.89
under PGD-20, without pseudo-labels, and 80.85 and 50.45 with them (1000 epochs, as its code has).
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
from common.pgd import ball_point, frozen_stats, pgd
from common.pictures import attack_key, difference, save_rows
from common.resnet import branch
from common.speed import compile_networks

BASE_TEMPERATURE = 0.07  # gives the loss the scale of the authors' code
VIEWS = ("x1", "x2", "x1+d", "x2+d", "x+d", "xl", "xh")  # "+d": attacked, through branch "adv"


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def strong(x, rng, size):
    """A crop of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]. No blur."""
    x = random_resized_crop(x, rng, size, scale=(0.2, 1.0), flip=0.5)
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    x = random_grayscale(x, rng, p=0.2)
    return x.contiguous(memory_format=torch.channels_last)


def augment(x, rng, size):
    """Two strong views and the weak one of the uint8 images x (B, 3, H, W): x1, x2, x (B, 3, size,
    size)."""
    x1 = strong(x, rng, size)
    x2 = strong(x, rng, size)  # another view: `rng` has moved on
    x = random_pad_crop(resize(x, size), rng, 4)
    return x1, x2, random_flip(x, rng)


def high_frequency(x, radius=8):
    """x (B, C, H, W) without its low frequencies, the integers (a, b) with a^2 + b^2 < radius^2;
    not clipped."""
    a = torch.fft.fftfreq(x.shape[2], 1 / x.shape[2], device=x.device).round()
    b = torch.fft.fftfreq(x.shape[3], 1 / x.shape[3], device=x.device).round()
    kept = a[:, None] ** 2 + b**2 >= radius**2
    return torch.fft.ifft2(torch.fft.fft2(x) * kept).real


def is_attacked(view):
    return view.endswith("+d")


def choose(views, x1, x2, x, cutoff):
    """The images of the `views`: those that stay clean (a list), and the A that are attacked (A, B,
    3, S, S)."""
    x_h = high_frequency(x, cutoff)
    images = {"x1": x1, "x2": x2, "x": x, "xh": x_h, "xl": x - x_h}
    clean = [images[view] for view in views if not is_attacked(view)]
    attacked = [images[view.removesuffix("+d")] for view in views if is_attacked(view)]
    if not attacked:
        raise ValueError(f"views {views}: one at least must be attacked (+d)")
    return clean, torch.stack(attacked)


def embed(net, x, bn):
    """z of x (B, 3, S, S) through BatchNorm branch `bn`: (B, 128), not normalised, in x's dtype."""
    with branch(net["encoder"], bn), run.autocast(x.device):
        z = net["projector"](net["encoder"](x))
    return z.to(x.dtype)


def multiview_loss(views, temperature):
    """Eq. 5, as mean over anchors i and their positives j of -log( e^(u_i.u_j/T) / sum_k!=i
    e^(u_i.u_k/T) ), times T / 0.07.

    views: V tensors (B, D), normalised here to u; positives are the other V - 1 views of the image.
    Chance is ln(V B - 1) T / 0.07.
    """
    u = F.normalize(torch.stack(views), dim=2)  # (V, B, D)
    pos = (u * (u.sum(0) - u)).sum(2) / temperature / (len(u) - 1)  # (V, B): the mean over the other views
    rows = u.flatten(0, 1)  # (V B, D)
    scores = rows @ rows.T / temperature  # (V B, V B)
    scores.fill_diagonal_(-math.inf)  # nothing is in its own denominator
    return (scores.logsumexp(1).mean() - pos.mean()) * temperature / BASE_TEMPERATURE


def cluster_loss(net, x, labels, clusters):
    """Mean over the K in `clusters` of the cross-entropy of K logits with labels (B, len(clusters)).

    Each is a mean over the images whose label is not -1, and 0 where there is none.
    """
    with branch(net["encoder"], "adv_ce"), run.autocast(x.device):
        logits = net["classifier"](net["encoder"](x))  # (B, sum of all K)
    total = 0.0
    for part, y in zip(logits.to(x.dtype).split(clusters, dim=1), labels.T, strict=True):
        labelled = (y >= 0).sum().clamp_min(1)  # a plain mean over no image would be NaN
        total = total + F.cross_entropy(part, y, ignore_index=-1, reduction="sum") / labelled
    return total / len(clusters)


def attack(net, loss_fn, x, noise, *, norm, eps, step_size, steps):
    """Eq. 9, inner maximum: x (..., 3, S, S) in [0, 1] moved within eps so as to maximise
    loss_fn(x).

    eps and step_size are in the units of x. The search starts at x + eps `noise`, noise of x's
    shape in the unit ball of the `norm`, or, where noise is None, at x.
    """
    start = x if noise is None else (x + eps * noise).clamp(0, 1)

    def loss_of_images(flat):
        return loss_fn(flat.view(x.shape))

    # Train mode, as in the authors' code (the networks are never put into eval mode here): batch
    # statistics are part of what is attacked. No running statistic changes.
    with frozen_stats(net):
        # As (A B, 3, S, S): each view of each image has a ball of its own.
        x_adv = pgd(loss_of_images, x.flatten(0, -4), eps, step_size, steps, norm,
                    start=start.flatten(0, -4))
    return x_adv.view(x.shape)


def contrast(net, x, constants, temperature):
    """`multiview_loss` of attacked views x (A, B, 3, S, S) and of `constants`, the z of the clean
    ones."""
    attacked = [embed(net, view, "adv") for view in x]
    return multiview_loss([*attacked, *constants], temperature)


def train_step(net, opt, x1, x2, x, labels, noise, *,
               views, cutoff, clusters, cluster_weight, temperature, norm, eps, step_size, steps):
    """One iteration on two strong views and the weak one (B, 3, S, S); the losses to be logged.

    labels (B, len(clusters)); without `clusters` there is no classification term. `noise` (A + 1,
    B, 3, S, S) is in the unit ball: noise[0] starts the attack on the classifier, noise[1:] those on
    the A views. With None they start at the images. The attacks read no running statistic, so the
    order of the two terms does not matter.
    """
    clean, to_attack = choose(views, x1, x2, x, cutoff)

    # Every view is a batch of its own, in the attack too, so the batch statistics of a clean view depend
    # on that view alone. The attack normalises by batch statistics as well, and so the embeddings made
    # here are its constants. These passes also move the running statistics of branch clean (x_h, which
    # is not in [0, 1], goes through it too) and of the projector.
    z_clean = [embed(net, view, "clean") for view in clean]
    constants = [z.detach() for z in z_clean]

    def loss_of_views(x_adv):
        return contrast(net, x_adv, constants, temperature)

    view_noise = None if noise is None else noise[1:]
    x_adv = attack(net, loss_of_views, to_attack, view_noise,
                   norm=norm, eps=eps, step_size=step_size, steps=steps)
    z_adv = [embed(net, view, "adv") for view in x_adv]
    embeddings = [dist.gather(z) for z in [*z_clean, *z_adv]]  # of all processes, with gradient
    loss_con = multiview_loss(embeddings, temperature)
    loss = loss_con
    losses = {"loss_con": loss_con}

    if clusters:

        def loss_of_labels(x_ce):
            return cluster_loss(net, x_ce, labels, clusters)

        label_noise = None if noise is None else noise[0]
        x_ce = attack(net, loss_of_labels, x, label_noise,
                      norm=norm, eps=eps, step_size=step_size, steps=steps)
        losses["loss_ce"] = cluster_loss(net, x_ce, labels, clusters)
        loss = loss_con + cluster_weight * losses["loss_ce"]

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    dist.average_buffers(net)  # else the running statistics of the processes drift apart
    return {"loss": loss, **losses}


def lr_at(step, steps_per_epoch, epochs, lr, warmup):
    """The learning rate of `step`, as in the authors' code. Over the first `warmup` epochs it rises linearly,
    step by step, from a fiftieth of `lr` (theirs: 0.01, for 0.5) to the cosine. After that it is constant
    within an epoch: the cosine from `lr` to a thousandth of it, read at the epoch's end."""

    def cosine_at(epoch):
        return optim.cosine(epoch / epochs, lr, lr / 1000)

    if step < warmup * steps_per_epoch:
        return lr / 50 + (cosine_at(warmup) - lr / 50) * step / (warmup * steps_per_epoch)
    return cosine_at(step // steps_per_epoch + 1)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="advcl", arch="resnet18")
    p.add_argument("--views", choices=VIEWS, nargs="+", default=["x+d", "x1", "x2", "xh"],
                   help="strong crops x1 x2; xl xh, the low and high frequencies of the weak crop x; and, "
                        "attacked, x1+d x2+d x+d (paper)")
    p.add_argument("--teacher", help="exported encoder, for the pseudo-labels; default: none (ours)")
    p.add_argument("--labels", type=run.path,
                   help=".npz of pseudo-labels instead of a teacher's; default: none (ours)")
    p.add_argument("--clusters", type=run.integer(2), nargs="+", default=[2, 10, 50, 100, 500],
                   help="K of each k-means (paper)")
    p.add_argument("--cluster-weight", type=run.number(above=0), default=0.2, help="lambda (authors' code)")
    p.add_argument("--cutoff", type=run.number(), default=8.0,
                   help="the lowest frequency in xh, in periods per image (paper)")
    p.add_argument("--epochs", type=run.integer(0), default=1000,
                   help="0 exports the random encoder; default (authors' code)")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images per step, over all processes (authors' code)")
    p.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd",
                   help="adamw, for a ViT, does not decay biases and norms (ours); sgd has momentum 0.9 "
                        "(authors' code)")
    p.add_argument("--lr", type=run.number(), default=0.5,
                   help="at its peak; with adamw try 1e-3 (ours); with sgd (authors' code)")
    p.add_argument("--warmup", type=run.integer(0), default=10, help="in epochs (authors' code)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=1e-4, help="(authors' code)")
    p.add_argument("--temperature", type=run.number(above=0), default=0.5, help="T (authors' code)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf",
                   help="of the attacks; with l2, for example --eps 128 (ours)")
    p.add_argument("--eps", type=run.number(0, 1e6), default=8.0,
                   help="radius of the attacks, in 1/255 (paper)")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attacks, in 1/255; default: for linf 2 (authors' code), for l2 "
                        "1.25 eps / steps (ours)")
    p.add_argument("--steps", type=run.integer(0), default=5, help="of the attacks (paper)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attacks at random points of the ball (authors' code); without it, at "
                        "the images: with --steps 1 and --step-size equal to --eps, in linf, that is FGSM")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if len(set(args.views)) < len(args.views):
        raise ValueError(f"--views {' '.join(args.views)}: each view once")
    if len(args.views) < 2 or not any(is_attacked(view) for view in args.views):
        raise ValueError(f"--views {' '.join(args.views)}: needs two views, one of them attacked (+d)")
    if args.norm == "linf" and args.eps > 255:
        raise ValueError(f"--eps {args.eps:g}: with --norm linf at most 255, the range of a pixel")
    if args.teacher and args.labels:
        raise ValueError("--teacher and --labels: both give the pseudo-labels; give one of them")


def network(arch, clusters):
    """A dict of networks: "encoder" with BatchNorm branches, images (B, 3, S, S), not normalised,
    -> (B, D); "projector" D -> 128, whose BatchNorm has no branches; given `clusters`, "classifier"
    D -> sum of all K."""
    branches = ("adv", "clean", "adv_ce") if clusters else ("adv", "clean")
    encoder = encoders.make(arch, branches, mean=(0, 0, 0), std=(1, 1, 1))
    projector = encoders.mlp(encoder.dim, encoder.dim, 128, norm=nn.BatchNorm1d)
    net = nn.ModuleDict({"encoder": encoder, "projector": projector})
    if clusters:
        net["classifier"] = nn.Linear(encoder.dim, sum(clusters))
    return net.to(memory_format=torch.channels_last)


def pseudo_labels(args, env, images, size):
    """Pseudo-labels (N, len(--clusters)): k-means on the teacher's normalised features of the
    images as they are.

    They are kept in --out, and made again where the data, the image size, the teacher, the clusters
    or the seed are others than those they were made with. Raises ValueError where the kept file
    cannot be read.
    """
    path = pathlib.Path(args.out) / "pseudo_labels.pt"
    format_name = "AdvCL pseudo-label file"
    advice = "move it away, and it is made again"
    teacher = encoders.load_encoder(args.teacher).to(env.device)
    weights = hashlib.sha256(pathlib.Path(args.teacher).read_bytes()).hexdigest()
    made_with = {"data": images.checksum(), "image_size": size, "teacher": weights,
                 "clusters": args.clusters, "seed": args.seed}
    kept = path.exists() and encoders.read(path, format_name, advice)["made_with"] == made_with
    if env.rank == 0 and not kept:
        with torch.no_grad():
            batches = images.stream(torch.arange(len(images)).split(500))
            h = torch.cat([teacher(resize(x, size)) for x, _ in batches])
        h = F.normalize(h, dim=1)  # (N, D)
        generator = torch.Generator().manual_seed(args.seed)
        labels = torch.stack([kmeans(h, k, generator) for k in args.clusters], 1).cpu()
        files.save({"format": format_name, "made_with": made_with, "labels": labels}, path)
    dist.barrier()
    return encoders.read(path, format_name, advice)["labels"].to(env.device)


def labels_of_file(args, images):
    """Pseudo-labels (N, len(--clusters)) of the N `images`, int64, -1 where there is none, from the file
    --labels: an .npz with `labels`, integers (len(--clusters), M), and perhaps `checksum`.

    The M images are all training images of --data in their own order, of which --limit may have taken
    N; with the checksum of the N images, they are those. Raises ValueError or FileNotFoundError that
    names the file, what is wrong with it and what would work.
    """
    path = args.labels
    found = data.read_npz(path, "labels", "checksum")
    if "labels" not in found:
        raise ValueError(f"{path}: labels is not in it; it must hold integers (clusterings, images)")
    labels = found["labels"]
    if labels.dtype.kind not in "iu" or labels.ndim != 2:
        raise ValueError(f"{path}: labels is {labels.dtype} {labels.shape}; it must be integers "
                         "(clusterings, images)")
    if len(labels) != len(args.clusters):
        raise ValueError(f"{path}: has {len(labels)} clusterings, and --clusters {len(args.clusters)} "
                         "numbers; give --clusters the K of each row of labels")

    whole = images
    rows = range(len(images))
    if args.limit:
        whole = data.load(args.data, args.data_dir, "train", "cpu", None, args.image_size or 32, args.workers)
        rows = data.fixed_order(len(whole))[: args.limit]
    if "checksum" in found:
        checksum = str(found["checksum"])
        if checksum == images.checksum():
            whole = images
            rows = range(len(images))
        elif checksum != whole.checksum():
            raise ValueError(f"{path}: its labels are of other images than --data {args.data} (or in another "
                             "order), by their checksum; make them for these")
    elif args.data not in data.NAMES:
        raise ValueError(f"{path}: has no checksum, so nobody knows whether its labels are in the order of "
                         f"--data {args.data}; add the data's, as log.jsonl has it")
    if labels.shape[1] != len(whole):
        raise ValueError(f"{path}: has labels of {labels.shape[1]} images; --data {args.data} "
                         f"has {len(whole)}")

    for row, k in zip(labels, args.clusters):
        if row.min() < -1 or row.max() >= k:
            raise ValueError(f"{path}: labels go from {row.min()} to {row.max()} where --clusters has {k}; "
                             f"they must be from 0 to {k - 1}, or -1 for none")
        if row.max() < 0:
            raise ValueError(f"{path}: all labels are -1 where --clusters has {k}; leave that row out")
    return torch.from_numpy(labels.astype("int64").T[list(rows)])


def start_noise(x, views, norm, rng):
    """The noise from which the attack on the classifier and those on the A attacked views start, as
    `train_step` takes it: (A + 1, B, 3, S, S), each view of each image uniform in a unit ball of the
    `norm`. The classifier's is drawn even where there is none, so that the views' is the same with and
    without pseudo-labels."""
    attacks = 1 + sum(is_attacked(view) for view in views)
    # One number more than there are pixels: under l2 it sets the distance from the centre, under linf it
    # is not used.
    u = rng.uniform(attacks, 1 + x[0].numel(), device=x.device)
    return ball_point(u, norm).view(len(x), attacks, *x.shape[1:]).transpose(0, 1)


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
    return dict(norm=args.norm, eps=eps, step_size=step_size, steps=args.steps)


def pictures(net, images, size, args):
    """Rows for `save_rows` of up to eight images: both strong views, the weak one, its high
    frequencies (about grey), then each attacked view and what the attack added. Batch statistics
    are those of these few images."""
    x, _, rng = data.sample(images, 8, args.seed)
    x1, x2, x = augment(x, rng, size)
    noise = start_noise(x, args.views, args.norm, rng)[1:] if args.random_start else None
    clean, to_attack = choose(args.views, x1, x2, x, args.cutoff)
    with frozen_stats(net):
        constants = [embed(net, view, "clean").detach() for view in clean]

    def loss_of_views(x_adv):
        return contrast(net, x_adv, constants, args.temperature)

    x_adv = attack(net, loss_of_views, to_attack, noise, **attack_settings(args))
    rows = [("x1", x1), ("x2", x2), ("x", x), ("xh", 0.5 + high_frequency(x, args.cutoff))]
    names = [view for view in args.views if is_attacked(view)]
    full_scale = args.eps / 255 if args.norm == "linf" else None
    for name, before, after in zip(names, to_attack, x_adv):
        rows += [(name, after), (f"d of {name}", difference(after, before, full_scale))]
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
    clusters = args.clusters if args.teacher or args.labels else []
    if args.teacher and max(clusters) > len(images):
        raise ValueError(f"--clusters {max(clusters)}: there are {len(images)} images; give smaller numbers")
    if args.labels:
        images.y = labels_of_file(args, images).to(device)

    net = run.to_device(network(args.arch, clusters), args, env)
    if args.optimizer == "adamw":
        groups = optim.groups(net.named_parameters(), args.weight_decay)
        opt = torch.optim.AdamW(groups, args.lr)
    else:
        opt = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    compile_networks(args, env, net["encoder"])

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    # A run is continued with the same labels, or the same teacher, only.
    if args.labels:
        log.data["labels"] = hashlib.sha256(images.y.cpu().contiguous().numpy()).hexdigest()
    if args.teacher:
        log.data["labels"] = hashlib.sha256(pathlib.Path(args.teacher).read_bytes()).hexdigest()
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    if args.teacher:  # only now: another run's labels in this folder must not be overwritten
        images.y = pseudo_labels(args, env, images, size)
    chance = math.log(len(args.views) * args.batch_size - 1) * args.temperature / BASE_TEMPERATURE
    about_labels = "no --teacher or --labels, so no pseudo-labels"
    if clusters:
        about_labels = f"pseudo-labels, K = {clusters}"
    if clusters and (images.y < 0).any():
        about_labels += f"; {100 * (images.y < 0).float().mean():.1f} % of them are -1"
    log.start(step, f"chance loss_con ln(VB - 1) T / 0.07 = {chance:.3f}; {about_labels}")

    settings = dict(views=args.views, cutoff=args.cutoff, clusters=clusters,
                    cluster_weight=args.cluster_weight, temperature=args.temperature,
                    **attack_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, y, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step, steps_per_epoch, args.epochs, args.lr, args.warmup)
            optim.set_lr(opt, lr)
            x1, x2, x = augment(x, rng, size)
            noise = start_noise(x, args.views, args.norm, rng) if args.random_start else None
            losses = train_step(net, opt, x1, x2, x, y, noise, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again. All processes draw them, since a SyncBatchNorm in train mode asks them all.
            rows = pictures(net, images, size, args)
            if env.rank == 0:
                save_rows(out / "views.png", rows, key=attack_key(args.norm, args.eps))
            run.save(args, env, state, step)
    if env.rank == 0:
        bn = encoders.branch_of(net["encoder"], "adv")
        encoders.export(net["encoder"], out / "encoder.pt", bn, image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder" + (f"; BN branch {bn}" if bn else ""))


if __name__ == "__main__":
    run.cli(main)
