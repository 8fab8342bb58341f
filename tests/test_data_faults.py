"""Data as people have them: replaced, turned, 16-bit, unlabelled, linked in circles; and one line for what
cannot be used."""
import functools
import hashlib
import json
import math
import os
import pathlib
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from common import augment, data
from tests.processes import Forked, in_two_processes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache directory is a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def one_line(error):
    return "\n" not in str(error.value) and error.value.__cause__ is None


def noise(side=8, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def put(root, *paths, side=8):
    """A picture at each of `paths` below `root`, all different; returns the root as str."""
    for seed, path in enumerate(paths):
        path = root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(side, seed).save(path)
    return str(root)


def small(root):
    """train/ and val/, classes a and b, of two pictures each."""
    classes = ["train/a", "train/b", "val/a", "val/b"]
    return put(root, *[f"{folder}/{i}.png" for folder in classes for i in (0, 1)])


def opened(root, split="train", size=8, workers=0, **others):
    return data.load(str(root), split=split, size=size, workers=workers, **others)


def names(images):
    return [os.path.relpath(path, images.root).replace(os.sep, "/") for path, _ in images.samples]


# What a checksum knows --------------------------------------------------------------------------------------
def replace_contents(folder):
    path = folder / "a" / "0.png"
    written = bytearray(path.read_bytes())
    written[-20] ^= 1  # the size stays
    path.write_bytes(written)


def replace_contents_and_restore_the_time(folder):
    path = folder / "a" / "0.png"
    before = path.stat()
    replace_contents(folder)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_two_files(folder):
    (folder / "a" / "0.png").rename(folder / "a" / "x.png")
    (folder / "a" / "1.png").rename(folder / "a" / "0.png")
    (folder / "a" / "x.png").rename(folder / "a" / "1.png")


def rename_a_file(folder):
    (folder / "a" / "0.png").rename(folder / "a" / "00.png")


def add_an_empty_class_in_front(folder):
    (folder / "A").mkdir()


def remove_a_file(folder):
    (folder / "a" / "0.png").unlink()


@pytest.mark.parametrize("change", [
    replace_contents, replace_contents_and_restore_the_time, swap_two_files, rename_a_file,
    add_an_empty_class_in_front, remove_a_file])
def test_the_checksum_of_a_folder_changes_with(change, tmp_path):
    root = small(tmp_path / "tree")
    before = opened(root).checksum()
    assert opened(root).checksum() == before
    change(tmp_path / "tree" / "train")
    assert opened(root).checksum() != before


def test_the_checksum_of_a_folder_knows_the_side_and_not_the_place(tmp_path):
    first, second = small(tmp_path / "here"), small(tmp_path / "there")
    assert opened(first).checksum() == opened(second).checksum() != opened(first, size=9).checksum()


def test_labels_that_are_assigned_do_not_change_the_checksum_of_a_folder(tmp_path):
    images = opened(small(tmp_path / "tree"))
    before = images.checksum()
    images.y = torch.arange(4)
    assert images.checksum() == before


def test_a_file_is_read_once_and_again_only_when_it_changed(tmp_path, cache, monkeypatch):
    root, read = small(tmp_path / "tree"), []
    contents = data._digest_of_file
    monkeypatch.setattr(data, "_digest_of_file", lambda path: read.append(path) or contents(path))
    before = opened(root).checksum()
    assert len(read) == 4 == len(set(read))
    assert opened(root, limit=4).checksum() and opened(root).checksum() == before and len(read) == 4
    replace_contents(tmp_path / "tree" / "train")
    assert opened(root).checksum() != before
    assert len(read) == 5 and pathlib.Path(read[4]) == tmp_path / "tree" / "train" / "a" / "0.png"
    kept = [path for path in cache.rglob("*") if path.is_file()]
    assert len(kept) == 1 and kept[0].parent.parent == cache and kept[0].suffix == ".json"
    assert all(os.path.isabs(path) for path in json.loads(kept[0].read_text()))


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b"{", b"[1]", b'{"x": 1}', None])
def test_a_cache_that_cannot_be_used_is_not(tmp_path, cache, content):
    root = small(tmp_path / "tree")
    before = opened(root).checksum()
    kept = next(path for path in cache.rglob("*") if path.is_file())
    if content is None:  # every entry of another kind than ours
        content = json.dumps(dict.fromkeys(json.loads(kept.read_text()), ["1", None])).encode()
    kept.write_bytes(content)
    assert opened(root).checksum() == before == opened(root).checksum()


def test_without_a_place_for_a_cache_the_checksum_is_the_same(tmp_path, cache, monkeypatch):
    root = small(tmp_path / "tree")
    before = opened(root).checksum()
    (tmp_path / "file").touch()
    for nowhere in (tmp_path / "file", "/dev/null"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere))
        assert opened(root).checksum() == before
    for unset in ("", "relative"):  # as the standard says
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        assert opened(root).checksum() == before
        assert list((tmp_path / "home" / ".cache").rglob("*.json")) and not (tmp_path / "relative").exists()


def test_a_file_that_is_gone_is_named_by_the_checksum(tmp_path):
    images = opened(small(tmp_path / "tree"))
    remove_a_file(tmp_path / "tree" / "train")
    with pytest.raises(OSError, match=r"0\.png: cannot be read \(No such file") as error:
        images.checksum()
    assert one_line(error)


