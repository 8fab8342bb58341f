"""Image encoders: `encoder(x) -> (B, dim)` for images x (B, 3, H, W) in [0, 1]; normalisation is their first
layer.

A BatchNorm may come as several named branches (Xie et al. 2020, arXiv 1911.09665: clean and attacked images
have different statistics, so each gets its own affine and running statistics); `with branch(net, "adv"):`
chooses. `export` writes torchvision's key names, so that no later program needs this one.
"""
import contextlib
import os

import torch
from torch import nn


class BranchNorm(nn.Module):
    """BatchNorm in several named branches; the first is used unless `branch` says otherwise. `norm`: of images
    (nn.BatchNorm2d) or, in a head, of rows (nn.BatchNorm1d)."""

    def __init__(self, channels, branches, norm=nn.BatchNorm2d):
        super().__init__()
        self.branches = nn.ModuleDict({name: norm(channels) for name in branches})
        self.branch = next(iter(branches))

    def forward(self, x):
        return self.branches[self.branch](x)


@contextlib.contextmanager
def branch(net, name):
    """Every BranchNorm of `net` uses branch `name` inside the block. Raises ValueError for an unknown one."""
    norms = [m for m in net.modules() if isinstance(m, BranchNorm)]
    for m in norms:
        if name not in m.branches:
            raise ValueError(f"BN branch {name!r}: this network has {', '.join(m.branches)}")
    before = [m.branch for m in norms]
    try:
        for m in norms:
            m.branch = name
        yield
    finally:
        for m, old in zip(norms, before):
            m.branch = old


