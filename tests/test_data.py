import itertools
import pickle
import traceback

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import functional as tv

from common import augment, data, run, shapes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache directory is a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, torch.stack(list(theirs)), atol=atol, rtol=0)


def random(*shape, seed=0, lo=0.0, hi=1.0):
    return lo + (hi - lo) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pictures(n, H=16, W=12):
    """Random images; the first three black, white and grey, the fourth half grey, half saturated."""
    x = random(n, 3, H, W)
    x[0], x[1], x[2], x[3, :, : H // 2], x[3, :, H // 2 :] = 0, 1, x[2, :1], 0.3, x[3, :, H // 2 :].round()
    return x


def rng(n):
    return data.Rng((0, 0, 0), n, slice(None))


# Each augmentation equals its torchvision counterpart -------------------------------------------------------
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("H, W, size", [(32, 32, 32), (40, 18, 7), (18, 40, 48), (5, 61, 16)])
def test_resized_crop_is_torchvisions_for_boxes_from_one_pixel_to_the_whole_image(H, W, size, filter):
    n = 24
    x, u = random(n, 3, H, W), random(4, n, seed=1)
    height, width = (1 + u[0] * H).floor(), (1 + u[1] * W).floor()
    height[0], width[0], height[1], width[1] = H, W, 1, 1
    top, left = (u[2] * (H - height + 1)).floor(), (u[3] * (W - width + 1)).floor()
    mirrored = torch.arange(n) % 3 == 0
    mode = transforms.InterpolationMode(filter)
    want = [tv.resized_crop(i, *map(int, box), [size, size], mode, antialias=True).clamp(0, 1)
            for i, *box in zip(x, top, left, height, width)]
    close(augment.resized_crop(x, top, left, height, width, size, filter=filter), want)
    close(augment.resized_crop(x, top, left, height, width, size, mirrored, filter),
          [tv.hflip(i) if m else i for i, m in zip(want, mirrored)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_color_jitter_is_torchvisions_in_all_24_orders(dtype):
    orders = torch.tensor(list(itertools.permutations(range(4))) * 4)
    orders = orders[torch.randperm(len(orders), generator=torch.Generator().manual_seed(0))]
    x, u = pictures(len(orders)), random(4, len(orders), seed=1)
    factors = [*(2 * u[:3]), u[3] - 0.5]
    functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    want = []
    for i, order in enumerate(orders.tolist()):
        image = x[i].double()
        for op in order:
            image = functions[op](image, factors[op][i].item())
        want.append(image.to(dtype))
    given = x.to(dtype)
    close(augment.color_jitter(given, *factors, orders), want)
    assert torch.equal(given, x.to(dtype))  # the argument is not changed


def test_adjust_hue_is_torchvisions_over_the_whole_circle():
    x = pictures(21)
    turn = torch.linspace(-0.5, 0.5, 21)[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    close(augment.adjust_hue(x, turn), [tv.adjust_hue(i.double(), t.item()).float() for i, t in zip(x, turn)])
    assert torch.equal(augment.adjust_hue(x[:3], turn[:3]), x[:3])  # grey has no hue


def test_grayscale_solarize_and_flip_are_torchvisions_and_leave_the_other_images_alone():
    x, where = pictures(8), torch.arange(8) % 3 > 0
    x[4, :, 0] = 0.25  # at the threshold
    for ours, theirs in [(augment.grayscale, lambda i: tv.rgb_to_grayscale(i, 3)),
                         (augment.solarize, lambda i: tv.solarize(i, 0.5)), (augment.flip, tv.hflip)]:
        close(ours(x, where), [theirs(i) if w else i for i, w in zip(x, where)], 1e-6)
        assert torch.equal(ours(x, where)[~where], x[~where])
    close(augment.solarize(x, where, 0.25), [tv.solarize(i, 0.25) if w else i for i, w in zip(x, where)], 0)


@pytest.mark.parametrize("H, W, kernel_size", [(16, 16, 3), (20, 12, 13), (7, 31, 13), (9, 9, 1)])
def test_gaussian_blur_is_torchvisions_and_sigma_zero_is_the_identity(H, W, kernel_size):
    x, sigma = pictures(8, H, W), torch.tensor([0.1, 0, 0.5, 1, 0, 1.5, 2, 8])
    want = [tv.gaussian_blur(i, kernel_size, s) if s else i for i, s in zip(x, sigma.tolist())]
    close(augment.gaussian_blur(x, sigma, kernel_size), want)
    assert torch.equal(augment.gaussian_blur(x, sigma, kernel_size)[sigma == 0], x[sigma == 0])
    for bad in (kernel_size + 1, 2 * min(H, W) + 1):
        with pytest.raises(ValueError, match=f"kernel size {bad}"):
            augment.gaussian_blur(x, sigma, bad)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_pad_crop_is_torchvisions_at_every_offset(mode):
    top, left = torch.cartesian_prod(torch.arange(7), torch.arange(7)).unbind(1)
    x = random(49, 3, 10, 13)
    close(augment.pad_crop(x, top, left, 3, mode),
          [tv.crop(tv.pad(i, 3, padding_mode=mode), t, s, 10, 13) for i, t, s in zip(x, top, left)], 0)


def test_resize_is_torchvisions_of_the_whole_image_and_leaves_its_own_size_alone():
    x = random(3, 3, 20, 14)
    close(augment.resize(x, 9), [tv.resize(i, [9, 9], antialias=True) for i in x])
    assert torch.equal(augment.resize(augment.resize(x, 9), 9), augment.resize(x, 9))


def test_a_crop_of_bytes_is_the_crop_of_their_255ths():
    x, at, side = (255 * random(3, 3, 20, 14)).byte(), torch.tensor([0, 1, 4]), torch.tensor([14, 5, 10])
    for crop in (lambda x: augment.resized_crop(x, at, at, side, side, 9),
                 lambda x: augment.pad_crop(x, at, at, 4)):
        assert torch.equal(crop(x), crop(x.float() / 255))


# The parameters are drawn as torchvision draws them ---------------------------------------------------------
def boxes(monkeypatch, n, H, W, scale, ratio=(3 / 4, 4 / 3), flip=0.0):
    """(top, left, height, width), flipped of `n` images under `random_resized_crop`."""
    with monkeypatch.context() as m:
        m.setattr(augment, "resized_crop", lambda x, *given: (torch.stack(given[:4], 1), given[5]))
        return augment.random_resized_crop(torch.empty(n, 0, H, W), rng(n), 8, scale, ratio, flip)


@pytest.mark.parametrize("H, W", [(32, 32), (96, 64), (9, 14)])
def test_crop_boxes_lie_inside_the_image_and_keep_to_the_ranges_of_area_and_ratio(monkeypatch, H, W):
    at, flipped = boxes(monkeypatch, 20_000, H, W, (0.2, 0.9), flip=0.3)
    top, left, h, w = at.T
    for start, length, side in ((top, h, H), (left, w, W)):
        assert torch.equal(start, start.round()) and torch.equal(length, length.round())
        assert start.min() == 0 and length.min() >= 1 and (start + length).max() == side
    assert ((h - 0.5) * (w - 0.5) <= 0.9 * H * W).all() and ((h + 0.5) * (w + 0.5) >= 0.2 * H * W).all()
    assert ((w - 0.5) / (h + 0.5) <= 4 / 3).all() and ((w + 0.5) / (h - 0.5) >= 3 / 4).all()
    assert abs(flipped.float().mean() - 0.3) < 0.02


@pytest.mark.parametrize("H, W, scale, ratio", [
    (32, 8, (1, 1), (3 / 4, 4 / 3)), (8, 33, (1, 1), (3 / 4, 4 / 3)), (16, 16, (2, 2), (3 / 4, 4 / 3)),
    (20, 20, (0.9, 1), (3, 4)), (20, 21, (0.9, 1), (0.1, 0.2))])
def test_where_no_box_fits_the_crop_is_torchvisions_central_one(monkeypatch, H, W, scale, ratio):
    want = transforms.RandomResizedCrop.get_params(torch.empty(3, H, W), list(scale), list(ratio))
    assert (boxes(monkeypatch, 50, H, W, scale, ratio)[0] == torch.tensor(want)).all()


def test_crop_boxes_have_the_means_of_torchvisions(monkeypatch):
    H, W, scale = 40, 28, [0.08, 1.0]
    ours = boxes(monkeypatch, 20_000, H, W, scale)[0]
    torch.manual_seed(0)
    theirs = [transforms.RandomResizedCrop.get_params(torch.empty(3, H, W), scale, [3 / 4, 4 / 3])
              for _ in range(3000)]
    mean, error = [], 0
    for box in (ours, torch.tensor(theirs).float()):
        top, left, h, w = box.T
        values = torch.stack([h * w, top, left, (w / h).log()])
        mean.append(values.mean(1))
        error = error + values.var(1) / len(box)
    assert ((mean[0] - mean[1]).abs() < 4 * error.sqrt()).all()


@pytest.mark.parametrize("augment", [
    lambda x, r, p: augment.random_color_jitter(x, r, 0.4, 0.4, 0.4, 0.1, p=p), augment.random_grayscale,
    lambda x, r, p: augment.random_gaussian_blur(x, r, (0.5, 2), p, 3), augment.random_solarize, augment.random_flip])
def test_an_augmentation_of_probability_p_changes_that_share_of_the_images(augment):
    x = random(4000, 3, 6, 6)
    for p in (0.0, 0.3, 1.0):
        changed = (augment(x, rng(4000), p) != x).flatten(1).any(1).float().mean()
        assert abs(changed - p) < 4 * (p * (1 - p) / 4000) ** 0.5 + 1e-6


def test_jitter_factors_are_independent_and_fill_their_range_and_orders_are_as_frequent(monkeypatch):
    n, drawn = 24_000, {}
    monkeypatch.setattr(augment, "color_jitter", lambda x, *parameters: drawn.update(all=parameters) or x)
    augment.random_color_jitter(torch.zeros(n, 3, 1, 1), rng(n), 0.4, 0.3, 0.2, 0.1)
    *factors, order, rows = drawn["all"]
    assert torch.equal(rows, torch.arange(n))
    for factor, middle, strength in zip(factors, (1, 1, 1, 0), (0.4, 0.3, 0.2, 0.1)):
        u = (factor - middle) / strength
        assert -1.00001 <= u.min() < -0.99 and 0.99 < u.max() <= 1.00001
        assert abs(u.mean()) < 4 / (3 * n) ** 0.5
    assert (torch.corrcoef(torch.stack(factors)) - torch.eye(4)).abs().max() < 5 / n**0.5
    kinds, counts = order.unique(dim=0, return_counts=True)
    assert len(kinds) == 24 and (counts - n / 24).abs().max() < 5 * (n / 24) ** 0.5


@pytest.mark.parametrize("strength", [0.4, 1.0, 1.5, 3.0])
def test_a_strength_above_one_draws_factors_from_nought_as_torchvision_does(monkeypatch, strength):
    n, drawn = 24_000, {}
    monkeypatch.setattr(augment, "color_jitter", lambda x, *parameters: drawn.update(all=parameters) or x)
    augment.random_color_jitter(torch.zeros(n, 3, 1, 1), rng(n), strength, 0.0, strength, 0.0)
    low, high = transforms.ColorJitter(strength).brightness
    for factor in (drawn["all"][0], drawn["all"][2]):
        u = ((factor - low) / (high - low)).sort().values
        assert -1e-6 <= u.min() < 0.01 and 0.99 < u.max() <= 1 + 1e-6
        assert (u - (torch.arange(n) + 0.5) / n).abs().max() < 2 / n**0.5
    assert (drawn["all"][1] == 1).all()


# Order and random numbers are a function of (seed, epoch, global position) ----------------------------------
def numbered(n):
    return data.Images(torch.arange(n).byte().view(n, 1, 1, 1).expand(n, 3, 2, 2), torch.arange(n), n)


def epoch_of(n=22, batch_size=8, seed=0, epoch=0, **where):
    """[(x, y, two draws of random numbers)]: an epoch of two whole steps and one of 6 images."""
    return [(x, y, r.uniform(2, 3), r.uniform(1)) for x, y, r in
            data.batches(numbered(n), batch_size, seed, epoch, **where)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(u, v) for s, t in zip(a, b) for u, v in zip(s, t))


@pytest.mark.parametrize("n, count", [(22, 8), (22, 22), (5, 8)])
def test_a_sample_is_the_first_step_of_an_epoch_of_such_batches(n, count):
    x, y, rng = data.sample(numbered(n), count, 3)
    wanted_x, wanted_y, wanted = next(data.batches(numbered(n), min(count, n), 3, 0))
    assert torch.equal(x, wanted_x) and torch.equal(y, wanted_y) and len(x) == min(count, n)
    assert torch.equal(rng.uniform(2, 3), wanted.uniform(2, 3)) and torch.equal(rng.shared(4), wanted.shared(4))


def test_a_sample_reads_no_picture_more(monkeypatch):
    asked = []
    images = numbered(22)
    stream = images.stream
    monkeypatch.setattr(images, "stream", lambda indices: asked.extend(indices) or stream(asked))
    data.sample(images, 8, 0)
    assert [len(rows) for rows in asked] == [8]


def test_two_ranks_together_see_the_images_and_random_numbers_of_one():
    ranks = [epoch_of(rank=rank, world=2) for rank in (0, 1)]
    together = [[torch.cat(v) for v in zip(*step)] for step in zip(*ranks)]
    assert [len(y) for _, y, *_ in together] == [8, 8, 6] and same(together, epoch_of())


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_an_epoch_started_later_is_its_tail(start):
    assert same(epoch_of(start=start), epoch_of()[start:])


def test_no_two_steps_of_two_seeds_and_epochs_share_their_images_or_random_numbers():
    steps = [s for seed in (0, 1) for epoch in (0, 1) for s in epoch_of(seed=seed, epoch=epoch)]
    for (_, y, u, v), (_, y2, u2, v2) in itertools.combinations(steps, 2):
        assert y.tolist() != y2.tolist() and not (u[:6] == u2[:6]).any() and not (v[:6] == v2[:6]).any()


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_visits_every_image_once_with_its_label(world):
    seen = [step for rank in range(world) for step in epoch_of(rank=rank, world=world)]
    assert sorted(torch.cat([y for _, y, *_ in seen]).tolist()) == list(range(22))
    assert all((x == y.view(-1, 1, 1, 1)).all() for x, y, *_ in seen)


@pytest.mark.parametrize("n, world, lengths", [
    (16, 1, [8, 8]), (17, 1, [8, 8]), (18, 1, [8, 8, 2]), (19, 2, [4, 4]), (21, 2, [4, 4, 2])])
def test_a_batch_divides_among_processes_and_a_short_last_one_needs_two_images_each(n, world, lengths):
    assert data.steps_per_epoch(n, 8, world) == len(lengths)
    for rank in range(world):
        assert [len(y) for _, y, *_ in epoch_of(n, rank=rank, world=world)] == lengths
    with pytest.raises(ValueError, match="batch size 8 does not divide among 3"):
        data.steps_per_epoch(n, 8, 3)
    with pytest.raises(ValueError, match=f"batch size 24 is larger than the data: {n}"):
        next(data.batches(numbered(n), 24, 0, 0))


# load -------------------------------------------------------------------------------------------------------
def arrays():
    """40 training images in four classes, in order; 8 test images; (N, 6, 5, 3)."""
    g = np.random.default_rng(0)
    train, test = (g.integers(0, 256, (n, 6, 5, 3), dtype=np.uint8) for n in (40, 8))
    return dict(x_train=train, y_train=np.arange(40) // 10, x_test=test, y_test=np.arange(8) % 4)


def npz(tmp_path, **changes):
    path = tmp_path / "some.npz"
    np.savez(path, **{k: v for k, v in {**arrays(), **changes}.items() if v is not None})
    return str(path)


@pytest.mark.parametrize("split, key", [("train", "train"), ("labelled", "train"), ("test", "test")])
def test_an_npz_comes_back_as_channels_first_bytes(tmp_path, split, key):
    images = data.load(npz(tmp_path), split=split)
    assert images.x.dtype == torch.uint8 and images.y.dtype == torch.int64 and images.classes == 4
    assert (images.x.permute(0, 2, 3, 1).numpy() == arrays()[f"x_{key}"]).all()
    assert (images.y.numpy() == arrays()[f"y_{key}"]).all() and len(images) == len(images.y)


def test_limit_keeps_a_fixed_subset_of_several_classes(tmp_path):
    path = npz(tmp_path)
    everything, some, fewer = data.load(path), data.load(path, limit=12), data.load(path, limit=5)
    assert len(some) == 12 and len(some.y.unique()) == 4 and some.classes == 4
    assert torch.equal(data.load(path, limit=12).x, some.x) and torch.equal(some.x[:5], fewer.x)
    index = {x.numpy().tobytes(): int(y) for x, y in zip(everything.x, everything.y)}
    assert [index.pop(x.numpy().tobytes()) for x in some.x] == some.y.tolist()  # each once, with its label


@pytest.mark.parametrize("changes, split, says", [
    ({"x_train": None}, "train", "x_train is not"), ({"y_test": None}, "test", "y_test is not"),
    ({"y_train": None}, "test", "y_train is not"),
    ({"x_train": arrays()["x_train"] / 255}, "train", "x_train is float64"),
    ({"x_train": arrays()["x_train"].transpose(0, 3, 1, 2)}, "train", "x_train is uint8 (40, 3, 6, 5)"),
    ({"x_test": arrays()["x_test"][0]}, "test", "x_test is uint8 (6, 5, 3)"),
    ({"x_test": arrays()["x_test"][:0]}, "test", "x_test is uint8 (0, 6, 5, 3)"),
    ({"y_train": arrays()["y_train"][:39]}, "train", "y_train is int64 (39,)"),
    ({"y_test": np.eye(4)[arrays()["y_test"]]}, "test", "y_test is float64 (8, 4)")])
def test_a_wrong_npz_is_refused_with_its_path_and_what_is_wrong(tmp_path, changes, split, says):
    path = npz(tmp_path, **changes)
    with pytest.raises(ValueError) as e:
        data.load(path, split=split)
    assert path in str(e.value) and says in str(e.value)


def test_what_is_no_npz_and_a_limit_beyond_the_data_and_an_unknown_name_are_refused_by_name(tmp_path):
    path, absent = npz(tmp_path), str(tmp_path / "absent.npz")
    for limit in (0, -1, 41):
        with pytest.raises(ValueError, match=f"limit {limit}: {path} has 40 images"):
            data.load(path, limit=limit)
    whole = open(path, "rb").read()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "some.npz").write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: not a readable .npz"):
            data.load(path)
    with pytest.raises(FileNotFoundError, match=f"{absent}: no such file"):
        data.load(absent)
    with pytest.raises(ValueError, match="'cifar11'.*cifar10, cifar100, stl10, shapes"):
        data.load("cifar11")


def without_md5(monkeypatch, kind):
    """Let torchvision take any file of the right name."""
    for which in ("train_list", "test_list"):
        monkeypatch.setattr(kind, which, [[name, None] for name, _ in getattr(kind, which)])
    if hasattr(kind, "meta"):
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})


@pytest.mark.parametrize("name, kind, key, classes", [
    ("cifar10", datasets.CIFAR10, "labels", 10), ("cifar100", datasets.CIFAR100, "fine_labels", 100)])
def test_cifar_is_read_from_torchvisions_files(tmp_path, monkeypatch, name, kind, key, classes):
    without_md5(monkeypatch, kind)
    folder, g, written = tmp_path / kind.base_folder, np.random.default_rng(0), {}
    folder.mkdir()
    for file, _ in kind.train_list + kind.test_list:
        written[file] = g.integers(0, 256, (3, 3072), dtype=np.uint8), g.integers(0, classes, 3).tolist()
        (folder / file).write_bytes(pickle.dumps({"data": written[file][0], key: written[file][1]}))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: list("abc")}))
    for split, files in (("train", kind.train_list), ("labelled", kind.train_list), ("test", kind.test_list)):
        images = data.load(name, str(tmp_path), split)
        assert (images.x.flatten(1).numpy() == np.concatenate([written[file][0] for file, _ in files])).all()
        assert images.x.shape[1:] == (3, 32, 32) and images.classes == classes
        assert images.y.tolist() == sum((written[file][1] for file, _ in files), [])


