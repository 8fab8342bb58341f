"""Adversarial MAE (Rebuffi et al. 2023, "Adversarially Self-Supervised Pre-training Improves
Accuracy and Robustness", Sec. 3.1; Eq. 10 of Qi & Shah 2022, arXiv 2210.13463), on the masked
autoencoder (MAE, He et al. 2021, arXiv 2111.06377).

MAE hides three quarters of an image's patches and rebuilds them from the rest. Adversarial MAE
first moves the patches that are seen, within eps, so as to make that as hard as possible; the clean
image remains the target. So the network learns inpainting and denoising at once. The aim is better
accuracy after fine-tuning and robustness to natural shifts.

    min over the weights, max over delta in S = {|delta| <= eps}:
        mean over removed patches, and over the D values of a patch, of
        (prediction(v + delta) - target)^2

v are the visible patches in pixels; the target is the clean patch, standardised over its D values. In
the attack the gradient goes to delta alone, in the update to the weights alone.

    paper                       this file
    m                           mask, of random_masking; 1 is *removed* (the paper's m is 1 where visible)
    m * x                       v: the visible patches, in pixels; nothing else is attacked
    Eq. 3  per-patch target     mae_loss, --norm-pix
    Eq. 4  the loss             mae_loss of what MAE.forward returns
    max over delta in S         attack: --norm, --eps, K = --steps
    Eq. 2  its step             common.pgd
    survey, Sec. 2.4.2          (1 - w) loss_adv + w loss_clean, w of --clean-weight

The paper has no loss of clean patches. With --clean-weight w, above 0 and below 1, the network also
rebuilds the image from the visible patches as they were, under the same mask. Without BatchNorm, clean
and attacked patches need no branches of their own.

Where the paper is silent, start and steps are clipped to [0, 1] (ours), and the rest is MAE's code: the
unbiased variance + 1e-6 of channel-normalised patches, a mean over pixels and then over the batch's
removed patches, crops of 0.2 to 1 of an image (bicubic, and mirrored half of the time), the betas 0.9
and 0.95, weight decay on cls and mask tokens but not on biases and norms. We depart from the paper:
    - In l2 the ball is over the visible patches of an image. Over the whole image, most of a random
      start would lie on removed patches, where it has no effect.
    - In l2 a step is along the gradient. Eq. 2 prints the gradient's sign for both norms; BYORL, by the
      same group, has the direction.
    - Crops are cut from the central square of a picture, reduced to --image-size; in MAE's code, from
      the whole picture.

No run of the paper is at 32 x 32. The defaults that differ from its ImageNet recipe are ours, for
CIFAR-10: vit_tiny, --decoder, --batch-size, --lr, --warmup, --epochs. The first command is its recipe
(it states no number of epochs; 800 is MAE's), the others are ours:

    torchrun --standalone --nproc-per-node 8 adv_mae.py --data path/to/imagenet --arch vit_base \
--image-size 224 --decoder 512 8 16 --batch-size 4096 --lr 2.4e-3 --warmup 40 --epochs 800
    python adv_mae.py                                         linf 1/255, the paper's best; K = 2
    python adv_mae.py --norm l2 --eps 17.85 --out runs/l2     l2 0.07: the paper's best, 0.5, times 32/224
    python adv_mae.py --clean-weight 0.5 --out runs/both      clean patches beside attacked ones
    python adv_mae.py --eps 0 --out runs/mae                  MAE, the clean base
    python adv_mae.py --steps 1 --no-random-start --out runs/fgsm    FGSM: one step of eps, from v itself
    python eval.py runs/adv_mae/encoder.pt --preset mae-tune-cifar mae-slf-cifar knn

Counting a backward pass to the pixels as one forward pass and a whole one as two, a step costs 2 K + 3
forward passes through encoder and decoder, and 2 K + 6 with --clean-weight, where MAE's costs 3: with
K = 2, 2.3 and 3.3 times as much. Target, mask and the patches of the clean image are computed once.

The encoder is exported without the decoder. At test time it sees all patches of clean images; in
training it saw a quarter of them, and (without --clean-weight) attacked ones only.

On several processes the loss is a mean over the images of each, and then over processes; there is
no BatchNorm, so nothing else changes.

In the log, a loss of 1 - 1/D is what predicting each patch's mean gives (D values per patch, with
--norm-pix). It falls below that within the first epochs: in the run below, where it is 0.979, the loss
was 0.96 in epoch 0, 0.69 in epoch 1 and 0.47 at the end. A loss that stays at 1 - 1/D asks for a lower
--lr or a smaller --eps. In recon.png the rebuilt patches should show the image's shapes, and not only its
colours. With --clean-weight the log has both losses besides their mixture. With --steps 0 the visible
patches are moved by the random start alone (with --no-random-start, not at all).

Measured on one CPU thread with 10,000 images of CIFAR-10 (JPEG) and --arch vit_slim --decoder 64 1 4
--batch-size 64 --lr 2e-3 --warmup 1 --epochs 16 (0.46 M parameters; one seed), in 9 CPU minutes: a
linear probe reaches 46.5 %, fine-tuning 52.3. MAE reaches 49.4 and 54.7 in the same time (40 epochs); a
random encoder, 34.8 and 40.4.

On all 50,000 images, judged on all 10,000 test images by another probe (amoc-slf; one seed each), it
reaches 49.6 in 21 CPU minutes (6 epochs), MAE 51.5 in 20 (15); under PGD-20 at 8/255 both have 0. This
has not been run on a GPU yet, and with --clean-weight not at all. The paper's 98.30 % on CIFAR-10
(fine-tuned, linf 1/255) is of a ViT-B/16, pretrained on ImageNet, at 224 pixels. Robustness to attacks
it shows only in Fig. 5, and there for its adversarial BYOL (byorl.py), fine-tuned with several values of
gamma (--layer-decay of eval.py).
"""
import argparse
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from common import data, dist, encoders, optim, run
from common.augment import random_resized_crop
from common.log import Log
from common.pgd import ball_point, pgd
from common.pictures import attack_key, difference, save_rows
from common.speed import compile_networks, graphed
from common.vit import PatchDecoder, check_masked, patchify, unpatchify

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in MAE's code
STD = (0.229, 0.224, 0.225)


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size):
    """A crop of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]."""
    return random_resized_crop(x, rng, size, scale=(0.2, 1.0), flip=0.5, filter="bicubic")


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


