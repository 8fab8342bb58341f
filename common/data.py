"""Images on the device, in an order and under augmentations that are a function of (seed, epoch, global
position).

`load` puts a data set on the device as uint8 (folders of pictures, too large for that, are streamed by
workers). `batches` cuts it into steps. Every random number of a step is drawn for the *whole* batch from a
generator seeded by (seed, epoch, step), and each process keeps the rows of its own images: so 1 or 8
processes, and a resumed run, see the same. (But for a short last step: its remainder by the number of
processes is left out, and all of it below two images per process.)

What `batches` yields is uint8, from 0 to 255; common/augment.py makes floats in [0, 1] of it, by the numbers of
an `Rng`.
"""
import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import pathlib
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torchvision import datasets

from common.dist import barrier
from common.shapes import SHAPES, shapes

NAMES = ("cifar10", "cifar100", "stl10", "shapes")


# ----------------------------------------------------------------------------------------------------------
# Data sets
# ----------------------------------------------------------------------------------------------------------
class Images:
    """A data set on the device: `x` (N, 3, H, W) uint8, `y` (N,) int64 (-1: none) of `classes`, which is at
    least 1."""

    def __init__(self, x, y, classes):
        self.x = x
        self.y = y
        self.classes = classes

    def __len__(self):
        return len(self.x)

    @property
    def size(self):
        """The side of the images in pixels; None if they are not square."""
        height, width = self.x.shape[2:]
        return height if height == width else None

    def checksum(self):
        """A hash of the images and their order: of their bytes alone, since results record it."""
        whole = hashlib.sha256()
        for part in self.x.split(max(1, PART // max(1, self.x[0].numel()))):
            whole.update(part.contiguous().cpu().numpy())
        return whole.hexdigest()

    def stream(self, indices):
        """Yield `(x, y)` for each index tensor of the iterable `indices`."""
        for i in indices:
            i = i.to(self.x.device, non_blocking=True)
            y = self.y[i.to(self.y.device, non_blocking=True)]
            yield self.x[i], y.to(self.x.device, non_blocking=True)


class Folder:
    """Pictures in files, decoded by workers as they are needed. Each is turned as its EXIF orientation says,
    and becomes the central square of side `size` pixels. 16-bit greyscale becomes 8-bit: v / 257, rounded.

    Like `Images`, but `x` does not exist. `samples` are (path, label), the paths below `root`. `y` begins as
    those labels on the device; it may be replaced by any tensor of N rows, for workers know nothing of it.

    A file that cannot be decoded ends the run with an error that names it. So does greyscale of 32-bit
    integers or floats (PIL's modes I and F): nobody knows which of its numbers is white.
    """

    def __init__(self, root, samples, classes, size, device, workers):
        self.root = root
        self.samples = samples
        self.classes = classes
        self.size = size
        self.device = device
        self.workers = workers
        self.y = torch.tensor([label for _, label in samples], device=device)

    def __len__(self):
        return len(self.samples)

    def checksum(self):
        """A hash of the files' contents, names, labels and order, and of the side they are decoded to.

        A file is read once: its hash is remembered in the user's cache directory (XDG_CACHE_HOME, else
        ~/.cache) until its size or one of its times changes. Under torch.distributed all processes must call
        this together: the first one reads, and tells the others. Raises OSError that names a file that cannot
        be read.
        """
        return _from_the_first_process(self._checksum)

    def listing(self):
        """A hash of the pictures' names and labels as this process sees them; no picture is read."""
        found = [(path.removeprefix(self.root).lstrip(os.sep), label) for path, label in self.samples]
        return hashlib.sha256(repr(found).encode()).hexdigest()

    def _checksum(self, meanwhile):
        names = [path.removeprefix(self.root).lstrip(os.sep) for path, _ in self.samples]
        digests = _digests_of_files(self.root, names, meanwhile)
        whole = hashlib.sha256(repr((self.size, self.classes)).encode())
        for (_, label), name, digest in zip(self.samples, names, digests):
            whole.update(repr((name.replace(os.sep, "/"), label, digest)).encode())
        return whole.hexdigest()

    def stream(self, indices):
        """Yield `(x, y)` for each index tensor of the iterable `indices`; x (B, 3, size, size) uint8."""
        indices = list(indices)
        loader = torch.utils.data.DataLoader(
            _Squares([path for path, _ in self.samples], self.size),
            batch_sampler=[i.tolist() for i in indices], num_workers=min(self.workers, len(indices)),
            pin_memory=torch.device(self.device).type == "cuda", worker_init_fn=_worker,
        )
        try:
            for x, i in zip(loader, indices):
                y = self.y[i.to(self.y.device, non_blocking=True)]
                yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        except ValueError as e:  # from a worker it comes wrapped in that worker's traceback
            raise ValueError(str(e).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


class _Squares(torch.utils.data.Dataset):
    """What workers decode: the pictures at `paths` as squares (3, size, size) uint8."""

    def __init__(self, paths, size):
        self.paths = paths
        self.size = size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = self.paths[i]
        try:
            with open(path, "rb") as f:
                image = _rgb(Image.open(f))
            scale = self.size / min(image.size)
            sides = [max(self.size, round(side * scale)) for side in image.size]
            image = image.resize(sides, 2)  # bilinear
            left, top = [(side - self.size) // 2 for side in image.size]
            image = image.crop((left, top, left + self.size, top + self.size))
        except Exception as e:
            why = " ".join(str(e).split())
            raise ValueError(
                f"{path}: cannot be decoded as an image ({why}); repair it or remove it") from None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _rgb(image):
    """The PIL image `image`, upright, with 8 bits for each of three channels."""
    image.load()
    with contextlib.suppress(Exception):  # EXIF that cannot be read says nothing
        ImageOps.exif_transpose(image, in_place=True)
    # I;16 and its kin; some formats, or older versions of PIL, give 16 bits as I
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 / 257 = 255
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: it does not say which number is white; convert it to 8 bits")
    return image.convert("RGB")


def _worker(_):
    torch.set_num_threads(1)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()  # a signal to the whole group is for the main process, which ends its workers itself


class Part:
    """Of the data set `images` those at `rows` (a list or tensor of ints), in that order."""

    def __init__(self, images, rows):
        self.images = images
        self.rows = torch.as_tensor(rows)
        self.y = images.y[self.rows.to(images.y.device)]
        self.classes = images.classes

    def __len__(self):
        return len(self.rows)

    def stream(self, indices):
        return self.images.stream(self.rows[i] for i in indices)


def load(name, root="data", split="train", device="cpu", limit=None, size=None, workers=4, shuffle=False):
    """The data set `name` as `Images` or, for a folder, `Folder`.

    name    cifar10, cifar100, stl10 (torchvision, downloaded into `root` when absent; STL-10's "train" is
            its unlabelled images and its 5,000 labelled ones), shapes (procedural), a path to an .npz with
            x_train, y_train, x_test, y_test (uint8 NHWC, integer labels), or a path to a folder with train/
            and test/ (or val/), each in ImageFolder layout, in ImageFolder's order. Names with a dot in front
            are passed over, links are followed, and within a class each file counts once.
    split   "train", "labelled" (STL-10's 5,000; elsewhere the same as "train", but labels must be there) or
            "test" (of a folder test/, or where that has no class folders val/).
    limit   keep the first `limit` images of `fixed_order` (files are often ordered by class).
    shuffle  in that order without a limit too.
    size    folders only: the side of the decoded square in pixels.
    workers  folders only: the number of decoding processes; 0: this one decodes.

    For "train" labels may be absent: an .npz with x_train alone; a folder train/, or without one the folder
    itself, with pictures and no class folders. Then `y` is -1 throughout, and `classes` 1. A class folder may
    be empty there too.

    Raises ValueError, FileNotFoundError or OSError, naming the file and what would work.
    """
    name = str(name)

    def keep(n):
        if limit is not None and not 0 < limit <= n:
            raise ValueError(f"limit {limit}: {name} has {n} images in split {split!r}")
        return fixed_order(n)[:limit] if shuffle or limit is not None else range(n)

    if not name.strip():
        raise ValueError(f"data '': must be one of {', '.join(NAMES)}, the path of an .npz or of a folder")
    if split not in ("train", "labelled", "test"):
        raise ValueError(f"split {split!r}: choose one of train, labelled, test")
    _check_workers(workers)
    if name not in NAMES and not name.endswith(".npz") and pathlib.Path(name).is_dir():
        _check_size(name, size)
        folder, samples, classes = _from_folder(pathlib.Path(name), split)
        samples = [samples[i] for i in keep(len(samples))]
        return Folder(str(folder), samples, classes, size, device, workers)
    if name == "shapes":
        x, y, _ = shapes(2_000 if split == "test" else 10_000, seed=1 if split == "test" else 0)
        classes = len(SHAPES)
        parts = [x]
    elif name in NAMES:
        x, y, classes = _from_torchvision(name, root, split)
        parts = [x]
    elif name.endswith(".npz"):
        parts, y, classes = _from_npz(name, split)
    else:
        raise ValueError(f"data {name!r}: not one of {', '.join(NAMES)}; not an .npz, and no such folder")
    rows = torch.as_tensor(keep(len(y)))
    x = _gathered(parts, rows, device)
    # In parts, of which the first one almost always ends the search.
    parts = x.split(max(1, PART // max(1, x[0].numel())))
    if all(part.max() <= 1 for part in parts) and x.any():
        raise ValueError(f"{name}: no pixel is above 1, where 255 is white; were they floats in [0, 1], cast to uint8? "
                         "Multiply by 255 before the cast")
    return Images(x, y[rows].to(device), classes)


def _check_workers(workers):
    if workers < 0:
        raise ValueError(f"workers {workers}: must be 0 or more")


def _check_size(folder, size):
    if size is None:
        raise ValueError(
            f"{folder}: a folder needs `size`, the side of the decoded square; give --image-size")
    if size < 1:
        raise ValueError(f"size {size}: must be 1 pixel or more; give another --image-size")


PART = 2**24  # bytes that are read, copied or hashed at a time


def _gathered(parts, rows, device):
    """Those at `rows` (n,) of all the images that come in `parts`, tensors (k, 3, H, W) uint8 one after the
    other: (n, 3, H, W) on `device`. Beside it there is never more than one part in memory."""
    found = None
    places = rows.argsort()
    sources = rows[places]
    begin = 0
    for part in parts:
        if found is None:
            found = torch.empty(len(rows), *part.shape[1:], dtype=torch.uint8, device=device)
        size = max(1, PART // max(1, part[0].numel()))
        for some in part.split(size):
            first, last = torch.searchsorted(sources, torch.tensor([begin, begin + len(some)])).tolist()
            wanted = some[sources[first:last] - begin]
            found[places[first:last].to(device)] = wanted.to(device)
            begin += len(some)
    return found


def fixed_order(n):
    """A permutation of 0 to n - 1, as a list: always the same one."""
    return np.random.default_rng(0).permutation(n).tolist()


def hold_out(images, share):
    """The data set `images` cut in two at random, always in the same way: the `share` of them that is held
    out for a choice (None where that is none), and the rest, on which to train. ValueError for a share that
    is not from 0 to below 1."""
    if not 0 <= share < 1:
        raise ValueError(f"share {share}: must be from 0 to below 1")
    n = round(share * len(images))
    if not n:
        return None, images
    rows = fixed_order(len(images))
    return Part(images, rows[:n]), Part(images, rows[n:])


def _from_torchvision(name, root, split):
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    if name == "stl10":
        which = {"split": {"train": "train+unlabeled", "labelled": "train", "test": "test"}[split]}
    else:
        which = {"train": split != "test"}
    # The first process of all downloads, then the first of each other host, whose folder may be another one;
    # the others find it there.
    turn = 0
    if dist.is_initialized() and dist.get_rank() != 0:
        turn = 1 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else 2
    for _ in range(turn):
        barrier()
    try:
        found = kind(root, download=True, **which)
    except Exception as e:
        why = " ".join(str(e).split())
        raise ValueError(
            f"{name} cannot be read from {root!r}, nor downloaded into it ({why}); put torchvision's files "
            "there, or use --data shapes or --data some.npz") from None
    for _ in range(2 - turn):
        barrier()
    x = torch.from_numpy(found.data)
    y = torch.as_tensor(np.asarray(found.labels if name == "stl10" else found.targets), dtype=torch.int64)
    return (x if name == "stl10" else x.permute(0, 3, 1, 2)), y, {"cifar100": 100}.get(name, 10)


def _from_npz(path, split):
    """The images in parts (k, 3, H, W) uint8, an iterator; y (N,) int64 and the number of classes. y is -1
    where the file has no labels."""
    part = "test" if split == "test" else "train"
    archive = _Npz(path)
    needed = [f"x_{part}"]
    if split != "train":
        needed += [f"y_{part}", "y_train"]
    for key in needed:
        if key not in archive.keys:
            raise ValueError(f"{path}: {key} is not in it; it must hold x_train, x_test and their labels "
                             "y_train, y_test (for pretraining x_train alone will do)")
    dtype, shape = archive.header(f"x_{part}")
    _check_pixels(dtype, shape, f"{path}: x_{part}")
    n = shape[0]
    x = (torch.from_numpy(some).permute(0, 3, 1, 2) for some in archive.parts(f"x_{part}"))
    if "y_train" not in archive.keys:
        return x, torch.full((n,), -1), 1
    y = archive.read(f"y_{part}")
    if y.shape != (n,) or y.dtype.kind not in "iu":
        raise ValueError(f"{path}: y_{part} is {y.dtype} {y.shape}; it must be integers ({n},){_made_labels(y)}")
    labels = archive.read("y_train")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError(
            f"{path}: y_train is {labels.dtype} {labels.shape}; it must be integers (N,), N > 0{_made_labels(labels)}")
    classes = max(1, int(labels.max()) + 1)
    if classes > max(len(labels), 100_000):
        raise ValueError(f"{path}: the largest label in y_train is {classes - 1}; "
                         "labels must be class numbers 0 to C - 1, not ids")
    if y.min() < -1 or y.max() >= classes:
        raise ValueError(f"{path}: y_{part} goes from {y.min()} to {y.max()}; "
                         f"y_train has classes 0 to {classes - 1}")
    return x, torch.from_numpy(y.astype(np.int64)), classes


def _made_labels(y):
    """How the array `y` becomes labels, where that is plain."""
    how = "; for pretraining it may be left out"
    if y.ndim == 2 and y.shape[1] == 1:
        return f"; take [:, 0]{how}"
    if y.ndim == 2 and y.shape[1]:
        return f"; of one-hot rows take argmax(1){how}"
    return how


def _check_pixels(dtype, shape, what):
    if dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and 0 not in shape:
        return
    how = ""
    if 0 not in shape and dtype != np.uint8:
        whole = "; of whole numbers from 0 to 255 take astype(uint8)"
        how = "; of floats in [0, 1] take (255 x).round().astype(uint8)" if dtype.kind == "f" else whole
    elif len(shape) == 3 and shape[2] == 3:
        how = "; of one picture take x[None]"
    elif len(shape) == 4 and shape[1] == 3:
        how = "; take transpose(0, 2, 3, 1)"
    elif len(shape) == 3 or shape[-1:] == (1,):
        how = "; repeat the grey values in three channels"
    raise ValueError(f"{what} is {dtype} {shape}; it must be uint8 (N, H, W, 3), and not empty{how}")


class _Npz:
    """The file `path` that np.savez or np.savez_compressed has written. `keys` are those of its arrays.
    Raises FileNotFoundError, or ValueError that names the file and what is wrong."""

    def __init__(self, path):
        self.path = path
        refused = f"{path}: not a readable .npz file"
        try:
            with open(path, "rb") as f:
                begins = f.read(6)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except OSError as e:
            raise ValueError(f"{refused} ({e.strerror})") from None
        if begins == b"\x93NUMPY":
            raise ValueError(
                f"{refused} but a single array, an .npy; write it by np.savez(path, x_train=..., ...)")
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{refused}, such as np.savez(path, x_train=..., ...) writes; or it is cut off")
        with self._opened("the whole") as archive:
            self.keys = [name.removesuffix(".npy") for name in archive.namelist()]

    @contextlib.contextmanager
    def _opened(self, reading):
        """The ZipFile. What goes wrong inside is a ValueError that says which array is being read."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except Exception as e:
            why = " ".join(str(e).split())
            if "allow_pickle" in why:  # what is not numbers would have to be unpickled, that is, executed
                why = "no array of numbers"
            raise ValueError(f"{self.path}: not a readable .npz file ({reading}: {why})") from None

    def header(self, key):
        """dtype and shape of an array."""
        with self._opened(key) as archive, archive.open(f"{key}.npy") as f:
            shape, _, dtype = _npy_header(f)
        return dtype, shape

    def read(self, key):
        """A whole array."""
        with self._opened(key) as archive, archive.open(f"{key}.npy") as f:
            return np.lib.format.read_array(f, allow_pickle=False)

    def parts(self, key):
        """An array of uint8, in parts of about PART bytes along its first dimension. The last one comes only
        if the file's checksum of the array is right."""
        with self._opened(key) as archive, archive.open(f"{key}.npy") as f:
            shape, reversed_order, _ = _npy_header(f)
            if reversed_order:  # Fortran's: an image's bytes do not lie together
                yield self.read(key)
                return
            bytes_each = math.prod(shape[1:])
            left = shape[0]
            while left:
                count = min(left, max(1, PART // bytes_each))
                part = np.frombuffer(bytearray(f.read(count * bytes_each)), np.uint8)
                left -= count
                if not left:
                    f.read()  # to the end, where zipfile compares the checksums
                yield part.reshape(count, *shape[1:])


def read_npz(path, *keys):
    """Of the .npz at `path` {key: array}, those of `keys` that it holds. Raises FileNotFoundError, or
    ValueError that names the file and what is wrong."""
    archive = _Npz(path)
    return {key: archive.read(key) for key in keys if key in archive.keys}


def _npy_header(f):
    """Shape, whether it is in Fortran's order, and dtype of the array in the open .npy file `f`."""
    version = np.lib.format.read_magic(f)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(f)
    return np.lib.format.read_array_header_2_0(f)


def _from_folder(root, split):
    """The folder with the pictures of `split` in `root`, a list of their (path, label), and the number of
    classes. Without labels: -1, and 1 class."""
    folder = _folder_of_split(root, split)
    classes = [] if folder == root else _classes(folder)
    samples = []
    empty = []
    for label, name in enumerate(classes):
        paths = _pictures(os.path.join(folder, name))
        samples += [(path, label) for path in paths]
        if not paths:
            empty.append(name)
    if samples and empty and split != "train":
        raise ValueError(f"{folder}: class {empty[0]!r} has no images; add some, or remove the class "
                         "from train and test")
    if samples:
        return folder, samples, len(classes)
    paths = _pictures(folder, below=False)
    if not paths:
        raise ValueError(f"{folder}: holds no images; it must be {folder}/<class>/<image>.png, .jpg, …")
    if split != "train":
        raise ValueError(f"{folder}: its pictures have no labels, which split {split!r} needs; "
                         f"it must be {folder}/<class>/<image>.png, .jpg, …")
    return folder, [(path, -1) for path in paths], 1


def _folder_of_split(root, split):
    train = root / "train"
    if split == "test":
        there = [root / name for name in ("test", "val") if (root / name).is_dir()]
        if not there:
            raise FileNotFoundError(f"{root}: has no folder test or val with images and their labels, "
                                    f"{root}/test/<class>/<image>.png, .jpg, …")
        labelled = [folder for folder in there if _classes(folder)]  # in ImageNet val, not test
        if not labelled:
            return there[0]
        if train.is_dir() and _classes(train):
            _refuse_other_classes(labelled[0], train)
        return labelled[0]
    if train.is_dir():
        return train
    if _pictures(root, below=False):
        return root
    raise FileNotFoundError(f"{root}: has no folder train, and no pictures in itself")


def _classes(folder):
    return sorted(entry.name for entry in _entries(folder) if _is_folder(entry))


def _refuse_other_classes(folder, train):
    here = set(_classes(folder))
    differ = sorted(here ^ set(_classes(train)))
    if differ:
        where = folder if differ[0] in here else train
        raise ValueError(f"{folder}: its classes are not those of {train} ({differ[0]!r} is only in "
                         f"{where.name}); make the folders agree")


def _pictures(folder, below=True):
    """The paths of the pictures in `folder` and, if asked for, below it, in the order of torchvision's
    ImageFolder.

    Links are followed, but not to a folder that holds `folder`. What can be reached in several ways counts
    once, and not by a link if there is another way.
    """
    found = []
    top = os.path.realpath(folder)
    reached = set()  # real paths, of folders and linked files
    folders = [str(folder)]
    linked_folders = []
    linked_files = []
    while folders or linked_folders:
        here = folders.pop() if folders else linked_folders.pop(0)
        real = os.path.realpath(here)
        if real in reached or top.startswith(os.path.join(real, "")):
            continue
        reached.add(real)
        for entry in sorted(_entries(here), key=lambda entry: entry.name):
            path = os.path.join(here, entry.name)
            if _is_folder(entry):
                if below:
                    (linked_folders if entry.is_symlink() else folders).append(path)
            elif datasets.folder.is_image_file(entry.name):
                (linked_files if entry.is_symlink() else found).append(path)
    if linked_files:
        reached.update(os.path.realpath(path) for path in found)
    for path in sorted(linked_files):
        real = os.path.realpath(path)
        if real not in reached:
            reached.add(real)
            found.append(path)
    return sorted(found, key=os.path.split)


def _entries(folder):
    """What lies in a folder, but for names with a dot in front: thumbnails, checkpoints of notebooks, ..."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as e:
        raise OSError(f"{folder}: cannot be read ({e.strerror})") from None


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


# ----------------------------------------------------------------------------------------------------------
# Other test sets
# ----------------------------------------------------------------------------------------------------------
def class_names(name, root="data"):
    """The names of the classes of the training images that `load(name, root)` gives, in the order of their
    labels: of a folder, those of its class folders; None of an .npz, whose classes are numbers."""
    name = str(name)
    if name == "shapes":
        return list(SHAPES)
    if name in NAMES:
        return _torchvisions_names(name, root)
    train = pathlib.Path(name) / "train"
    return _classes(train) if train.is_dir() else None


def _torchvisions_names(name, root):
    if name == "stl10":
        return list(datasets.STL10(root, split="test").classes)
    return list({"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](root, train=False).classes)


def load_test(path, classes, names=None, device="cpu", limit=None, size=None, workers=4):
    """Test images at `path` for a classifier that was trained on other data, of `classes` classes with the
    `names` (`class_names`): `Images` or `Folder`, and which classes they can be of, a list of labels in
    ascending order. Their `y` are places in that list.

    path    an .npz with x_test and y_test, labels as in training; a folder with <name>_data.npy and
            <name>_labels.npy (as CIFAR-10.1 is published), or that first file; there every class can be. Or a
            folder of class folders, named as in training, of all classes or some; where no name is one of
            training, and all are numbers, they are labels (as ImageNet-V2 is published).
    limit   keep the first `limit` images of `fixed_order`, all where there are fewer.
    size    folders of pictures only: the side of the decoded square in pixels.

    Raises ValueError, FileNotFoundError or OSError, naming the path and what would work.
    """
    path = pathlib.Path(path)
    _check_workers(workers)
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: must be 1 image or more")
    if path.is_dir():
        arrays = sorted(path.glob("*_data.npy"))
        if len(arrays) > 1:
            found = " and ".join(array.name for array in arrays)
            raise ValueError(f"{path}: holds {found}; give one of them")
        if not arrays:
            _check_size(path, size)
            samples, present = _from_class_folders(path, classes, names)
            samples = [samples[i] for i in fixed_order(len(samples))[:limit]]
            return Folder(str(path), samples, len(present), size, device, workers), present
        path = arrays[0]
    if path.name.endswith("_data.npy"):
        parts, y = _from_two_arrays(path)
    elif path.suffix == ".npz":
        parts, y = _from_test_npz(path)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    else:
        raise ValueError(f"{path}: must be an .npz, a <name>_data.npy, or a folder of class folders")
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"{path}: its labels go from {y.min()} to {y.max()}; training has classes 0 to "
                         f"{classes - 1}")
    rows = torch.tensor(fixed_order(len(y))[:limit])
    y = torch.from_numpy(y.astype(np.int64))[rows].to(device)
    return Images(_gathered(parts, rows, device), y, classes), list(range(classes))


def _from_test_npz(path):
    """The images in parts (k, 3, H, W) uint8, an iterator, and y (N,) integers."""
    archive = _Npz(path)
    for key in ("x_test", "y_test"):
        if key not in archive.keys:
            raise ValueError(f"{path}: {key} is not in it; a test set is x_test and its labels y_test")
    dtype, shape = archive.header("x_test")
    _check_pixels(dtype, shape, f"{path}: x_test")
    y = archive.read("y_test")
    _check_labels(y, shape[0], f"{path}: y_test")
    return (torch.from_numpy(some).permute(0, 3, 1, 2) for some in archive.parts("x_test")), y


def _from_two_arrays(path):
    """The same of <name>_data.npy, at `path`, and <name>_labels.npy beside it."""
    arrays = []
    for file in (path, path.with_name(path.name.removesuffix("_data.npy") + "_labels.npy")):
        try:
            arrays.append(np.load(file, allow_pickle=False))
        except FileNotFoundError:
            raise FileNotFoundError(f"{file}: no such file; images and labels come as two") from None
        except Exception as e:
            raise ValueError(f"{file}: not a readable .npy file ({' '.join(str(e).split())})") from None
    x, y = arrays
    _check_pixels(x.dtype, x.shape, str(path))
    _check_labels(y, len(x), str(file))
    return [torch.from_numpy(x).permute(0, 3, 1, 2)], y


def _check_labels(y, n, what):
    if y.shape != (n,) or y.dtype.kind not in "iu":
        raise ValueError(f"{what} is {y.dtype} {y.shape}; it must be integers ({n},)")


def _from_class_folders(folder, classes, names):
    """A list of the pictures' (path, place in `present`), and `present`, the labels of the class folders in
    ascending order."""
    found = _classes(folder)
    if not found:
        raise ValueError(f"{folder}: holds no class folders, by which its images would have labels; it must "
                         f"be {folder}/<class>/<image>.png, .jpg, …")
    label_of = {name: label for label, name in enumerate(names or [])}
    if not label_of.keys() & set(found) and all(name.isdecimal() for name in found):
        label_of = {name: int(name) for name in found if int(name) < classes}
    unknown = [name for name in found if name not in label_of]
    if unknown:
        wanted = f"they are numbers, 0 to {classes - 1}"
        if names:
            wanted = f"they are named {', '.join(names[:3])}, …"
        raise ValueError(f"{folder}: class {unknown[0]!r} is none of the {classes} of training; {wanted}")
    present = sorted({label_of[name] for name in found})
    samples = []
    for name in found:
        paths = _pictures(os.path.join(folder, name))
        if not paths:
            raise ValueError(f"{folder}: class {name!r} has no images; add some, or remove its folder")
        samples += [(path, present.index(label_of[name])) for path in paths]
    return samples, present


# ----------------------------------------------------------------------------------------------------------
# The contents of files, each read once
# ----------------------------------------------------------------------------------------------------------
def _from_the_first_process(make):
    """What `make(meanwhile)` returns in the first process is returned in all; an OSError is raised in all.
    `make` must call meanwhile() every few minutes: the others give up after half an hour without a word."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make(lambda: None)
    told = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            told[0] = make(lambda: dist.broadcast_object_list([None, None], src=0))
        except OSError as e:
            told[1] = str(e)
        dist.broadcast_object_list(told, src=0)
    while told == [None, None]:
        dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise OSError(told[1])
    return told[0]


def _digests_of_files(folder, names, meanwhile):
    """The hash of the contents of each of the files `names` in `folder`, remembered in the user's cache
    directory, in one file for each folder. Calls meanwhile() after every thousand files."""
    folder = os.path.abspath(folder)
    paths = [os.path.join(folder, name) for name in names]
    cache = _cache_of(folder)
    known = _read_cache(cache)
    entries = {}

    def read(some):
        return [(path, _entry(path, known)) for path in some]

    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for begin in range(0, len(paths), 1024):
                for found in pool.map(read, [paths[i : i + 128] for i in range(begin, begin + 1024, 128)]):
                    entries.update(found)
                meanwhile()
    finally:  # also what was read until an error
        if any(known.get(path) != entry for path, entry in entries.items()):
            _write_cache(cache, {**known, **entries})
    return [entries[path][3] for path in paths]


def _entry(path, known):
    """Of a file [size, mtime and ctime in ns, hash of its contents]; what `known` has if the first three are
    equal. (ctime: a file may be replaced by one of its size and mtime, as rsync does.)"""
    try:
        stat = os.stat(path)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = known.get(path)
        if isinstance(entry, list) and entry[:3] == stamp and len(entry) == 4 and isinstance(entry[3], str):
            return entry
        now = time.time_ns()
        if any(abs(now - changed) < CLOCK_TICK for changed in stamp[1:]):
            time.sleep(CLOCK_TICK / 1e9)  # so that whoever writes it once we have read it changes its times
        return [*stamp, _digest_of_file(path)]
    except OSError as e:
        raise OSError(f"{path}: cannot be read ({e.strerror})") from None


CLOCK_TICK = 20_000_000  # ns; kernels give files the time of their last tick, 1 to 10 ms ago


def _digest_of_file(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def _cache_of(folder):
    """The path of the JSON file that holds {absolute path: entry} of the files in `folder`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # its standard says that others are to be ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return pathlib.Path(base) / "adversarial-pretraining" / f"contents-{name}.json"


def _read_cache(path):
    """What `_write_cache` wrote; nothing where that cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_cache(path, entries):
    """Write the cache, whole or not at all. Where it cannot be written, files are read again next time."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # other processes may be writing it too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(entries))
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


# ----------------------------------------------------------------------------------------------------------
# Order and randomness
# ----------------------------------------------------------------------------------------------------------
class Rng:
    """The random numbers of one step: drawn for all `total` images of the global batch, cut to our `rows`."""

    def __init__(self, key, total, rows):
        self.seed, self.total, self.rows = _seed(*key), total, rows
        self.generators = {}

    def uniform(self, *shape, device="cpu"):
        """(B, *shape) float32 in [0, 1), B the images of this process."""
        return torch.rand(self.total, *shape, generator=self._on(device), device=device)[self.rows]

    def shared(self, *shape, device="cpu"):
        """(*shape) float32 in [0, 1), the same on all processes."""
        return torch.rand(*shape, generator=self._on(device), device=device)

    def _on(self, device):
        if str(device) not in self.generators:
            self.generators[str(device)] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[str(device)]


def _seed(*key):
    """A well-mixed 63-bit seed from a tuple of integers below 2^32, its length included."""
    return int(np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)[0] >> 1)


def steps_per_epoch(n, batch_size, world=1, least=1):
    """Steps of an epoch over `n` images, `batch_size` in each over `world` processes. A short last one is
    left out below two images per process.

    `least` images per process are what a step of the method needs: 2 where BatchNorm or negatives within the
    batch need two. Raises ValueError if a step would have fewer, if `batch_size` does not divide among the
    processes, and if it is larger than `n`.
    """
    if batch_size % world:
        raise ValueError(f"batch size {batch_size} does not divide among {world} processes")
    share = batch_size // world
    if share < least:
        if world == 1:
            raise ValueError(f"--batch-size {batch_size}: this method needs at least {least} images per step")
        images = "1 image" if share == 1 else f"{share} images"
        raise ValueError(f"--batch-size {batch_size} over {world} processes is {images} each; this method "
                         f"needs at least {least}")
    if batch_size > n:
        raise ValueError(f"batch size {batch_size} is larger than the data: {n} images")
    return n // batch_size + (n % batch_size >= 2 * world)


def batches(images, batch_size, seed, epoch, rank=0, world=1, start=0):
    """The steps of one epoch, from step `start`: yields `(x, y, rng)` for this process.

    x (b, 3, H, W) uint8 and y (b,) on the device, b = batch_size / world (less in a short last step, whose
    remainder by `world` is left out); `rng` an `Rng` for those images. The order is a new permutation each
    epoch. Raises ValueError as `steps_per_epoch` does, at the first step that is asked for.
    """
    steps = steps_per_epoch(len(images), batch_size, world)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_seed(seed, epoch)))

    def rows(step):
        total = min(batch_size, len(images) - step * batch_size)
        return slice(rank * (total // world), (rank + 1) * (total // world)), total

    indices = (order[s * batch_size : (s + 1) * batch_size][rows(s)[0]] for s in range(start, steps))
    for step, (x, y) in enumerate(images.stream(indices), start):
        cut, total = rows(step)
        yield x, y, Rng((seed, epoch, step), total, cut)


def sample(images, count, seed):
    """Up to `count` of the images, the same ones at each call, as a step of `batches` has them: `(x, y, rng)`.
    For pictures and small measurements: one batch is read, where `batches` would begin to read more."""
    count = min(count, len(images))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_seed(seed, 0)))
    ((x, y),) = images.stream([order[:count]])
    return x, y, Rng((seed, 0, 0), count, slice(0, count))


def endless_batches(images, batch_size, seed, epoch, rank=0, world=1):
    """`batches` of `epoch`, of the next one, and so on without end."""
    while True:
        yield from batches(images, batch_size, seed, epoch, rank, world)
        epoch += 1
