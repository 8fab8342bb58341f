"""Adversarial Selfie, Rotation and Jigsaw, alone and together: Chen, Liu, Chang, Cheng, Amini & Wang 2020,
"Adversarial Robustness: From Self-Supervised Pre-Training to Fine-Tuning" (arXiv 2003.12862; AP-SE, AP-DPE).

In each of three pretext tasks a network must tell what was done to an image: by how many quarters it was
turned (Rotation); in which order its 16 patches were shuffled (Jigsaw); or, of four patches that were taken
out, which belongs to which of the four empty places (Selfie). Rotation and Jigsaw are attacked after the
image was turned or shuffled, Selfie on the whole image. The tasks share one trunk, with which fine-tuning
starts; according to the paper it then needs fewer epochs, and ends more robust.

With several tasks, a term g measures how different the directions of their input gradients are. The paper's
aim is that no one perturbation fools all tasks; for what its sign does, see below.

    paper                       this file
    theta_p                     net.encoder.trunk: a ResNet without its last stage
    theta_pc                    the parts private to a task: last stage and linear head, or AttentionPool
    Rotation, Jigsaw, Selfie    rotate and cross-entropy, jigsaw and cross-entropy, selfie_loss
    Eq. 1, one task             objective of one loss
    Eq. 3, the joint attack     attack: one search over the images of all tasks at once
    g, in Eq. 4                 log_det: of the cosines between the tasks' input gradients, plus 1e-5 I
    Eq. 2                       objective, lambda = --lam; AP-SE is --lam 0, and the default AP-DPE
    P1, P2, P3                  --epochs 0, --eps 0, and the default: attacked
    Table 8                     --noise: Gaussian noise in place of the attack

The loss of a step is the mean over tasks of each task's loss at its attacked images, plus lambda g. There is
no temperature. The attacked images are constants in the update; otherwise no gradient is stopped: g too is
differentiated in the weights, and the features that Selfie's queries are compared with are trained.
The attack maximises the sum of the losses plus lambda g. The targets are drawn before, and do not depend on
the pixels. Without g the search falls apart into one for each task, for no image is shared.

**The sign.** g is about 0 where the gradients are orthogonal, and negative elsewhere. The paper minimises a
loss that contains + lambda g, and its attack maximises losses + lambda g as well. So the attack looks for
diverse gradients, while the weights are trained to align them. Paper and code agree on this, and so do we;
the log has g as `log_det`. A negative --lam reverses both.

Paper and code differ in these places:
- The loss of Eqs. 1 and 2 is of attacked images alone: so is ours. The code takes the mean of the attacked
  and the clean loss, which is --clean-weight 0.5.
- Eq. 2 adds up the losses of the tasks, with a lambda from a grid search in the supplement. We take the
  code's mean, and its lambda, 0.1; three times that is the paper's sum with 0.3. The attack uses the sum,
  in both.
- The code's Selfie puts a softmax before its cross-entropy, which has one of its own. We do not;
  --double-softmax does.
- The paper says nothing of modes in the attack. In the code, running statistics move at each of its steps,
  and dropout is live. Ours are frozen, and there is no dropout, so that the attack leaves no trace;
  BatchNorm uses the statistics of the batch, as in the code.
- The code's joint trunk lacks BatchNorm and ReLU after the first convolution, which its single ones have. We
  always have them, so that all tasks give one kind of encoder.

Each image is cut and mirrored once, and all tasks get the result. A batch has one order of patches in Selfie,
and equal numbers of the four rotations.

    python pretext.py                                                AP-DPE: three tasks, lambda 0.1
    python pretext.py --lam 0 --out runs/ap-se                       AP-SE
    python pretext.py --tasks rotation --out runs/rotation           one task, P3
    python pretext.py --tasks rotation --eps 0 --epochs 200 --out runs/rotation-clean    P2, as in the code
    python pretext.py --tasks selfie --clean-weight 0.5 --double-softmax --out runs/selfie    as in the code
    python eval.py runs/pretext/encoder.pt --preset chen-f1 chen-f4    the paper's fine-tuning
    python eval.py runs/pretext/encoder.pt --preset knn amoc-slf amoc-alf

Learning rate, its end, weight decay, epochs, crop and flip differ from task to task; they stand in RECIPES,
and flags change them. Two tasks have the recipe of three.

Count a forward pass, or a backward pass to the pixels, as 1, and a whole backward pass as 2. A step on one
task then costs 2 K + 3, 23 with K = 10, and 3 with --eps 0. AP-SE costs 2 K + 4 for each task, for g is
logged. In AP-DPE each step of the attack, and the update, differentiates a gradient: by operations counted on
a CPU, 5.3 K + 6.3 for each task. With --eps 0 the terms in K fall away. --clean-weight adds 3, and Selfie's
pooling comes on top.

The encoder is exported with Rotation's last stage or, without Rotation, with Jigsaw's. With Selfie alone no
last stage is trained: the exported one is random, and the file says so. At test time it sees whole, upright
images. It normalises them by running statistics, of which the trunk has one set: of attacked images (with
--eps 0 clean ones, with --clean-weight both) of all tasks, Selfie's single patches included. In a step the
last of the --tasks weighs most. A tenth of the images (--held-out) is kept for the choice of the epoch in
fine-tuning, and not seen here.

On several processes gradients and running statistics are averaged. Each BatchNorm sees the images of its own
process; with --sync-bn, which is for one task, those of all. Order, augmentation, tasks and noise are those
of one process; dropout is not.

In the log, the loss for uniform answers is 1.386 (ln 4) in Rotation, 3.434 (ln 31) in Jigsaw, and 5.545
(4 ln 4) in Selfie, which adds up four choices. With --double-softmax Selfie's loss cannot fall below 2.97.
The loss_... are of attacked images in train mode; accuracy_... of up to 256 clean training images, always
the same, in eval mode: chance is 25 %, 13 % (the share of unshuffled images) and 25 %. Since unshuffled
images are the most frequent class, a network that ignores the image comes to 3.347 in Jigsaw. Attacked
losses may begin above chance: in the AP-DPE run below loss_selfie goes from 8.2 to 4.6, loss_jigsaw from
3.47 to 3.17, and loss_rotation ends at 1.39, while accuracy_rotation rises from 34 to 38 %. `loss` has
lambda g in it. A log_det near 0 is the rule; near -11 two tasks have the same input gradient (or one has
none), near -22 all three. With --steps 0 the images are moved by the random start alone (with
--no-random-start, not at all).

Measured on one CPU thread (Intel Xeon) and 10,000 images of CIFAR-10 (JPEG), with --arch slim
--batch-size 64 --ramp 0 --steps 2 --step-size 4 --pool-layers 2, and --lr 0.05 for Rotation, 0.01 for
three tasks: after 6.7 CPU minutes of Rotation (20 epochs) a linear probe (eval.py's preset amoc-slf,
2,000 test images) reaches 33.2 %, 18.3 under PGD-20 at 8/255; without attack (6 CPU minutes, 40 epochs)
42.4 and 0; a random encoder has 27.4 and 0. AP-DPE has 30.2 and 4.6 after 11.7 CPU minutes, which are 3
epochs; AP-SE 30.5 and 5.2 after 8.9 (8 epochs). Nothing has run on a GPU yet. Fan et al. (2021) print
78.30 % on clean images and 18.22 under attack for AP-DPE with a ResNet-18 on CIFAR-10. The 18.22 also
stands in the paper itself, for another run: Rotation alone, fine-tuned by F1 (the last stage and the
classifier, on clean images).
"""
import argparse
import copy
import functools
import math
import pathlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, resnet, run
from common.augment import random_flip, random_pad_crop, resize
from common.log import Log
from common.pgd import eval_mode, frozen_stats, pgd
from common.pictures import difference, save_rows
from common.speed import compile_networks

MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10
STD = (0.2470, 0.2435, 0.2616)
GRID = 4  # patches along each side of an image
MASKED = 4  # of the patches, in Selfie


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size, padding, flip):
    """A view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1], padded by `padding`
    pixels and cut; with `flip`, mirrored with probability 1/2."""
    x = random_pad_crop(resize(x, size), rng, padding=padding)
    return random_flip(x, rng) if flip else x


def rotate(x, y):
    """x (B, C, S, S), image b turned by y_b quarters counter-clockwise; y (B,) int64, from 0 to 3."""
    turned = x
    for quarters in (1, 2, 3):
        chosen = (y == quarters).view(-1, 1, 1, 1)
        turned = torch.where(chosen, x.rot90(quarters, (2, 3)), turned)
    return turned


def to_patches(x, grid):
    """Images (B, C, S, S) -> their patches, row by row: (B, grid^2, C, s, s), s = S / grid."""
    B, C, S, _ = x.shape
    s = S // grid
    x = x.reshape(B, C, grid, s, grid, s)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, grid * grid, C, s, s)


def from_patches(patches, grid):
    """The inverse of `to_patches`."""
    B, _, C, s, _ = patches.shape
    x = patches.reshape(B, grid, grid, C, s, s)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(B, C, grid * s, grid * s)