def test_stl10_trains_on_its_unlabelled_images_too_and_marks_them(tmp_path, monkeypatch):
    without_md5(monkeypatch, datasets.STL10)
    folder = tmp_path / "stl10_binary"
    x = np.random.default_rng(0).integers(0, 256, (6, 3, 96, 96), dtype=np.uint8)
    folder.mkdir()
    for part, rows in (("train", slice(0, 2)), ("unlabeled", slice(2, 5)), ("test", slice(5, 6))):
        x[rows].transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")  # columns first
    np.array([1, 10], dtype=np.uint8).tofile(folder / "train_y.bin")
    np.array([7], dtype=np.uint8).tofile(folder / "test_y.bin")
    for split, rows, y in (("train", slice(0, 5), [0, 9, -1, -1, -1]), ("labelled", slice(0, 2), [0, 9]),
                           ("test", slice(5, 6), [6])):
        images = data.load("stl10", str(tmp_path), split)
        assert (images.x.numpy() == x[rows]).all() and images.y.tolist() == y and images.classes == 10


@pytest.mark.parametrize("name, kind", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("stl10", "STL10")])
def test_a_failed_download_is_one_error_that_says_what_would_work(tmp_path, monkeypatch, name, kind):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, kind, fail)
    with pytest.raises(ValueError, match=f"{name}.*no route to host.*shapes") as e:
        data.load(name, str(tmp_path))
    assert str(tmp_path) in str(e.value) and e.value.__suppress_context__


