import pytest
import torch
from torch import nn

from common.unet import UNet


@pytest.mark.parametrize("c, size", [(8, 101_288), (16, 222_800), (32, 576_416)])
def test_it_has_the_published_size(c, size):
    """At side 32: 288 c^2 + 8277 c + 16640, and the head."""
    assert sum(p.numel() for p in UNet(4, c, 32).parameters()) == size + 4 * (c + 1)


def by_hand(net, x):
    """The forward pass, spelled out for side 32: four blocks down and four up."""
    def half(x):
        return x[..., ::2, ::2]

    def twice(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    a = net.down[0]((x - net.mean) / net.std)
    b = net.down[1](half(a))
    c = net.down[2](half(b))
    d = net.down[3](half(c))
    assert [v.shape[1:] for v in (a, b, c, d)] == [(8, 32, 32), (16, 16, 16), (16, 8, 8), (16, 4, 4)]
    w = net.bottom[1:7](d.flatten(1)).view_as(d)
    w = net.up[0](torch.cat([w, d], 1))
    w = net.up[1](torch.cat([twice(w), c], 1))
    w = net.up[2](torch.cat([twice(w), b], 1))
    w = net.up[3](torch.cat([twice(w), a], 1))
    assert w.shape[1:] == (8, 32, 32)
    return net.head(w)


def test_forward_equals_the_one_by_hand():
    torch.manual_seed(0)
    net, x = UNet(3, 8, 32).double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(net(x), by_hand(net, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [16, 28, 64, 96])
def test_other_sizes_and_every_weight_is_used(size):
    net = UNet(2, 8, size)
    y = net(torch.rand(2, 3, size, size))
    assert y.shape == (2, 2, size, size)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


@pytest.mark.parametrize("width, size, words", [
    (8, 8, "image size 8 of a U-Net: 16 or more.*choose another size .--image-size.$"),
    (8, 0, "image size 0 of a U-Net: 16 or more"), (8, -32, "image size -32 of a U-Net: 16 or more"),
    (8, 18, "image size 18 of a U-Net: .*a multiple of 4; choose another size .--image-size.$"),
    (8, 33, "image size 33 .*a multiple of 8; choose another size .--image-size.$"),
    (12, 32, "width 12 of a U-Net: must be a multiple of 8; choose another width .--mask-width.$"),
    (0, 32, "width 0 of a U-Net: .*--mask-width"), (-8, 32, "width -8 of a U-Net: .*--mask-width")])
def test_what_it_cannot_do_is_named(width, size, words):
    with pytest.raises(ValueError, match=words):
        UNet(2, width, size)


@pytest.mark.parametrize("shape", [(2, 3, 48, 48), (2, 3, 32, 16), (2, 3, 16, 16)])
def test_images_of_another_size_are_refused_with_the_flag(shape):
    words = rf"images of {shape[2]} x {shape[3]}: .* for 32 x 32 \(--image-size 32\)"
    with pytest.raises(ValueError, match=words):
        UNet(2, 8, 32)(torch.rand(shape))
