"""Vision transformers (Dosovitskiy et al. 2021, arXiv 2010.11929) for images in patches, and the light
decoder of masked autoencoders. Module names are timm's. The file stands alone.
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth


def patchify(x, patch):
    """Images (B, C, H, W) -> patches (B, L, C patch^2), row by row; within a patch the order is (row,
    column, channel), channel fastest. Raises ValueError where H or W is no multiple of `patch`."""
    B, C, H, W = x.shape
    if H % patch or W % patch:
        raise ValueError(f"images of {H} x {W}: no multiple of the patch size {patch}; choose another "
                         "size (--image-size)")
    x = x.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, C * patch * patch)


def unpatchify(patches, patch, grid=None):
    """The inverse of `patchify`: patches (B, L, C patch^2) -> images (B, C, H, W) of a `grid` of (H / patch,
    W / patch) patches; None: as many rows as columns, which of an oblong image's patches makes another
    image. Raises ValueError where L patches are no such grid."""
    B, L, D = patches.shape
    rows, columns = grid or (round(L**0.5), round(L**0.5))
    if rows * columns != L:
        wanted = "a square" if grid is None else f"{rows} x {columns}"
        raise ValueError(f"{L} patches: they are not {wanted}; give `grid`, their rows and columns")
    x = patches.reshape(B, rows, columns, patch, patch, D // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * patch, columns * patch)


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


class Relative(nn.Module):
    """Relative positions r_ij of one attention layer, shared by its heads, in the manner of iRPE (Wu et
    al. 2021, arXiv 2107.14222): a table of d-vectors, 7 x 7 of them, for the offset between two patches,
    and one more vector where one of the two is the cls token. All zero at the start. How an offset reads
    the table is the method's."""

    SIDE = 7

    def __init__(self, d):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(d, self.SIDE, self.SIDE))
        self.cls = nn.Parameter(torch.zeros(d))

    def read(self, weights, table=None):
        """r_ij of L patches and the cls token before them, (1 + L, 1 + L, d), from weights (L, L, 49) of
        the entries for each pair; of another `table` (d, 7, 7) if one is given."""
        table = self.table if table is None else table
        L = len(weights)
        with torch.autocast(table.device.type, enabled=False):  # it is small
            inner = table.flatten(1) @ weights.flatten(0, 1).T
        return self.with_cls(inner.view(-1, L, L).permute(1, 2, 0))

    def with_cls(self, inner):
        """r_ij between patches, inner (L, L, d) -> those with the cls token before them: (1 + L, 1 + L,
        d)."""
        L = len(inner)
        left = self.cls.expand(L, 1, -1)
        top = self.cls.expand(1, 1 + L, -1)
        return torch.cat([top, torch.cat([left, inner], 1)])


def relative_logits(q, r):
    """q_i . r_ij: q (B, heads, T, d), already divided by sqrt(d), and r (T, T, d) -> (B, heads, T, T)."""
    return torch.einsum("bhid,ijd->bhij", q, r)


def relative_bias(r):
    """For r_ij, r (T, T, d): the `bias` of a TransformerBlock."""

    def bias(q):
        return relative_logits(q, r)

    return bias