@pytest.mark.parametrize("rank, local, turn", [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)])
def test_the_first_process_of_all_downloads_then_one_of_each_host_then_the_others_look(rank, local, turn, monkeypatch):
    """Two hosts, which may share --data-dir or each have its own. All processes wait equally often."""
    order = []

    class Files:
        data = np.full((2, 32, 32, 3), 255, dtype=np.uint8)
        targets = [0, 1]

        def __init__(self, root, **which):
            order.append("look")

    monkeypatch.setattr(datasets, "CIFAR10", Files)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: order.append("wait"))
    data.load("cifar10")
    assert order == ["wait"] * turn + ["look"] + ["wait"] * (2 - turn)


# Folders ----------------------------------------------------------------------------------------------------
@pytest.fixture
def tree(tmp_path):
    """train/ (12 images) and val/ (4), classes a and b; PNG, JPEG, colour, grey, 30 x 20, 20 x 45."""
    g = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 4)):
        for i in range(n):
            folder = tmp_path / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            shape = ((20, 30) if i % 3 else (45, 20)) + ((3,) if i % 4 else ())
            image = Image.fromarray(g.integers(0, 256, shape, dtype=np.uint8))
            image.save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return tmp_path


def test_a_folder_gives_the_same_squares_whatever_the_number_of_workers(tree):
    epochs = []
    for workers in (0, 2):
        images = data.load(str(tree), size=16, workers=workers)
        epochs.append([(x, y, r.uniform(1)) for x, y, r in data.batches(images, 5, 0, 0)])
    assert same(*epochs) and [len(x) for x, *_ in epochs[0]] == [5, 5, 2]
    assert all(x.dtype == torch.uint8 and x.shape[1:] == (3, 16, 16) for x, *_ in epochs[0])
    assert sorted(torch.cat([y for _, y, _ in epochs[0]]).tolist()) == [0] * 6 + [1] * 6