# ----------------------------------------------------------------------------------------------------------
# ResNet (He et al. 2016, arXiv 1512.03385), module names as in torchvision
# ----------------------------------------------------------------------------------------------------------
def _conv(c_in, c_out, size, stride=1):
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """Basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1 with four times the channels) residual block."""

    def __init__(self, c_in, c, stride, bottleneck, norm):
        super().__init__()
        c_out = 4 * c if bottleneck else c
        if bottleneck:
            self.conv1, self.bn1 = _conv(c_in, c, 1), norm(c)
            self.conv2, self.bn2 = _conv(c, c, 3, stride), norm(c)
            self.conv3, self.bn3 = _conv(c, c_out, 1), norm(c_out)
        else:
            self.conv1, self.bn1 = _conv(c_in, c, 3, stride), norm(c)
            self.conv2, self.bn2 = _conv(c, c_out, 3), norm(c_out)
            self.conv3 = None
        same = stride == 1 and c_in == c_out
        self.downsample = None if same else nn.Sequential(_conv(c_in, c_out, 1, stride), norm(c_out))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        if self.conv3 is not None:
            y = self.bn3(self.conv3(y.relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """ResNet without its classifier.

    stem "cifar": 3x3 stride 1; "imagenet": 7x7 stride 2 and max-pool; "small": 3x3 stride 2, for CPUs.
    dim  length of the features.
    """

    def __init__(self, arch, depths, widths, bottleneck, stem, branches, mean, std):
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem {stem!r}: choose one of {', '.join(STEMS)}")
        self.recipe = {"arch": arch, "stem": stem, "mean": list(mean), "std": list(std)}
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

        def norm(c):
            return BranchNorm(c, branches) if branches else nn.BatchNorm2d(c)

        size, stride = STEMS[stem]
        self.conv1, self.bn1 = _conv(3, widths[0], size, stride), norm(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        c_in = widths[0]
        for i, (depth, c) in enumerate(zip(depths, widths), 1):
            blocks = []
            for j in range(depth):
                blocks.append(Block(c_in, c, 2 if i > 1 and j == 0 else 1, bottleneck, norm))
                c_in = 4 * c if bottleneck else c
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.dim, self.stages = c_in, len(depths)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = (x - self.mean) / self.std
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for i in range(1, self.stages + 1):
            x = getattr(self, f"layer{i}")(x)
        return x.mean((2, 3))


STEMS = {"cifar": (3, 1), "imagenet": (7, 2), "small": (3, 2)}
ARCHS = {  # depths, widths, bottleneck, default stem
    "slim": ((1, 1, 1, 1), (16, 32, 64, 128), False, "small"),  # 0.3 M parameters
    "resnet18": ((2, 2, 2, 2), (64, 128, 256, 512), False, "cifar"),
    "resnet34": ((3, 4, 6, 3), (64, 128, 256, 512), False, "cifar"),
    "resnet50": ((3, 4, 6, 3), (64, 128, 256, 512), True, "cifar"),
}


def make(arch, branches=(), stem=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
    """An encoder by name. `branches`: of its BatchNorm (none: a plain one); `stem` None: the default."""
    if arch not in ARCHS:
        raise ValueError(f"arch {arch!r}: choose one of {', '.join(ARCHS)}")
    depths, widths, bottleneck, default = ARCHS[arch]
    return ResNet(arch, depths, widths, bottleneck, stem or default, tuple(branches), mean, std)


def resnet18(**options):
    return make("resnet18", **options)


def resnet34(**options):
    return make("resnet34", **options)


def resnet50(**options):
    return make("resnet50", **options)


def mlp(*sizes, norm=None):
    """Linear, ReLU, ..., Linear through `sizes`; `norm(channels)` gives a layer put before each ReLU."""
    layers = []
    for c_in, c_out in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(c_in, c_out), *([norm(c_out)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


# ----------------------------------------------------------------------------------------------------------
# Exported encoders
# ----------------------------------------------------------------------------------------------------------
def export(encoder, branch, path):
    """Write `encoder` to `path`: a dict of plain types and tensors.

    arch, stem, mean, std   how to build it
    branch                  the BN branch that `state` holds (None without branches)
    state                   torchvision's keys: `resnet18().load_state_dict(state, strict=False)` lacks `fc`,
                            and the stem's convolution differs where `stem` is not "imagenet"
    others                  {branch: its BatchNorm tensors}, the branches not chosen
    """
    states = {branch: {}}
    for key, tensor in encoder.state_dict().items():
        name, tensor = None, tensor.detach().cpu().contiguous().clone()
        if ".branches." in key:
            before, after = key.split(".branches.")
            name, leaf = after.split(".", 1)
            key = f"{before}.{leaf}"
        states.setdefault(name or branch, {})[key] = tensor
    names = {n for m in encoder.modules() if isinstance(m, BranchNorm) for n in m.branches}
    if names and branch not in names:
        raise ValueError(f"BN branch {branch!r}: this encoder has {', '.join(sorted(names))}")
    state = states.pop(branch)
    out = {"format": FORMAT, **encoder.recipe, "branch": branch, "state": state, "others": states}
    torch.save(out, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


FORMAT = "exported encoder, version 1"


def load_encoder(path, branch=None):
    """The exported encoder at `path`, in eval mode, with plain BatchNorm; `branch` None is the exported
    choice.

    Its `branch` attribute names the one loaded. Raises FileNotFoundError, or ValueError that names what is
    wrong: not such a file, an unknown branch, or the first missing, unexpected or misshaped tensor.
    """
    saved = read(path, FORMAT, "pretraining writes encoder.pt when it ends")
    state = dict(saved["state"])
    if branch not in (None, saved["branch"]):
        if branch not in saved["others"]:
            raise ValueError(f"{path}: no BN branch {branch!r}; it has "
                             f"{', '.join(str(b) for b in [saved['branch'], *saved['others']])}")
        state.update(saved["others"][branch])
    encoder = make(saved["arch"], (), saved["stem"], saved["mean"], saved["std"])
    load_strict(encoder, state, path)
    encoder.branch = branch or saved["branch"]
    return encoder.eval()


def read(path, kind, hint):
    """The dict saved at `path` of format `kind`; else an error that names the file and gives `hint`."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; {hint}") from None
    except Exception as e:
        raise ValueError(f"{path}: cannot be read ({type(e).__name__}), perhaps truncated; {hint}") from None
    if not isinstance(saved, dict) or saved.get("format") != kind:
        raise ValueError(f"{path}: not an {kind}; {hint}")
    return saved


def load_strict(net, state, path):
    """`net.load_state_dict(state)`; a missing, unexpected or misshaped tensor is a ValueError naming it."""
    want = net.state_dict()
    for key in dict.fromkeys([*want, *state]):
        if key not in state:
            raise ValueError(f"{path}: {key} is missing")
        if key not in want:
            raise ValueError(f"{path}: {key} is unexpected")
        if state[key].shape != want[key].shape:
            raise ValueError(f"{path}: {key} is {tuple(state[key].shape)}, expected {tuple(want[key].shape)}")
    net.load_state_dict(state)
