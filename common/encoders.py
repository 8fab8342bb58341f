"""Image encoders by name, written to files and read back.

An encoder is `encoder(x) -> (B, dim)` for images x (B, 3, H, W) in [0, 1]; normalisation is its first
layer. `export` writes torchvision's (ResNet) or timm's (ViT) key names, so that no later program needs
this one.
"""
import collections
import contextlib
import copy
import importlib.util
import math
import pathlib
import sys
import traceback

import torch
from torch import nn

from common import files, resnet
from common.pgd import eval_mode
from common.resnet import (
    ARCHS, PREACT_ARCHS, Block, BranchNorm, PreActBlock, PreActBottleneck, PreActResNet, ResNet)
from common.vit import VITS, TransformerBlock, ViT


def make(arch, branches=(), stem=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
         size=None, positions="sincos", relative=False, fc_norm=False):
    """An encoder by name, or, as "my_file.py:function", one of your own (`OwnEncoder`).

    branches      names of the branches of its BatchNorms; none: plain BatchNorms. A ViT has no BatchNorm.
    stem          of a ResNet; None: the default of `arch`.
    size, positions, relative, fc_norm    of a ViT, see there.
    mean, std     of the three channels of images in [0, 1].

    Raises ValueError that names what cannot be.
    """
    numbers = [*mean, *std]
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, numbers)) or min(std) <= 0:
        raise ValueError(f"mean {list(mean)}, std {list(std)}: must be three finite numbers each, those of "
                         "std positive")
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


class OwnEncoder(nn.Module):
    """A network of your own: what the function named by `source`, "my_file.py:function", returns.

    The function takes no arguments and returns a new module, images (B, 3, H, W) -> features (B, dim), which
    gets normalised images. With `branches`, every BatchNorm in it is replaced by a BranchNorm; where there
    is none, clean and attacked images share the whole network, as in a ViT. An exported encoder holds its
    weights and `source`, not the code: the file must be there when it is loaded.

    What could not be trained, attacked or exported is refused at once (`try_own`).
    """

    def __init__(self, source, branches, mean, std):
        super().__init__()
        self.recipe = {"arch": source, "mean": list(mean), "std": list(std)}
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.net = from_file(source)
        for name, module in self.net.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(f"arch {source}: its BatchNorm {name} keeps no running statistics, so features "
                                 "would depend on the batch; leave track_running_stats=False out")
        self.dim, side = feature_length(self.net, source)
        add_branches(self.net, branches)
        this = (source, pathlib.Path(source.rpartition(":")[0]).read_bytes(), branches)
        if this not in tried:
            with torch.random.fork_rng(devices=[]):
                try_own(self.net, source, branches, side)
            tried.add(this)

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


