"""Adversarial MAE (Rebuffi et al. 2023, "Adversarially Self-Supervised Pre-training Improves Accuracy and
Robustness", Sec. 3.1; Eq. 10 of Qi & Shah 2022, arXiv 2210.13463), on the masked autoencoder (MAE, He et al.
2021, arXiv 2111.06377).

MAE hides three quarters of an image's patches and rebuilds them from the rest. Here the patches that are seen
are first moved, within eps, to make that as hard as possible; the clean image remains the target. What is
learnt is inpainting and denoising at once. The aim is better accuracy after fine-tuning and robustness to
natural shifts; the paper does not measure adversarial robustness.

    paper                       here
    m                           mask, of random_masking; 1 is *removed* (the paper's m is 1 where visible)
    m * x                       v: the visible patches, in pixels; nothing else is attacked
    Eq. 3  per-patch target     mae_loss, --norm-pix
    Eq. 4  the loss             mae_loss of MAE.forward
    max over delta in S         attack: --norm, --eps, K = --steps
    Eq. 2  its step             common.pgd: the gradient's sign for linf; for l2 its direction (the paper
                                prints the sign for both; BYORL's paper has this)

The mask is drawn once per step and held: drawn anew in each forward, as MAE's code would, it would aim the
attack at another loss than the update's. eps bounds the visible patches alone: a removed pixel has no
gradient. There is no clean term.

Where the paper is silent we take MAE's code: unbiased variance + 1e-6 of channel-normalised patches, a mean
over pixels and then over the batch's removed patches, cls and mask tokens decayed, biases and norms not. No
BatchNorm, no dropout: train and eval mode agree.

No run of the paper is at 32 x 32: the defaults that differ from its ImageNet recipe are ours, for CIFAR-10:
vit_tiny, --decoder, --batch-size, --lr, --warmup, --epochs. First its recipe (epochs: MAE's, it states none;
crops: of images decoded at 224 pixels), then ours:

    torchrun --standalone --nproc-per-node 8 adv_mae.py --data path/to/imagenet --arch vit_base \
--image-size 224 --decoder 512 8 16 --batch-size 4096 --lr 2.4e-3 --warmup 40 --epochs 800
    python adv_mae.py                                         linf 1/255, the paper's best; K = 2
    python adv_mae.py --norm l2 --eps 17.85 --out runs/l2     l2 0.07: the paper's best, 0.5, at equal RMS
    python adv_mae.py --eps 0 --out runs/mae                  MAE, the clean base
    python adv_mae.py --steps 1 --out runs/fgsm               FGSM: one step of eps, from v itself
    python eval.py runs/adv_mae/encoder.pt --preset mae-tune-cifar mae-slf-cifar knn

Measured on a CPU thread, 0.46 M-parameter ViT (vit_slim, --decoder 64 1 4), 10,000 images of CIFAR-10 (JPEG),
9 minutes: linear probe 46.5, fine-tuned 52.3 (16 epochs); MAE 49.4 and 54.7 (40 epochs); a random encoder
34.8 and 40.4. Not yet run on a GPU; the paper's 98.30 on CIFAR-10 is of ViT-B/16, pretrained on ImageNet, at
224 pixels.
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
from common.vit import PatchDecoder, check_masked, patchify, unpatchify

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in MAE's code


# ----------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------
def augment(x, rng, size):
    """A crop of the uint8 images x (B, 3, H, W): floats (B, 3, size, size) in [0, 1]."""
    return random_resized_crop(x, rng, size, scale=(0.2, 1.0), flip=0.5, filter="bicubic")


def random_masking(u, ratio):
    """Keep the int(L (1 - ratio)) patches of smallest `u` (B, L).

    Returns ids_keep (B, Lk); ids_restore (B, L), the place of each patch among [kept; removed]; and mask
    (B, L), 1 where *removed*.
    """
    kept = int(u.shape[1] * (1 - ratio))
    order = u.argsort(1)
    ids_restore = order.argsort(1)
    return order[:, :kept], ids_restore, (ids_restore >= kept).to(u)


def take(patches, ids):
    """The patches `ids` (B, n) of (B, L, D): (B, n, D)."""
    return patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[2]))


class MAE(nn.Module):
    """Encoder of visible patches and light decoder of all: `decoder` is its width, blocks and heads."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, PatchDecoder(encoder, *decoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder[0]))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, v, ids_keep, ids_restore):
        """Visible patches v (B, Lk, D) in pixels -> all patches (B, L, D), as they are for the loss."""
        (B, L), kept = ids_restore.shape, ids_keep.shape[1]
        tokens = self.encoder.embed(v) + self.encoder.pos_embed[0, 1:][ids_keep]  # bf16 would blur 1/255
        with run.autocast(v.device):
            h = self.encoder.encode(tokens)
            h = self.decoder.embed(h)  # (B, 1 + Lk, width)
            tokens = torch.cat([h[:, 1:], self.mask_token.expand(B, L - kept, -1)], 1)
            return self.decoder(torch.cat([h[:, :1], take(tokens, ids_restore)], 1))


