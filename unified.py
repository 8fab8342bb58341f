"""One adversary for contrastive and masked-image pretraining (Qi & Shah 2022, arXiv 2210.13463, Sec. 6.2).

The survey proposes it as a direction: worst-case perturbations "by jointly maximizing the contrastive
loss and the MAE loss", and training on the joint loss. It prints no equation, and we know of no
published code: every formula, decision and number below is ours, where nothing else is said.

Each image has two views, t(x) and t'(x). One perturbation delta, added to t(x) alone, is to raise two
losses at once. The contrastive loss compares the whole attacked view with another, clean view of the
image, and with both views of the other images. For the reconstruction loss the decoder rebuilds the
removed patches of the clean view from the visible, attacked ones. All weights descend the joint loss;
delta alone ascends it.

    min over the weights of E_x max_{|delta| <= eps} J(delta),
    J = con_weight NT( t(x) + delta, t'(x) ) + lam MAE( m (t(x) + delta), t(x) )

    t(x), t'(x)                       x1, x2: two views; `patches`, those of x1, in pixels
    m, 1 at a visible patch           1 - mask, of random_masking; for each image and step one draw
    NT                                nt_xent, of ACL's and SimCLR's kind, in the batch
    MAE                               mae_loss: that of adv_mae.py, Eq. 4 of Rebuffi et al. 2023
    J                                 objective
    max over delta                    attack: --norm, --eps, --steps

One ViT encodes both; MAE's decoder and a projector of the mean patch token stand on it. A ViT has
neither BatchNorm nor dropout, and the weights change only after the attack. So the embedding of t'(x)
is computed once per step, for the attack, where it is a constant, and for the update, which has its
gradient. The same draw of m serves both, and the attacked patches are constants in the update. The
images of a batch are attacked together: their views are each other's negatives.

The weights --lam and --con-weight hold in the attack as in the update. A step of the attack uses only
the gradient's direction (its sign under linf), so there their ratio alone matters. Rate, schedule,
optimizer and decoder are those of adv_mae.py, and so are the number and the size of the attack's
steps, and crop and flip, which are MAE's. The colours are changed as SimCLR does for CIFAR-10. --eps is
4/255, half of what contrastive methods use on CIFAR-10.

It contains its parts, exactly: with --con-weight 0 loss and attack are those of adv_mae.py at equal
flags (whose --eps is 1 if not given), with --eps 0 it is the clean joint loss, and with --lam 0 SimCLR on a
ViT under attack. A loss without weight is not computed (though the second view is augmented all the
same). Where only the visible patches matter to the attack (with --con-weight 0, --attack mae or --share),
the removed ones get no noise at the start: under l2 it would use up part of the radius without effect.
Under linf it would do no harm, and is left out so that one rule holds for both.

    python unified.py                                    the joint attack
    python unified.py --attack none --out runs/clean     the clean joint loss
    python unified.py --attack con --out runs/con        delta raises the contrastive loss alone
    python unified.py --attack mae --out runs/mae        delta raises the reconstruction loss alone
    python unified.py --lam 0 --out runs/adv-simclr      SimCLR under attack
    python unified.py --con-weight 0 --out runs/amae     adversarial MAE, with this augmentation
    python unified.py --share --out runs/share           the contrastive loss sees the visible patches of t(x)
    python eval.py runs/unified/encoder.pt --preset mae-tune-cifar mae-slf-cifar knn

A backward pass to the pixels counts as much as a forward pass, one to the weights twice as much. Let W, V
and R be a forward pass of the whole view, of its visible patches and of the decoder. Then a step with K
attack steps costs (2 K + 3)(W + V + R) + 3 W, where the last term is the other view's. With K = 2 that is
1.8 times as much as without an attack. With --attack con or mae the attack passes only what that loss
needs.

The encoder is exported without decoder and projector; its feature is the mean of all patch tokens, of a
whole, clean image.

On several processes order, augmentation, masks and noise are those of one process. In the update the
negatives are those of all of them; in the attack, those of its own process. The reconstruction loss is a
mean over the images of each, and then over processes.

The losses in the log are those of the attacked view. Chance for loss_con is ln(2B - 1), for B images over
all processes, and it stays there where all embeddings are alike; predicting each patch's mean gives
loss_mae 1 - 1/D (D values per patch, with --norm-pix). Both fall below within the first epochs. At the
end of each, on the same up to 64 training images: gain_con and gain_mae are each loss after the attack
minus the loss where the attack began, at random noise or, with --no-random-start, at the view. Of a loss
that is attacked the gain should be above 0; both are 0 where nothing is (--attack none, --eps 0), or where
the attack makes no step beyond its random start (--steps 0). agreement is the mean, over images, of the
cosine of the two losses' gradients in the pixels, at the view. Where an image's cosine is below 0, a small
step along one of the gradients lowers the other loss. agreement cannot come near 1: without --share one
of the two gradients has no part in the removed patches.

Measured on one CPU thread (Intel Xeon), with a 0.46 M-parameter ViT (vit_slim, --decoder 64 1 4,
--batch-size 64 --lr 2e-3 --warmup 1) and 10,000 images of CIFAR-10 (JPEG), in 10 CPU minutes (mean of 2
seeds): after 4 epochs of the joint attack a linear probe reaches 40.6 %, and fine-tuning on 4,000 labels
43.2, with 12.8 under PGD-20 at 4/255. With --attack con (5 epochs) it is 41.9, 44.2 and 13.7, as good; with
--attack mae (6) 43.5, 46.7 and 8.1; without an attack (11 epochs, 15 CPU minutes) 47.3, 48.6 and 5.2; SimCLR
(--lam 0 --attack none, 9 epochs) has 45.2, 47.6 and 6.5, MAE (--con-weight 0 --attack none, 36) 48.2, 54.0
and 1.0, and the network from scratch, fine-tuned, 40.4 and 7.6. agreement is 0.01 to 0.03 in the last
epoch (-0.01 to 0.04 over all). l2 and --share have not been run, and nothing on a GPU.
"""
import argparse
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_color_jitter, random_grayscale, random_resized_crop
from common.log import Log
from common.pgd import ball_point, pgd
from common.pictures import attack_key, difference, save_rows
from common.speed import compile_networks, graphed
from common.vit import PatchDecoder, check_masked, patchify, unpatchify

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in MAE's code
STD = (0.229, 0.224, 0.225)