def checksums(tree, cache, rank, world):
    """In a process: the checksum of `tree`, how many files were read, and the error where one is gone."""
    os.environ["XDG_CACHE_HOME"] = cache  # this process has not the environment of the test
    read, contents = [], data._digest_of_file
    data._digest_of_file = lambda path: read.append(path) or contents(path)
    images = opened(tree)
    found = [images.checksum(), len(read)]
    images.samples = images.samples + [(os.path.join(images.root, "gone.png"), 0)]
    try:
        images.checksum()
    except OSError as e:
        found.append(str(e))
    return found


def test_of_several_processes_the_first_reads_the_files_and_tells_the_others(tmp_path):
    tree = small(tmp_path / "tree")
    work = functools.partial(checksums, tree, str(tmp_path / "cache"))
    first, second = in_two_processes(work, tmp_path)
    assert first[0] == second[0] == opened(tmp_path / "tree").checksum()
    assert first[1] == 4 and second[1] == 0
    assert first[2] == second[2] and "gone.png: cannot be read" in first[2]


def test_the_checksum_of_images_is_that_of_their_bytes():
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    assert data.Images(x, None, 1).checksum() == hashlib.sha256(bytes(range(120))).hexdigest()


@pytest.mark.parametrize("shape, size", [((2, 3, 4, 4), 4), ((2, 3, 4, 5), None), ((0, 3, 7, 7), 7)])
def test_the_size_of_images_is_their_side_if_they_are_square(shape, size):
    assert data.Images(torch.zeros(shape, dtype=torch.uint8), None, 1).size == size


# Pictures of all kinds --------------------------------------------------------------------------------------
def decoded(tmp_path, name, write, size=8):
    """(size, size, 3): the picture that `write(path)` makes, as a Folder gives it."""
    path = tmp_path / "one" / "train" / "a" / name
    path.parent.mkdir(parents=True)
    write(path)
    x, _ = next(opened(tmp_path / "one", size=size).stream([torch.tensor([0])]))
    return x[0].permute(1, 2, 0).numpy()


def ramp16(side=8):
    """(side, side) integers over the whole range of 16 bits, with the ends and halves between two bytes."""
    values = np.linspace(0, 65535, side * side).round().astype(np.uint16)
    values[1:5] = 128, 129, 65535 - 128, 65535 - 129
    return values.reshape(side, side)


def as_16_bits(values, mode):
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, values.shape[::-1], values.astype(order).tobytes())


@pytest.mark.parametrize("name, mode", [
    ("x.png", "I;16"), ("x.tif", "I;16"), ("x.tif", "I;16B"), ("x.pgm", "I;16")])
def test_16_bits_become_8(tmp_path, name, mode):
    values = ramp16()

    def write(path):
        if name == "x.pgm":
            path.write_bytes(b"P5 8 8 65535 " + values.astype(">u2").tobytes())
        else:
            as_16_bits(values, mode).save(path)

    want = (values / 257).round().astype(np.uint8)
    found = decoded(tmp_path, name, write)
    assert (found == want[:, :, None]).all() and found.min() == 0 and found.max() == 255


@pytest.mark.parametrize("mode, dtype", [("I", np.int32), ("F", np.float32)])
@pytest.mark.parametrize("workers", [0, 1])
def test_integers_and_floats_without_a_range_are_refused_with_file_and_mode(tmp_path, mode, dtype, workers):
    path = tmp_path / "train" / "a" / "x.tif"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 100, dtype)).save(path)
    assert Image.open(path).mode == mode
    with pytest.raises(ValueError, match=rf"x\.tif: .*mode {mode}\b") as error:
        list(opened(tmp_path, workers=workers).stream([torch.tensor([0])]))
    assert str(path) in str(error.value) and one_line(error)


def eight_bits(mode, path):
    """Write a picture of `mode`, one with 8 bits or fewer a channel."""
    image, more = noise(), {}
    if mode == "P;transparent":
        image = image.quantize(16)
        more = {"transparency": 3}
    elif mode == "RGB;transparent":
        more = {"transparency": image.getpixel((2, 2))}
    elif mode == "LA":
        image = Image.merge("LA", [image.convert("L"), image.getchannel(1)])
    elif mode == "RGBA":
        image.putalpha(image.getchannel(1))
    else:
        image = image.convert(mode)
    image.save(path, **more)


@pytest.mark.parametrize("mode, name", [
    ("1", "x.png"), ("1", "x.bmp"), ("L", "x.png"), ("L", "x.jpg"), ("L", "x.pgm"), ("LA", "x.png"),
    ("P", "x.png"), ("P;transparent", "x.png"), ("RGB;transparent", "x.png"), ("RGB", "x.JPEG"),
    ("RGB", "x.ppm"), ("RGB", "x.webp"), ("RGBA", "x.png"), ("RGBA", "x.tiff"), ("CMYK", "x.jpg"),
    ("YCbCr", "x.jpg"), ("YCbCr", "x.tif")])
def test_pictures_of_8_bits_are_as_torchvision_reads_them(tmp_path, mode, name):
    found = decoded(tmp_path, name, lambda path: eight_bits(mode, path))
    path = tmp_path / "one" / "train" / "a" / name
    assert (found == np.array(datasets.folder.default_loader(path))).all()


