"""Image encoders: `encoder(x) -> (B, dim)` for images x (B, 3, H, W) in [0, 1]; normalisation is their first
layer.

A BatchNorm may come as several named branches (Xie et al. 2020, arXiv 1911.09665: clean and attacked images
have different statistics, so each gets its own affine and running statistics); `with branch(net, "adv"):`
chooses. `export` writes torchvision's (ResNet) or timm's (ViT) key names, so that no later program needs this
one.
"""
import contextlib
import math
import pathlib
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth

from common import files


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
    """Every BranchNorm of `net` uses branch `name` inside the block. A network without any BatchNorm is left
    alone.

    Raises ValueError where a BranchNorm has no such branch, or where all BatchNorms of `net` are plain ones:
    clean and attacked images would share their statistics, and nothing would show it.
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


STEMS = {"cifar": (3, 1), "imagenet": (7, 2), "small": (3, 2)}
ARCHS = {  # depths, widths, bottleneck, default stem
    "slim": ((1, 1, 1, 1), (16, 32, 64, 128), False, "small"),  # 0.3 M parameters
    "resnet18": ((2, 2, 2, 2), (64, 128, 256, 512), False, "cifar"),
    "resnet34": ((3, 4, 6, 3), (64, 128, 256, 512), False, "cifar"),
    "resnet50": ((3, 4, 6, 3), (64, 128, 256, 512), True, "cifar"),
}


# ----------------------------------------------------------------------------------------------------------
# Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), module names as in timm
# ----------------------------------------------------------------------------------------------------------
def patchify(x, patch):
    """Images (B, C, H, W) -> patches (B, L, C patch^2), row by row; within a patch the order is (row, column,
    channel), channel fastest. Raises ValueError where H or W is no multiple of `patch`."""
    B, C, H, W = x.shape
    if H % patch or W % patch:
        raise ValueError(f"images of {H} x {W}: no multiple of the patch size {patch}; choose another "
                         "--image-size")
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, C * patch * patch)


def unpatchify(patches, patch):
    """The inverse of `patchify`, for a square grid of patches."""
    B, L, D = patches.shape
    g = round(L**0.5)
    x = patches.reshape(B, g, g, patch, patch, D // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, g * patch, g * patch)


def coordinates(height, width, device="cpu", dtype=torch.float64):
    """(row, column) of each patch of a grid: (L, 2), row by row. They are whole, so exact in any `dtype`;
    not every device has float64."""
    rows = torch.arange(height, device=device, dtype=dtype)
    columns = torch.arange(width, device=device, dtype=dtype)
    return torch.cartesian_prod(rows, columns)


def sincos_at(at, dim):
    """Sine-cosine embedding (..., dim) of real coordinates `at` (..., 2), as (row, column), in patches.

    The first half encodes the column, the second the row; each is dim/4 sines, then as many cosines, of
    frequencies 10000^(-i / (dim/4)). Raises ValueError where 4 does not divide `dim`.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions: width {dim} is no multiple of 4")
    frequency = 10000.0 ** (-torch.arange(dim // 4, device=at.device, dtype=at.dtype) / (dim // 4))
    angle = at.flip(-1)[..., None] * frequency  # (..., 2, dim/4)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def sincos_2d(dim, height, width=None):
    """`sincos_at` every patch of a grid: (L, dim) float64, on the CPU."""
    return sincos_at(coordinates(height, width or height), dim)


def relative_index(offsets, alpha=1.9, beta=3.8, gamma=15.2):
    """Real index of an offset in patches, per coordinate: the offset itself up to `alpha`, then growing as a
    logarithm that reaches `beta` at `gamma`, and stays. Rounded it is iRPE's piecewise index (Wu et al. 2021,
    arXiv 2107.14222)."""
    far = offsets.abs().clamp_min(alpha)  # the logarithm of 0 would make the gradient NaN
    index = alpha + (beta - alpha) / math.log(gamma / alpha) * (far / alpha).log()
    return torch.where(offsets.abs() <= alpha, offsets, offsets.sign() * index.clamp_max(beta))


def lookup_weights(offsets, K):
    """Bilinear weights (..., (2K+1)^2) of a table's entries at `offsets` (..., 2) from its centre, clamped to
    [-K, K]. At integers one weight is 1 and the others 0; the derivative there is one-sided. An offset that
    is NaN makes all weights NaN."""
    at = offsets.clamp(-K, K) + K
    low = at.detach().nan_to_num().floor().clamp_max(2 * K - 1)  # no entry has the number NaN
    f = (at - low)[..., None]
    low = F.one_hot(low.long(), 2 * K + 1).to(f)  # (..., 2, 2K+1)
    rows, columns = ((1 - f) * low + f * low.roll(1, -1)).unbind(-2)
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)


def lookup(table, offsets):
    """Bilinear reading (C, ...) of table (C, 2K+1, 2K+1) at real `offsets` (..., 2), as (row, column) in
    table units from its centre, clamped to [-K, K]; differentiable in both."""
    weights = lookup_weights(offsets, table.shape[1] // 2)
    with torch.autocast(table.device.type, enabled=False):  # it is small
        found = table.flatten(1) @ weights.reshape(-1, table[0].numel()).T
    return found.view(len(table), *offsets.shape[:-1])


class Relative(nn.Module):
    """Relative positions r_ij of one attention layer, shared by its heads, in the manner of iRPE: a table of
    d-vectors, read bilinearly at `relative_index` of the offset; one more vector where i or j is the cls
    token. All zero at the start."""

    K = 3

    def __init__(self, d):
        super().__init__()
        side = 2 * self.K + 1
        self.table = nn.Parameter(torch.zeros(d, side, side))
        self.cls = nn.Parameter(torch.zeros(d))

    def forward(self, height, width, shift=0.0, extra=0.0):
        """(1 + L, 1 + L, d). `shift` (2,) is added to every offset between patches, `extra` (d, 7, 7) to the
        table."""
        at = coordinates(height, width, self.table.device, self.table.dtype)
        offsets = relative_index(at[:, None] - at + shift)
        inner = lookup(self.table + extra, offsets).permute(1, 2, 0)
        L = len(at)
        left = self.cls.expand(L, 1, -1)
        top = self.cls.expand(1, 1 + L, -1)
        return torch.cat([top, torch.cat([left, inner], 1)])


def relative_logits(q, r):
    """q_i . r_ij: q (B, heads, T, d), already divided by sqrt(d), and r (T, T, d) -> (B, heads, T, T)."""
    return torch.einsum("bhid,ijd->bhij", q, r)


class Attention(nn.Module):
    def __init__(self, dim, heads, relative):
        super().__init__()
        self.heads = heads
        self.d = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if relative:
            self.relative = Relative(self.d)

    def forward(self, x, bias=None):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, self.d).permute(2, 0, 3, 1, 4)  # (B, heads, T, d)
        mask = None if bias is None else bias(q / self.d**0.5)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class TransformerBlock(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)), the mlp four times as wide. `bias`: None, or a
    function of the queries divided by sqrt(d) that gives logits (B, heads, T, T) to add."""

    def __init__(self, dim, heads, relative=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, relative)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop = 0.0  # see drop_path

    def forward(self, x, bias=None):
        x = x + stochastic_depth(self.attn(self.norm1(x), bias), self.drop, "row", self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop, "row", self.training)


def xavier(net):
    """Start every Linear of `net` Xavier-uniform, with zero bias (MAE, He et al. 2021, arXiv 2111.06377)."""
    for m in net.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)


class ViT(nn.Module):
    """Vision transformer without its classifier. Its features are the mean of the patch tokens.

    size       side of the images that `pos_embed` is for.
    positions  "sincos": fixed at first (`requires_grad_` of the network makes them trainable); images of
               another size get those of their own grid, whatever was trained. "learned": for `size` only.
    relative   every block has relative positions besides (`Relative`); timm's ViT has no place for them.
    fc_norm    the last LayerNorm comes after the mean instead of before it (`renew_norm`).
    """

    def __init__(self, arch, patch, dim, depth, heads, size, mean, std, positions, relative, fc_norm):
        super().__init__()
        if size % patch:
            raise ValueError(f"image size {size}: no multiple of the patch size {patch} of {arch}; choose "
                             "another --image-size")
        if positions not in ("sincos", "learned"):
            raise ValueError(f"positions {positions!r}: choose sincos or learned")
        self.recipe = {"arch": arch, "size": size, "mean": list(mean), "std": list(std),
                       "positions": positions, "relative": relative, "fc_norm": fc_norm}
        self.dim = dim
        self.patch = patch
        self.grid = (size // patch, size // patch)
        self.relative = relative
        self.register_buffer("mean", torch.tensor(mean).repeat(patch**2), persistent=False)  # of a patch
        self.register_buffer("std", torch.tensor(std).repeat(patch**2), persistent=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (size // patch) ** 2, dim), positions == "learned")
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, relative) for _ in range(depth))
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if fc_norm else nn.Identity()
        xavier(self)
        proj = self.patch_embed["proj"]
        nn.init.xavier_uniform_(proj.weight.view(dim, -1))
        nn.init.zeros_(proj.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        if positions == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)
        else:
            with torch.no_grad():
                self.pos_embed.copy_(self.sincos(*self.grid))

    def sincos(self, height, width):
        """(1, 1 + L, dim); zero for the cls token."""
        positions = F.pad(sincos_2d(self.dim, height, width), (0, 0, 1, 0))[None].to(self.pos_embed.dtype)
        return positions.to(self.pos_embed.device, non_blocking=self.pos_embed.is_cuda)

    def normalise(self, patches):
        """Patches (B, n, 3 patch^2) of pixels -> what the network is shown, channel by channel."""
        return (patches - self.mean) / self.std

    def embed(self, patches):
        """Patches (B, n, 3 patch^2) of pixels in [0, 1] -> tokens (B, n, dim), without positions."""
        proj = self.patch_embed["proj"]
        return F.linear(self.normalise(patches), proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias)

    def encode(self, tokens, biases=None):
        """Tokens (B, n, dim) with their positions -> (B, 1 + n, dim) after the last block and norm, the cls
        token first. `biases`: one for each block (`TransformerBlock`)."""
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(tokens.shape[0], -1, -1), tokens], 1)  # tracing would fix len(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, biases[i] if biases else None)
        return self.norm(x)

    def forward(self, x):
        grid = x.shape[2] // self.patch, x.shape[3] // self.patch
        positions = self.pos_embed
        biases = None
        if grid != self.grid:
            if self.recipe["positions"] == "learned":
                side = self.recipe["size"]
                raise ValueError(f"images of {x.shape[2]} x {x.shape[3]}: this encoder's positions were "
                                 f"learned for {side} x {side} (--image-size {side})")
            positions = self.sincos(*grid)
        if self.relative:
            rows = [block.attn.relative(*grid) for block in self.blocks]
            biases = [lambda q, r=r: relative_logits(q, r) for r in rows]
        tokens = self.embed(patchify(x, self.patch)) + positions[:, 1:]
        return self.fc_norm(self.encode(tokens, biases)[:, 1:].mean(1))


class PatchDecoder(nn.Module):
    """The light decoder of a masked autoencoder: `embed` takes the encoder's tokens to its `width`, `forward`
    a whole grid of them, cls first, (B, 1 + L, width), to patches (B, L, 3 patch^2). Sine-cosine positions,
    relative ones besides if the encoder has them."""

    def __init__(self, encoder, width, depth, heads):
        super().__init__()
        self.embed = nn.Linear(encoder.dim, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, encoder.relative) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, 3 * encoder.patch**2)
        xavier(self)
        positions = F.pad(sincos_2d(width, *encoder.grid), (0, 0, 1, 0)).float()  # zero for cls
        self.register_buffer("positions", positions.to(self.pred.weight.device), persistent=False)

    def forward(self, h, biases=None):
        h = h + self.positions
        for i, block in enumerate(self.blocks):
            h = block(h, biases[i] if biases else None)
        return self.pred(self.norm(h))[:, 1:]


def check_masked(arch, image_size, decoder, mask_ratio):
    """ValueError that names the first flag of a masked autoencoder that does not fit: --arch, --image-size
    (a side, in pixels), --decoder (width, blocks, heads) and --mask-ratio (from 0 to 1)."""
    if arch not in VITS:
        raise ValueError(f"--arch {arch}: choose one of {', '.join(VITS)}")
    patch = VITS[arch][0]
    width, _, heads = decoder
    if image_size % patch:
        raise ValueError(f"--image-size {image_size}: no multiple of {arch}'s patch size, {patch}")
    if min(decoder) < 1 or width % 4 or width % heads:
        raise ValueError(f"--decoder {' '.join(map(str, decoder))}: all must be positive, the width a "
                         "multiple of 4 and of the heads")
    patches = (image_size // patch) ** 2
    if not 0 < mask_ratio < 1 or not 1 <= int(patches * (1 - mask_ratio)) < patches:
        raise ValueError(f"--mask-ratio {mask_ratio:g}: of {patches} patches some must stay, some go")


VITS = {  # patch, width, blocks, heads, image size
    "vit_slim": (4, 96, 4, 3, 32),  # 0.5 M parameters
    "vit_tiny": (4, 192, 12, 3, 32),
    "vit_small": (4, 384, 12, 6, 32),
    "vit_base": (16, 768, 12, 12, 224),
    "vit_large": (16, 1024, 24, 16, 224),
}


# ----------------------------------------------------------------------------------------------------------
# Any encoder, by name and for fine-tuning
# ----------------------------------------------------------------------------------------------------------
def make(arch, branches=(), stem=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
         size=None, positions="sincos", relative=False, fc_norm=False):
    """An encoder by name. For a ResNet, `branches`: of its BatchNorm (none: a plain one; a ViT has no
    BatchNorm), and `stem`; for a ViT, `size`, `positions`, `relative` and `fc_norm`, see there. None: the
    default of `arch`. `mean` and `std` of the three channels are of images in [0, 1]. Raises ValueError that
    names what cannot be."""
    numbers = [*mean, *std]
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, numbers)) or min(std) <= 0:
        raise ValueError(f"mean {list(mean)}, std {list(std)}: must be three finite numbers each, those of "
                         "std positive")
    if arch in VITS:
        *shape, default = VITS[arch]
        return ViT(arch, *shape, size or default, mean, std, positions, relative, fc_norm)
    if arch not in ARCHS:
        raise ValueError(f"arch {arch!r}: choose one of {', '.join([*ARCHS, *VITS])}")
    depths, widths, bottleneck, default = ARCHS[arch]
    return ResNet(arch, depths, widths, bottleneck, stem or default, tuple(branches), mean, std)

def resnet18(**options):
    return make("resnet18", **options)


def resnet34(**options):
    return make("resnet34", **options)


def resnet50(**options):
    return make("resnet50", **options)


def stages(encoder):
    """Names of the encoder's parts by depth: what precedes the blocks, then each block; lists of names."""
    blocks = [name for name, m in encoder.named_modules() if isinstance(m, (Block, TransformerBlock))]
    return [["conv1", "bn1", "cls_token", "pos_embed", "patch_embed"], *([name] for name in blocks)]