# Which losses the attack raises: the contrastive one, the reconstruction.
ATTACKS = {"joint": (True, True), "con": (True, False), "mae": (False, True), "none": (False, False)}


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size):
    """One view of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]."""
    x = random_resized_crop(x, rng, size, scale=(0.2, 1.0), flip=0.5, filter="bicubic")
    x = random_color_jitter(x, rng, 0.4, 0.4, 0.4, 0.1, p=0.8)
    return random_grayscale(x, rng, p=0.2)


def random_masking(u, ratio):
    """Keep the int(L (1 - ratio)) patches of smallest `u` (B, L).

    Returns ids_keep (B, Lk); ids_restore (B, L), the place of each patch among [kept; removed]; and
    mask (B, L), 1 where *removed*. Raises ValueError where that keeps no patch, or all.
    """
    kept = int(u.shape[1] * (1 - ratio))
    if not 0 < kept < u.shape[1]:
        raise ValueError(f"mask ratio {ratio}: leaves {kept} of {u.shape[1]} patches; must be some, not all")
    order = u.argsort(1)
    ids_restore = order.argsort(1)
    return order[:, :kept], ids_restore, (ids_restore >= kept).to(u)


def take(patches, ids):
    """The patches `ids` (B, n) of (B, L, D): (B, n, D)."""
    return patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[2]))