# The orientations of EXIF: how the upright picture was turned before it was stored
STORED = {
    1: lambda v: v,
    2: np.fliplr,
    3: lambda v: np.rot90(v, 2),
    4: np.flipud,
    5: lambda v: v.swapaxes(0, 1),
    6: lambda v: np.rot90(v, 1),
    7: lambda v: np.rot90(v, 2).swapaxes(0, 1),
    8: lambda v: np.rot90(v, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["rgb.png", "palette.png", "16.png", "rgb.tif", "16.tif"])
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation, kind):
    upright = ramp16() if kind.startswith("16") else np.array(noise())
    stored = np.ascontiguousarray(STORED[orientation](upright))

    def write(path):
        if kind.startswith("16"):
            image = as_16_bits(stored, "I;16")
        elif kind == "palette.png":
            image = Image.fromarray(stored).quantize(256)
        else:
            image = Image.fromarray(stored)
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(path, exif=exif)

    want = (upright / 257).round()[:, :, None] if kind.startswith("16") else upright
    assert (decoded(tmp_path, kind, write) == want).all()


def test_exif_that_cannot_be_read_leaves_the_picture_as_it_is(tmp_path):
    found = decoded(tmp_path, "x.jpg", lambda path: noise().save(path, exif=b"Exif\x00\x00rubbish" * 3))
    path = tmp_path / "one" / "train" / "a" / "x.jpg"
    assert (found == np.array(datasets.folder.default_loader(path))).all()