def jigsaw(x, y, permutations):
    """x (B, C, S, S) with its patches shuffled by class y (B,) int64: class 0 leaves the image, class c
    shows patch permutations[c - 1, j] at place j. permutations (P, grid^2) int64."""
    places = permutations.shape[1]
    grid = math.isqrt(places)
    identity = torch.arange(places, device=x.device)[None]
    order = torch.cat([identity, permutations])[y]  # (B, places)
    patches = to_patches(x, grid)
    shuffled = patches.gather(1, order[:, :, None, None, None].expand_as(patches))
    return from_patches(shuffled, grid)


def jigsaw_labels(u, classes=31):
    """Classes (B,) from numbers u (B, 2) uniform in [0, 1): 0 with probability 0.1, and otherwise uniform
    (the authors' code)."""
    return torch.where(u[:, 1] < 0.1, 0, (classes * u[:, 0]).long())


class PoolLayer(nn.Module):
    """A transformer layer, LayerNorms last: (B, n, dim) -> the same."""

    def __init__(self, dim, heads, hidden, dropout):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim))
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, n, dim = x.shape
        qkv = self.qkv(x).view(B, n, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, n, dim / heads) each
        # Written out, for PyTorch's fused attention has no second derivative, which log_det needs.
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(3)
        mixed = (weights @ v).transpose(1, 2).reshape(B, n, dim)
        x = self.norm1(x + self.dropout(self.out(mixed)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class AttentionPool(nn.Module):
    """Selfie's queries: features of the visible patches (B, n, dim), and the places (m,) int64 of the masked
    ones -> (B, m, dim).

    A learnt token stands before the features, and what `layers` make of it describes the image. The visible
    patches get no embedding of their place. A query is that description plus embeddings of its row and
    column. All sizes are the authors' code's.
    """

    def __init__(self, dim, layers, dropout=0.1):
        super().__init__()
        heads = max(1, dim // 64)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.layers = nn.Sequential(*[PoolLayer(dim, heads, 2 * dim, dropout) for _ in range(layers)])
        self.rows = nn.Parameter(torch.randn(GRID, dim))
        self.columns = nn.Parameter(torch.zeros(GRID, dim))

    def forward(self, features, places):
        token = self.token.expand(len(features), -1, -1)
        pooled = self.layers(torch.cat([token, features], 1))[:, :1]
        return pooled + self.rows[places // GRID] + self.columns[places % GRID]


class Tasks(nn.Module):
    """One trunk, that of `encoder`, and the parts that are private to each of the `tasks`.

    permutations  (P, 16) int64: of Jigsaw, whose classes are the identity and these
    layers        how many Selfie's pooling has
    """

    def __init__(self, encoder, tasks, permutations, layers):
        super().__init__()
        self.encoder = encoder
        last_stage = encoders.last_stage(encoder, "pretext.py")  # the name is for its error
        self.register_buffer("permutations", permutations)
        if "rotation" in tasks:
            self.rotation_head = nn.Linear(encoder.dim, 4)
        if "jigsaw" in tasks:
            self.jigsaw_head = nn.Linear(encoder.dim, 1 + len(permutations))
            self.jigsaw_stage = None  # the encoder's
            if "rotation" in tasks:
                self.jigsaw_stage = copy.deepcopy(nn.Sequential(*last_stage))
                resnet.initialize(self.jigsaw_stage)
        if "selfie" in tasks:
            self.pool = AttentionPool(encoder.trunk_dim, layers)

    def forward(self, x, task, order):
        """The answers to `task` for its images x (B, 3, S, S): logits (B, 4) of Rotation and (B, 1 + P) of
        Jigsaw. For Selfie, which masks the first 4 patches in `order` (16,): queries and features, stacked,
        (2, B, 4, dim)."""
        if task == "rotation":
            return self.rotation_head(self.encoder(x))
        if task == "selfie":
            return self.selfie(x, order)
        if self.jigsaw_stage is None:
            h = self.encoder(x)
        else:
            h = self.jigsaw_stage(self.encoder.trunk(x)).mean((2, 3))
        return self.jigsaw_head(h)

    def selfie(self, x, order):
        patches = to_patches(x, GRID).flatten(0, 1)  # each goes through the trunk alone
        patches = patches.contiguous(memory_format=torch.channels_last)
        features = self.encoder.trunk(patches).mean((2, 3)).unflatten(0, (len(x), -1))  # (B, 16, dim)
        masked = order[:MASKED]
        queries = self.pool(features[:, order[MASKED:]], masked)
        return torch.stack([queries, features[:, masked]])


def predict(net, x, task, target):
    """The answers (see `Tasks`) to `task`, in x's dtype. `target` is as in `task_loss`; only Selfie's, the
    order of the patches, goes into the network."""
    with run.autocast(x.device):
        answers = net(x, task, target if task == "selfie" else None)
    return answers.to(x.dtype)


def scores(queries, features):
    """Dot products of the queries with the features of the masked patches of their image: (B, m, D) each ->
    (B, m, m), rows are queries."""
    return queries @ features.transpose(1, 2)


def selfie_loss(queries, features, double_softmax=False):
    """The cross-entropy with which query i (B, m, D) picks the i-th of the features (B, m, D), added up over
    i; mean over B. With `double_softmax` the probabilities are taken as logits, as in the authors' code."""
    logits = scores(queries, features)
    if double_softmax:
        logits = logits.softmax(2)
    m = logits.shape[1]
    y = torch.arange(m, device=logits.device).repeat(len(logits))
    return m * F.cross_entropy(logits.flatten(0, 1), y)


def task_loss(net, task, target, double_softmax, x):
    """The loss of one task at its images x (B, 3, S, S), mean over them. `target`: (B,) classes of Rotation
    and Jigsaw; of Selfie the order of patches (16,)."""
    answers = predict(net, x, task, target)
    if task == "selfie":
        return selfie_loss(*answers, double_softmax)
    return F.cross_entropy(answers, target)


def losses_at(task_losses, x):
    """A list: the loss of each task, a function of its images, at that task's part of x (m B, ...)."""
    parts = x.chunk(len(task_losses))
    return [loss(part) for loss, part in zip(task_losses, parts)]


def log_det(gradients):
    """g: log det(G^T G + 1e-5 I), mean over images, where the columns of G are an image's gradients in a list
    of m tensors (B, ...), each divided by its length."""
    columns = []
    for gradient in gradients:
        column = gradient.flatten(1)
        columns.append(column / (column.norm(dim=1, keepdim=True) + 1e-10))
    G = torch.stack(columns, 2).double()  # (B, pixels, m); in TF32 the rounding would exceed the 1e-5
    identity = torch.eye(len(gradients), dtype=G.dtype, device=G.device)
    g = torch.logdet(G.transpose(1, 2) @ G + 1e-5 * identity).mean()
    return g.to(gradients[0].dtype)


def joint(task_losses, x):
    """The losses of the m tasks at the images x (m B, ...), which must require a gradient, and the g of their
    gradients. All can be differentiated further, in x and in the weights."""
    parts = x.chunk(len(task_losses))
    losses = []
    gradients = []
    for task_loss, part in zip(task_losses, parts):
        loss = task_loss(part)
        (gradient,) = torch.autograd.grad(loss, part, create_graph=True)
        losses.append(loss)
        gradients.append(gradient)
    return losses, log_det(gradients)


def objective(attacked, clean, g, lam, clean_weight):
    """Eq. 2, with the mean over tasks in place of their sum. `attacked` and `clean` are lists of the tasks'
    losses (`clean` is None where its weight is 0); g has the weight lam, and is not looked at where that is
    0."""
    loss = sum(attacked) / len(attacked)
    if clean_weight:
        loss = (1 - clean_weight) * loss + clean_weight * sum(clean) / len(clean)
    return loss + lam * g if lam else loss


def attack(net, task_losses, x, noise, *, lam, eps, step_size, steps):
    """Eq. 3: the images x (m B, 3, S, S) of m tasks moved, each within linf eps and within [0, 1], so as to
    maximise the sum of their losses plus lambda g. eps and step_size are in the units of x. The search starts
    at x + eps `noise`, noise (m B, 3 S S) from -1 to 1, or, where noise is None, at x."""
    start = x if noise is None else (x + eps * noise.view(x.shape)).clamp(0, 1)

    def loss_of_images(x_adv):
        if lam == 0 or len(task_losses) == 1:  # no gradient of a gradient is needed
            return sum(losses_at(task_losses, x_adv))
        losses, g = joint(task_losses, x_adv)
        return sum(losses) + lam * g

    # BatchNorm uses the statistics of the attacked batch, as it will in the update, but no running statistic
    # changes.
    dropouts = [m for m in net.modules() if isinstance(m, nn.Dropout)]
    with frozen_stats(net), eval_mode(*dropouts):
        return pgd(loss_of_images, x, eps, step_size, steps, start=start)


def train_step(net, opt, x, targets, noise, *, tasks, lam, clean_weight, double_softmax, eps, step_size,
               steps, sigma=None):
    """One iteration on the images x (m B, 3, S, S) of the `tasks`, one task after the other, and their
    `targets`, a list (see `task_loss`). Returns the losses, and log_det, to be logged. `noise` is as in
    `attack`. With `sigma`, in the units of x, it is standard Gaussian, and takes the place of the
    attack."""
    task_losses = [functools.partial(task_loss, net, task, target, double_softmax)
                   for task, target in zip(tasks, targets)]
    if sigma is None:
        x_adv = attack(net, task_losses, x, noise, lam=lam, eps=eps, step_size=step_size, steps=steps)
    else:
        x_adv = (x + sigma * noise.view(x.shape)).clamp(0, 1)

    # Each task's images are a batch of their own to BatchNorm, whose running statistics move once for each;
    # clean ones, if any, go first, so that the attacked weigh more.
    clean = losses_at(task_losses, x) if clean_weight else None
    logged = {}
    if len(tasks) == 1:
        attacked = losses_at(task_losses, x_adv)
        loss = objective(attacked, clean, None, 0, clean_weight)
    else:
        attacked, g = joint(task_losses, x_adv.requires_grad_())
        loss = objective(attacked, clean, g, lam, clean_weight)
        logged["log_det"] = g.detach()

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    dist.average_buffers(net)  # else the running statistics of the processes drift apart
    for task, value in zip(tasks, attacked):
        logged[f"loss_{task}"] = value
    return {"loss": loss, **logged}


def lr_at(step, steps, lr, final_lr, ramp):
    """The learning rate of `step` of a run of `steps`: during the first `ramp` steps linear from lr / 10 to
    lr, and otherwise a cosine from `lr` to `final_lr` over the whole run."""
    if step < ramp:
        return lr * (0.1 + 0.9 * step / ramp)
    return optim.cosine(step / steps, lr, final_lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
class Recipe(NamedTuple):
    """The recipe for one task, or for several: lr and final_lr are the paper's, the rest is from the authors'
    code."""

    epochs: int
    lr: float
    final_lr: float
    weight_decay: float
    nesterov: bool
    ramp: int  # steps
    padding: int  # pixels
    flip: bool


RECIPES = {
    "rotation": Recipe(100, 0.1, 1e-6, 3e-4, False, 200, 4, True),
    "jigsaw": Recipe(100, 0.1, 1e-6, 3e-4, False, 200, 4, True),
    "selfie": Recipe(200, 0.025, 1e-6, 1e-4, True, 0, 2, False),
    "joint": Recipe(150, 0.001, 1e-8, 1e-4, True, 0, 4, True),
}


def parser():
    p = run.parser(__doc__, name="pretext", arch="preact_resnet50")
    p.add_argument("--tasks", nargs="+", choices=("selfie", "rotation", "jigsaw"), metavar="TASK",
                   default=["selfie", "rotation", "jigsaw"], help="one or more of the three (paper)")
    p.add_argument("--lam", type=run.number(-1e6, 1e6), default=0.1,
                   help="lambda, of log_det, where there are several tasks; 0 gives AP-SE (authors' code)")
    p.add_argument("--clean-weight", type=run.number(0, 1), default=0.0,
                   help="of the clean loss beside the attacked, 0.5 in the authors' code; default (paper)")
    p.add_argument("--double-softmax", action=argparse.BooleanOptionalAction, default=False,
                   help="put a softmax before Selfie's cross-entropy, as the code does; without it (paper)")
    p.add_argument("--permutations", type=run.integer(1, 1000), default=30,
                   help="how many Jigsaw has, drawn once from the seed (authors' code)")
    p.add_argument("--pool-layers", type=run.integer(0, 100), default=13,
                   help="layers of Selfie's attention pooling (authors' code)")
    p.add_argument("--epochs", type=run.integer(0),
                   help="0 exports the random encoder; default: RECIPES (authors' code)")
    p.add_argument("--batch-size", type=run.integer(1), default=256,
                   help="images per step, over all processes (paper)")
    p.add_argument("--lr", type=run.number(), help="at its peak; default: RECIPES (paper)")
    p.add_argument("--final-lr", type=run.number(), help="at the end of the cosine; default: RECIPES (paper)")
    p.add_argument("--ramp", type=run.integer(0),
                   help="steps over which the rate climbs from a tenth; default: RECIPES (authors' code)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), help="default: RECIPES (authors' code)")
    p.add_argument("--nesterov", action=argparse.BooleanOptionalAction,
                   help="of SGD with momentum 0.9; default: RECIPES (authors' code)")
    p.add_argument("--padding", type=run.integer(0, 1000),
                   help="pixels around the image before it is cut; default: RECIPES (authors' code)")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction,
                   help="mirror images with probability 1/2; default: RECIPES (authors' code)")
    p.add_argument("--eps", type=run.number(0, 255), default=8.0,
                   help="radius of the attack, linf, in 1/255; 0: clean images (paper)")
    p.add_argument("--step-size", type=run.number(0, 1e6), default=2.0,
                   help="of one step of the attack, in 1/255 (paper)")
    p.add_argument("--steps", type=run.integer(0), default=10, help="K, of the attack (paper)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (paper); without it, at the "
                        "image")
    p.add_argument("--noise", type=run.number(0, 1e6), metavar="SIGMA",
                   help="Gaussian noise of this standard deviation, in 1/255, in place of the attack, whose "
                        "flags then have no effect; default: none (paper)")
    p.add_argument("--held-out", type=run.number(0, 0.9), default=0.1,
                   help="share of the images that are not trained on (paper)")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    repeated = [task for task in args.tasks if args.tasks.count(task) > 1]
    if repeated:
        raise ValueError(f"--tasks {' '.join(args.tasks)}: {repeated[0]} is there twice")
    for flag in ("compile", "sync_bn"):
        if getattr(args, flag) and len(args.tasks) > 1:
            raise ValueError(f"--{flag.replace('_', '-')}: has no second derivative, which log_det needs; it "
                             "is for one task")


def recipe(args):
    """The `Recipe` for the tasks of the flags, with the changes that other flags make."""
    known = RECIPES[args.tasks[0] if len(args.tasks) == 1 else "joint"]
    changed = {name: getattr(args, name) for name in Recipe._fields if getattr(args, name) is not None}
    return known._replace(**changed)


def network(arch, tasks, permutations, layers, seed):
    """The tasks' network (`Tasks`). The permutations of Jigsaw are drawn from the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(GRID * GRID, generator=generator) for _ in range(permutations)]
    encoder = encoders.make(arch, mean=MEAN, std=STD)
    net = Tasks(encoder, tasks, torch.stack(drawn), layers)
    return net.to(memory_format=torch.channels_last)


def batch_of_tasks(net, x, rng, size, args, padding, flip):
    """What a step learns from uint8 images x (B, 3, H, W): the images of all tasks (m B, 3, size, size), one
    task after the other, and a list of their targets (see `task_loss`)."""
    x = augment(x, rng, size, padding, flip)
    images = []
    targets = []
    for task in args.tasks:
        if task == "rotation":
            # A quarter of the global batch each, in random order.
            order = rng.shared(rng.total, device=x.device).argsort()
            target = order[rng.rows] % 4
            images.append(rotate(x, target))
        elif task == "jigsaw":
            target = jigsaw_labels(rng.uniform(2, device=x.device), 1 + len(net.permutations))
            images.append(jigsaw(x, target, net.permutations))
        else:
            target = rng.shared(GRID * GRID, device=x.device).argsort()  # one for the whole batch
            images.append(x)
        targets.append(target)
    return torch.cat(images).contiguous(memory_format=torch.channels_last), targets


def start_noise(x, rng, args):
    """For images x (m B, 3, S, S) of the m tasks: where the attack starts, (m B, 3 S S) uniform from -1 to 1,
    or None for the images themselves; with --noise, standard Gaussian numbers."""
    if args.noise is None and not args.random_start:
        return None
    pixels = x[0].numel()
    noise = 2 * rng.uniform(len(args.tasks), pixels, device=x.device) - 1
    noise = noise.transpose(0, 1).flatten(0, 1)
    if args.noise is None:
        return noise
    return 2**0.5 * torch.erfinv(noise.clamp(-0.999999, 0.999999))


def attack_settings(args):
    """The named arguments of `attack` as the flags have them; eps and step_size as pixel values in
    [0, 1]."""
    return dict(lam=args.lam, eps=args.eps / 255, step_size=args.step_size / 255, steps=args.steps)


def step_settings(args):
    """The named arguments of `train_step` as the flags have them."""
    sigma = None if args.noise is None else args.noise / 255
    return dict(tasks=args.tasks, clean_weight=args.clean_weight, double_softmax=args.double_softmax,
                sigma=sigma, **attack_settings(args))


@torch.no_grad()
def clean_accuracy(net, images, size, args):
    """{"accuracy_" + task: share} of what `net` gets right in eval mode: of up to 256 training images, the
    same in each epoch, made into tasks as in training, and not attacked."""
    plan = recipe(args)
    x, _, rng = data.sample(images, 256, args.seed)
    x, targets = batch_of_tasks(net, x, rng, size, args, plan.padding, plan.flip)
    found = {}
    with eval_mode(net):
        for task, target, part in zip(args.tasks, targets, x.chunk(len(args.tasks))):
            answers = predict(net, part, task, target)
            if task == "selfie":
                answers = scores(*answers).flatten(0, 1)
                target = torch.arange(MASKED, device=x.device).repeat(len(part))  # the places in that order
            found[f"accuracy_{task}"] = (answers.argmax(1) == target).float().mean().item()
    return found


def pictures(net, images, size, args):
    """Rows for `save_rows` of up to eight images, for each task: its images, the same attacked (or with
    noise), and what was added, of which white and black are the largest change of all tasks. Of Selfie,
    before these, what its pooling is shown: grey where patches are masked."""
    plan = recipe(args)
    x, _, rng = data.sample(images, 8, args.seed)
    x, targets = batch_of_tasks(net, x, rng, size, args, plan.padding, plan.flip)
    noise = start_noise(x, rng, args)
    settings = step_settings(args)
    if settings["sigma"] is None:
        task_losses = [functools.partial(task_loss, net, task, target, args.double_softmax)
                       for task, target in zip(args.tasks, targets)]
        x_adv = attack(net, task_losses, x, noise, **attack_settings(args))
    else:
        x_adv = (x + settings["sigma"] * noise.view(x.shape)).clamp(0, 1)
    largest = (x_adv - x).abs().max()
    rows = []
    parts = zip(args.tasks, targets, x.chunk(len(args.tasks)), x_adv.chunk(len(args.tasks)))
    for task, target, clean, attacked in parts:
        added = difference(attacked, clean, largest)
        if task == "selfie":
            rows.append(("selfie: visible", mask_grey(clean, target)))
        rows += [(f"{task}: x", clean), (f"{task}: x_adv", attacked), (f"{task}: x_adv - x", added)]
    return rows


def mask_grey(x, order):
    """Images x (B, 3, S, S), grey where the first 4 patches in `order` (16,) are."""
    patches = to_patches(x, GRID).clone()
    patches[:, order[:MASKED]] = 0.5
    return from_patches(patches, GRID)


def main(argv=None):
    args = parser().parse_args(argv)
    check(args)
    plan = recipe(args)
    env = run.setup(args)
    device = env.device
    out = pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    if size % GRID:
        raise ValueError(f"--image-size {size}: images are cut into {GRID} x {GRID} patches, so that their "
                         f"side must be a multiple of {GRID}")
    _, seen = data.hold_out(images, args.held_out)
    # BatchNorm in train mode needs two images per process.
    steps_per_epoch = data.steps_per_epoch(len(seen), args.batch_size, env.world, least=2)

    net = network(args.arch, args.tasks, args.permutations, args.pool_layers, args.seed)
    net = run.to_device(net, args, env)
    opt = torch.optim.SGD(net.parameters(), plan.lr, momentum=0.9, weight_decay=plan.weight_decay,
                          nesterov=plan.nesterov)
    compile_networks(args, env, net)

    all_steps = steps_per_epoch * plan.epochs
    log = Log(args, env, all_steps, images)
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    chance = {"rotation": math.log(4), "jigsaw": math.log(1 + args.permutations),
              "selfie": MASKED * math.log(MASKED)}
    texts = ", ".join(f"{task} {chance[task]:.3f}" for task in args.tasks)
    log.start(step, f"loss of uniform answers: {texts}; {plan.epochs} epochs, lr {plan.lr:g}")

    settings = step_settings(args)
    for epoch in range(step // steps_per_epoch, plan.epochs):
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        batches = data.batches(seen, args.batch_size, args.seed, epoch, env.rank, env.world, first)
        for x, _, rng in batches:
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step, all_steps, plan.lr, plan.final_lr, plan.ramp)
            optim.set_lr(opt, lr)
            x, targets = batch_of_tasks(net, x, rng, size, args, plan.padding, plan.flip)
            noise = start_noise(x, rng, args)
            # Dropout draws from torch's own generator: seeded here, a run that is continued draws the same.
            torch.manual_seed(rng.seed + env.rank)
            losses = train_step(net, opt, x, targets, noise, **settings)
            log.step(step, len(x) // len(args.tasks) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr, **clean_accuracy(net, seen, size, args))
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == plan.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again.
            rows = pictures(net, seen, size, args)
            if env.rank == 0:
                save_rows(out / "views.png", rows, key=("largest decrease", "largest increase"))
            run.save(args, env, state, step)
    if env.rank == 0:
        if args.tasks == ["selfie"] and plan.epochs:
            net.encoder.recipe["fresh"] = "the last stage"
        encoders.export(net.encoder, out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