class Unified(nn.Module):
    """A ViT encoder, a projector of its mean patch token, and MAE's decoder; `decoder` is its width,
    blocks and heads.

    Without BatchNorm and dropout, train and eval mode agree.
    """

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.projector = encoders.mlp(encoder.dim, encoder.dim, 128)
        self.decoder = PatchDecoder(encoder, *decoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder[0]))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, patches, ids_keep=None, ids_restore=None, con=True, share=False):
        """Patches (B, L, D) of a view, in pixels -> z (B, 128), not normalised, and the view rebuilt
        (B, L, D) from its patches ids_keep (B, Lk), as mae_loss wants it: standardised patches, or with
        --no-norm-pix pixels normalised by channel. Both are in the patches' dtype.

        Without ids_restore nothing is rebuilt, and without `con` there is no z: None in their place. With
        `share`, which needs ids_keep, z is of these patches as well.
        """
        # Pixels are embedded in float32: bf16 would blur a perturbation of 1/255.
        tokens = self.encoder.embed(patches) + self.encoder.pos_embed[0, 1:]
        z = None
        pred = None
        with run.autocast(patches.device):
            if ids_keep is not None:
                h = self.encoder.encode(take(tokens, ids_keep))  # (B, 1 + Lk, dim), the cls token first
            if ids_restore is not None:
                pred = self.rebuild(h, ids_restore).to(patches.dtype)
            if con:
                seen = h if share else self.encoder.encode(tokens)
                z = self.projector(self.encoder.fc_norm(seen[:, 1:].mean(1))).to(patches.dtype)
        return z, pred

    def rebuild(self, h, ids_restore):
        """All patches (B, L, D) from the tokens h (B, 1 + Lk, dim) of the visible ones."""
        B, L = ids_restore.shape
        h = self.decoder.embed(h)
        removed = self.mask_token.expand(B, L + 1 - h.shape[1], -1)
        tokens = take(torch.cat([h[:, 1:], removed], 1), ids_restore)  # back to their places
        return self.decoder(torch.cat([h[:, :1], tokens], 1))


def nt_xent(z1, z2, temperature):
    """Mean over all 2B anchors i of -log( e^(u_i.u_p/T) / sum_k!=i e^(u_i.u_k/T) ), p the other
    view of i.

    z1, z2 (B, D), normalised here to u. Chance is ln(2B - 1).
    """
    u1 = F.normalize(z1, dim=1)
    u2 = F.normalize(z2, dim=1)
    rows = torch.cat([u1, u2])  # (2B, D)
    scores = rows @ rows.T / temperature  # (2B, 2B)
    scores.fill_diagonal_(-math.inf)  # nothing is in its own denominator
    return scores.logsumexp(1).mean() - (u1 * u2).sum(1).mean() / temperature


def mae_loss(pred, target, mask, norm_pix=True):
    """Eq. 4 of Rebuffi et al. 2023: squared error of pred against target (B, L, D), mean over D, then
    over the patches where `mask` (B, L) is 1. With `norm_pix` each target patch is standardised over its
    D values first (their Eq. 3), by the unbiased variance + 1e-6, as in MAE's code."""
    if norm_pix:
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = (pred.to(target.dtype) - target).square().mean(2)  # (B, L)
    return (error * mask).sum() / mask.sum()


def objective(z1, z2, pred, target, mask, temperature, lam, con_weight=1.0, norm_pix=True):
    """J = con_weight L_con + lam L_mae, and the two losses: three scalars. A loss of weight 0 is not
    computed, and 0.

    z1, z2 (B, D) are embeddings of the two views, pred and target (B, L, D) the rebuilt patches and the
    clean ones, normalised by channel, and `mask` (B, L) is 1 where a patch was removed.
    """
    loss_con = nt_xent(z1, z2, temperature) if con_weight else target.new_zeros(())
    loss_mae = mae_loss(pred, target, mask, norm_pix) if lam else target.new_zeros(())
    return con_weight * loss_con + lam * loss_mae, loss_con, loss_mae


def gradient_cosine(g1, g2):
    """The cosine of two gradients in the same images, g1 and g2 (B, ...), mean over the images."""
    return F.cosine_similarity(g1.flatten(1), g2.flatten(1), dim=1).mean()


def outputs(net, patches, ids_keep, ids_restore, *, lam, con_weight, share):
    """z and the rebuilt patches of a view's patches (B, L, D); None in place of what has no weight."""
    if not lam:
        ids_restore = None  # nothing is to be rebuilt
        if not share:
            ids_keep = None
    return net(patches, ids_keep, ids_restore, con_weight != 0, share)


@graphed  # with --graph, on CUDA, recorded once and then replayed; the result is the same
def attack(net, patches, noise, z2, ids_keep, ids_restore, target, mask, *,
           climbs, temperature, lam, con_weight, norm_pix, share, norm, eps, step_size, steps):
    """A view's patches (B, L, D), in pixels in [0, 1], moved within eps so as to maximise J, or one loss
    of it: `climbs` is a row of ATTACKS.

    eps and step_size are in the units of the pixels, in the `norm` over an image. The search starts at
    patches + eps `noise`, noise (B, L, D) in the unit ball of each image, or, where noise is None, at
    the patches. z2 (B, 128), the mask and the target are constants.
    """
    climbs_con, climbs_mae = climbs
    con_weight = con_weight if climbs_con else 0.0
    lam = lam if climbs_mae else 0.0
    if not con_weight and not lam:
        return patches
    start = patches if noise is None else (patches + eps * noise).clamp(0, 1)

    def loss_of_patches(moved):
        z1, pred = outputs(net, moved, ids_keep, ids_restore, lam=lam, con_weight=con_weight, share=share)
        loss, _, _ = objective(z1, z2, pred, target, mask, temperature, lam, con_weight, norm_pix)
        return loss

    return pgd(loss_of_patches, patches, eps, step_size, steps, norm, start=start)


