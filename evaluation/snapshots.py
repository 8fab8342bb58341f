"""A run whose encoder is kept every few epochs, to see how accuracy grows.

    python -m evaluation.snapshots --every 2 caco.py --epochs 20 --out runs/caco
    python -m evaluation.snapshots --every 5 --bn adv amoc.py --epochs 200
    python eval.py runs/caco/encoder-*.pt --preset knn amoc-slf
    python plot.py loss runs/caco --column loss knn "amoc-slf pgd20"

The script runs as it does by itself, and what is given after its name are its own flags. Beside its encoder.pt
it leaves encoder-002.pt, encoder-004.pt and so on, after as many epochs. An encoder with BatchNorm branches
needs --bn, the one that the script exports.

An encoder is kept where the script saves its state. So --every must be a multiple of the script's --save-every,
and another one is refused.
"""
import argparse
import importlib
import pathlib

from torch import nn

from common import encoders, run
from common.resnet import BranchNorm


def parser():
    p = run.Parser("python -m evaluation.snapshots", __doc__)
    p.add_argument("--every", type=run.integer(1), default=1, help="epochs between two encoders that are kept")
    p.add_argument("--bn", help="the BatchNorm branch of the encoders that are kept")
    p.add_argument("script", help="such as caco.py")
    p.add_argument("flags", nargs=argparse.REMAINDER, help="of the script")
    return p


def encoder_of(net):
    """The encoder in a script's network `net`: its first part, or the one that it calls so."""
    if isinstance(net, nn.Sequential):
        return net[0]
    if isinstance(net, nn.ModuleDict):
        return net["encoder"]
    return net.encoder


def check_branch(encoder, bn):
    """ValueError where `bn` is no BatchNorm branch of `encoder`, or is missing."""
    names = sorted({name for m in encoder.modules() if isinstance(m, BranchNorm) for name in m.branches})
    if names and bn not in names:
        raise ValueError(f"--bn {bn}: this encoder has the BatchNorm branches {', '.join(names)}; name one")
    if bn and not names:
        raise ValueError(f"--bn {bn}: this encoder has no BatchNorm branches; leave --bn out")


def check_every(every, save_every):
    """ValueError where the script, which saves its state every `save_every` epochs, does not do so after each
    `every` epochs."""
    if every % save_every:
        raise ValueError(f"--every {every}: must be a multiple of the script's --save-every {save_every}, as an "
                         "encoder is kept where the script saves its state")


def is_due(epochs, steps, every):
    """Whether an encoder is kept after so many `epochs`, and `steps` of the next one: a run that is stopped
    saves its state within an epoch."""
    return steps == 0 and epochs % every == 0


def main(argv=None):
    args = parser().parse_args(argv)
    name = args.script.removesuffix(".py")
    if not name.isidentifier() or not pathlib.Path(f"{name}.py").exists():
        raise ValueError(f"{args.script}: no script here; such as caco.py")
    script = importlib.import_module(name)
    originals = {part: getattr(run, part) for part in ("image_size", "resume", "save")}
    size = None

    def image_size(script_args, images):
        nonlocal size
        size = originals["image_size"](script_args, images)
        return size

    def resume(script_args, env, state):
        check_every(args.every, script_args.save_every)  # before anything is trained
        check_branch(encoder_of(state["net"]), args.bn)
        return originals["resume"](script_args, env, state)

    def save_and_keep(script_args, env, state, step):
        originals["save"](script_args, env, state, step)
        log = state["log"]
        if env.rank == 0 and is_due(log.epochs, log.count, args.every):
            path = pathlib.Path(script_args.out) / f"encoder-{log.epochs:03}.pt"
            encoders.export(encoder_of(state["net"]), path, args.bn, image_size=size)

    run.image_size = image_size
    run.resume = resume
    run.save = save_and_keep
    try:
        script.main(args.flags)
    finally:
        for part, original in originals.items():
            setattr(run, part, original)


if __name__ == "__main__":
    run.cli(main)