def mae_loss(pred, target, mask, norm_pix=True):
    """Eq. 4: squared error of pred against target (B, L, D), mean over D, then over the patches where `mask`
    (B, L) is 1. With `norm_pix` each target patch is standardised over its D values first (Eq. 3)."""
    if norm_pix:
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = (pred.to(target.dtype) - target).square().mean(2)  # (B, L)
    return (error * mask).sum() / mask.sum()


def attack(net, v, noise, ids_keep, ids_restore, target, mask, args):
    """v (B, Lk, D) in pixels moved within eps to maximise the loss. It starts at v + eps `noise`, noise (B,
    Lk D) in the unit ball; with one step (FGSM), and under --no-random-start, at v itself."""
    eps = args.eps / 255
    step_size = (eps if args.steps == 1 else 5 / 8 * eps) if args.step_size is None else args.step_size / 255
    from_noise = args.random_start and args.steps != 1
    start = (v + eps * noise.view_as(v)).clamp(0, 1) if from_noise else v
    return pgd(lambda v: mae_loss(net(v, ids_keep, ids_restore), target, mask, args.norm_pix),
               v, eps, step_size, args.steps, args.norm, start=start)


def train_step(net, opt, x, u, noise, args):
    """One iteration on images x (B, 3, S, S); `u` (B, L), uniform, draws the mask, `noise` (B, Lk D), in the
    unit ball, starts the attack."""
    patches = patchify(x, net.encoder.patch)  # (B, L, D)
    target = net.encoder.normalise(patches)
    ids_keep, ids_restore, mask = random_masking(u, args.mask_ratio)
    v = take(patches, ids_keep)
    v_adv = attack(net, v, noise, ids_keep, ids_restore, target, mask, args)
    loss = mae_loss(net(v_adv, ids_keep, ids_restore), target, mask, args.norm_pix)

    opt.zero_grad()
    loss.backward()
    dist.average_grads(net.parameters())
    opt.step()
    return {"loss": loss}


def lr_at(epoch, epochs, lr, warmup):
    """At the fractional `epoch`: linear from 0 over the first `warmup`, then a cosine to 0."""
    return optim.warmup_cosine(epoch, epochs, warmup, lr)


# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------
def parser():
    p = run.parser(__doc__, name="adv_mae", arch="vit_tiny")
    p.add_argument("--decoder", type=run.integer(1), nargs=3, default=[128, 4, 4],
                   metavar=("WIDTH", "BLOCKS", "HEADS"))
    p.add_argument("--mask-ratio", type=run.number(0, 1), default=0.75,
                   help="part of the patches that is removed")
    p.add_argument("--norm-pix", action=argparse.BooleanOptionalAction, default=True,
                   help="standardise the patches of the target")
    p.add_argument("--epochs", type=run.integer(0), default=400, help="0 exports the random encoder")
    p.add_argument("--batch-size", type=run.integer(1), default=512,
                   help="images a step, over all processes")
    p.add_argument("--lr", type=run.number(), default=1e-3, help="of AdamW, at its peak")
    p.add_argument("--warmup", type=run.integer(0), default=20, help="epochs")
    p.add_argument("--weight-decay", type=run.number(0, 1e6), default=0.05)
    p.add_argument("--norm", choices=("linf", "l2"), default="linf", help="of the attack: linf or l2")
    p.add_argument("--eps", type=run.number(0, 1e6), default=1.0,
                   help="radius of the attack, in 1/255; 0: MAE")
    p.add_argument("--step-size", type=run.number(0, 1e6),
                   help="of the attack, in 1/255; default: 5/8 eps (1 step: eps)")
    p.add_argument("--steps", type=run.integer(0), default=2,
                   help="K, of the attack; 1: FGSM, from v itself")
    p.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                   help="start the attack at a random point of the ball (paper); without, and wherever it "
                        "has one step, at the image")
    p.add_argument("--image-size", type=run.integer(1, 10000),
                   help="side of a crop; default: that of the data's images, of a folder's 32")
    return p