def train_step(net, opt, x1, x2, u, noise, *, mask_ratio,
               climbs, temperature, lam, con_weight, norm_pix, share, norm, eps, step_size, steps):
    """One iteration on two views (B, 3, S, S) of B images; the losses to be logged. `u` (B, L), uniform,
    draws the mask of x1; `noise` is as in `attack`."""
    encoder = net.encoder
    patches = patchify(x1, encoder.patch)  # (B, L, D)
    target = encoder.normalise(patches)  # of the clean view
    ids_keep, ids_restore, mask = random_masking(u, mask_ratio)
    z2 = None
    z2_constant = None
    if con_weight:
        z2, _ = net(patchify(x2, encoder.patch))
        z2_constant = z2.detach()
    attacked = attack(net, patches, noise, z2_constant, ids_keep, ids_restore, target, mask,
                      climbs=climbs, temperature=temperature, lam=lam, con_weight=con_weight,
                      norm_pix=norm_pix, share=share, norm=norm, eps=eps, step_size=step_size, steps=steps)

    z1, pred = outputs(net, attacked, ids_keep, ids_restore, lam=lam, con_weight=con_weight, share=share)
    if con_weight:  # negatives of all processes
        z1 = dist.gather(z1)
        z2 = dist.gather(z2)
    loss, loss_con, loss_mae = objective(z1, z2, pred, target, mask, temperature, lam, con_weight, norm_pix)

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    losses = {"loss": loss}
    if con_weight:
        losses["loss_con"] = loss_con
    if lam:
        losses["loss_mae"] = loss_mae
    return losses


def lr_at(epoch, epochs, lr, warmup):
    """The learning rate at the fractional `epoch`: linear from 0 over the first `warmup`, then a
    cosine to 0."""
    return optim.warmup_cosine(epoch, epochs, warmup, lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="unified", arch="vit_tiny", graph=True)
    p.add_argument("--attack", choices=ATTACKS, default="joint",
                   help="which of the losses the attack raises (ours)")
    p.add_argument("--lam", type=run.number(), default=1.0, help="weight of the reconstruction loss (ours)")
    p.add_argument("--con-weight", type=run.number(), default=1.0,
                   help="weight of the contrastive loss (ours)")
    p.add_argument("--share", action=argparse.BooleanOptionalAction, default=False,
                   help="of the attacked view the contrastive loss sees the visible patches only; the other "
                        "view stays whole (ours)")
    p.add_argument("--decoder", type=run.integer(1), nargs=3, default=[128, 4, 4],
                   metavar=("WIDTH", "BLOCKS", "HEADS"), help="width, blocks and heads of the decoder (ours)")
    p.add_argument("--mask-ratio", type=run.number(0, 1), default=0.75,
                   help="the share of the patches that is removed (MAE's)")
    p.add_argument("--norm-pix", action=argparse.BooleanOptionalAction, default=True,
                   help="standardise the patches of the target (MAE's)")
    p.add_argument("--temperature", type=run.number(above=0), default=0.2,
                   help="of the contrastive loss (ours)")
    p.add_argument("--epochs", type=run.integer(0), default=400,
                   help="0 exports the random encoder; default (ours)")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images per step, over all processes (ours)")
    p.add_argument("--lr", type=run.number(), default=1e-3, help="of AdamW, at its peak (ours)")
    p.add_argument("--warmup", type=run.integer(0), default=20, help="in epochs (ours)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=0.05, help="(MAE's)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf",
                   help="of the attack; with l2, for example --eps 64 (ours)")
    p.add_argument("--eps", type=run.number(0, 1e6), default=4.0,
                   help="radius of the attack, in 1/255; 0 gives the clean joint loss (ours)")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attack, in 1/255; default: eps with --steps 1, else 5/8 eps, as in "
                        "adv_mae.py (ours)")
    p.add_argument("--steps", type=run.integer(0), default=2,
                   help="K, of the attack, as in adv_mae.py (ours)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (ours); without it, at "
                        "the image: with --steps 1 and --step-size equal to --eps, in linf, that is FGSM")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a view in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    """ValueError for flags that do not go together."""
    if args.norm == "linf" and args.eps > 255:
        raise ValueError(f"--eps {args.eps:g}: with --norm linf at most 255, the range of a pixel")
    if not args.lam and not args.con_weight:
        raise ValueError("--lam 0, --con-weight 0: nothing is left to train on; give one of them a weight")
    climbs_con, climbs_mae = ATTACKS[args.attack]
    if climbs_con != climbs_mae and not (args.con_weight if climbs_con else args.lam):
        raise ValueError(f"--attack {args.attack}: that loss has no weight; choose another, or none")


