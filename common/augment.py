"""Augmentation of whole batches on their device, one parameter per image.

Images are x (B, 3, H, W). Each augmentation comes as a pair: the function of its parameters, equal to its
torchvision counterpart, and `random_...`, which draws them as torchvision does from `rng`: an object whose
`uniform(*shape)` gives (B, *shape) numbers in [0, 1), as `common.data.Rng`.

Parameters of the images, tensors (B,), are to lie on the CPU: a thousand numbers per step cost nothing
there, and which image gets what is known without waiting for the device. Images are floats in [0, 1], of
float32 (or float64, whose parameters are float32 all the same), under autocast too; only crops, `resize` and
`to_float` take uint8 as well, being where a view begins. Others are refused, but by `flip`, which takes any
dtype, and `to_float`, which takes any floats. Whether floats lie in [0, 1] is not checked: jitter would clip
them to it. No function changes its argument, but where nothing is to be done it may be the argument
itself that comes back: clone it before you write into it. The file stands alone.
"""
import contextlib
import math

import torch
import torch.nn.functional as F


def to_float(x):
    """uint8 (0 to 255) -> float32 in [0, 1]; floats, which are in [0, 1] already, stay as they are.

    Raises ValueError for other dtypes.
    """
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not x.is_floating_point():
        raise ValueError(f"images are {x.dtype}: they must be uint8 (0 to 255), or floats in [0, 1]")
    return x


def _check_floats(x, function):
    if x.dtype not in (torch.float32, torch.float64):
        advice = ", as to_float gives" if not x.is_floating_point() else ": x.float()"
        raise ValueError(f"{function}: images are {x.dtype}; it takes float32 in [0, 1]{advice}")


def _unrounded(x):
    """Autocast off on the device of x: it would round matrix products of pixels."""
    if not torch.amp.is_autocast_available(x.device.type):  # as for "meta"
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def resized_crop(x, top, left, height, width, size, flip=None, filter="bilinear"):
    """Cut the box of each image and resize it to (size, size): torchvision's `resized_crop`, antialiased.

    x (B, 3, H, W) floats in [0, 1] or uint8 -> float in [0, 1]; top, left, height, width (B,) and size in
    pixels; flip (B,) bool mirrors the result; filter "bilinear" or "bicubic" (which overshoots, and is
    clipped). Resizing is linear and separable, so it is two batched matrix products; a crop and a mirror
    are only other rows in those matrices. Raises ValueError for other dtypes or filters, where size is below
    1, and where a box is empty or leaves its image.
    """
    if x.is_floating_point():
        _check_floats(x, "resized_crop")
    if filter not in FILTERS:
        raise ValueError(f"filter {filter!r}: choose one of {', '.join(FILTERS)}")
    if size < 1:
        raise ValueError(f"size {size}: a crop has at least one pixel; give a larger size (--image-size)")
    B, C, H, W = x.shape
    bottom = top + height
    right = left + width
    if not ((top >= 0) & (left >= 0) & (bottom > top) & (right > left) & (bottom <= H) & (right <= W)).all():
        raise ValueError(f"resized_crop: boxes must lie within the images, {H} x {W}, and not be empty")
    if flip is None:
        flip = torch.zeros(B)
    top, left, height, width, flip = on_device(x.device, top, left, height, width, flip)
    x = to_float(x.permute(0, 2, 1, 3).contiguous())  # (B, H, C, W): both products find their axis in place
    rows = _resize_matrix(FILTERS[filter], top, height, H, size).to(x.dtype)
    columns = _resize_matrix(FILTERS[filter], left, width, W, size, flip).to(x.dtype)
    with _unrounded(x):
        x = (x.view(B, H * C, W) @ columns.transpose(1, 2)).view(B, H, C * size)
        x = (rows @ x).view(B, size, C, size).permute(0, 2, 1, 3).contiguous()
    return x.clamp_(0, 1) if filter == "bicubic" else x


def _cubic(t):
    """Keys' cubic with a = -1/2 (1981) of distances t >= 0, as in PIL."""
    near = ((1.5 * t - 2.5) * t * t).add_(1)
    far = (((2.5 - 0.5 * t) * t - 4) * t).add_(2)
    return torch.where(t < 1, near, torch.where(t < 2, far, 0.0))


FILTERS = {"bilinear": lambda t: t.neg().add_(1).clamp_min_(0), "bicubic": _cubic}


