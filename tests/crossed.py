"""Which adversary raises which loss of unified.py, and what does training against one keep under another?

    python -m tests.crossed runs/unified/joint runs/unified/con ...    the network of each run's last.pt

On 1,024 test images, in batches of 64, each augmented and masked as in training: the contrastive and the
reconstruction loss of the first view as it is, after noise of the same radius, and under the attack on each loss
and on both, by ten steps. All networks meet the same views, masks and noise, at eps 4/255. A loss that a network
was not trained on is left out.
"""
import argparse
import json
import math
import pathlib

import torch

import unified
from common import data, files, run
from common.vit import patchify

BATCH = 64


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="run")
    p.add_argument("--data", help="default: the data set of each run")
    p.add_argument("--images", type=run.integer(BATCH), default=1024, help="of the test set")
    p.add_argument("--eps", type=run.number(0, 255), default=4.0, help="in 1/255")
    p.add_argument("--steps", type=run.integer(1), default=10)
    return p


def network_of(out):
    """The network of the run in the folder `out`, and its flags. Raises OSError where there is none."""
    path = pathlib.Path(out) / "last.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; unified.py writes it")
    saved = files.load(path)
    flags = argparse.Namespace(**saved["flags"])
    net = unified.network(flags, flags.image_size or 32)
    net.load_state_dict(saved["state"]["net"])
    return net.requires_grad_(False), flags


def settings_of(flags, attack, eps, steps):
    """The named arguments of unified.attack for an attack by `steps` steps of a quarter of `eps`."""
    flags = argparse.Namespace(**vars(flags))
    flags.attack, flags.norm, flags.eps, flags.step_size, flags.steps = attack, "linf", eps, eps / 4, steps
    return unified.attack_settings(flags)


@torch.no_grad()
def losses(net, flags, images, attack, eps, steps):
    """The means over the batches of the two losses (contrastive, reconstruction) of attacked views. `attack` is one
    of unified.ATTACKS, or "noise"."""
    size = flags.image_size or 32
    batches = []
    for x, _, rng in data.batches(images, BATCH, 0, 0):
        x1 = unified.augment(x, rng, size)
        x2 = unified.augment(x, rng, size)
        patches = patchify(x1, net.encoder.patch)
        B, L, D = patches.shape
        ids_keep, ids_restore, mask = unified.random_masking(rng.uniform(L), flags.mask_ratio)
        noise = 2 * rng.uniform(L, D) - 1
        target = net.encoder.normalise(patches)
        z2, _ = net(patchify(x2, net.encoder.patch))
        if attack == "noise":
            attacked = (patches + eps / 255 * noise).clamp(0, 1)
        else:
            attacked = unified.attack(net, patches, noise, z2, ids_keep, ids_restore, target, mask,
                                      **settings_of(flags, attack, eps, steps))
        z1, pred = net(attacked, ids_keep, ids_restore, True, flags.share)
        loss_con = unified.nt_xent(z1, z2, flags.temperature)
        loss_mae = unified.mae_loss(pred, target, mask, flags.norm_pix)
        batches.append((loss_con.item(), loss_mae.item()))
    return [math.fsum(column) / len(batches) for column in zip(*batches)]


def measure(out, args):
    """{attack: {"loss_con": ..., "loss_mae": ...}} of the run in `out`."""
    net, flags = network_of(out)
    images = data.load(args.data or flags.data, flags.data_dir, "test", torch.device("cpu"), args.images,
                       flags.image_size or 32, 0)
    found = {}
    for attack in ("none", "noise", "con", "mae", "joint"):
        needed = unified.ATTACKS.get(attack, (False, False))
        if (needed[0] and not flags.con_weight) or (needed[1] and not flags.lam):
            continue
        loss_con, loss_mae = losses(net, flags, images, attack, args.eps, args.steps)
        found[attack] = {}
        if flags.con_weight:
            found[attack]["loss_con"] = round(loss_con, 4)
        if flags.lam:
            found[attack]["loss_mae"] = round(loss_mae, 4)
    return found


def main(argv=None):
    args = parser().parse_args(argv)
    for out in args.runs:
        setting = {"run": out, "eps": args.eps, "steps": args.steps, "images": args.images}
        print(json.dumps({**setting, **measure(out, args)}), flush=True)


if __name__ == "__main__":
    run.cli(main)