def network(args, size):
    """Encoder, projector and decoder: patches in pixels -> embeddings and rebuilt patches
    (`Unified.forward`)."""
    encoder = encoders.make(args.arch, mean=MEAN, std=STD, size=size)
    return Unified(encoder, args.decoder)


def start_noise(u, encoder, args, rng):
    """The noise from which the attack on a view starts: (B, L, D), each image in the unit ball; None: it
    starts at the view. `u` draws the mask. Where no gradient moves the removed patches they have no
    noise."""
    if args.attack == "none" or not args.random_start:
        return None
    B, L = u.shape
    D = 3 * encoder.patch**2
    climbs_con, _ = ATTACKS[args.attack]
    ids_keep, ids_restore, _ = random_masking(u, args.mask_ratio)
    # One number more than there are pixels: under l2 it sets the distance from the centre, under linf it
    # is not used.
    if climbs_con and args.con_weight and not args.share:
        return ball_point(rng.uniform(1 + L * D, device=u.device), args.norm).view(B, L, D)
    kept = ids_keep.shape[1]
    visible = ball_point(rng.uniform(1 + kept * D, device=u.device), args.norm).view(B, kept, D)
    return take(F.pad(visible, (0, 0, 0, L - kept)), ids_restore)


def random_numbers(rng, encoder, args, device):
    """For the images of `rng`: uniform u (B, L), which draws masks, and the noise of `start_noise`."""
    u = rng.uniform(encoder.grid[0] * encoder.grid[1], device=device)
    return u, start_noise(u, encoder, args, rng)


def is_attacked(args):
    """Whether the flags ask for an attack."""
    return args.attack != "none" and args.eps > 0


def attack_settings(args):
    """The named arguments of `attack` as the flags have them; eps and step_size as pixel values in
    [0, 1]."""
    eps = args.eps / 255
    if args.step_size is not None:
        step_size = args.step_size / 255
    else:
        step_size = eps if args.steps == 1 else 5 / 8 * eps
    return dict(
        climbs=ATTACKS[args.attack],
        temperature=args.temperature,
        lam=args.lam,
        con_weight=args.con_weight,
        norm_pix=args.norm_pix,
        share=args.share,
        norm=args.norm,
        eps=eps,
        step_size=step_size,
        steps=args.steps,
    )


def sample(net, images, count, size, args):
    """Of up to `count` training images, augmented as in training: both views, the noise of the first, and
    what `attack` takes after it: z2, ids_keep, ids_restore, target and mask."""
    encoder = net.encoder
    x, _, rng = data.sample(images, count, args.seed)
    x1 = augment(x, rng, size)
    x2 = augment(x, rng, size)
    u, noise = random_numbers(rng, encoder, args, x.device)
    ids_keep, ids_restore, mask = random_masking(u, args.mask_ratio)
    z2 = None
    if args.con_weight:
        z2, _ = net(patchify(x2, encoder.patch))
    target = encoder.normalise(patchify(x1, encoder.patch))
    return x1, x2, noise, (z2, ids_keep, ids_restore, target, mask)