# Folders as people have them --------------------------------------------------------------------------------
def test_the_order_is_imagefolders(tmp_path):
    put(tmp_path, *[f"train/{path}" for path in (
        "b/2.png", "b/10.png", "b/c/1.png", "b/c-d/1.PNG", "b/c/d/1.png", "b/c.png", "a b/1.png", "B/1.jpg",
        "é/1.png", "b/z/1.webp", "b/Z/0.bmp")])
    (tmp_path / "train" / "b" / "notes.txt").write_text("no picture")
    (tmp_path / "elsewhere").mkdir()
    noise().save(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "train" / "b" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "train" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    noise().save(tmp_path / "train" / "loose.png")
    tree, images = datasets.ImageFolder(tmp_path / "train"), opened(tmp_path)
    assert images.samples == tree.samples and len(images) == 13
    assert images.classes == len(tree.classes) == 5 and images.y.tolist() == tree.targets


@pytest.mark.parametrize("split, folder", [("train", "train"), ("labelled", "train"), ("test", "val")])
def test_names_with_a_dot_in_front_are_neither_classes_nor_pictures(tmp_path, split, folder):
    root = small(tmp_path)
    before = opened(root, split)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    put(tmp_path / folder, ".thumbnails/1.png", "a/.thumbnails/1.png", "a/._0.png")
    after = opened(root, split)
    assert after.classes == 2 and after.samples == before.samples


def test_a_class_without_pictures_can_be_pretrained_with_and_not_evaluated(tmp_path):
    root = small(tmp_path)
    for folder in ("train", "val"):
        (tmp_path / folder / "aa").mkdir()
    images = opened(root)
    assert images.classes == 3 and images.y.tolist() == [0, 0, 2, 2]
    for split, folder in (("labelled", "train"), ("test", "val")):
        with pytest.raises(ValueError, match=f"{folder}: class 'aa' has no images") as error:
            opened(root, split)
        assert one_line(error)


@pytest.mark.parametrize("more, says", [
    ("train/c", "'c' is only in train"), ("val/A", "'A' is only in val"), ("val/b2", "'b2' is only in val")])
def test_the_first_class_that_differs_is_named(tmp_path, more, says):
    root = small(tmp_path)
    (tmp_path / more).mkdir()
    (tmp_path / "train" / "z").mkdir()
    with pytest.raises(ValueError, match=f"val: its classes are not those of .*train.*{says}") as error:
        opened(root, "test")
    assert one_line(error)


def loop_to_itself(root):
    (root / "train" / "a" / "loop").symlink_to(root / "train" / "a", target_is_directory=True)


def loops_upwards(root):
    for up in (root, root / "train", root / "train" / "a"):
        (root / "train" / "a" / "deep" / f"to_{up.name}").symlink_to(up, target_is_directory=True)


def many_loops(root):
    for i in range(5):
        (root / "train" / "a" / f"loop{i}").symlink_to(root / "train" / "a", target_is_directory=True)


def two_ways_to_a_folder(root):
    (root / "train" / "a" / "also").symlink_to(root / "train" / "a" / "deep", target_is_directory=True)


def two_ways_to_a_file(root):
    (root / "train" / "a" / "00.png").symlink_to(root / "train" / "a" / "0.png")
    (root / "train" / "a" / "01.png").symlink_to(root / "train" / "a" / "0.png")


def folder_that_is_its_own_link(root):
    (root / "train" / "a" / "self").symlink_to(root / "train" / "a" / "self")


@pytest.mark.parametrize("link", [
    loop_to_itself, loops_upwards, many_loops, two_ways_to_a_folder, two_ways_to_a_file,
    folder_that_is_its_own_link])
def test_links_do_not_multiply_pictures(tmp_path, link):
    root = put(tmp_path, "train/a/0.png", "train/a/deep/1.png", "train/b/0.png")
    before = opened(root)
    link(tmp_path)
    assert opened(root).samples == before.samples


def test_two_classes_that_link_to_each_other_have_each_picture_once(tmp_path):
    root = put(tmp_path, "train/a/0.png", "train/b/1.png")
    for here, there in ("ab", "ba"):
        (tmp_path / "train" / here / "other").symlink_to(tmp_path / "train" / there, target_is_directory=True)
    assert names(opened(root)) == ["a/0.png", "a/other/1.png", "b/1.png", "b/other/0.png"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root, scandir = small(tmp_path), os.scandir

    def denied(path):
        if str(path).endswith(os.path.join("train", "b")):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(OSError, match=r"train.b: cannot be read \(Permission denied\)") as error:
        opened(root)
    assert one_line(error)


def test_a_test_folder_without_labels_is_passed_over_as_in_imagenet(tmp_path):
    root = put(tmp_path, "train/a/0.JPEG", "val/a/1.JPEG", "test/1.JPEG", "test/2.JPEG")
    images = opened(root, "test")
    assert names(images) == ["a/1.JPEG"] and images.classes == 1 and images.root == str(tmp_path / "val")
    (tmp_path / "test" / "2.JPEG").unlink()
    (tmp_path / "test" / "1.JPEG").unlink()
    assert names(opened(root, "test")) == ["a/1.JPEG"]


@pytest.mark.parametrize("folder", ["train", "."])
def test_pictures_without_labels_can_be_pretrained_on(tmp_path, folder):
    pictures = ["b.png", "a.jpg", "B.webp", ".hidden.png"]
    root = put(tmp_path / "some", *[f"{folder}/{name}" for name in pictures])
    images = opened(root, size=8)
    assert names(images) == ["B.webp", "a.jpg", "b.png"]
    assert images.y.tolist() == [-1, -1, -1] and images.y.dtype == torch.int64 and images.classes == 1
    (x, y, _), = data.batches(images, 3, 0, 0)
    assert x.shape == (3, 3, 8, 8) and y.tolist() == [-1, -1, -1]
    assert images.checksum() != opened(root, limit=2).checksum()
    for split in ("labelled", "test"):
        with pytest.raises((ValueError, FileNotFoundError), match="labels") as error:
            opened(root, split)
        assert root in str(error.value) and one_line(error)


def test_flat_pictures_with_an_empty_folder_beside_them_have_no_labels(tmp_path):
    root = put(tmp_path, "train/1.png")
    (tmp_path / "train" / "notes").mkdir()
    assert opened(root).y.tolist() == [-1]


def test_what_lies_beside_train_is_not_pretrained_on(tmp_path):
    root = put(tmp_path, "1.png", "train/a/0.png", "val/a/0.png")
    assert names(opened(root)) == ["a/0.png"]


def test_flat_test_pictures_are_refused_for_want_of_labels(tmp_path):
    root = put(tmp_path, "train/a/0.png", "test/1.png")
    with pytest.raises(ValueError, match=r"test: .*labels.*<class>") as error:
        opened(root, "test")
    assert one_line(error)


# npz --------------------------------------------------------------------------------------------------------
def arrays(n=6):
    x = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return {"x_train": x, "y_train": np.arange(n) % 3, "x_test": x[:3], "y_test": np.arange(3)}


def npz(tmp_path, **changes):
    np.savez(tmp_path / "some.npz", **{k: v for k, v in {**arrays(), **changes}.items() if v is not None})
    return str(tmp_path / "some.npz")


@pytest.mark.parametrize("without", [["y_train"], ["y_train", "x_test", "y_test"]])
def test_an_npz_without_labels_can_be_pretrained_on(tmp_path, without):
    path = npz(tmp_path, **dict.fromkeys(without))
    images = data.load(path)
    assert images.y.tolist() == [-1] * 6 and images.y.dtype == torch.int64 and images.classes == 1
    assert images.x.shape == (6, 3, 4, 4) and len(data.load(path, limit=2)) == 2
    for split in ("labelled", "test"):
        with pytest.raises(ValueError, match="is not in it.*labels|labels.*is not in it") as error:
            data.load(path, split=split)
        assert path in str(error.value) and one_line(error)


@pytest.mark.parametrize("changes, split, says", [
    ({"x_train": np.zeros((6, 0, 0, 3), np.uint8)}, "train", "x_train is uint8 (6, 0, 0, 3)"),
    ({"x_train": np.zeros((6, 4, 0, 3), np.uint8)}, "labelled", "x_train is uint8 (6, 4, 0, 3)"),
    ({"x_test": np.zeros((3, 0, 4, 3), np.uint8)}, "test", "x_test is uint8 (3, 0, 4, 3)"),
    ({"y_train": np.arange(6) + 2**40}, "train", f"{2**40 + 5}"),
    ({"y_train": np.arange(6) + 2**40}, "test", f"{2**40 + 5}"),
    ({"y_train": np.arange(6).astype(np.uint64) + np.uint64(2**63)}, "train", f"{2**63 + 5}"),
    ({"y_train": np.array([0, 1, 2, 3, 4, 100_000])}, "labelled", "100000"),
    ({"y_train": np.array([0, 1, 2, 3, 4, np.nan])}, "test", "y_train is float64"),
    ({"y_train": np.zeros((0,), np.int64)}, "test", "y_train is int64 (0,)"),
    ({"y_train": np.zeros((6, 1), np.int64)}, "test", "y_train is int64 (6, 1)"),
    ({"y_train": np.array([True] * 6)}, "train", "y_train is bool"),
    ({"x_train": np.array([[1], [2, 3]], dtype=object)}, "train", "x_train"),
    ({"y_train": np.array([None] * 6)}, "train", "y_train")])
def test_an_npz_that_cannot_be_used_is_refused_in_one_line(tmp_path, changes, split, says):
    path = npz(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        data.load(path, split=split)
    assert path in str(error.value) and says in str(error.value) and one_line(error)


@pytest.mark.parametrize("labels", [np.arange(6) + 2**40, np.array([0, 1, 2, 3, 4, 2**31])])
def test_ids_in_place_of_labels_are_told_what_labels_are(tmp_path, labels):
    with pytest.raises(ValueError, match=rf"{labels.max()}.*class numbers 0 to C - 1"):
        data.load(npz(tmp_path, y_train=labels))


def test_classes_of_which_few_have_images_are_no_ids(tmp_path):
    assert data.load(npz(tmp_path, y_train=np.array([0, 1, 2, 3, 4, 21_840]))).classes == 21_841


@pytest.mark.parametrize("kind, says", [
    ("text", "savez"), ("npy", "savez"), ("empty", "savez"), ("folder", "directory"), ("bad zip", "the whole")])
def test_what_is_called_npz_and_is_none_is_named(tmp_path, kind, says):
    path = tmp_path / "some.npz"
    if kind == "folder":
        path.mkdir()
    elif kind == "bad zip":
        whole = pathlib.Path(npz(tmp_path)).read_bytes()
        path.write_bytes(whole.replace(b"PK\x01\x02", b"PK\x01\x03"))  # its table of contents
    elif kind == "npy":
        with open(path, "wb") as f:
            np.save(f, arrays()["x_train"])
    else:
        path.write_text("1, 2, 3\n" if kind == "text" else "")
    with pytest.raises(ValueError, match=f"{path}: not a readable .npz file.*{says}") as error:
        data.load(str(path))
    assert one_line(error) and "pickle" not in str(error.value) and "context manager" not in str(error.value)


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name_is_no_folder(name, tmp_path, monkeypatch):
    small(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data ''.*cifar10") as error:
        data.load(name, size=8)
    assert one_line(error)


@pytest.mark.parametrize("flags, says", [
    ({"workers": -1}, "workers -1: must be"), ({"size": None}, "needs `size`.*--image-size"),
    ({"size": 0}, "size 0: must be"), ({"limit": 5}, "limit 5: .* has 4 images"),
    ({"limit": 0}, "limit 0: .* has 4 images")])
def test_numbers_that_cannot_be_are_one_line(tmp_path, flags, says):
    root = small(tmp_path)
    with pytest.raises(ValueError, match=says) as error:
        data.load(root, **{"size": 8, "workers": 0, **flags})
    assert one_line(error)


@pytest.mark.parametrize("flags, says", [
    ({"size": None}, "needs `size`.*--image-size"), ({"size": 0}, "size 0: must be"), ({"limit": 0}, "limit 0: must be"),
    ({"limit": -1}, "limit -1: must be"), ({"workers": -1}, "workers -1: must be")])
def test_numbers_that_cannot_be_are_one_line_of_other_test_sets_too(tmp_path, flags, says):
    root = small(tmp_path)
    with pytest.raises(ValueError, match=says) as error:
        data.load_test(f"{root}/train", 2, ["a", "b"], **{"size": 8, "workers": 0, **flags})
    assert one_line(error)
    x = np.full((3, 8, 8, 3), 255, dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_test=x, y_test=np.arange(3) % 2)
    if "limit" in flags:
        with pytest.raises(ValueError, match=says):
            data.load_test(tmp_path / "x.npz", 2, **flags)


def test_workers_are_counted_for_data_without_workers_too():
    with pytest.raises(ValueError, match="workers -2: must be"):
        data.load("shapes", workers=-2)


# Augmentations take floats, and say so ----------------------------------------------------------------------
def rng(n):
    return data.Rng((0, 0, 0), n, slice(None))


NO = torch.zeros(4, dtype=torch.bool)
ONE = torch.ones(4)
ORDER = torch.arange(4).expand(4, 4)
DRAWN = {  # by functions of (x, rng, p)
    "random_color_jitter": lambda x, rng, p: augment.random_color_jitter(x, rng, 0.4, 0.4, 0.4, 0.1, p=p),
    "random_grayscale": augment.random_grayscale,
    "random_gaussian_blur": lambda x, rng, p: augment.random_gaussian_blur(x, rng, (0.1, 2), p, 3),
    "random_solarize": augment.random_solarize,
}
FLOATS_ONLY = {
    "color_jitter": lambda x: augment.color_jitter(x, ONE, ONE, ONE, 0 * ONE, ORDER),
    "adjust_hue": lambda x: augment.adjust_hue(x, 0 * ONE),
    "grayscale": lambda x: augment.grayscale(x, ~NO),
    "grayscale of none": lambda x: augment.grayscale(x, NO),
    "gaussian_blur": lambda x: augment.gaussian_blur(x, ONE, 3),
    "gaussian_blur of none": lambda x: augment.gaussian_blur(x, 0 * ONE, 3),
    "solarize": lambda x: augment.solarize(x, ~NO),
    "solarize of none": lambda x: augment.solarize(x, NO),
    **{f"{name} {p}": lambda x, f=f, p=p: f(x, rng(4), p) for name, f in DRAWN.items() for p in (0, 1)},
}
BYTES_TOO = {
    "to_float": augment.to_float,
    "resized_crop": lambda x: augment.resized_crop(x, 0 * ONE, 0 * ONE, 6 * ONE, 6 * ONE, 5),
    "random_resized_crop": lambda x: augment.random_resized_crop(x, rng(4), 5, (0.2, 1)),
    "resize": lambda x: augment.resize(x, 5),
    "resize to its own side": lambda x: augment.resize(x, 6),
    "pad_crop": lambda x: augment.pad_crop(x, ONE, ONE, 1),
    "random_pad_crop": lambda x: augment.random_pad_crop(x, rng(4), 1, "reflect"),
}


def some_bytes():
    return torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.int16, torch.bool])
@pytest.mark.parametrize("name", FLOATS_ONLY)
def test_what_takes_floats_refuses_integers(name, dtype):
    function = name.split()[0].removeprefix("random_")
    with pytest.raises(ValueError, match=f"{function}: .*{dtype}.*to_float") as error:
        FLOATS_ONLY[name](some_bytes().to(dtype))
    assert one_line(error)


@pytest.mark.parametrize("name", FLOATS_ONLY)
def test_what_takes_floats_takes_them(name):
    x = some_bytes() / 255
    assert FLOATS_ONLY[name](x).shape == x.shape


@pytest.mark.parametrize("name", BYTES_TOO)
def test_where_a_view_begins_bytes_are_their_255ths_and_other_integers_are_refused(name):
    x = some_bytes()
    found = BYTES_TOO[name](x)
    assert found.dtype == torch.float32 and torch.equal(found, BYTES_TOO[name](x / 255))
    for dtype in (torch.int64, torch.int16, torch.bool):
        with pytest.raises(ValueError, match=f"{dtype}.*uint8"):
            BYTES_TOO[name](x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*FLOATS_ONLY, *(name for name in BYTES_TOO if name != "to_float")])
def test_half_precision_is_refused_in_one_line(name, dtype):
    function = name.split()[0].removeprefix("random_")
    with pytest.raises(ValueError, match=f"{function}: images are {dtype}; it takes float32.*: x.float") as error:
        {**FLOATS_ONLY, **BYTES_TOO}[name]((some_bytes() / 255).to(dtype))
    assert one_line(error)


@pytest.mark.parametrize("name", [*FLOATS_ONLY, *BYTES_TOO])
def test_float64_stays_float64_and_autocast_rounds_nothing(name):
    function = {**FLOATS_ONLY, **BYTES_TOO}[name]
    x = some_bytes() / 255
    wide = function(x.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), function(x), rtol=0, atol=2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = function(x)
        assert cast.dtype == torch.float32 and torch.equal(cast, function(x))
    assert torch.equal(cast, function(x))


def test_an_unknown_filter_is_named():
    with pytest.raises(ValueError, match="filter 'area': choose one of bilinear, bicubic"):
        augment.resized_crop(some_bytes(), 0 * ONE, 0 * ONE, 6 * ONE, 6 * ONE, 5, filter="area")


@pytest.mark.parametrize("numbers, words", [
    ((-0.1, 0, 0, 0), "brightness -0.1: must be finite, and not negative"),
    ((0, float("nan"), 0, 0), "contrast nan: must be finite"), ((0, 0, float("inf"), 0), "saturation inf: must be"),
    ((0, 0, 0, 0.6), "hue 0.6: must be from 0 to 0.5"), ((0, 0, 0, -0.1), "hue -0.1: must be from 0 to 0.5")])
def test_a_strength_of_jitter_that_torchvision_refuses_is_refused(numbers, words):
    x = some_bytes() / 255
    with pytest.raises(ValueError, match=words):
        augment.random_color_jitter(x, rng(4), *numbers)
    if not any(map(math.isinf, numbers)):
        with pytest.raises(ValueError):
            transforms.ColorJitter(*numbers)


@pytest.mark.parametrize("name", FLOATS_ONLY)
def test_the_argument_is_not_changed(name):
    x = some_bytes() / 255
    FLOATS_ONLY[name](x)
    assert torch.equal(x, some_bytes() / 255)


def test_jitter_of_some_rows_leaves_the_others_even_where_a_row_is_named_twice():
    x = some_bytes() / 255
    rows = torch.tensor([0, 0, 2, 2])
    found = augment.color_jitter(x, 0.5 * ONE, ONE, ONE, 0 * ONE, ORDER, rows)
    assert torch.equal(found[1::2], x[1::2])
    torch.testing.assert_close(found[::2], 0.5 * x[::2])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.float64])
