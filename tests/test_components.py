import numpy as np
import pytest
import torch

from common import encoders
from evaluation import components


def test_principal_components_hold_the_largest_variances():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(500, 6, generator=g) * torch.tensor([1, 5, 0.1, 1, 3, 1]) + 7
    z = components.project(h)
    variances = torch.linalg.eigvalsh(torch.cov(h.T)).flip(0)
    torch.testing.assert_close(torch.cov(z.T), torch.diag(variances[:2]), atol=1e-3, rtol=1e-4)
    assert z.mean(0).abs().max() < 1e-5


def test_principal_components_are_numpys_orthonormal_and_sorted():
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).double() + 3
    found, variances = components.principal(rows, 4)
    _, singular, want = np.linalg.svd(rows.numpy() - rows.numpy().mean(0))
    signs = np.sign((found.numpy() * want[:4]).sum(1, keepdims=True))
    np.testing.assert_allclose(found.numpy(), signs * want[:4], atol=1e-10)
    np.testing.assert_allclose(variances.numpy(), singular[:4] ** 2 / 8, atol=1e-10)
    torch.testing.assert_close(found @ found.T, torch.eye(4).double())
    assert (variances.diff() < 0).all()
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()
    assert len(components.principal(rows, 100)[0]) == 5


def test_two_clusters_fall_apart_along_the_first_component():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(200, 16, generator=g)
    h[:100] += 9 * torch.nn.functional.normalize(torch.randn(16, generator=g), dim=0)
    z = components.project(h)
    assert z.shape == (200, 2)
    left, right = sorted((z[:100, 0], z[100:, 0]), key=torch.mean)
    assert (left < 0).float().mean() > 0.98 and (right > 0).float().mean() > 0.98


def test_standardised_columns_have_mean_zero_and_deviation_one_and_constants_are_zero():
    rows = torch.rand(50, 4).double() * torch.tensor([1, 9, 100, 0]) + 2
    found = components.standardised(rows)
    torch.testing.assert_close(found.mean(0), torch.zeros(4).double())
    torch.testing.assert_close(found.std(0, correction=0), torch.tensor([1, 1, 1, 0]).double())


@pytest.mark.parametrize("arch, count, side", [("slim", 15, 3), ("resnet18", 27, 3), ("preact_resnet18", 27, 3),
                                               ("vit_tiny", 28, 4)])
def test_filters_are_those_that_images_meet_first_and_components_as_many_as_there_are(arch, count, side):
    torch.manual_seed(0)
    encoder = encoders.make(arch)
    filters = components.first_filters(encoder)
    first = encoder.patch_embed.proj if arch.startswith("vit") else encoder.conv1
    assert filters.data_ptr() == first.weight.data_ptr() and not filters.requires_grad
    found, shares = components.filter_components(filters)
    assert found.shape == (count, 3, side, side)
    flat = found.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)).double())
    assert (shares.diff() <= 0).all() and (shares > 1e-9).all() and shares.sum() < 1 + 1e-9
    if len(found) < 28:
        assert shares.sum() > 1 - 1e-6  # all of the variance


def test_components_do_not_depend_on_the_scale_of_single_weights():
    filters = torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    scaled = filters * torch.rand(3, 2, 2).add(0.5) + 1
    torch.testing.assert_close(components.filter_components(filters)[0], components.filter_components(scaled)[0],
                               atol=1e-4, rtol=1e-4)


def test_a_network_without_such_a_convolution_is_refused():
    with pytest.raises(ValueError, match="no convolution of images with three channels"):
        components.first_filters(torch.nn.Linear(3, 3))


def test_a_mosaic_has_every_component_scaled_by_itself_about_grey():
    pictures = torch.zeros(9, 3, 2, 2)
    pictures[0, 0, 0, 0] = 4
    pictures[8, 2, 1, 1] = -0.1
    found = components.mosaic(pictures)
    assert found.shape == (3, 6, 21)
    assert found[0, 0, 0] == 1 and found[2, 4, 4] == 0 and found[1, 0, 0] == 0.5
    assert (found[:, 3:, 6:] == 1).all()  # nothing there: white
