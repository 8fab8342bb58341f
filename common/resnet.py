"""ResNets (He et al. 2016, arXiv 1512.03385) whose BatchNorms may come in several named branches, and the
pre-activation and wide ones that the literature on robustness uses.

Clean and attacked images have different statistics, so each kind gets a BatchNorm of its own (Xie et al.
2020, arXiv 1911.09665); `with branch(net, "adv"):` chooses. Module names of `ResNet` are torchvision's. In
attacks, convolution and BatchNorm are one convolution (`conv_norm`). The file stands alone.
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
        if isinstance(branches, str):
            raise ValueError(f"branches {branches!r}: must be a list of names, as [{branches!r}]")
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
    modules = _modules(net)
    norms = [m for m in modules if isinstance(m, BranchNorm)]
    if not norms and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
        other = "adv" if name == "clean" else name
        branches = f'("clean", "{other}")'
        raise ValueError(f"BN branch {name!r}: this network has plain BatchNorms only; build it with "
                         f"branches={branches}, or by torchvision with "
                         f"norm_layer=lambda c: BranchNorm(c, {branches})")
    for m in norms:
        if name not in m._modules["branches"]._modules:  # m.branches would take ten times as long
            raise ValueError(f"BN branch {name!r}: this network has {', '.join(m.branches)}")
    before = [m.branch for m in norms]
    try:
        for m in norms:
            m.__dict__["branch"] = name  # nn.Module's own way to set it takes twenty times as long
        yield
    finally:
        for m, old in zip(norms, before):
            m.__dict__["branch"] = old


def _modules(net):
    """All modules of `net`, itself included, and perhaps None. Every embedding comes by here, and
    net.modules(), which makes a name for each and looks for repetitions, takes ten times as long."""
    found = [net]
    for m in found:  # grows meanwhile
        if m is not None and m._modules:
            found += m._modules.values()
    return found


def conv_norm(conv, norm, x):
    """norm(conv(x)) of x (B, C, H, W), `norm` any module.

    A BatchNorm in eval mode multiplies each channel by s = gamma / sqrt(var + eps) and adds beta - mean s. A
    convolution with weights s w and that bias does the same, and saves a pass over the channels both forward
    and backward. So it is done within `eval_mode` (of common/pgd.py) where no weight can get a gradient: in
    an attack, and elsewhere from the second pass through the same weights on. Values and gradients are equal
    up to rounding. The same weights are the same tensors that no operation in place has changed; a change
    through `w.data` does not count as one, and within the same `eval_mode` it has no effect here.
    """
    inner = norm.branches[norm.branch] if isinstance(norm, BranchNorm) else norm
    folded = None
    if "kept" in inner.__dict__ and not torch.compiler.is_compiling() and _may_fold(conv, norm, inner):
        folded = _folded(conv, inner, inner.kept)
    return norm(conv(x)) if folded is None else conv._conv_forward(x, *folded)


def _may_fold(conv, norm, inner):
    if inner.training or inner.running_mean is None:  # the batch's statistics are used
        return False
    if type(inner) not in (nn.BatchNorm2d, nn.SyncBatchNorm) and not getattr(inner, "folds", False):
        return False
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return False  # it does something of its own with its weights
    for m in (conv, norm, inner):  # hooks are to see what a module makes
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
    if inner.kept.pixels_only or not torch.is_grad_enabled():
        return True
    return not any(w.requires_grad for m in (conv, inner) for w in m._parameters.values() if w is not None)


@torch.no_grad()
def _folded(conv, norm, kept):
    """Weights and bias of the one convolution, from `kept` (a dict that eval_mode gives to each BatchNorm)
    where they are there; None at first sight of these weights outside of an attack."""
    device = conv.weight.device.type
    dtype = conv.weight.dtype
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    sources = [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    versions = [0 if t is None or t.is_inference() else t._version for t in sources]
    key = (dtype, *map(id, sources), *versions)
    first = key not in kept
    if first:
        if len(kept) > 3:  # the weights are changing
            kept.clear()
        kept[key] = sources, None  # with `sources`, so that no other tensor gets their id
    if kept[key][1] is None and (kept.pixels_only or not first):
        kept[key] = sources, _fold(conv, norm, dtype)
    return kept[key][1]


def _fold(conv, norm, dtype):
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    bias = -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)
    return (conv.weight * scale[:, None, None, None]).to(dtype), bias.to(dtype)


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
        self.drop = 0.0  # the probability that, in train mode, an image skips the convolutions
        same = stride == 1 and c_in == c_out
        self.downsample = None if same else nn.Sequential(_conv(c_in, c_out, 1, stride), norm(c_out))

    def forward(self, x):
        if torch.jit.is_scripting():  # TorchScript has no functions of modules
            return self.unfolded(x)
        y = conv_norm(self.conv1, self.bn1, x).relu()
        y = conv_norm(self.conv2, self.bn2, y)
        if self.conv3 is not None:
            y = conv_norm(self.conv3, self.bn3, y.relu())
        y = stochastic_depth(y, self.drop, "row", self.training)
        return (y + (x if self.downsample is None else conv_norm(*self.downsample, x))).relu()

    def unfolded(self, x):
        """`forward` without conv_norm."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        if self.conv3 is not None:
            y = self.bn3(self.conv3(y.relu()))
        y = stochastic_depth(y, self.drop, "row", self.training)
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """ResNet without its classifier: images (B, 3, H, W), pixels in [0, 1], which it normalises itself, ->
    features (B, dim).

    arch        its name, kept in `recipe` with what else is needed to build it again.
    depths      blocks of each of the four stages; from the second on a stage halves height and width.
    widths      channels of each stage; with bottlenecks four times as many come out of it.
    bottleneck  whether blocks are 1x1, 3x3, 1x1 instead of 3x3, 3x3 (`Block`).
    stem        "cifar": 3x3 stride 1; "imagenet": 7x7 stride 2 and max-pool; "small": 3x3 stride 2, for CPUs.
    branches    names of the branches of its BatchNorms (`branch`), the first used by default; (): plain ones.
    mean, std   of the three channels of pixels: the network sees (x - mean) / std.

    Its attributes `dim` and `trunk_dim` are the channels after the last stage and before it. Raises
    ValueError for an unknown stem, or depths and widths that are not four positive numbers each (a depth but
    the last may be 0: no blocks, and no halving). For example
    `ResNet("resnet18", *ARCHS["resnet18"], branches=(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))`.
    """

    def __init__(self, arch, depths, widths, bottleneck, stem, branches, mean, std):
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem {stem!r}: choose one of {', '.join(STEMS)}")
        _check_stages(depths, widths)
        if len(depths) != 4:
            raise ValueError(f"depths {tuple(depths)}: a ResNet has four stages; PreActResNet takes any "
                             "number")
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
        self.trunk_dim = self.layer4[0].conv1.in_channels
        self.dim = c_in
        initialize(self)

    def forward(self, x):
        return self.layer4(self.trunk(x)).mean((2, 3))

    def trunk(self, x):
        """What comes before the last stage: images (B, 3, H, W) -> (B, trunk_dim, h, w)."""
        if not x.is_floating_point():
            raise ValueError("images are integers: must be floats in [0, 1], as x.float() / 255 is")
        x = (x - self.mean) / self.std
        if torch.jit.is_scripting():
            x = self.bn1(self.conv1(x))
        else:
            x = conv_norm(self.conv1, self.bn1, x)
        x = self.maxpool(x.relu())
        return self.layer3(self.layer2(self.layer1(x)))

    def last_stage(self):
        """The modules after the trunk, in order; the mean over places follows."""
        return [self.layer4]


