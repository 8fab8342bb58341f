import re

import pytest
import torch
import torch.nn.functional as F

from common import kmeans as kmeans_module
from common.kmeans import kmeans


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(k, n=30, d=8):
    """k * n unit rows about k random directions, and which one each is of."""
    g, truth = generator(k), torch.arange(k * n) % k
    centres = F.normalize(torch.randn(k, d, generator=g), dim=1)
    return F.normalize(centres[truth] + 0.02 * torch.randn(k * n, d, generator=g), dim=1), truth


@pytest.mark.parametrize("k", [1, 2, 10])
def test_well_separated_clusters_are_found(k):
    h, truth = blobs(k)
    labels = kmeans(h, k, generator())
    assert len({(a, b) for a, b in zip(labels.tolist(), truth.tolist())}) == k  # the same up to names
    assert labels.unique().tolist() == list(range(k))


def cost(h, labels, k):
    return sum((h[labels == c] - h[labels == c].mean(0)).square().sum().item() for c in range(k))


def test_the_result_is_a_fixed_point_of_lloyds_algorithm_and_the_best_of_its_restarts():
    h = torch.randn(200, 4, dtype=torch.float64, generator=generator())
    labels = kmeans(h, 12, generator())
    centres = torch.stack([h[labels == c].mean(0) for c in range(12)])
    assert torch.equal(torch.cdist(h, centres).argmin(1), labels)
    more, single = generator(), [cost(h, kmeans(h, 12, generator(seed), restarts=1), 12) for seed in range(8)]
    assert cost(h, kmeans(h, 12, more, restarts=8), 12) <= cost(h, kmeans(h, 12, generator(), restarts=1), 12)
    assert min(single) <= cost(h, labels, 12) <= max(single)


def test_the_same_seed_gives_the_same_labels_and_another_may_not():
    h = torch.randn(100, 4, generator=generator())
    assert torch.equal(kmeans(h, 7, generator()), kmeans(h, 7, generator()))
    assert not torch.equal(kmeans(h, 7, generator()), kmeans(h, 7, generator(1)))


def test_no_cluster_is_empty_even_where_rows_repeat():
    h = torch.eye(6).repeat_interleave(20, 0)
    for seed in range(5):
        assert (kmeans(h, 6, generator(seed)).bincount(minlength=6) == 20).all()
    assert sorted(kmeans(torch.randn(9, 3, generator=generator()), 9, generator()).tolist()) == list(range(9))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(value):
    h = torch.rand(20, 2)
    h[7, 1] = value
    with pytest.raises(ValueError, match="row 7 of 20 is not finite"):
        kmeans(h, 3, generator())


@pytest.mark.parametrize("how", [dict(restarts=0), dict(iterations=0)])
def test_no_run_gives_no_labels_and_is_refused(how):
    (name,) = how
    with pytest.raises(ValueError, match=f"{name} 0: must be at least 1"):
        kmeans(torch.rand(20, 2), 3, generator(), **how)


@pytest.mark.parametrize("k", [0, 21])
def test_a_number_of_clusters_that_cannot_be_is_refused(k):
    with pytest.raises(ValueError, match=f"{k} clusters of 20 rows: must be from 1 to 20"):
        kmeans(torch.rand(20, 2), k, generator())


@pytest.mark.parametrize("k, differ", [(4, 3), (5, 3), (2, 1)])
def test_more_clusters_than_different_rows_are_refused(k, differ):
    """There would be clusters without a row, whose mean is NaN."""
    h = torch.arange(differ).repeat(4)[:, None].float()
    words = f"{k} clusters of {4 * differ} rows, of which only {differ} differ: .*as many different rows"
    for seed in range(5):
        with pytest.raises(ValueError, match=words):
            kmeans(h, k, generator(seed))
        assert len(kmeans(h, differ, generator(seed)).unique()) == differ


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_a_row_becomes_a_centre_once_at_whatever_scale(scale):
    h = scale * torch.eye(4).repeat(20, 1)
    for seed in range(5):
        found = kmeans(h, 4, generator(seed), restarts=1, iterations=1)
        assert found.bincount(minlength=4).tolist() == [20] * 4


def test_empty_clusters_are_filled_with_the_farthest_rows_that_leave_no_other_one_empty():
    labels, distance = torch.tensor([0, 0, 1, 1, 1, 1, 4]), torch.tensor([5.0, 4, 3, 2, 1, 1, 9])
    kmeans_module._fill_empty(labels, distance, 5)
    assert labels.tolist() == [2, 0, 3, 1, 1, 1, 4]
    labels = torch.zeros(6).long()
    kmeans_module._fill_empty(labels, torch.zeros(6), 6)
    assert sorted(labels.tolist()) == list(range(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_with_in_float32(dtype):
    h = torch.randn(60, 4, generator=generator()).to(dtype)
    assert torch.equal(kmeans(h, 5, generator()), kmeans(h.float(), 5, generator()))


@pytest.mark.parametrize("h", [torch.ones(20, 2, dtype=torch.int64), torch.ones(20), torch.ones(20, 2, 2)])
def test_what_are_no_rows_of_floats_is_refused(h):
    words = rf"rows to cluster are {re.escape(str(tuple(h.shape)))} {h.dtype}: must be \(N, D\), floats"
    with pytest.raises(ValueError, match=words):
        kmeans(h, 3, generator())


@pytest.mark.parametrize("offset", [0, 1e4])
def test_clusters_far_from_the_origin_are_found_as_well(offset):
    """Distances are made of products, in which an offset would drown them."""
    g, truth = generator(), torch.arange(90) % 3
    h = torch.eye(3)[truth] * 3 + 0.1 * torch.randn(90, 3, generator=g) + offset
    labels = kmeans(h, 3, generator())
    assert len({(a, b) for a, b in zip(labels.tolist(), truth.tolist())}) == 3