def test_flip_takes_any_type(dtype):
    x = some_bytes().to(dtype)
    where = torch.tensor([True, False, True, False])
    found = augment.flip(x, where)
    assert found.dtype == dtype and torch.equal(found[0], x[0].flip(2)) and torch.equal(found[1::2], x[1::2])
    assert torch.equal(augment.random_flip(x, rng(4), 1.0), x.flip(3))


@pytest.mark.parametrize("name", sorted(
    {"flip", "random_flip"} | {name.split()[0] for name in [*FLOATS_ONLY, *BYTES_TOO]}))
def test_docstrings_say_what_images_are_taken(name):
    assert re.search(r"\[0, 1\]|any dtype", getattr(augment, name).__doc__), name


@pytest.mark.parametrize("side, kernel_size", [(6, 13), (4, 9), (1, 3)])
def test_images_too_small_to_blur_are_told_how_large_they_must_be(side, kernel_size):
    x = torch.rand(4, 3, side, side + 3)
    with pytest.raises(ValueError, match=rf"kernel size {kernel_size}.* {side} x {side + 3}.* at least "
                                         rf"{kernel_size // 2 + 1}.*--image-size") as error:
        augment.random_gaussian_blur(x, rng(4), (0.1, 2), 0.5, kernel_size)
    assert one_line(error)
    side = kernel_size // 2 + 1  # what the line says works
    augment.random_gaussian_blur(torch.rand(4, 3, side, side), rng(4), (0.1, 2), 0.5, kernel_size)