def _check_stages(depths, widths):
    if not len(depths) == len(widths) > 0 or min(depths) < 0 or min(depths[-1], *widths) < 1:
        raise ValueError(f"depths {tuple(depths)}, widths {tuple(widths)}: must be as many of each, and "
                         "positive (but for the last, a depth may be 0)")


def initialize(net):
    """Draw all convolutions of `net` anew (He et al. 2015, arXiv 1502.01852), and put its BatchNorms where
    they start."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.reset_parameters()


class PreActBlock(nn.Module):
    """Residual block whose BatchNorms and ReLUs come before its two convolutions (He et al. 2016, arXiv
    1603.05027). Where the shape changes, the shortcut starts after the first of them."""

    def __init__(self, c_in, c, stride, norm):
        super().__init__()
        self.bn1 = norm(c_in)
        self.conv1 = _conv(c_in, c, 3, stride)
        self.bn2 = norm(c)
        self.conv2 = _conv(c, c, 3)
        self.drop = 0.0  # the probability that, in train mode, an image skips the convolutions
        same = stride == 1 and c_in == c
        self.downsample = None if same else _conv(c_in, c, 1, stride)

    def forward(self, x):
        activated = self.bn1(x).relu()
        y = conv_norm(self.conv1, self.bn2, activated)
        y = self.conv2(y.relu())
        y = stochastic_depth(y, self.drop, "row", self.training)
        return y + (x if self.downsample is None else self.downsample(activated))


class PreActBottleneck(nn.Module):
    """The same with three convolutions (1x1, 3x3, 1x1 with four times the channels). Where the shape
    changes, the shortcut has a BatchNorm of its own, as in Chen et al. 2020 (arXiv 2003.12862)."""

    def __init__(self, c_in, c, stride, norm):
        super().__init__()
        self.bn1 = norm(c_in)
        self.conv1 = _conv(c_in, c, 1)
        self.bn2 = norm(c)
        self.conv2 = _conv(c, c, 3, stride)
        self.bn3 = norm(c)
        self.conv3 = _conv(c, 4 * c, 1)
        self.drop = 0.0  # the probability that, in train mode, an image skips the convolutions
        same = stride == 1 and c_in == 4 * c
        self.downsample = None if same else nn.Sequential(_conv(c_in, 4 * c, 1, stride), norm(4 * c))

    def forward(self, x):
        activated = self.bn1(x).relu()
        y = conv_norm(self.conv1, self.bn2, activated).relu()
        y = conv_norm(self.conv2, self.bn3, y).relu()
        y = stochastic_depth(self.conv3(y), self.drop, "row", self.training)
        return y + (x if self.downsample is None else conv_norm(*self.downsample, activated))


class PreActResNet(nn.Module):
    """Pre-activation ResNet without its classifier, for images of about 32 pixels: a 3x3 convolution to
    `stem_width` channels, a stage of `depths[i]` blocks for each of `widths`, BatchNorm, ReLU and the mean.
    Images (B, 3, H, W), pixels in [0, 1], which it normalises itself, -> features (B, dim).

    Wide ResNets (Zagoruyko & Komodakis 2016, arXiv 1605.07146) are of this kind. With `bottleneck` it is the
    ResNet-50 of Chen et al. 2020 (arXiv 2003.12862): BatchNorm and ReLU follow the first convolution, and
    not the last block.

    The other arguments and the attributes are those of `ResNet`; there may be any number of stages. Raises
    ValueError for depths and widths that are not as many, or not positive. For example `PreActResNet(
    "wrn34_10", *PREACT_ARCHS["wrn34_10"], branches=(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))`.
    """

    def __init__(self, arch, stem_width, depths, widths, bottleneck, branches, mean, std):
        super().__init__()
        _check_stages(depths, widths)
        self.recipe = {"arch": arch, "mean": list(mean), "std": list(std)}
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

        def norm(c):
            return BranchNorm(c, branches) if branches else nn.BatchNorm2d(c)

        self.conv1 = _conv(3, stem_width, 3)
        self.bn1 = norm(stem_width) if bottleneck else None
        self.stages = len(depths)
        c_in = stem_width
        for i, (depth, c) in enumerate(zip(depths, widths), 1):
            blocks = []
            for j in range(depth):
                block = PreActBottleneck if bottleneck else PreActBlock
                blocks.append(block(c_in, c, 2 if i > 1 and j == 0 else 1, norm))
                c_in = 4 * c if bottleneck else c
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.bn = None if bottleneck else norm(c_in)
        self.trunk_dim = blocks[0].conv1.in_channels
        self.dim = c_in
        initialize(self)

    def forward(self, x):
        x = self.trunk(x)
        for module in self.last_stage():
            x = module(x)
        return x.mean((2, 3))

    def trunk(self, x):
        """What comes before the last stage: images (B, 3, H, W) -> (B, trunk_dim, h, w)."""
        if not x.is_floating_point():
            raise ValueError("images are integers: must be floats in [0, 1], as x.float() / 255 is")
        x = (x - self.mean) / self.std
        x = self.conv1(x) if self.bn1 is None else conv_norm(self.conv1, self.bn1, x).relu()
        for i in range(1, self.stages):
            x = getattr(self, f"layer{i}")(x)
        return x

    def last_stage(self):
        """The modules after the trunk, in order; the mean over places follows."""
        last = getattr(self, f"layer{self.stages}")
        return [last] if self.bn is None else [last, self.bn, nn.ReLU()]


STEMS = {"cifar": (3, 1), "imagenet": (7, 2), "small": (3, 2)}
ARCHS = {  # depths, widths, bottleneck, default stem
    "slim": ((1, 1, 1, 1), (16, 32, 64, 128), False, "small"),  # 0.3 M parameters
    "resnet18": ((2, 2, 2, 2), (64, 128, 256, 512), False, "cifar"),
    "resnet34": ((3, 4, 6, 3), (64, 128, 256, 512), False, "cifar"),
    "resnet50": ((3, 4, 6, 3), (64, 128, 256, 512), True, "cifar"),
}
PREACT_ARCHS = {  # width of the first convolution, depths, widths, bottleneck
    "preact_slim": (16, (1, 1, 1, 1), (16, 32, 64, 128), False),  # 0.3 M parameters
    "preact_resnet18": (64, (2, 2, 2, 2), (64, 128, 256, 512), False),
    "preact_resnet50": (64, (3, 4, 6, 3), (64, 128, 256, 512), True),
    "wrn34_10": (16, (5, 5, 5), (160, 320, 640), False),  # 34 layers, ten times as wide
}