class MAE(nn.Module):
    """An encoder of the visible patches and a light decoder of all; `decoder` is its width, blocks
    and heads.

    Without BatchNorm and dropout, train and eval mode agree.
    """

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = PatchDecoder(encoder, *decoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder[0]))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, v, ids_keep, ids_restore):
        """Visible patches v (B, Lk, D) in pixels -> predictions of all patches (B, L, D), in the space
        of the target (with --norm-pix, standardised)."""
        B, L = ids_restore.shape
        kept = ids_keep.shape[1]
        # Pixels are embedded in float32: bf16 would blur a perturbation of 1/255.
        tokens = self.encoder.embed(v) + self.encoder.pos_embed[0, 1:][ids_keep]
        with run.autocast(v.device):
            h = self.encoder.encode(tokens)
            h = self.decoder.embed(h)  # (B, 1 + Lk, width), the cls token first
            removed = self.mask_token.expand(B, L - kept, -1)
            tokens = take(torch.cat([h[:, 1:], removed], 1), ids_restore)  # back to their places
            return self.decoder(torch.cat([h[:, :1], tokens], 1))


def mae_loss(pred, target, mask, norm_pix=True):
    """Eq. 4: squared error of pred against target (B, L, D), mean over D, then over the patches
    where `mask` (B, L) is 1. With `norm_pix` each target patch is standardised over its D values
    first (Eq. 3)."""
    if norm_pix:
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = (pred.to(target.dtype) - target).square().mean(2)  # (B, L)
    return (error * mask).sum() / mask.sum()


@graphed  # with --graph, on CUDA, recorded once and then replayed; the result is the same
def attack(net, v, noise, ids_keep, ids_restore, target, mask, *, norm_pix, norm, eps, step_size, steps):
    """v (B, Lk, D) in pixels moved within eps so as to maximise the loss.

    eps and step_size are pixel values in [0, 1], in the `norm` over the visible patches of an image
    together; removed pixels are not attacked, as the prediction does not depend on them. The search
    starts at v + eps `noise`, noise (B, Lk D) in the unit ball, or, where noise is None, at v. Every step
    is projected onto the ball and clipped to [0, 1].
    The weights are constants, and get no gradient. Target and mask are constants too: a mask drawn
    again at each step would aim the attack at another loss than the update's.
    """
    start = v if noise is None else (v + eps * noise.view_as(v)).clamp(0, 1)

    def loss_of_patches(v_adv):
        return mae_loss(net(v_adv, ids_keep, ids_restore), target, mask, norm_pix)

    return pgd(loss_of_patches, v, eps, step_size, steps, norm, start=start)