@pytest.mark.parametrize("kernel_size", [0, 2, -1])
def test_a_kernel_that_is_not_odd_is_refused(kernel_size):
    with pytest.raises(ValueError, match=f"kernel size {kernel_size}: must be odd"):
        augment.gaussian_blur(torch.rand(4, 3, 8, 8), ONE, kernel_size)


@pytest.mark.parametrize("H, W", [(4, 4), (3, 9), (9, 2), (1, 1)])
def test_images_too_small_to_reflect_are_told_how_large_they_must_be(H, W):
    x = torch.rand(4, 3, H, W)
    with pytest.raises(ValueError, match=rf"padding 4.* {H} x {W}.*at least 5.*--image-size") as error:
        augment.random_pad_crop(x, rng(4), 4, "reflect")
    assert one_line(error)
    assert augment.random_pad_crop(x, rng(4), 4).shape == x.shape  # zeros are there at any side
    assert augment.random_pad_crop(torch.rand(4, 3, 5, 5), rng(4), 4, "reflect").shape == (4, 3, 5, 5)


def test_a_crop_to_no_pixels_is_refused():
    with pytest.raises(ValueError, match="size 0.*--image-size"):
        augment.random_resized_crop(torch.rand(4, 3, 8, 8), rng(4), 0, (0.2, 1))