def from_file(source):
    """The module that the function named by `source`, "my_file.py:function", returns. Raises
    ValueError."""
    file, _, name = source.rpartition(":")
    if not pathlib.Path(file).is_file():
        raise ValueError(f"arch {source}: there is no file {file}")
    folder = str(pathlib.Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last: what lies beside the file may be imported by it
    spec = importlib.util.spec_from_file_location(f"arch_{pathlib.Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"arch {source}: {file} has no function {name!r}")
    net = getattr(module, name)()
    if not isinstance(net, nn.Module):
        raise ValueError(f"arch {source}: {name}() returned a {type(net).__name__}, not an nn.Module")
    return net


def add_branches(net, branches):
    """`branch_norms`, where `net` has BatchNorms and there are `branches`."""
    if branches and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
        branch_norms(net, branches)


tried = set()  # (source, contents of its file, branches) of what `try_own` has found good in this process


def try_own(net, source, branches, side):
    """Try what a run will do with `net`, a network from `source` with its `branches`, on noise of `side`: a
    pass in train mode, gradients, and whether a second network that loads the weights of a first one makes the
    same features. That is done with two networks made anew; `net` stays as it is.

    Raises ValueError that says what fails, where nothing has been trained yet.
    """
    used = from_file(source)
    if used is net:
        raise ValueError(f"arch {source}: returns one and the same network at each call; it must make a new one")
    feature_length(used, source, side)
    add_branches(used, branches)
    with torch.no_grad():
        for w in used.parameters():
            if w.is_floating_point():
                w.add_(0.01 * torch.randn_like(w))  # no longer what the function makes
    names = branches if branch_of(used, branches) else (None,)
    for name in names:
        x = try_training(used, source, side, name)

    loaded = from_file(source)
    feature_length(loaded, source, side)
    add_branches(loaded, branches)
    lost = f"arch {source}: the exported encoder would not be the trained one"
    try:
        load_strict(loaded, used.state_dict(), lost)
    except ValueError as e:
        raise ValueError(f"{e}; what depends on the batch, or is infinite, must stay out of the state_dict, as by "
                         "register_buffer(name, tensor, persistent=False)") from None
    for name in names:
        features = features_of(used, x, name)
        if differ(features[:2], features_of(used, x[:2], name)):
            if differ(features, features_of(used, x, name)):
                raise ValueError(f"arch {source}: in eval mode the same images have other features at each pass; "
                                 "switch off what is random by self.training, as F.dropout(x, p, self.training)")
            raise ValueError(f"arch {source}: in eval mode the features of an image depend on the other images "
                             "of its batch; they must be of the image alone")
        if differ(features, features_of(loaded, x, name)):
            raise ValueError(f"{lost}: its state_dict does not hold all that the features depend on; keep every "
                             "layer in a module or nn.ModuleList, every other tensor in register_buffer")


def try_training(net, source, side, name):
    """A pass through `net` in train mode and branch `name` (None: it has none), and its gradients. Returns its
    images, noise (3, 3, S, S), S the first of SIDES from `side` on that it takes. Raises ValueError that says
    what fails."""
    fault = None
    features = None
    for larger in (s for s in SIDES if s >= side):  # some need a larger one in train mode
        x = torch.randn(3, 3, larger, larger, device=device_of(net)).requires_grad_()
        try:
            with in_branch(net, name):
                features = net.train()(x)
            break
        except Exception as e:
            fault = fault or e
    if features is None and fault:
        where = line_of(fault, source.rpartition(":")[0])
        replaced = ""
        if "BranchNorm" in str(fault):
            replaced = "; its BatchNorms are BranchNorms here, which can only be called, as self.bn(x)"
        raise ValueError(f"arch {source}: fails in train mode{where} on images of side {side} "
                         f"({type(fault).__name__}: {' '.join(str(fault).split())[:200]}){replaced}")
    check_features(features, source, x, "in train mode ")
    gradient = None
    if features.requires_grad:
        gradient, = torch.autograd.grad(features.sum(), x, allow_unused=True, retain_graph=True)
    if gradient is None:
        raise ValueError(f"arch {source}: no gradient reaches the images, so that it cannot be attacked; leave out "
                         "torch.no_grad() and detach()")
    known = {id(w) for w in net.parameters()}
    for w in leaves(features):
        if id(w) not in known and w is not x:
            raise ValueError(f"arch {source}: a weight of shape {tuple(w.shape)} is none of its parameters, and "
                             "would be neither trained nor exported; keep every layer in a module or an "
                             "nn.ModuleList, not in a plain list")
    return x.detach()


def line_of(error, file):
    """Where in `file` the `error` came from, in words; nothing where it did not pass by there."""
    lines = [place.lineno for place in traceback.extract_tb(error.__traceback__)
             if pathlib.Path(place.filename).resolve() == pathlib.Path(file).resolve()]
    return f" in line {lines[-1]}" if lines else ""


def leaves(y):
    """The tensors that a gradient of `y` would be kept for: the leaves of its graph."""
    found = []
    seen = set()
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [before for before, _ in node.next_functions]
    return found


def in_branch(net, name):
    return resnet.branch(net, name) if name else contextlib.nullcontext()


@torch.no_grad()
def features_of(net, x, name):
    """The features of images x (B, 3, H, W) in eval mode and branch `name`."""
    with eval_mode(net), in_branch(net, name):
        return net(x)


def differ(features, others):
    """Whether two tensors of features differ by more than rounding, which depends on the size of a batch."""
    scale = features.abs().max().item()
    return not torch.allclose(features, others, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def device_of(net):
    return next((w.device for w in net.parameters()), torch.device("cpu"))


SIDES = (32, 64, 96, 224, 384)  # of usual images; some networks take one of them only


@torch.no_grad()
def feature_length(net, source, side=None):
    """The D of net's features (B, D) and the side of the images, found on two black images of that `side`, or
    of the first of SIDES that it takes; no running statistic changes. Raises ValueError where it takes none,
    or where they are no such features."""
    device = device_of(net)
    features = None
    faults = []
    for side in (side,) if side else SIDES:
        x = torch.zeros(2, 3, side, side, device=device)
        try:
            with eval_mode(net):
                features = net(x)
            break
        except (RuntimeError, AssertionError, ValueError) as e:
            faults.append(f"of side {side}: {' '.join(str(e).split())[:200]}")
    if features is None:
        raise ValueError(f"arch {source}: takes no images of the sides tried; {faults[0]}")
    check_features(features, source, x)
    return features.shape[1], side


def check_features(features, source, x, where=""):
    """ValueError where `features` are not (B, D), those of images x (B, 3, H, W); `where`: in which mode."""
    if not isinstance(features, torch.Tensor) or features.dim() != 2 or len(features) != len(x):
        what = tuple(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
        raise ValueError(f"arch {source}: must map images (B, 3, H, W) to features (B, D); {where}of "
                         f"{len(x)} images it made {what}")


def branch_norms(net, branches):
    """Replace every BatchNorm in `net` by a BranchNorm with these `branches`, all of them starting as it
    was.

    Raises ValueError where there is none.
    """
    norms = [(name, m) for name, m in net.named_modules(remove_duplicate=False)
             if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise ValueError("this network has no BatchNorm, so that it cannot have the branches "
                         f"{', '.join(branches)}")
    of_norm = {}  # one that has several names stays one
    for name, norm in norms:
        parent, _, leaf = name.rpartition(".")
        if norm not in of_norm:
            of_norm[norm] = BranchNorm(norm.num_features, branches, lambda _: copy.deepcopy(norm))
        setattr(net.get_submodule(parent), leaf, of_norm[norm])


def resnet18(**options):
    return make("resnet18", **options)


def resnet34(**options):
    return make("resnet34", **options)


def resnet50(**options):
    return make("resnet50", **options)


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
    fresh                   where the recipe has it: the part that was never trained, as "layer4"
    branch                  the BN branch that `state` holds (None without branches)
    state                   torchvision's keys: of a `resnet18()` whose `fc` is `nn.Identity()`; its first
                            convolution differs where `stem` is not "imagenet". Or timm's:
                            `VisionTransformer(..., num_classes=0, global_pool="avg", fc_norm=False)`
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


def load_encoder(path, branch=None, all_branches=False):
    """The exported encoder at `path`, in eval mode, with plain BatchNorm; `branch` None is the exported
    choice. `all_branches`: with all of them instead, that one in use.

    Its attribute `branch` names the one loaded, `image_size` the side of the images it was pretrained on,
    in pixels (None where the file does not say), `fresh` the part of it that was never trained, as "layer4"
    (None: all was trained). Raises FileNotFoundError, or ValueError that names what is wrong: not such a
    file, an unknown branch, or the first missing, unexpected or misshaped tensor, or one that is not finite.
    """
    advice = "pretraining writes encoder.pt when it ends"
    saved = read(path, FORMAT, advice)
    for key in ("arch", "branch", "state", "others"):
        if key not in saved:
            raise ValueError(f"{path}: {key!r} is missing; {advice}")
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
    load_strict(encoder, state, path)
    encoder.branch = branch
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
    """The encoder that the dict `saved` describes, with random weights."""
    return make(branches=branches, **{k: saved[k] for k in RECIPE if k in saved})


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


def load_strict(net, state, path):
    """`net.load_state_dict(state)`; a missing, unexpected or misshaped tensor, or one that is not finite,
    is a ValueError naming it and the file, `path`. Nothing is loaded then."""
    want = net.state_dict()
    for key in dict.fromkeys([*want, *state]):
        if key not in state:
            raise ValueError(f"{path}: {key} is missing")
        if key not in want:
            raise ValueError(f"{path}: {key} is unexpected")
        if not isinstance(state[key], torch.Tensor):
            raise ValueError(f"{path}: {key} is a {type(state[key]).__name__}, not a tensor")
        if state[key].shape != want[key].shape:
            raise ValueError(f"{path}: {key} is {tuple(state[key].shape)}, expected {tuple(want[key].shape)}")
    bad = files.not_finite(state)
    if bad:
        raise ValueError(f"{path}: {bad} is not finite")
    load_state(net, state)


def load_state(net, state):
    """`net.load_state_dict(state)` of a plain dict, whose layout is the one that `net` itself would write:
    torchvision's MNASNet asks which one it is."""
    state = collections.OrderedDict(state)
    state._metadata = getattr(net.state_dict(), "_metadata", {})
    net.load_state_dict(state)