def train_step(net, opt, x, u, noise, *, mask_ratio, norm_pix, norm, eps, step_size, steps,
               clean_weight=0.0):
    """One iteration on images x (B, 3, S, S); the losses to be logged. `u` (B, L), uniform, draws
    the mask; `noise` is as in `attack`. `clean_weight`, from 0 to 1, is that of the patches as they
    were."""
    patches = patchify(x, net.encoder.patch)  # (B, L, D)
    target = net.encoder.normalise(patches)  # of the clean image
    ids_keep, ids_restore, mask = random_masking(u, mask_ratio)
    v = take(patches, ids_keep)
    v_adv = attack(net, v, noise, ids_keep, ids_restore, target, mask,
                   norm_pix=norm_pix, norm=norm, eps=eps, step_size=step_size, steps=steps)
    loss = mae_loss(net(v_adv, ids_keep, ids_restore), target, mask, norm_pix)
    losses = {"loss": loss}
    if clean_weight:
        loss_adv = loss
        loss_clean = mae_loss(net(v, ids_keep, ids_restore), target, mask, norm_pix)
        loss = (1 - clean_weight) * loss_adv + clean_weight * loss_clean
        losses = {"loss": loss, "loss_clean": loss_clean, "loss_adv": loss_adv}

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    return losses


def lr_at(epoch, epochs, lr, warmup):
    """The learning rate at the fractional `epoch`: linear from 0 over the first `warmup`, then a
    cosine to 0."""
    return optim.warmup_cosine(epoch, epochs, warmup, lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="adv_mae", arch="vit_tiny", graph=True)
    p.add_argument("--decoder", type=run.integer(1), nargs=3, default=[128, 4, 4],
                   metavar=("WIDTH", "BLOCKS", "HEADS"), help="width, blocks and heads of the decoder (ours)")
    p.add_argument("--mask-ratio", type=run.number(0, 1), default=0.75,
                   help="the share of the patches that is removed (paper)")
    p.add_argument("--norm-pix", action=argparse.BooleanOptionalAction, default=True,
                   help="standardise the patches of the target (paper)")
    p.add_argument("--clean-weight", type=run.number(0, 1), default=0.0,
                   help="w, the weight of the loss of unattacked patches, beside 1 - w for attacked ones; 0: "
                        "attacked alone (paper)")
    p.add_argument("--epochs", type=run.integer(0), default=400,
                   help="0 exports the random encoder; default (ours)")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images per step, over all processes (ours)")
    p.add_argument("--lr", type=run.number(), default=1e-3, help="of AdamW, at its peak (ours)")
    p.add_argument("--warmup", type=run.integer(0), default=20, help="in epochs (ours)")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=0.05, help="(MAE's)")
    p.add_argument("--norm", choices=("linf", "l2"), default="linf", help="of the attack (paper)")
    p.add_argument("--eps", type=run.number(0, 1e6), default=1.0,
                   help="radius of the attack, in 1/255; 0 gives MAE; default (paper)")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attack, in 1/255; default: eps with --steps 1, as in the survey's FGSM, and "
                        "else 5/8 eps (paper)")
    p.add_argument("--steps", type=run.integer(0), default=2,
                   help="K, of the attack (paper)")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (paper); without it, at "
                        "the image: with --steps 1, in linf, that is FGSM")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a crop in pixels; default: that of the images, and 32 for a folder")
    return p


def check(args):
    if args.norm == "linf" and args.eps > 255:
        raise ValueError(f"--eps {args.eps:g}: with --norm linf at most 255, the range of a pixel")
    if args.clean_weight == 1:
        raise ValueError("--clean-weight 1: gives attacked patches no weight, which is MAE at a higher "
                         "cost; use --eps 0 instead")
    if args.clean_weight and not args.eps:
        raise ValueError(f"--clean-weight {args.clean_weight:g}: needs --eps above 0, as without an attack "
                         "all patches are clean")