def network(args, size):
    """Encoder and decoder: patches in pixels -> rebuilt patches (`MAE.forward`)."""
    encoder = encoders.make(args.arch, mean=MEAN, std=STD, size=size)
    return MAE(encoder, args.decoder)


def random_numbers(rng, encoder, args, device):
    """For the images of `rng`: uniform u (B, L), and a point (B, Lk D) of the unit ball."""
    L = encoder.grid[0] * encoder.grid[1]
    u = rng.uniform(L, device=device)
    noise = rng.uniform(1 + int(L * (1 - args.mask_ratio)) * 3 * encoder.patch**2, device=device)
    return u, ball_point(noise, args.norm)


@torch.no_grad()
def pictures(path, net, images, size, args):
    """Rows of up to eight: input, mask, attacked input, its perturbation (grey is none, full scale is the
    largest), reconstruction. Under --norm-pix mean and deviation of a rebuilt patch are the target's."""
    x, _, rng = next(data.batches(images, min(8, len(images)), args.seed, 0))
    x, encoder = augment(x, rng, size), net.encoder
    patches = patchify(x, encoder.patch)
    target = encoder.normalise(patches)
    u, noise = random_numbers(rng, encoder, args, x.device)
    ids_keep, ids_restore, mask = random_masking(u, args.mask_ratio)
    v = take(patches, ids_keep)
    v_adv = attack(net, v, noise, ids_keep, ids_restore, target, mask, args)
    pred = net(v_adv, ids_keep, ids_restore)
    if args.norm_pix:
        pred = pred * (target.var(2, keepdim=True) + 1e-6).sqrt() + target.mean(2, keepdim=True)
    grey, hidden = torch.full_like(patches, 0.5), mask[:, :, None].bool()

    def whole(seen, elsewhere):
        L, kept = mask.shape[1], ids_keep.shape[1]
        seen = take(F.pad(seen, (0, 0, 0, L - kept)), ids_restore)
        return torch.where(hidden, elsewhere, seen)

    delta = v_adv - v
    rows = [patches, whole(v, grey), whole(v_adv, grey),
            whole(0.5 + delta / (2 * delta.abs().max().clamp_min(1e-8)), grey),
            whole(v_adv, pred * encoder.std + encoder.mean)]
    run.save_picture(torch.cat([unpatchify(row, encoder.patch) for row in rows]), path, len(x))


def main(argv=None):
    args = parser().parse_args(argv)
    env = run.setup(args)
    device, out = env.device, pathlib.Path(args.out)
    images = data.load(args.data, args.data_dir, "train", device, args.limit,
                       args.image_size or 32, args.workers)
    size = run.image_size(args, images)
    check_masked(args.arch, size, args.decoder, args.mask_ratio)
    steps = data.steps_per_epoch(len(images), args.batch_size, env.world)

    net = run.to_device(network(args, size), args, env)
    groups = optim.groups(net.named_parameters(), args.weight_decay)
    opt = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95))
    if args.compile:
        net.compile()

    log = Log(args, env, steps * args.epochs, images)
    state = dict(net=net, opt=opt, log=log)
    step = run.resume(args, env, state)
    flat = 1 - 1 / (3 * net.encoder.patch**2)
    log.start(step, f"predicting each patch's mean: loss 1 - 1/D = {flat:.3f}" if args.norm_pix else "")

    for epoch in range(step // steps, args.epochs):
        begin = step % steps  # of the epoch's steps; not 0 where a run stopped within an epoch
        for x, _, rng in data.batches(images, args.batch_size, args.seed, epoch, env.rank, env.world, begin):
            run.stop_if_signalled(args, env, state, step)
            lr = lr_at(step / steps, args.epochs, args.lr, args.warmup)
            optim.set_lr(opt, lr)
            x = augment(x, rng, size)
            u, noise = random_numbers(rng, net.encoder, args, device)
            losses = train_step(net, opt, x, u, noise, args)
            log.step(step, len(x) * env.world, **losses)
            step += 1
        log.epoch(epoch, step, lr=lr)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            if env.rank == 0:  # before the checkpoint, so that none is missing when the run goes on
                pictures(out / "recon.png", net, images, size, args)
            run.save(args, env, state, step)
    if env.rank == 0:
        encoders.export(net.encoder, out / "encoder.pt", image_size=size)
        print(f"{out / 'encoder.pt'} holds the encoder")


if __name__ == "__main__":
    run.cli(main)
