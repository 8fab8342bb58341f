"""Encoders from elsewhere: weights of another program, in a network of torchvision, of timm, or of a file
of yours.

    torchvision:resnet18            with the stem for CIFAR where the weights have it
    timm:vit_tiny_patch16_224       needs timm (pip install timm)
    my_file.py:make                 what this function returns, images (B, 3, H, W) -> features (B, D)

Loading is strict: every weight of the network must be there, and nothing else, except a classifier or
projector at the end (fc, head, ...), which is left out.
"""
import pathlib
import pickle
import re

import torch
import torchvision
from torch import nn

from common import encoders, files, own

HEADS = ("fc", "linear", "classifier", "head", "heads")  # modules that make logits of features
# Keys that begin so are not of the features.
LEFT_OUT = r"(fc(_?\d+)?|linear|classifier|heads?(_\w+)?|normalize|AuxLogits|aux\d)\."
# Under these names programs put weights.
CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "encoder", "teacher")


def is_foreign(arch):
    return arch.startswith(("torchvision:", "timm:"))


class Foreign(nn.Module):
    """Images in [0, 1] (B, 3, H, W) -> features (B, dim) of a network of torchvision or timm, its
    classifier taken away. `arch` is torchvision:name or timm:name.

    cifar_stem  its first convolution is 3x3 of stride 1, without max-pool
    head        of a classifier of torchvision with several layers, the last one alone is taken away

    `layers` are the names of the weights of those layers that stay; none where its classifier has one only.
    """

    def __init__(self, arch, mean, std, cifar_stem=False, head=False):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        library, name = arch.split(":", 1)
        self.layers = set()
        if library == "timm":
            self.net = _of_timm(name)
        else:
            self.net = _of_torchvision(name, head)
            self.layers = {key for key in self.net.state_dict() if key.split(".")[0] in HEADS}
        self.recipe = {"arch": arch, "mean": list(mean), "std": list(std), "cifar_stem": cifar_stem,
                       "head": bool(self.layers)}
        if cifar_stem:
            self.net.conv1 = nn.Conv2d(3, self.net.conv1.out_channels, 3, padding=1, bias=False)
            self.net.maxpool = nn.Identity()
        self.dim, _ = own.feature_length(self.net, arch, _side(self.net))

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


def _of_torchvision(name, head):
    if name not in torchvision.models.list_models(torchvision.models):
        raise ValueError(f"--encoder torchvision:{name}: torchvision has no such model of whole images; "
                         "torchvision.models.list_models(torchvision.models) names them")
    options = {}
    if name in ("googlenet", "inception_v3"):  # which otherwise return three or two outputs in train mode
        options = {"aux_logits": False, "init_weights": False}
    net = torchvision.models.get_model(name, weights=None, **options)
    for place in HEADS:
        classifier = getattr(net, place, None)
        with_weights = []
        if isinstance(classifier, nn.Sequential):
            with_weights = [i for i, layer in enumerate(classifier) if list(layer.parameters())]
        if head and len(with_weights) > 1:  # ConvNeXt, VGG, MobileNet v3, ...
            classifier[with_weights[-1]] = nn.Identity()
        elif classifier is not None:
            setattr(net, place, nn.Flatten())  # ConvNeXt's features come as (B, dim, 1, 1)
    return net