def network(args, size):
    """Encoder and decoder: patches in pixels -> rebuilt patches (`MAE.forward`)."""
    encoder = encoders.make(args.arch, mean=MEAN, std=STD, size=size)
    return MAE(encoder, args.decoder)


def random_numbers(rng, encoder, args, device):
    """For the images of `rng`: uniform u (B, L), which draws masks; and noise (B, Lk D), uniform in
    the unit ball, or None where the attack starts at the image."""
    L = encoder.grid[0] * encoder.grid[1]
    kept = int(L * (1 - args.mask_ratio))
    u = rng.uniform(L, device=device)
    if not args.random_start:
        return u, None
    return u, ball_point(rng.uniform(1 + kept * 3 * encoder.patch**2, device=device), args.norm)


def attack_settings(args):
    """The named arguments of `attack` as the flags have them; eps and step_size as pixel values in
    [0, 1]."""
    eps = args.eps / 255
    if args.step_size is not None:
        step_size = args.step_size / 255
    else:
        step_size = eps if args.steps == 1 else 5 / 8 * eps
    return dict(norm_pix=args.norm_pix, norm=args.norm, eps=eps, step_size=step_size, steps=args.steps)


@torch.no_grad()
def pictures(net, images, size, args):
    """Rows for `save_rows` of up to eight images: the image, what is seen of it, the same attacked,
    what the attack added, and the rebuilt patches among the attacked ones. With --norm-pix the mean and
    the deviation of a rebuilt patch are taken from the target."""
    encoder = net.encoder
    x, _, rng = data.sample(images, 8, args.seed)
    x = augment(x, rng, size)
    patches = patchify(x, encoder.patch)
    target = encoder.normalise(patches)
    u, noise = random_numbers(rng, encoder, args, x.device)
    ids_keep, ids_restore, mask = random_masking(u, args.mask_ratio)
    v = take(patches, ids_keep)
    v_adv = attack(net, v, noise, ids_keep, ids_restore, target, mask, **attack_settings(args))
    pred = net(v_adv, ids_keep, ids_restore)
    if args.norm_pix:
        pred = pred * (target.var(2, keepdim=True) + 1e-6).sqrt() + target.mean(2, keepdim=True)
    pred = pred * encoder.std + encoder.mean
    grey = torch.full_like(patches, 0.5)

    def whole(seen, elsewhere):
        """Images of the visible patches `seen` (B, Lk, D), and of those of `elsewhere` (B, L, D) at
        the others."""
        removed = mask.shape[1] - ids_keep.shape[1]
        placed = take(F.pad(seen, (0, 0, 0, removed)), ids_restore)
        return unpatchify(torch.where(mask[:, :, None].bool(), elsewhere, placed), encoder.patch)

    rows = [("image", x), ("seen", whole(v, grey))]
    if args.eps:
        full_scale = args.eps / 255 if args.norm == "linf" else None
        added = difference(v_adv, v, full_scale)
        rows += [("attacked", whole(v_adv, grey)), ("added", whole(added, grey))]
    return [*rows, ("rebuilt", whole(v_adv, pred))]


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
    steps_per_epoch = data.steps_per_epoch(len(images), args.batch_size, env.world)

    net = run.to_device(network(args, size), args, env)
    groups = optim.groups(net.named_parameters(), args.weight_decay)
    opt = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95))
    compile_networks(args, env, net)

    log = Log(args, env, steps_per_epoch * args.epochs, images)
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    flat = 1 - 1 / (3 * net.encoder.patch**2)
    log.start(step, f"predicting each patch's mean: loss 1 - 1/D = {flat:.3f}" if args.norm_pix else "")

    settings = dict(mask_ratio=args.mask_ratio, clean_weight=args.clean_weight, **attack_settings(args))
    for epoch in range(step // steps_per_epoch, args.epochs):
        first = step % steps_per_epoch  # not 0 where a run was stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, first):
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step / steps_per_epoch, args.epochs, args.lr, args.warmup)
            optim.set_lr(opt, lr)
            x = augment(x, rng, size)
            u, noise = random_numbers(rng, net.encoder, args, device)
            losses = train_step(net, opt, x, u, noise, **settings)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            # Pictures come before the checkpoint: a run that is stopped between the two draws them
            # again.
            rows = pictures(net, images, size, args)
            if env.rank == 0:
                key = attack_key(args.norm, args.eps) if args.eps else None
                save_rows(out / "recon.png", rows, key)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net.encoder, out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
