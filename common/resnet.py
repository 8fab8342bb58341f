"""ResNets (He et al. 2016, arXiv 1512.03385) whose BatchNorms may come in several named branches, and the
pre-activation and wide ones that the literature on robustness uses.

Clean and attacked images have different statistics, so each kind gets a BatchNorm of its own (Xie et al.
2020, arXiv 1911.09665); `with branch(net, "adv"):` chooses. Module names of `ResNet` are torchvision's. The
file stands alone.
"""
import contextlib

import torch
from torch import nn
from torchvision.ops import stochastic_depth


class BranchNorm(nn.Module):
    """BatchNorm in several named branches; the first is used unless `branch` says otherwise. `norm`: of
    images (nn.BatchNorm2d) or, in a head, of rows (nn.BatchNorm1d)."""

    def __init__(self, channels, branches, norm=nn.BatchNorm2d):
        super().__init__()
        self.branches = nn.ModuleDict({name: norm(channels) for name in branches})
        self.branch = next(iter(branches))

    def forward(self, x):
        return self.branches[self.branch](x)


@contextlib.contextmanager
def branch(net, name):
    """Every BranchNorm of `net` uses branch `name` inside the block. A network without any BatchNorm is
    left alone.

    Raises ValueError where a BranchNorm has no such branch, or where all BatchNorms of `net` are plain
    ones: clean and attacked images would share their statistics, and nothing would show it.
    """
    modules = list(net.modules())  # one walk: every embedding comes by here
    norms = [m for m in modules if isinstance(m, BranchNorm)]
    if not norms and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
        other = "adv" if name == "clean" else name
        branches = f'("clean", "{other}")'
        raise ValueError(f"BN branch {name!r}: this network has plain BatchNorms only; build it by "
                         f"make(arch, {branches}), or by torchvision with "
                         f"norm_layer=lambda c: BranchNorm(c, {branches})")
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


def _conv(c_in, c_out, size, stride=1):
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """Basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1 with four times the channels) residual block."""

    def __init__(self, c_in, c, stride, bottleneck, norm):
        super().__init__()
        c_out = 4 * c if bottleneck else c
        if bottleneck:
            self.conv1 = _conv(c_in, c, 1)
            self.bn1 = norm(c)
            self.conv2 = _conv(c, c, 3, stride)
            self.bn2 = norm(c)
            self.conv3 = _conv(c, c_out, 1)
            self.bn3 = norm(c_out)
        else:
            self.conv1 = _conv(c_in, c, 3, stride)
            self.bn1 = norm(c)
            self.conv2 = _conv(c, c_out, 3)
            self.bn2 = norm(c_out)
            self.conv3 = None
        self.drop = 0.0  # see drop_path
        same = stride == 1 and c_in == c_out
        self.downsample = None if same else nn.Sequential(_conv(c_in, c_out, 1, stride), norm(c_out))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        if self.conv3 is not None:
            y = self.bn3(self.conv3(y.relu()))
        y = stochastic_depth(y, self.drop, "row", self.training)
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
        self.conv1 = _conv(3, widths[0], size, stride)
        self.bn1 = norm(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        c_in = widths[0]
        for i, (depth, c) in enumerate(zip(depths, widths), 1):
            blocks = []
            for j in range(depth):
                blocks.append(Block(c_in, c, 2 if i > 1 and j == 0 else 1, bottleneck, norm))
                c_in = 4 * c if bottleneck else c
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.dim = c_in
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = (x - self.mean) / self.std
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))


class PreActBlock(nn.Module):
    """Residual block whose BatchNorms and ReLUs come before its two convolutions (He et al. 2016, arXiv
    1603.05027). Where the shape changes, the shortcut starts after the first of them."""

    def __init__(self, c_in, c, stride, norm):
        super().__init__()
        self.bn1 = norm(c_in)
        self.conv1 = _conv(c_in, c, 3, stride)
        self.bn2 = norm(c)
        self.conv2 = _conv(c, c, 3)
        self.drop = 0.0  # see drop_path
        same = stride == 1 and c_in == c
        self.downsample = None if same else _conv(c_in, c, 1, stride)

    def forward(self, x):
        activated = self.bn1(x).relu()
        y = self.conv1(activated)
        y = self.conv2(self.bn2(y).relu())
        y = stochastic_depth(y, self.drop, "row", self.training)
        return y + (x if self.downsample is None else self.downsample(activated))


class PreActResNet(nn.Module):
    """Pre-activation ResNet without its classifier, for images of about 32 pixels: a 3x3 convolution to
    `stem_width` channels, a stage of `depths[i]` blocks for each of `widths`, BatchNorm, ReLU and the mean.

    Wide ResNets (Zagoruyko & Komodakis 2016, arXiv 1605.07146) are of this kind. dim: length of the
    features.
    """

    def __init__(self, arch, stem_width, depths, widths, branches, mean, std):
        super().__init__()
        self.recipe = {"arch": arch, "mean": list(mean), "std": list(std)}
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

        def norm(c):
            return BranchNorm(c, branches) if branches else nn.BatchNorm2d(c)

        self.conv1 = _conv(3, stem_width, 3)
        self.stages = len(depths)
        c_in = stem_width
        for i, (depth, c) in enumerate(zip(depths, widths), 1):
            blocks = []
            for j in range(depth):
                blocks.append(PreActBlock(c_in, c, 2 if i > 1 and j == 0 else 1, norm))
                c_in = c
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.bn = norm(c_in)
        self.dim = c_in
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.conv1((x - self.mean) / self.std)
        for i in range(1, self.stages + 1):
            x = getattr(self, f"layer{i}")(x)
        return self.bn(x).relu().mean((2, 3))


STEMS = {"cifar": (3, 1), "imagenet": (7, 2), "small": (3, 2)}
ARCHS = {  # depths, widths, bottleneck, default stem
    "slim": ((1, 1, 1, 1), (16, 32, 64, 128), False, "small"),  # 0.3 M parameters
    "resnet18": ((2, 2, 2, 2), (64, 128, 256, 512), False, "cifar"),
    "resnet34": ((3, 4, 6, 3), (64, 128, 256, 512), False, "cifar"),
    "resnet50": ((3, 4, 6, 3), (64, 128, 256, 512), True, "cifar"),
}
PREACT_ARCHS = {  # width of the first convolution, depths, widths
    "preact_resnet18": (64, (2, 2, 2, 2), (64, 128, 256, 512)),
    "wrn34_10": (16, (5, 5, 5), (160, 320, 640)),  # 34 layers, ten times as wide
}
