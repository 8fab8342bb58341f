"""Pictures for people: rows of images, enlarged, each with its name, and a key to the colours of
differences."""
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from common import files

MARGIN = 6  # pixels between a name and its row
LINE = 16  # height of a line of text


def difference(x_adv, x, full_scale=None):
    """What was added to images x (N, 3, H, W), to be looked at: grey where nothing was, white where
    `full_scale` was added, black where it was taken away. None: the largest change of a pixel."""
    if full_scale is None:
        full_scale = (x_adv - x).abs().max()
    return 0.5 + (x_adv - x) / (2 * max(full_scale, 1e-8))


def attack_key(norm, eps):
    """The `key` of `save_rows` where a `difference` shows an attack: under linf `eps`, in 1/255, is its
    full scale, and under another norm the largest change of a pixel."""
    if norm == "linf":
        return f"-{eps:g}/255", f"+{eps:g}/255"
    return "largest decrease", "largest increase"


def save_rows(path, rows, key=None, enlarge=4):
    """Write `rows`, a list of (name, images), to the PNG file `path`, whole or not at all.

    images   (N, 3, H, W) floats in [0, 1], on any device; every row may have another N. What
             lies outside is cut.
    key      (text at black, text at white) below the rows: what the colours of a `difference` mean.
    enlarge  every pixel becomes so many squared.
    """
    font = ImageFont.load_default()
    strips = [(name, _strip(images, enlarge)) for name, images in rows]
    texts = [name for name, _ in strips]
    left = 2 * MARGIN + max(round(font.getlength(text)) for text in texts)
    width = left + max(strip.width for _, strip in strips)
    if key:
        width = max(width, left + 260)
    height = sum(strip.height for _, strip in strips) + (LINE + 2 * MARGIN if key else 0)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    top = 0
    for name, strip in strips:
        draw.text((MARGIN, top + strip.height // 2 - LINE // 2), name, fill="black", font=font)
        picture.paste(strip, (left, top))
        top += strip.height
    if key:
        _draw_key(picture, draw, font, left, top + MARGIN, key)
    with files.replacing(path) as temporary:
        picture.save(temporary, format="png")


def _strip(images, enlarge):
    """Images (N, 3, H, W) side by side, enlarged, two white pixels between them: a PIL image."""
    images = (255 * images.detach().float().cpu().clamp(0, 1)).round().to(torch.uint8)
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    images = F.pad(images, (0, 2, 0, 2), value=255)
    return to_pil_image(torch.cat(list(images), dim=2))


def _draw_key(picture, draw, font, left, top, key):
    """A bar from black to white, with the two texts of `key` at its ends."""
    black, white = key
    ramp = torch.linspace(0, 1, 120).repeat(3, LINE, 1)
    begin = left + round(font.getlength(black)) + MARGIN
    draw.text((left, top + 2), black, fill="black", font=font)
    picture.paste(to_pil_image(ramp), (begin, top))
    draw.rectangle((begin, top, begin + 120, top + LINE), outline="grey")
    draw.text((begin + 120 + MARGIN, top + 2), white, fill="black", font=font)
