"""What the tests shared by all scripts need to know of each: a tiny run of it."""

import importlib
import inspect
import os
import pathlib
import sys

import numpy as np

from common import vit

ROOT = pathlib.Path(__file__).parents[1]

# Housekeeping comes from TINY; here only what the script itself needs to be small.
SCRIPTS = {
    "amoc": ["--bank-size", "48", "--steps", "1", "--warmup", "1"],
    "rocl": ["--steps", "1", "--warmup", "1"],
    "acl": ["--steps", "1", "--warmup", "1"],
    "advcl": ["--steps", "1", "--warmup", "0"],
    "clae": [],
    "adco": ["--bank-size", "48", "--fill-steps", "3"],
    "caco": ["--bank-size", "48", "--fill-steps", "3"],
    "hardneg": ["--bank-size", "48", "--hardest", "8", "--mix", "6", "--mix-query", "4", "--mix-from", "0"],
    "adpe": ["--arch", "vit_slim", "--decoder", "16", "1", "2", "--warmup", "1"],
    "adv_mae": ["--arch", "vit_slim", "--decoder", "16", "1", "2", "--warmup", "1"],
    "unified": ["--arch", "vit_slim", "--decoder", "16", "1", "2", "--steps", "1", "--warmup", "1"],
    "byorl": ["--steps", "1", "--warmup", "1", "--hidden", "64"],
    "adios": ["--warmup", "1", "--masks", "2", "--mask-width", "8"],
    "rotnet": ["--steps", "1", "--warmup", "1", "--drop-path", "0.3"],
    "pretext": ["--tasks", "jigsaw", "selfie", "--steps", "1", "--pool-layers", "1", "--held-out", "0"],
}
PICTURES = {"adv_mae": "recon.png", "adpe": "positions.png", "adios": "masks.png"}  # the others write views.png
TINY = ["--arch", "slim", "--batch-size", "16", "--epochs", "2", "--device", "cpu"]


def scripts_with(flag):
    """The scripts that have the flag, by the name of its value: "graph"."""
    return [script for script in SCRIPTS if flag in vars(read_flags(importlib.import_module(script)))]


def tiny_npz(path, n=44):
    """A data set of `n` images: two whole steps of 16 and a short one of 12."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    y = np.arange(n) % 4
    np.savez(path, x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    return str(path)


def command(script, *flags, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, str(ROOT / f"{script}.py"), *flags]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def named(function, script, *flags, **others):
    """The named arguments of `function` of the module `script` as its flags have them; `others` win."""
    return named_by(function, script, read_flags(script, *flags), **others)


def named_by(function, script, args, **others):
    """The same of flags that were read."""
    values = {**vars(args), **(script.attack_settings(args) if hasattr(script, "attack_settings") else {}), **others}
    if isinstance(values.get("variant"), str):
        values["variant"] = script.VARIANTS[values["variant"]]
    parameters = inspect.signature(function).parameters.values()
    return {p.name: values[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in values}


def read_flags(script, *flags):
    """The flags as the module `script` reads and checks them before it does anything."""
    args = script.parser().parse_args(flags)
    if hasattr(script, "check"):
        script.check(args)
    if hasattr(args, "mask_ratio"):
        vit.check_masked(args.arch, args.image_size or 32, args.decoder, args.mask_ratio)
    return args