def drop_path(encoder, rate):
    """In train mode, skip the residual branches of single images (stochastic depth, Huang et al. 2016, arXiv
    1603.09382): never in the first block, with probability `rate` in the last, linear between."""
    blocks = [m for m in encoder.modules() if isinstance(m, (Block, TransformerBlock))]
    for i, block in enumerate(blocks):
        block.drop = rate * i / max(1, len(blocks) - 1)


def renew_norm(encoder):
    """Drop a ViT's last LayerNorm, and put a new one after the mean of its tokens, as MAE's fine-tuning does.
    Other encoders have none, and stay."""
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
    branch                  the BN branch that `state` holds (None without branches)
    state                   torchvision's keys: of a `resnet18()` whose `fc` is `nn.Identity()`; its first
                            convolution differs where `stem` is not "imagenet". Or timm's:
                            `VisionTransformer(..., num_classes=0, global_pool="avg", fc_norm=False)`
    others                  {branch: its BatchNorm tensors}, the branches not chosen

    Raises ValueError, and writes nothing, for a network that `make` did not build, a branch that it lacks, or
    a parameter or buffer that is not finite.
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


FORMAT = "exported encoder, version 1"


def load_encoder(path, branch=None, all_branches=False):
    """The exported encoder at `path`, in eval mode, with plain BatchNorm; `branch` None is the exported
    choice. `all_branches`: with all of them instead, that one in use.

    Its attribute `branch` names the one loaded, `image_size` the side of the images it was pretrained on, in
    pixels (None where the file does not say). Raises FileNotFoundError, or ValueError that names what is
    wrong: not such a file, an unknown branch, or the first missing, unexpected or misshaped tensor, or one
    that is not finite.
    """
    hint = "pretraining writes encoder.pt when it ends"
    saved = read(path, FORMAT, hint)
    for key in ("arch", "branch", "state", "others"):
        if key not in saved:
            raise ValueError(f"{path}: {key!r} is missing; {hint}")
    parts = {saved["branch"]: saved["state"], **saved["others"]}
    branch = branch or saved["branch"]
    if branch not in parts:
        raise ValueError(f"{path}: no BN branch {branch!r}; it has {', '.join(map(str, parts))}")
    state = {**saved["state"], **parts[branch]}
    keep = all_branches and len(parts) > 1
    for key in next(iter(saved["others"].values())) if keep else ():  # each tensor of a BatchNorm
        before, leaf = key.rsplit(".", 1)
        del state[key]
        state |= {f"{before}.branches.{name}.{leaf}": part[key] for name, part in parts.items()}
    try:
        encoder = rebuild(saved, branches=sorted(parts, key=lambda name: name != branch) if keep else ())
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    load_strict(encoder, state, path)
    encoder.branch = branch
    encoder.image_size = saved.get("image_size")
    return encoder.eval()


