"""Image encoders by name, written to files and read back.

An encoder is `encoder(x) -> (B, dim)` for images x (B, 3, H, W) in [0, 1]; normalisation is its first
layer. `export` writes torchvision's (ResNet) or timm's (ViT) key names, so that no later program needs
this one.
"""
import math
import pathlib
import warnings

import torch
from torch import nn

from common import files, resnet
from common.own import OwnEncoder
from common.resnet import (
    ARCHS, PREACT_ARCHS, Block, BranchNorm, PreActBlock, PreActBottleneck, PreActResNet, ResNet)
from common.vit import VITS, TransformerBlock, ViT


def make(arch, branches=(), stem=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
         size=None, positions="sincos", relative=False, fc_norm=False):
    """An encoder by name, or, as "my_file.py:function", one of your own (`own.OwnEncoder`).

    branches      names of the branches of its BatchNorms; none: plain BatchNorms. A ViT has no BatchNorm.
    stem          of a ResNet; None: the default of `arch`. Others have none to choose.
    size, positions, relative, fc_norm    of a ViT, see there.
    mean, std     of the three channels of images in [0, 1].

    Raises ValueError that names what cannot be.
    """
    numbers = [*mean, *std]
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, numbers)) or min(std) <= 0:
        raise ValueError(f"mean {list(mean)}, std {list(std)}: must be three finite numbers each, those of "
                         "std positive")
    if stem is not None and (arch in VITS or arch in PREACT_ARCHS or ".py:" in arch):
        raise ValueError(f"stem {stem!r}: is for {', '.join(ARCHS)}, and not for {arch}")
    if ".py:" in arch:
        return OwnEncoder(arch, tuple(branches), mean, std)
    if arch in VITS:
        *shape, default = VITS[arch]
        return ViT(arch, *shape, size or default, mean, std, positions, relative, fc_norm)
    if arch in PREACT_ARCHS:
        return PreActResNet(arch, *PREACT_ARCHS[arch], tuple(branches), mean, std)
    if arch not in ARCHS:
        known = ", ".join([*ARCHS, *PREACT_ARCHS, *VITS])
        raise ValueError(f"arch {arch!r}: choose one of {known}, or my_file.py:function")
    depths, widths, bottleneck, default = ARCHS[arch]
    return ResNet(arch, depths, widths, bottleneck, stem or default, tuple(branches), mean, std)


BLOCKS = (Block, PreActBlock, PreActBottleneck, TransformerBlock)


def stages(encoder):
    """Names of the encoder's parts by depth: what precedes the blocks, then each block; lists of
    names."""
    blocks = [name for name, m in encoder.named_modules() if isinstance(m, BLOCKS)]
    return [["conv1", "bn1", "cls_token", "pos_embed", "patch_embed"], *([name] for name in blocks)]


def has_blocks(encoder):
    """Whether `stages` and `drop_path` know the encoder's blocks: those of this project's networks."""
    return any(isinstance(m, BLOCKS) for m in encoder.modules())


def drop_path(encoder, rate):
    """In train mode, skip the residual branches of single images (stochastic depth, Huang et al. 2016,
    arXiv 1603.09382): never in the first block, with probability `rate` in the last, linear between."""
    blocks = [m for m in encoder.modules() if isinstance(m, BLOCKS)]
    for i, block in enumerate(blocks):
        block.drop = rate * i / max(1, len(blocks) - 1)


def last_stage(encoder, why):
    """The modules after the `trunk` of a ResNet, in order: its last stage. Raises ValueError, with `why` one
    is needed, for an encoder without."""
    if not hasattr(encoder, "last_stage"):
        raise ValueError(f"{why} needs a ResNet of this project, and {encoder.recipe['arch']} is none")
    return encoder.last_stage()


def renew_last_stage(encoder, why):
    """Start the last stage of a ResNet anew; errors as `last_stage`."""
    for module in last_stage(encoder, why):
        resnet.initialize(module)