def test_an_image_of_the_right_height_loses_only_its_sides(tree):
    images = data.load(str(tree), split="test", size=20, workers=0)
    assert images.classes == 2 and images.y.tolist() == [0, 0, 1, 1] and len(images) == 4
    x, y = next(images.stream([torch.tensor([2])]))
    whole = np.array(Image.open(tree / "val" / "b" / "1.png"))
    assert (x[0].permute(1, 2, 0).numpy() == whole[:, 5:25]).all() and y.tolist() == [1]


def test_no_more_workers_are_started_than_there_are_batches(tree, monkeypatch):
    started = []
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *what, num_workers, **how: (
        started.append(num_workers) or loader(*what, num_workers=0, **how)))
    images = data.load(str(tree), size=8, workers=3)
    for count in (1, 3, 6):
        list(images.stream(torch.arange(12).chunk(count)))
    assert started == [1, 3, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_gives_whatever_stands_in_y(tree, workers):
    images = data.load(str(tree), size=20, workers=workers)
    images.y = torch.arange(24).view(12, 2)
    assert torch.cat([y for _, y in images.stream(torch.tensor([5, 0, 7]).split(2))]).tolist() == [
        [10, 11], [0, 1], [14, 15]]


def test_a_checksum_knows_the_images_and_their_order(tree):
    a, b = data.Images(random(2, 3, 4, 4), None, 1), data.Images(random(2, 3, 4, 4).flip(0), None, 1)
    assert a.checksum() == data.Images(a.x.clone(), None, 1).checksum() != b.checksum()
    folder = data.load(str(tree), size=20)
    assert folder.checksum() == data.load(str(tree), size=20, workers=0).checksum()
    others = [data.load(str(tree), size=21), data.load(str(tree), size=20, limit=12),
              data.load(str(tree), size=20, split="test")]
    assert len({folder.checksum(), *(other.checksum() for other in others)}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_image_is_named(tree, workers):
    bad = tree / "train" / "b" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(ValueError, match="cannot be decoded") as e:
        list(data.load(str(tree), size=8, workers=workers).stream([torch.arange(6), torch.arange(6, 12)]))
    assert str(bad) in str(e.value)
    traceback.clear_frames(e.tb)  # else the loader dies in a reference cycle, ten seconds for two workers


def test_a_folder_without_its_split_or_without_images_is_refused_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder train") as e:
        data.load(str(tmp_path), size=8)
    assert str(tmp_path) in str(e.value)
    with pytest.raises(FileNotFoundError, match="no folder test or val"):
        data.load(str(tmp_path), split="test", size=8)
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="holds no images") as e:
        data.load(str(tmp_path), size=8)
    assert str(tmp_path / "train") in str(e.value)


# Shapes -----------------------------------------------------------------------------------------------------
def test_shapes_are_a_function_of_the_seed():
    first, again, other = shapes.shapes(200, 0), shapes.shapes(200, 0), shapes.shapes(200, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not (first[0] == other[0]).flatten(1).all(1).any() and not torch.equal(first[1], other[1])


def test_shapes_are_bytes_with_balanced_labels_and_a_mask_of_coverage():
    x, y, mask = shapes.shapes(400, 0)
    assert x.dtype == torch.uint8 and x.shape == (400, 3, 32, 32) and mask.shape == (400, 32, 32)
    assert y.dtype == torch.int64 and y.bincount().tolist() == [40] * 10 and not torch.equal(y, y.sort()[0])
    assert mask.min() == 0 and mask.max() == 1
    assert (mask.amax((1, 2)) == 1).all() and (mask.amin((1, 2)) == 0).all()  # figure and ground


def test_the_mean_colour_of_an_image_does_not_tell_its_shape():
    (x, y, _), (held_out, labels, _) = shapes.shapes(2000, 0), shapes.shapes(2000, 1)
    colour, held_out = x.float().mean((2, 3)), held_out.float().mean((2, 3))
    means = torch.stack([colour[y == c].mean(0) for c in range(10)])
    assert (torch.cdist(held_out, means).argmin(1) == labels).float().mean() < 0.2

def test_labels_that_the_training_split_lacks_are_refused(tmp_path):
    x = np.zeros((2, 4, 4, 3), np.uint8)
    for bad in ([0, 7], [0, -2]):
        np.savez(tmp_path / "bad.npz", x_train=x, y_train=[0, 1], x_test=x, y_test=bad)
        with pytest.raises(ValueError, match=r"bad\.npz: y_test goes from .* classes 0 to 1"):
            data.load(str(tmp_path / "bad.npz"), split="test")


def test_folders_whose_splits_have_other_classes_are_refused(tmp_path):
    for split, labels in (("train", "abc"), ("test", "bc")):
        for label in labels:
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / label / "1.png")
    with pytest.raises(ValueError, match="test: its classes are not those of"):
        data.load(str(tmp_path), split="test", size=8)
    with pytest.raises(ValueError, match="a folder needs `size`"):
        data.load(str(tmp_path))


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="split 'val'"):
        data.load("shapes", split="val")


def test_a_corrupt_image_is_one_line_even_from_a_worker(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"not an image")
    with pytest.raises(SystemExit, match=r"error: [^\n]*1\.png: cannot be decoded"):
        run.cli(lambda: list(data.load(str(tmp_path), size=8, workers=1).stream([torch.arange(1)])))


def test_seeds_of_different_keys_differ():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    assert len({data._seed(*key) for key in keys}) == len(keys)


def test_endless_batches_are_those_of_one_epoch_after_the_other():
    images = data.Images(torch.arange(5 * 3 * 4, dtype=torch.uint8).view(5, 3, 2, 2), torch.zeros(5).long(), 1)
    stream = data.endless_batches(images, 2, 0, 7)
    for epoch in (7, 8):
        for x, _, rng in data.batches(images, 2, 0, epoch):
            x_next, _, rng_next = next(stream)
            assert torch.equal(x, x_next) and torch.equal(rng.uniform(3), rng_next.uniform(3))