# Workers and labels -----------------------------------------------------------------------------------------
class Untouched:
    """Labels that only the main process may look at."""

    def __init__(self, y):
        self.y = y
        self.device = y.device

    def __getitem__(self, i):
        assert torch.utils.data.get_worker_info() is None, "a worker looks at the labels"
        assert torch.is_tensor(i) and i.dim() == 1, "a single label is looked at"
        return self.y[i]

    def __reduce__(self):
        raise TypeError("the labels are pickled")


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
@pytest.mark.parametrize("workers", [0, 1])
def test_workers_never_touch_the_labels(tmp_path, workers, shape):
    images = opened(small(tmp_path), workers=workers)
    labels = torch.arange(int(np.prod(shape))).view(shape)
    images.y = Untouched(labels)
    order = torch.tensor([3, 0, 2, 1])
    found = list(images.stream(order.split(2)))
    assert torch.equal(torch.cat([y for _, y in found]), labels[order])
    plain = opened(tmp_path)
    want = torch.cat([x for x, _ in plain.stream(order.split(2))])
    assert torch.equal(torch.cat([x for x, _ in found]), want)


def test_what_a_worker_gets_can_be_pickled_and_holds_no_labels(tmp_path, monkeypatch):
    images, given = opened(small(tmp_path)), []
    images.y = Untouched(images.y)
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader",
                        lambda dataset, **others: given.append(dataset) or loader(dataset, **others))
    list(images.stream([torch.arange(4)]))
    assert torch.equal(pickle.loads(pickle.dumps(given[0]))[2], given[0][2])


@pytest.mark.parametrize("kind", ["folder", "images"])
def test_labels_are_looked_up_where_they_lie_and_come_to_where_the_images_are(tmp_path, kind):
    """`meta` stands for the GPU, where an index that lies elsewhere may be an error."""
    seen = []

    class OnAnotherDevice:
        device = torch.device("meta")

        def __getitem__(self, i):
            seen.append(i.device)
            return torch.arange(len(i))

    if kind == "folder":
        images = opened(small(tmp_path))
    else:
        images = data.Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), 4)
    images.y = OnAnotherDevice()
    (x, y), = images.stream([torch.arange(4)])
    assert seen == [torch.device("meta")] and y.device == x.device == torch.device("cpu")


def test_a_worker_starts_where_there_are_no_process_groups(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.delattr(os, "setpgrp")
    data._worker(0)


# Steps ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size, world, least, says", [
    (8, 8, 2, "--batch-size 8 over 8 processes is 1 image each; this method needs at least 2"),
    (4, 2, 3, "--batch-size 4 over 2 processes is 2 images each; this method needs at least 3"),
    (1, 1, 2, "--batch-size 1: this method needs at least 2"),
    (0, 1, 1, "--batch-size 0: this method needs at least 1")])
def test_a_step_with_too_few_images_for_a_process_is_refused(batch_size, world, least, says):
    with pytest.raises(ValueError, match=says) as error:
        data.steps_per_epoch(100, batch_size, world, least=least)
    assert one_line(error)