def _resize_matrix(filter, start, length, n_in, n_out, flip=None):
    """(B, n_out, n_in): the filter that resizes [start, start + length) of n_in samples to n_out; where
    `flip` (B,) is 1, the other way round."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / n_out
    out = torch.arange(0.5, n_out, device=start.device)[:, None]  # the centres of what comes out
    if flip is not None:
        out = out + flip[:, None, None] * (n_out - 2 * out)
    center = start + out * scale
    tap = torch.arange(0.5, n_in, device=start.device)
    w = filter((tap - center).abs_().div_(scale.clamp_min(1)))
    w *= (tap > start) & (tap < start + length)
    return w.div_(w.sum(2, keepdim=True))


def resize(x, size):
    """Images x (B, 3, H, W), floats in [0, 1] or uint8, as floats in [0, 1] of side `size` pixels; of that
    side already, their pixels do not change. Raises ValueError for other dtypes."""
    if x.is_floating_point():
        _check_floats(x, "resize")
    if x.shape[2:] == (size, size):
        return to_float(x)
    zero = torch.zeros(len(x))
    one = torch.ones(len(x))
    return resized_crop(x, zero, zero, one * x.shape[2], one * x.shape[3], size)


def random_resized_crop(x, rng, size, scale, ratio=(3 / 4, 4 / 3), flip=0.0, filter="bilinear"):
    """torchvision's `RandomResizedCrop`, then `RandomHorizontalFlip(flip)` in the same products.

    x (B, 3, H, W) floats in [0, 1] or uint8 -> float in [0, 1] of side `size` pixels; scale: the range of
    the crop's share of the area; ratio: that of width / height; flip: a probability. Errors:
    `resized_crop`'s.
    """
    u = rng.uniform(4, 10)  # ten attempts each, as in torchvision
    p = rng.uniform(1)[:, 0]
    top, left, height, width = _crop_boxes(u, x.shape[2], x.shape[3], scale, ratio)
    return resized_crop(x, top, left, height, width, size, p < flip, filter)


def _crop_boxes(u, H, W, scale, ratio):
    """top, left, height, width (B,) from u (B, 4, 10): the first of ten that fits, else the central one."""
    area = H * W * (scale[0] + (scale[1] - scale[0]) * u[:, 0])
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[:, 1])
    width = (area * aspect).sqrt().round()
    height = (area / aspect).sqrt().round()
    fits = (width > 0) & (width <= W) & (height > 0) & (height <= H)
    first = fits.int().argmax(1, keepdim=True)
    width, height, u_top, u_left = [v.gather(1, first)[:, 0] for v in (width, height, u[:, 2], u[:, 3])]
    whole_w = min(W, round(H * ratio[1]))
    whole_h = min(H, round(W / ratio[0]))
    none = ~fits.any(1)
    width = width.masked_fill(none, whole_w)
    height = height.masked_fill(none, whole_h)
    top = (u_top * (H - height + 1)).floor()
    left = (u_left * (W - width + 1)).floor()
    top = top.masked_fill(none, (H - whole_h) // 2)
    left = left.masked_fill(none, (W - whole_w) // 2)
    return top, left, height, width


def color_jitter(x, brightness, contrast, saturation, hue, order, rows=None):
    """torchvision's `ColorJitter` of x (B, 3, H, W), floats in [0, 1], with given factors (B,), not negative,
    1 for none, and hue (B,) in turns, 0 for none. They are applied in `order` (B, 4): each row a permutation
    of 0 brightness, 1 contrast, 2 saturation, 3 hue. With `rows` (n,), distinct indices on the CPU, only
    these images are changed, and the other arguments are theirs, (n,) and (n, 4). Raises ValueError for
    other dtypes."""
    _check_floats(x, "color_jitter")
    every = rows is None
    if every:
        rows = torch.arange(len(x))
    if not len(rows):
        return x
    place, by_place = (order == 3).int().argmax(1).sort()  # images whose hue comes first, second, ...: slices
    ends = [0, *place.bincount(minlength=4).cumsum(0).tolist()]
    blends = order[order != 3].view(-1, 3)[by_place].T
    brightness = brightness.float()[by_place]
    contrast = contrast.float()[by_place]
    saturation = saturation.float()[by_place]
    factor = torch.where(blends == 0, brightness, torch.where(blends == 1, contrast, saturation))  # (3, n)
    to_mean = (1 - factor) * (blends == 1)
    to_grey = (1 - factor) * (blends == 2)
    index, hue, *columns = on_device(x.device, rows[by_place], hue[by_place], *factor, *to_mean, *to_grey)
    index = index.long()
    some = x[index]
    for i in range(4):
        hued = slice(ends[i], ends[i + 1])
        if ends[i] < ends[i + 1]:
            some[hued] = _turned(some[hued], hue[hued])
        if i < 3:  # the others blend with black, with the mean grey, with the grey image
            f, to_mean, to_grey = [v.view(-1, 1, 1, 1) for v in columns[i::3]]
            grey = _grey(some)
            base = torch.addcmul(to_mean * grey.mean((2, 3), keepdim=True), grey, to_grey)
            some = torch.addcmul(base, some, f).clamp_(0, 1)
    x = torch.empty_like(x) if every else x.clone()
    x[index] = some
    return x


def adjust_hue(x, turn):
    """Rotate the hue of x (B, 3, H, W), floats in [0, 1], by `turn` (B,) in turns (1 is the whole circle):
    torchvision's `adjust_hue`, for any number of turns. Raises ValueError for other dtypes.

    HSV's own definition, read backwards: with V the maximum, C the range and d the distance, in turns
    around the colour circle, to the hue that lacks this channel (3/6 for red, 5/6 for green, 7/6 for blue),
    each channel is V minus C clamp(2 - 6d, 0, 1). V and C do not change.
    """
    _check_floats(x, "adjust_hue")
    (turn,) = on_device(x.device, turn)
    return _turned(x, turn)


def _turned(x, turn):
    """`adjust_hue` with `turn` on the device of x."""
    r, g, b = x.unbind(1)
    v = x.amax(1)
    c = v - x.amin(1)
    h = torch.where(v == r, g - b, torch.where(v == g, (b - r).add_(c, alpha=2), (r - g).add_(c, alpha=4)))
    h = h.div_(c.clamp_min(1e-12).mul_(6)).add_(turn[:, None, None])
    d = h[:, None] - torch.arange(3, 8, 2, device=x.device).view(3, 1, 1) / 6
    d = d.sub_(d.round()).abs_()
    return torch.addcmul(v[:, None], d.mul_(6).sub_(2).clamp_(-1, 0), c[:, None])


def random_color_jitter(x, rng, brightness, contrast, saturation, hue, p=1.0):
    """torchvision's `RandomApply([ColorJitter(...)], p)`; the order of the four is random too, as there.

    x (B, 3, H, W) floats in [0, 1]. The factors go from 1 - brightness, or from 0 if that is negative, to
    1 + brightness, and so on; the hue from -hue to hue, in turns. Raises ValueError for other dtypes, a
    strength that is negative, and a hue that is not from 0 to 0.5.
    """
    _check_floats(x, "random_color_jitter")
    for name, strength in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
        if not 0 <= strength < math.inf:
            raise ValueError(f"{name} {strength}: must be finite, and not negative")
    if not 0 <= hue <= 0.5:
        raise ValueError(f"hue {hue}: must be from 0 to 0.5, half a turn either way")
    u = rng.uniform(5)
    order = rng.uniform(4).argsort(1)
    rows = (u[:, 4] < p).nonzero()[:, 0]
    u, order = 2 * u[rows] - 1, order[rows]
    factors = [_factor(strength, u[:, i]) for i, strength in enumerate((brightness, contrast, saturation))]
    return color_jitter(x, *factors, hue * u[:, 3], order, rows)


def _factor(strength, u):
    """Uniform in [max(0, 1 - strength), 1 + strength], from u (n,) uniform in [-1, 1)."""
    if strength > 1:
        return (1 + strength) * (1 + u) / 2
    return 1 + strength * u


def grayscale(x, where):
    """torchvision's `rgb_to_grayscale`, three channels out, for the images `where` (B,) bool says.

    x (B, 3, H, W) floats in [0, 1]; raises ValueError for other dtypes.
    """
    _check_floats(x, "grayscale")
    rows = where.nonzero()[:, 0]
    if not len(rows):
        return x
    (rows,) = on_device(x.device, rows)
    rows = rows.long()
    x = x.clone()
    x[rows] = _grey(x[rows])
    return x


def random_grayscale(x, rng, p):
    """torchvision's `RandomGrayscale(p)` of x (B, 3, H, W), floats in [0, 1]. Raises ValueError for
    other dtypes."""
    return grayscale(x, rng.uniform(1)[:, 0] < p)


def gaussian_blur(x, sigma, kernel_size):
    """torchvision's `gaussian_blur` (reflected edges) of x (B, 3, H, W), floats in [0, 1], with a sigma
    (B,) in pixels for each image; 0 leaves an image as it is. kernel_size is in pixels too.

    Like resizing, two batched matrix products: row i of the matrix holds the kernel around i, folded at the
    edges. Raises ValueError for other dtypes, for a kernel size that is not odd, and where
    kernel_size // 2 is not below H and W.
    """
    _check_floats(x, "gaussian_blur")
    B, C, H, W = x.shape
    radius = kernel_size // 2
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel size {kernel_size}: must be odd and positive")
    if radius >= min(H, W):
        raise ValueError(f"kernel size {kernel_size}: images to blur are {H} x {W}, and their sides must be "
                         f"at least {radius + 1}; give larger images (--image-size)")
    rows = sigma.nonzero()[:, 0]
    if not len(rows):
        return x
    rows, width = on_device(x.device, rows, sigma[rows])
    rows = rows.long()
    width = width[:, None]
    tap = torch.arange(-radius, radius + 1, device=x.device)[:, None]
    kernel = torch.softmax(-0.5 * (tap.T / width) ** 2, 1)  # (b, kernel)

    def matrix(n):
        source = (torch.arange(n, device=x.device) + tap).abs()  # (kernel, n)
        source = torch.where(source >= n, 2 * (n - 1) - source, source)
        return (kernel @ F.one_hot(source, n).flatten(1).float()).view(-1, n, n).to(x.dtype)

    def blur(x):
        x = x.permute(0, 2, 1, 3).reshape(-1, H * C, W) @ matrix(W).transpose(1, 2)
        return (matrix(H) @ x.view(-1, H, C * W)).view(-1, H, C, W).permute(0, 2, 1, 3)

    x = x.clone()
    with _unrounded(x):
        x[rows] = blur(x[rows])
    return x


def random_gaussian_blur(x, rng, sigma, p, kernel_size):
    """torchvision's `RandomApply([GaussianBlur(kernel_size, sigma)], p)`.

    x (B, 3, H, W) floats in [0, 1]; sigma (from, to) and kernel_size in pixels. Errors: `gaussian_blur`'s.
    """
    u = rng.uniform(2)
    drawn = sigma[0] + (sigma[1] - sigma[0]) * u[:, 0]
    return gaussian_blur(x, torch.where(u[:, 1] < p, drawn, 0.0), kernel_size)


def solarize(x, where, threshold=0.5):
    """torchvision's `solarize` (invert from the threshold up) for the images `where` (B,) bool says.

    x (B, 3, H, W) floats in [0, 1], and so is the threshold; raises ValueError for other dtypes.
    """
    _check_floats(x, "solarize")
    (where,) = on_device(x.device, where)
    return torch.where((where.view(-1, 1, 1, 1) > 0) & (x >= threshold), 1 - x, x)


def random_solarize(x, rng, p, threshold=0.5):
    """torchvision's `RandomSolarize(threshold, p)` of x (B, 3, H, W), floats in [0, 1], as is the
    threshold; raises ValueError for other dtypes."""
    return solarize(x, rng.uniform(1)[:, 0] < p, threshold)


def flip(x, where):
    """torchvision's `hflip` for the images `where` (B,) bool says; x (B, 3, H, W) of any dtype."""
    (where,) = on_device(x.device, where)
    return torch.where(where.view(-1, 1, 1, 1) > 0, x.flip(3), x)


