"""The U-Net of GENESIS (Engelcke et al. 2020, arXiv 1907.13052), for images of a fixed size."""
import math

import torch
import torch.nn.functional as F
from torch import nn


class UNet(nn.Module):
    """Images (B, 3, S, S), pixels in [0, 1], which it normalises itself, -> (B, channels, S, S): any real
    numbers, as logits are; a sigmoid or softmax is for the caller.

    k = int(log2 S - 1) blocks (3x3 convolution, GroupNorm of 8, ReLU) down and as many up; the three at
    the bottom have twice `width` channels, those before (none below 32 pixels) `width`; between them an
    MLP. `size` is S, in pixels; `mean` and `std` are of the three channels of pixels: the network sees (x
    - mean) / std. Raises ValueError where the size is below 16 or no multiple of 2^(k - 1), where 8 does
    not divide `width`, and in `forward` for images of another size. For example `UNet(channels=4,
    width=32, size=32)`.
    """

    def __init__(self, channels, width, size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
        super().__init__()
        self.size = size
        k = int(math.log2(max(size, 4)) - 1)
        c = width
        if size < 16 or size % 2 ** (k - 1):
            raise ValueError(f"image size {size} of a U-Net: 16 or more, and a multiple of {2 ** (k - 1)}; "
                             "choose another size (--image-size)")
        if c < 1 or c % 8:
            raise ValueError(f"width {c} of a U-Net: must be a multiple of 8; choose another width "
                             "(--mask-width)")
        side = size // 2 ** (k - 1)  # at the bottom
        down = (k - 3) * [c] + 3 * [2 * c]
        up = 2 * [2 * c] + (k - 2) * [c]
        joined = [below + skip for below, skip in zip([2 * c, *up], reversed(down))]

        def blocks(channels_in, channels_out):
            return nn.ModuleList(
                nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.GroupNorm(8, o), nn.ReLU())
                for i, o in zip(channels_in, channels_out))

        self.down = blocks([3, *down], down)
        self.up = blocks(joined, up)
        flat = 2 * c * side**2
        self.bottom = nn.Sequential(
            nn.Flatten(), nn.Linear(flat, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
            nn.Linear(128, flat), nn.ReLU(), nn.Unflatten(1, (2 * c, side, side)))
        self.head = nn.Conv2d(c, channels, 1)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x):
        if x.shape[2:] != (self.size, self.size):
            raise ValueError(f"images of {x.shape[2]} x {x.shape[3]}: this U-Net is for {self.size} x "
                             f"{self.size} (--image-size {self.size})")
        x = (x - self.mean) / self.std
        skips = []
        for block in self.down:
            x = block(F.interpolate(x, scale_factor=0.5) if skips else x)
            skips.append(x)
        x = self.bottom(x)
        for i, block in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2.0) if i else x
            x = block(torch.cat([x, skips.pop()], 1))
        return self.head(x)