def _of_timm(name):
    try:
        import timm
    except ImportError:
        raise ValueError(f"--encoder timm:{name}: needs timm: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"--encoder timm:{name}: timm has no such model; timm.list_models() names them")
    return timm.create_model(name, num_classes=0)


def _side(net):
    """The side of the images that the network is for, as far as it says; else None."""
    if isinstance(getattr(net, "image_size", None), int):  # torchvision's ViTs
        return net.image_size
    config = getattr(net, "default_cfg", None)  # timm's
    return config["input_size"][-1] if config else None


def rebuild(saved):
    """The encoder that the dict `saved` describes, with random weights."""
    return Foreign(saved["arch"], saved["mean"], saved["std"], saved["cifar_stem"], saved.get("head", False))


def weights_in(path, prefix):
    """The weights in the file `path`, {key: tensor}: those whose key begins with `prefix`, without it. Dicts
    within dicts are joined by dots, and what is in one of CONTAINERS is looked through first, without its name.
    Raises ValueError, or FileNotFoundError, that names the file and what is in it."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        kind = re.search(r"GLOBAL (\S+)", str(e))
        if not kind:
            raise ValueError(f"{path}: cannot be read as weights; it is not what torch.save writes (a page of the "
                             "web, a pointer of Git LFS, safetensors?)") from None
        raise ValueError(f"{path}: holds more than tensors and plain types, as {kind.group(1)}. Reading that could run any "
                         "program, so it is left to you: save the state_dict in it to a file of its own") from None
    except Exception as e:
        raise ValueError(f"{path}: cannot be read as weights ({type(e).__name__}), perhaps truncated") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: holds a {type(saved).__name__}, not a state_dict")
    whole = flat(saved)
    if not whole:
        keys = ", ".join(map(str, list(saved)[:5]))
        raise ValueError(f"{path}: holds no tensors, but {keys or 'nothing'}")
    usual = contained(saved, path, prefix)
    beside = {str(key): value for key, value in usual.items() if isinstance(value, torch.Tensor)}
    state = beside or flat(usual) or whole  # what else lies beside weights, as an optimizer's, is none
    of_data_parallel = all(key.startswith("module.") for key in state)
    if of_data_parallel and any(key.startswith(f"module.{prefix}") for key in state):
        prefix = f"module.{prefix}"  # that "module." need not be named
    if not any(key.startswith(prefix) for key in state):
        state = whole
    chosen = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not chosen:
        raise ValueError(f"{path}: --prefix {prefix}: no key begins so; the first are "
                         f"{', '.join(list(state)[:3])}")
    return chosen


def contained(saved, path, prefix):
    """Of the dict in the file `path` what is in the first of CONTAINERS that it has, and in that one's, and so on.
    Where it has several, and `prefix` names none of them, a line on the screen."""
    there = [container for container in CONTAINERS if isinstance(saved.get(container), dict)]
    if not there:
        return saved
    if len(there) > 1 and not prefix.startswith(tuple(f"{container}." for container in there)):
        say(f"{path}: the weights in {there[0]} are taken; there are others in {', '.join(there[1:])} (--prefix)")
    return contained(saved[there[0]], path, prefix)


said = set()


def say(line):
    """Print a line, but not again in this process: a file is loaded several times."""
    if line not in said:
        print(line)
        said.add(line)


def flat(saved, before=""):
    """The tensors in a dict, and in dicts within it: {keys joined by dots: tensor}."""
    found = {}
    for key, value in saved.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        elif isinstance(value, torch.Tensor):
            found[f"{before}{key}"] = value
    return found


def fitting_prefixes(wanted, state):
    """What may stand before all of the names `wanted` among the keys of `state`."""
    names = [name for name in wanted if not name.endswith("num_batches_tracked")]
    prefixes = [key.removesuffix(names[0]) for key in state if key.endswith(names[0])]
    return [prefix for prefix in prefixes if prefix and all(prefix + name in state for name in names)]


def torchvisions_names(state, bn, path):
    """The weights `state` under torchvision's names, where they are a ResNet's under those of two other
    families: pytorch-cifar's, as RoCL's, which say shortcut for downsample; and those of ACL and AdvCL,
    whose BatchNorms are lists of branches, of which `bn` gives the number. Raises ValueError where that is
    not given."""
    branches = sorted({key.split(".bn_list.")[1].split(".")[0] for key in state if ".bn_list." in key})
    numbers = [branch for branch in branches if branch.isdigit()]
    if numbers and bn not in numbers:
        raise ValueError(f"{path}: its BatchNorms have the branches {', '.join(numbers)}; choose one by --bn")
    if bn and not numbers:
        raise ValueError(f"{path}: --bn {bn}: its BatchNorms have no branches")
    renamed = {}
    for key, value in state.items():
        if ".bn_list." in key:
            before, after = key.split(".bn_list.")
            branch, _, leaf = after.rpartition(".")
            if branch not in ("", bn):
                continue
            key = f"{before}.{leaf}"
        key = key.replace(".downsample.conv.", ".downsample.0.").replace(".downsample.bn.", ".downsample.1.")
        renamed[key.replace(".shortcut.", ".downsample.")] = value
    return renamed


def load_into(net, state, path):
    """Load `state` into `net`. Keys of a head that `net` lacks are left out, and said. Raises ValueError
    that names the missing, the extra and the misshaped keys."""
    wanted = net.state_dict()
    heads = [key for key in state if key not in wanted and re.match(LEFT_OUT, key)]
    if heads:
        first = f"{', '.join(heads[:5])}{', ...' if len(heads) > 5 else ''}"
        say(f"{path}: {first} left out: features are judged, not logits")
        state = {key: value for key, value in state.items() if key not in heads}
    for key in wanted.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # older programs have none, and nothing here reads it
            state = {**state, key: wanted[key]}
    faults = []
    for what, keys in (("missing", wanted.keys() - state.keys()), ("extra", state.keys() - wanted.keys())):
        if keys:
            first = ", ".join(sorted(keys)[:5])
            faults.append(f"{len(keys)} {what} ({first}{', ...' if len(keys) > 5 else ''})")
    misshaped = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    for key in misshaped[:5]:
        faults.append(f"{key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}")
    if len(misshaped) > 5:
        faults.append(f"{len(misshaped) - 5} more are of another shape")
    if faults:
        prefixes = fitting_prefixes(wanted, state)
        advice = f"what would fit: --prefix {' or '.join(prefixes)}" if prefixes else "is --prefix right?"
        raise ValueError(f"{path}: its weights do not fit the network: {'; '.join(faults)}; {advice}")
    bad = files.not_finite(state)
    if bad:
        raise ValueError(f"{path}: {bad} is not finite")
    files.load_state(net, state)


def exported(path, branch, dual, arch=None):
    """The encoder at `path` that pretraining here exported, through BatchNorm `branch`. With `dual`, where it has
    the branches clean and adv, both are there, and adv, that of attacked images, is in use. `arch` as for
    encoders.load_encoder."""
    encoder = encoders.load_encoder(path, branch, arch=arch)
    if dual and {"clean", "adv"} <= set(encoder.branches):
        return encoders.load_encoder(path, "adv", all_branches=True, arch=arch)
    return encoder


def load(path, args, dual=False):
    """The encoder at `path`, in eval mode: one that pretraining here exported, or, with --encoder, one from
    elsewhere. Of an exported network of one's own, --encoder says where its code is now. `dual` as in
    `exported`; networks from elsewhere have no branches."""
    if not args.encoder:
        return exported(path, args.bn, dual)
    if encoders.is_exported(path):
        if not args.encoder.partition(".py:")[1]:
            raise ValueError(f"{path}: was exported by this project, and names its network itself; leave --encoder out")
        if args.prefix or args.mean:
            raise ValueError(f"{path}: was exported by this project, and has its own normalisation; leave --prefix, "
                             "--mean and --std out")
        return exported(path, args.bn, dual, arch=args.encoder)
    mean = args.mean or [0.0, 0.0, 0.0]
    std = args.std or [1.0, 1.0, 1.0]
    state = weights_in(path, args.prefix)
    if is_foreign(args.encoder):
        if args.encoder.startswith("torchvision:resnet"):
            state = torchvisions_names(state, args.bn, path)
        conv1 = state.get("conv1.weight")
        is_resnet = args.encoder.startswith("torchvision:resnet")
        cifar_stem = is_resnet and conv1 is not None and conv1.shape[-1] == 3
        if cifar_stem:
            say(f"{path}: its first convolution is 3x3: the stem for CIFAR, of stride 1 and without max-pool")
        encoder = Foreign(args.encoder, mean, std, cifar_stem, head=True)
        if encoder.layers and not encoder.layers <= state.keys():  # it was pretrained without a classifier
            encoder = Foreign(args.encoder, mean, std, cifar_stem)
            say(f"{path}: has no classifier with the layers of {args.encoder}: features are what precedes them")
    elif ".py:" in args.encoder:
        if args.bn:
            raise ValueError(f"--bn: {args.encoder} has no BN branches")
        encoder = encoders.make(args.encoder, mean=mean, std=std)
    else:
        raise ValueError(f"--encoder {args.encoder}: torchvision:name, timm:name or my_file.py:function")
    load_into(encoder.net, state, path)
    encoder.branch = None
    encoder.image_size = None
    encoder.fresh = None
    return encoder.eval()


def describe(args, paths):
    """One line about how --encoder is used for the files `paths`."""
    exported = [str(path) for path in paths if encoders.is_exported(path)]
    if len(exported) == len(paths):
        return f"encoder {args.encoder}, with the normalisation that the file names"
    normalised = f"mean {args.mean}, std {args.std}" if args.mean else "not normalised (--mean, --std)"
    but = f"; those of {', '.join(exported)} as the file says" if exported else ""
    return f"encoder {args.encoder}; images in [0, 1] are {normalised}{but}"