def random_flip(x, rng, p=0.5):
    """torchvision's `RandomHorizontalFlip(p)` of x (B, 3, H, W) of any dtype."""
    return flip(x, rng.uniform(1)[:, 0] < p)


def pad_crop(x, top, left, padding, mode="constant"):
    """Pad all sides as torchvision's `pad` does (constant 0, or reflect), cut (H, W) at top, left (B,).

    x (B, 3, H, W) floats in [0, 1] or uint8 -> float in [0, 1]; padding, top and left in pixels. Raises
    ValueError for other dtypes, where there is not enough to reflect (both sides must be above `padding`), and
    for a top or left beyond 2 `padding`.
    """
    if x.is_floating_point():
        _check_floats(x, "pad_crop")
    B, C, H, W = x.shape
    if mode == "reflect" and padding >= min(H, W):
        raise ValueError(f"padding {padding} by reflection: images are {H} x {W}, and their sides must be at "
                         f"least {padding + 1}; give larger images (--image-size)")
    if not ((top >= 0) & (left >= 0) & (top <= 2 * padding) & (left <= 2 * padding)).all():
        raise ValueError(f"pad_crop: top and left must be from 0 to {2 * padding}, twice the padding")
    padded = F.pad(to_float(x), [padding] * 4, mode=mode)
    top, left = on_device(x.device, top, left)
    rows = top.long()[:, None] + torch.arange(H, device=x.device)
    columns = left.long()[:, None] + torch.arange(W, device=x.device)
    image = torch.arange(B, device=x.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_pad_crop(x, rng, padding, mode="constant"):
    """torchvision's `RandomCrop(side, padding, padding_mode=mode)`; padding in pixels.

    x (B, 3, H, W) floats in [0, 1] or uint8 -> float in [0, 1]. Errors: `pad_crop`'s.
    """
    top, left = (rng.uniform(2) * (2 * padding + 1)).floor().unbind(1)
    return pad_crop(x, top, left, padding, mode)


def _grey(x):
    r, g, b = x.unbind(1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]


def on_device(device, *columns):
    """Numbers of the images, tensors (B,) on the CPU, as float32 (B,) on `device`: all in one copy, for which
    the host does not wait. (Whole numbers below 2^24 stay exact.)"""
    columns = torch.stack([v.float() for v in columns])
    if torch.device(device).type == "cuda":
        columns = columns.pin_memory()
    return columns.to(device, non_blocking=True).unbind(0)