def one_branch(state, branch):
    """The state dict of a network with branches -> that of the like with plain BatchNorm, `branch` chosen."""
    return {k.replace(f".branches.{branch}.", "."): v for k, v in state.items()
            if ".branches." not in k or f".branches.{branch}." in k}


RECIPE = ("arch", "stem", "mean", "std", "size", "positions", "relative", "fc_norm")


def rebuild(saved, branches=()):
    """The encoder that the dict `saved` describes, with random weights."""
    return make(branches=branches, **{k: saved[k] for k in RECIPE if k in saved})


def read(path, kind, hint):
    """The dict saved at `path` of format `kind`. Raises FileNotFoundError, or ValueError that names the file,
    what it is instead or which of its tensors is not finite, and gives `hint`."""
    if pathlib.Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; {hint}")
    try:
        saved = files.load(path)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e}; {hint}") from None
    except ValueError as e:
        raise ValueError(f"{e}; {hint}") from None
    if not isinstance(saved, dict) or saved.get("format") != kind:
        raise ValueError(f"{path}: not an {kind} but {_what(saved)}; {hint}")
    bad = files.not_finite(saved)
    if bad:
        raise ValueError(f"{path}: {bad} is not finite; {hint}")
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
    """`net.load_state_dict(state)`; a missing, unexpected or misshaped tensor, or one that is not finite, is
    a ValueError naming it and the file, `path`. Nothing is loaded then."""
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
    net.load_state_dict(state)