class Attention(nn.Module):
    """Self-attention of `heads` heads over tokens (B, T, dim); names of weights are timm's. `bias`: as of a
    TransformerBlock. `relative`: it has a `Relative`, for whoever makes that bias. Raises ValueError where
    `dim` is no positive multiple of `heads`."""

    def __init__(self, dim, heads, relative):
        super().__init__()
        if min(dim, heads) < 1 or dim % heads:
            raise ValueError(f"width {dim} of a transformer: must be a positive multiple of its {heads} "
                             "heads")
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
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)), the mlp four times as wide. `bias`: None,
    or a function of the queries divided by sqrt(d) that gives logits (B, heads, T, T) to add."""

    def __init__(self, dim, heads, relative=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, relative)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop = 0.0  # the probability that, in train mode, an image skips the attention; likewise the mlp

    def forward(self, x, bias=None):
        x = x + stochastic_depth(self.attn(self.norm1(x), bias), self.drop, "row", self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop, "row", self.training)


def xavier(net):
    """Start every Linear of `net` Xavier-uniform, with zero bias (MAE, He et al. 2021, arXiv
    2111.06377)."""
    for m in net.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)


class ViT(nn.Module):
    """Vision transformer without its classifier: images (B, 3, H, W), pixels in [0, 1], which it normalises
    itself, -> features (B, dim), the mean of the patch tokens.

    arch       its name, kept in `recipe` with what else is needed to build it again.
    patch      side of a patch, in pixels; H and W are multiples of it.
    dim        length of a token, and of the features: a multiple of heads, and of 4 for "sincos".
    depth      number of blocks.
    heads      of the attention of each block.
    size       side of the images that `pos_embed` is for.
    mean, std  of the three channels of pixels: the network sees (x - mean) / std.
    positions  "sincos": fixed at first (`requires_grad_` of the network makes them trainable); images of
               another size get those of their own grid, whatever was trained. "learned": for `size` only.
    relative   every block has relative positions besides (`Relative`); timm's ViT has no place for them. The
               buffer `offset_weights` (15, 7) says how an offset of -7, ..., 7 patches along one
               coordinate reads the 7 entries of the table along that coordinate; the method fills it in.
    fc_norm    the last LayerNorm comes after the mean instead of before it, as in MAE's fine-tuning.

    Raises ValueError for what does not fit, and in `forward` for images whose side is no multiple of `patch`
    or, with learned positions, not `size`. For example `ViT("vit_tiny", *VITS["vit_tiny"], mean=(0.5, 0.5,
    0.5), std=(0.25, 0.25, 0.25), positions="sincos", relative=False, fc_norm=False)`.
    """

    def __init__(self, arch, patch, dim, depth, heads, size, mean, std, positions, relative, fc_norm):
        super().__init__()
        if size % patch:
            raise ValueError(f"image size {size}: no multiple of the patch size {patch} of {arch}; choose "
                             "another size (--image-size)")
        if positions not in ("sincos", "learned"):
            raise ValueError(f"positions {positions!r}: choose sincos or learned")
        self.recipe = {"arch": arch, "size": size, "mean": list(mean), "std": list(std),
                       "positions": positions, "relative": relative, "fc_norm": fc_norm}
        self.dim = dim
        self.patch = patch
        self.grid = (size // patch, size // patch)
        self.relative = relative
        if relative:
            self.register_buffer("offset_weights", torch.zeros(15, Relative.SIDE))
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
        """(1, 1 + L, dim); zero for the cls token. On CUDA they are made there: a copy from the host is
        nothing that a CUDA graph could record."""
        device = self.pos_embed.device if self.pos_embed.is_cuda else "cpu"
        positions = sincos_at(coordinates(height, width, device), self.dim)
        return F.pad(positions, (0, 0, 1, 0))[None].to(self.pos_embed)

    def pair_weights(self, height, width):
        """The weights with which each pair of patches of a grid reads a table of relative positions: (L,
        L, 49). Offsets beyond 7 count as 7."""
        reach = len(self.offset_weights) // 2
        at = coordinates(height, width, self.offset_weights.device, torch.long)
        offsets = (at[:, None] - at).clamp(-reach, reach) + reach  # (L, L, 2)
        rows, columns = self.offset_weights[offsets].unbind(2)  # (L, L, 7) each
        return (rows[..., :, None] * columns[..., None, :]).flatten(-2)

    def normalise(self, patches):
        """Patches (B, n, 3 patch^2) of pixels -> what the network is shown, channel by channel."""
        return (patches - self.mean) / self.std

    def embed(self, patches):
        """Patches (B, n, 3 patch^2) of pixels in [0, 1] -> tokens (B, n, dim), without positions."""
        if not patches.is_floating_point():
            raise ValueError("images are integers: must be floats in [0, 1], as x.float() / 255 is")
        proj = self.patch_embed["proj"]
        return F.linear(self.normalise(patches), proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias)

    def encode(self, tokens, biases=None):
        """Tokens (B, n, dim) with their positions -> (B, 1 + n, dim) after the last block and norm, the
        cls token first. `biases`: one for each block (`TransformerBlock`)."""
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
            weights = self.pair_weights(*grid)
            biases = [relative_bias(block.attn.relative.read(weights)) for block in self.blocks]
        tokens = self.embed(patchify(x, self.patch)) + positions[:, 1:]
        return self.fc_norm(self.encode(tokens, biases)[:, 1:].mean(1))


class PatchDecoder(nn.Module):
    """The light decoder of a masked autoencoder: `embed` takes the encoder's tokens to its `width`,
    `forward` a whole grid of them, cls first, (B, 1 + L, width), to patches (B, L, 3 patch^2).
    Sine-cosine positions, relative ones besides if the encoder (a `ViT`) has them. `depth` blocks of `heads`
    heads. Raises ValueError for a width that is no multiple of 4 and of `heads`, and in `forward` for
    another grid than that of the encoder's `size`."""

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
        if h.shape[1] != len(self.positions):
            raise ValueError(f"{h.shape[1]} tokens: this decoder is for {len(self.positions)}, the cls token "
                             "and the patches of images of the encoder's size")
        h = h + self.positions
        for i, block in enumerate(self.blocks):
            h = block(h, biases[i] if biases else None)
        return self.pred(self.norm(h))[:, 1:]


def check_masked(arch, image_size, decoder, mask_ratio):
    """ValueError that names the first flag of a masked autoencoder that does not fit: --arch,
    --image-size (a side, in pixels), --decoder (width, blocks, heads) and --mask-ratio (from 0 to 1)."""
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
        raise ValueError(f"--mask-ratio {mask_ratio:g}: of {patches} patches (--image-size {image_size}) "
                         "some must stay, some go")


VITS = {  # patch, width, blocks, heads, image size
    "vit_slim": (4, 96, 4, 3, 32),  # 0.5 M parameters
    "vit_tiny": (4, 192, 12, 3, 32),
    "vit_small": (4, 384, 12, 6, 32),
    "vit_base": (16, 768, 12, 12, 224),
    "vit_large": (16, 1024, 24, 16, 224),
}


def check_crops(encoder, sides):
    """ValueError where `encoder` is a ViT that crops of these `sides`, in pixels, do not fit; before
    anything is trained."""
    patch = getattr(encoder, "patch", 1)
    for side in sides:
        if side % patch:
            raise ValueError(f"--multi-crop: crops of {side} x {side} pixels are no multiple of the patch "
                             f"size {patch}; choose another --image-size, or leave --multi-crop out")