@torch.no_grad()
def gains(net, images, size, args):
    """What the attack adds to each loss beyond what its start adds, and whether the two losses' gradients
    in the pixels agree, on up to 64 training images."""
    x1, _, noise, constants = sample(net, images, 64, size, args)
    patches = patchify(x1, net.encoder.patch)
    z2, ids_keep, ids_restore, target, mask = constants
    start = patches if noise is None else (patches + args.eps / 255 * noise).clamp(0, 1)
    attacked = attack(net, patches, noise, *constants, **attack_settings(args))

    def losses_of(view):
        z1, pred = outputs(net, view, ids_keep, ids_restore,
                           lam=args.lam, con_weight=args.con_weight, share=args.share)
        _, loss_con, loss_mae = objective(
            z1, z2, pred, target, mask, args.temperature, args.lam, args.con_weight, args.norm_pix)
        return loss_con, loss_mae

    con_before, mae_before = losses_of(start)
    con_after, mae_after = losses_of(attacked)
    found = {}
    if args.con_weight:
        found["gain_con"] = (con_after - con_before).item()
    if args.lam:
        found["gain_mae"] = (mae_after - mae_before).item()
    if args.con_weight and args.lam:
        at = patches.clone().requires_grad_()
        with torch.enable_grad():
            loss_con, loss_mae = losses_of(at)
            (g_con,) = torch.autograd.grad(loss_con, at, retain_graph=True)
            (g_mae,) = torch.autograd.grad(loss_mae, at)
        found["agreement"] = gradient_cosine(g_con, g_mae).item()
    return found


@torch.no_grad()
def pictures(net, images, size, args):
    """Rows for `save_rows` of up to eight images: both views; if there is an attack, the first one attacked
    and what the attack added; what is seen of it; and with --lam the reconstruction. With --norm-pix the
    mean and the deviation of a rebuilt patch are taken from the target."""
    encoder = net.encoder
    x1, x2, noise, constants = sample(net, images, 8, size, args)
    _, ids_keep, ids_restore, target, mask = constants
    patches = patchify(x1, encoder.patch)
    attacked = attack(net, patches, noise, *constants, **attack_settings(args))
    removed = mask[:, :, None].bool()

    def whole(seen, elsewhere):
        """Images of the visible patches of `seen`, and of the others of `elsewhere`, both (B, L, D)."""
        return unpatchify(torch.where(removed, elsewhere, seen), encoder.patch)

    rows = [("x1", x1), ("x2", x2)]
    if is_attacked(args):
        x1_adv = unpatchify(attacked, encoder.patch)
        full_scale = args.eps / 255 if args.norm == "linf" else None
        rows += [("x1_adv", x1_adv), ("x1_adv - x1", difference(x1_adv, x1, full_scale))]
    rows.append(("seen", whole(attacked, torch.full_like(attacked, 0.5))))
    if args.lam:
        _, pred = net(attacked, ids_keep, ids_restore, con=False)
        if args.norm_pix:
            pred = pred * (target.var(2, keepdim=True) + 1e-6).sqrt() + target.mean(2, keepdim=True)
        rows.append(("rebuilt", whole(attacked, pred * encoder.std + encoder.mean)))
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
    check_masked(args.arch, size, args.decoder, args.mask_ratio)
    # The negatives within the batch need two images per process.
    steps_per_epoch = data.steps_per_epoch(len(images), args.batch_size, env.world, least=2)

    net = run.to_device(network(args, size), args, env)
    groups = optim.groups(net.named_parameters(), args.weight_decay)
    opt = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95))  # as MAE's
    compile_networks(args, env, net)

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    notes = []
    if args.con_weight:
        notes.append(f"chance loss_con ln(2B - 1) = {math.log(2 * args.batch_size - 1):.3f}")
    if args.lam and args.norm_pix:
        flat = 1 - 1 / (3 * net.encoder.patch**2)
        notes.append(f"predicting each patch's mean: loss_mae 1 - 1/D = {flat:.3f}")
    log.start(step, "; ".join(notes))

    settings = dict(mask_ratio=args.mask_ratio, **attack_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step / steps_per_epoch, args.epochs, args.lr, args.warmup)
            optim.set_lr(opt, lr)
            x1 = augment(x, rng, size)
            x2 = augment(x, rng, size)  # another view: `rng` has moved on
            u, noise = random_numbers(rng, net.encoder, args, device)
            losses = train_step(net, opt, x1, x2, u, noise, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr, **gains(net, images, size, args))
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again.
            rows = pictures(net, images, size, args)
            if env.rank == 0:
                key = attack_key(args.norm, args.eps) if is_attacked(args) else None
                save_rows(out / "views.png", rows, key)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net.encoder, out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