@pytest.mark.parametrize("batch_size, world", [(8, 8), (8, 4), (16, 8), (1, 1), (2, 1)])
def test_enough_images_for_a_process_are_not_refused(batch_size, world):
    images = data.Images(torch.zeros(35, 3, 1, 1, dtype=torch.uint8), torch.arange(35), 35)
    steps = data.steps_per_epoch(35, batch_size, world)
    assert steps == len(list(data.batches(images, batch_size, 0, 0, world=world)))
    if batch_size // world >= 2:
        assert data.steps_per_epoch(35, batch_size, world, least=2) == steps


def test_the_fixed_order_is_a_permutation_that_never_changes():
    assert sorted(data.fixed_order(100)) == list(range(100))
    assert data.fixed_order(10) == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1] and not hasattr(data, "shuffled")


# Memory and damage ------------------------------------------------------------------------------------------
WRITERS = {"stored": np.savez, "compressed": np.savez_compressed}


@pytest.mark.parametrize("limit, shuffle", [(None, False), (None, True), (7, False)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", WRITERS)
def test_parts_of_any_size_give_the_same_images(tmp_path, monkeypatch, kind, order, limit, shuffle):
    x = np.random.default_rng(1).integers(0, 256, (23, 5, 5, 3), dtype=np.uint8)
    path = str(tmp_path / "parts.npz")
    WRITERS[kind](path, x_train=np.asarray(x, order=order), y_train=np.arange(23) % 4)
    rows = data.fixed_order(23)[:limit] if limit or shuffle else list(range(23))
    for size in (1, 75 * 4, 75 * 23, 2**26):  # an image, four, all
        monkeypatch.setattr(data, "PART", size)
        images = data.load(path, limit=limit, shuffle=shuffle)
        assert images.x.is_contiguous() and images.y.tolist() == [row % 4 for row in rows]
        assert (images.x.permute(0, 2, 3, 1).numpy() == x[rows]).all()
        assert images.checksum() == hashlib.sha256(x[rows].transpose(0, 3, 1, 2).tobytes()).hexdigest()


@pytest.mark.parametrize("kind", WRITERS)
def test_a_byte_that_was_damaged_is_noticed(tmp_path, kind):
    path = tmp_path / "damaged.npz"
    x = np.random.default_rng(1).integers(0, 256, (23, 5, 5, 3), dtype=np.uint8)
    WRITERS[kind](path, x_train=x)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    for limit in (None, 2):
        with pytest.raises(ValueError, match=f"{path}: not a readable .npz file .x_train") as error:
            data.load(str(path), limit=limit)
        assert one_line(error)


MEASURE = """
import resource, sys
from common import data
import torch
torch.zeros(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = data.load(sys.argv[1], limit=int(sys.argv[2]) or None)
images.checksum()
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(images))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize("kind", WRITERS)
def test_images_are_in_memory_once(tmp_path, kind):
    """250 MB of images may take 1.3 times that, and a thousand of them little, some parts included."""
    path = tmp_path / "large.npz"
    n, bytes_each = 20_000, 64 * 64 * 3
    WRITERS[kind](path, x_train=np.zeros((n, 64, 64, 3), np.uint8))
    for limit, most in ((0, 1.3 * n * bytes_each + 6 * data.PART), (1000, 1000 * bytes_each + 6 * data.PART)):
        (tmp_path / "measure.py").write_text(MEASURE)
        with open(tmp_path / "printed.txt", "w") as printed:
            process = Forked([sys.executable, str(tmp_path / "measure.py"), str(path), str(limit)], printed)
        assert process.wait(60) == 0
        before, after, found = map(int, (tmp_path / "printed.txt").read_text().split())
        assert found == (limit or n) and 1024 * (after - before) <= most


def test_pixels_that_were_floats_are_named(tmp_path):
    floats = np.random.default_rng(0).random((8, 4, 4, 3))
    for x, words in ((np.round(floats).astype(np.uint8), "no pixel is above 1, where 255 is white; were they floats"),
                     ((floats * 255).astype(np.uint8), None)):
        np.savez(tmp_path / "x.npz", x_train=x)
        if words:
            with pytest.raises(ValueError, match=words):
                data.load(str(tmp_path / "x.npz"))
        else:
            assert len(data.load(str(tmp_path / "x.npz"))) == 8


@pytest.mark.parametrize("given, words", [
    (dict(y_train=np.zeros((8, 1), np.int64)), r"y_train is int64 \(8, 1\); .*; take \[:, 0\]; for pretraining it may be left out"),
    (dict(y_train=np.eye(8)), r"y_train is float64 \(8, 8\); .*; of one-hot rows take argmax\(1\)"),
    (dict(x_train=np.zeros((8, 4, 4, 3))), r"x_train is float64 .*; of floats in \[0, 1\] take \(255 x\).round\(\).astype\(uint8\)"),
    (dict(x_train=np.zeros((8, 3, 4, 4), np.uint8)), r"x_train is uint8 .*; take transpose\(0, 2, 3, 1\)"),
    (dict(x_train=np.zeros((8, 4, 4), np.uint8)), "repeat the grey values in three channels"),
    (dict(x_train=np.zeros((8, 4, 4, 1), np.uint8)), "repeat the grey values in three channels"),
])
def test_what_would_make_an_array_usable_is_said(tmp_path, given, words):
    arrays = dict(x_train=np.full((8, 4, 4, 3), 9, np.uint8), y_train=np.arange(8))
    np.savez(tmp_path / "x.npz", **{**arrays, **given})
    with pytest.raises(ValueError, match=words):
        data.load(str(tmp_path / "x.npz"))