def renew_norm(encoder):
    """Drop a ViT's last LayerNorm, and put a new one after the mean of its tokens, as MAE's fine-tuning
    does. Other encoders have none, and stay."""
    if isinstance(encoder, ViT):
        encoder.norm = nn.Identity()
        encoder.fc_norm = nn.LayerNorm(encoder.dim, eps=1e-6).to(encoder.mean)
        encoder.recipe = {**encoder.recipe, "fc_norm": True}


def mlp(*sizes, norm=None):
    """Linear, ReLU, ..., Linear through `sizes`; `norm(channels)` gives a layer put before each ReLU."""
    layers = []
    for c_in, c_out in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(c_in, c_out), *([norm(c_out)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


# ----------------------------------------------------------------------------------------------------------
# Exported encoders
# ----------------------------------------------------------------------------------------------------------
def export(encoder, path, branch=None, image_size=None):
    """Write `encoder` to `path`: a dict of plain types and tensors.

    arch, mean, std, ...    how to build it (`rebuild`)
    image_size              the side of the images it was pretrained on, in pixels; None: not known
    fresh                   where the recipe has it: the part that was never trained, as "the last stage"
    branch                  the BN branch that `state` holds (None without branches)
    state                   of a ResNet torchvision's keys, as of its `resnet18()` whose `fc` is
                            `nn.Identity()`; the first convolution differs where `stem` is not "imagenet".
                            Of a ViT timm's, as of its
                            `VisionTransformer(..., num_classes=0, global_pool="avg", fc_norm=False)`.
                            What `relative` adds to a ViT, and pre-activation and wide ResNets, have keys
                            of this project; a network of one's own keeps its keys
    others                  {branch: its BatchNorm tensors}, the branches not chosen

    Raises ValueError, and writes nothing, for a network that `make` did not build, a branch that it
    lacks, or a parameter or buffer that is not finite.
    """
    if not isinstance(getattr(encoder, "recipe", None), dict):
        raise ValueError(f"{path}: not written, as {type(encoder).__name__} is not an encoder of `make`")
    names = {n for m in encoder.modules() if isinstance(m, BranchNorm) for n in m.branches}
    if names and branch not in names:
        raise ValueError(f"BN branch {branch!r}: this encoder has {', '.join(sorted(names))}")
    if branch is not None and not names:
        raise ValueError(f"BN branch {branch!r}: this encoder has none")
    tensors = encoder.state_dict()
    bad = files.not_finite(tensors)
    if bad:
        raise ValueError(f"{path}: not written, as {bad} is not finite")
    states = {branch: {}}
    for key, tensor in tensors.items():
        name = None
        if ".branches." in key:
            before, after = key.split(".branches.")
            name, leaf = after.split(".", 1)
            key = f"{before}.{leaf}"
        states.setdefault(name or branch, {})[key] = tensor.detach().cpu().contiguous().clone()
    state = states.pop(branch)
    files.save({"format": FORMAT, **encoder.recipe, "image_size": image_size, "branch": branch,
                "state": state, "others": states}, path)


def branch_of(encoder, branch):
    """`branch`, or None where `encoder` has no BatchNorm branches, as a ViT: what `export` takes."""
    return branch if any(isinstance(m, BranchNorm) for m in encoder.modules()) else None


FORMAT = "exported encoder, version 1"


def load_encoder(path, branch=None, all_branches=False, arch=None):
    """The exported encoder at `path`, in eval mode, with plain BatchNorm; `branch` None is the exported
    choice. `all_branches`: with all of them instead, that one in use. `arch`: of a network of one's own,
    where its code is now, as "my_file.py:function".

    Its attribute `branch` names the one loaded, and `branches` all that the file holds; `image_size` is the
    side of the images it was pretrained on, in pixels (None where the file does not say), `fresh` the part of
    it that was never trained, as "the last stage" (None: all was trained).

    Raises FileNotFoundError, or ValueError that names what is wrong: not such a file, an unknown branch, or
    the first missing, unexpected or misshaped tensor, or one that is not finite.
    """
    advice = "pretraining writes encoder.pt when it ends"
    saved = read(path, FORMAT, advice)
    for key in ("arch", "branch", "state", "others"):
        if key not in saved:
            raise ValueError(f"{path}: {key!r} is missing; {advice}")
    if arch:
        if ".py:" not in saved["arch"]:
            raise ValueError(f"{path}: holds a {saved['arch']}, which needs no code of yours; leave --encoder out")
        saved = {**saved, "arch": arch}
    parts = {saved["branch"]: saved["state"], **saved["others"]}
    branch = branch or saved["branch"]
    if branch not in parts:
        names = ", ".join(name for name in parts if name) or "no branches"
        raise ValueError(f"{path}: no BN branch {branch!r}; it has {names}")
    state = {**saved["state"], **parts[branch]}
    branched = all_branches and len(parts) > 1
    for key in next(iter(saved["others"].values())) if branched else ():  # each tensor of a BatchNorm
        before, leaf = key.rsplit(".", 1)
        del state[key]
        state |= {f"{before}.branches.{name}.{leaf}": part[key] for name, part in parts.items()}
    try:
        encoder = rebuild(saved, branches=sorted(parts, key=lambda name: name != branch) if branched else ())
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    files.load_strict(encoder, state, path)
    encoder.branch = branch
    encoder.branches = [name for name in parts if name]
    encoder.image_size = saved.get("image_size")
    encoder.fresh = saved.get("fresh")
    if encoder.fresh:
        encoder.recipe = {**encoder.recipe, "fresh": encoder.fresh}
    return encoder.eval()


def one_branch(state, branch):
    """The state dict of a network with branches -> that of the like with plain BatchNorm, `branch`
    chosen."""
    return {k.replace(f".branches.{branch}.", "."): v for k, v in state.items()
            if ".branches." not in k or f".branches.{branch}." in k}


RECIPE = ("arch", "stem", "mean", "std", "size", "positions", "relative", "fc_norm")


def rebuild(saved, branches=()):
    """The encoder that the dict `saved` describes, with random weights. A warning where it is a network of one's
    own whose code is not what it was."""
    encoder = make(branches=branches, **{k: saved[k] for k in RECIPE if k in saved})
    if saved.get("code") and saved["code"] != encoder.recipe["code"]:
        warnings.warn(f"the code of {saved['arch']} has changed since these weights were saved")
    return encoder


def read(path, format_name, advice):
    """The dict saved at `path` of format `format_name`. Raises FileNotFoundError, or ValueError that
    names the file, what it is instead or which of its tensors is not finite, and gives `advice`."""
    if pathlib.Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; {advice}")
    try:
        saved = files.load(path)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e}; {advice}") from None
    except ValueError as e:
        raise ValueError(f"{e}; {advice}") from None
    if not isinstance(saved, dict) or saved.get("format") != format_name:
        raise ValueError(f"{path}: not an {format_name} but {_what(saved)}; {advice}")
    bad = files.not_finite(saved)
    if bad:
        raise ValueError(f"{path}: {bad} is not finite; {advice}")
    return saved


def is_exported(path):
    """Whether the file at `path` is one that `export` wrote."""
    try:
        saved = files.load(path)
    except (ValueError, OSError):
        return False
    return isinstance(saved, dict) and saved.get("format") == FORMAT


def _what(saved):
    """What a loaded file seems to hold, in words."""
    if not isinstance(saved, dict):
        return f"a {type(saved).__name__}"
    if not saved:
        return "an empty dict"
    if "format" in saved:
        return f"an {saved['format']}"
    if all(isinstance(value, torch.Tensor) for value in saved.values()):
        return f"a plain state_dict of {len(saved)} tensors, without architecture and normalisation"
    if {"flags", "step", "state"} <= saved.keys():
        return "the checkpoint of a run"
    return f"a dict of {', '.join(map(str, list(saved)[:5]))}"
