"""Images on the device, in an order and under augmentations that are a function of (seed, epoch, global
position).

`load` puts a data set on the device as uint8 (folders of pictures, too large for that, are streamed by
workers). `batches` cuts it into steps. Every random number of a step is drawn for the *whole* batch from a
generator seeded by (seed, epoch, step), and each process keeps the rows of its own images: so 1 or 8
processes, and a resumed run, see the same (but for the fewer-than-8 images of a last step that do not divide
among 8).

Augmentation works on batches (B, 3, H, W), one parameter per image. Each comes as a pair: the function of its
parameters, equal to its torchvision counterpart, and `random_...`, which draws them as torchvision does.
Parameters live on the CPU until they are used: a thousand numbers a step cost nothing there, and which image
gets what is known without a host sync.

Images are float32 in [0, 1], and integers are refused. What begins a view takes uint8 (0 to 255) as well, and
gives floats: `resized_crop`, `pad_crop`, `resize`, `to_float`. `flip` only moves pixels, of any dtype.
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
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets

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
        return hashlib.sha256(self.x.cpu().numpy().tobytes()).hexdigest()

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
            batch_sampler=[i.tolist() for i in indices], num_workers=self.workers,
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
    if workers < 0:
        raise ValueError(f"workers {workers}: must be 0 or more")
    if name not in NAMES and not name.endswith(".npz") and pathlib.Path(name).is_dir():
        if size is None:
            raise ValueError(
                f"{name}: a folder needs `size`, the side of the decoded square; give --image-size")
        if size < 1:
            raise ValueError(f"size {size}: must be 1 pixel or more; give another --image-size")
        folder, samples, classes = _from_folder(pathlib.Path(name), split)
        samples = [samples[i] for i in keep(len(samples))]
        return Folder(str(folder), samples, classes, size, device, workers)
    if name == "shapes":
        x, y, _ = shapes(2_000 if split == "test" else 10_000, seed=1 if split == "test" else 0)
        classes = len(SHAPES)
    elif name in NAMES:
        x, y, classes = _from_torchvision(name, root, split)
    elif name.endswith(".npz"):
        x, y, classes = _from_npz(name, split)
    else:
        raise ValueError(f"data {name!r}: not one of {', '.join(NAMES)}; not an .npz, and no such folder")
    rows = torch.as_tensor(keep(len(x)))
    return Images(x[rows].contiguous().to(device), y[rows].to(device), classes)


def fixed_order(n):
    """A permutation of 0 to n - 1, as a list: always the same one."""
    return np.random.default_rng(0).permutation(n).tolist()


def _from_torchvision(name, root, split):
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    if name == "stl10":
        which = {"split": {"train": "train+unlabeled", "labelled": "train", "test": "test"}[split]}
    else:
        which = {"train": split != "test"}
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 or not dist.is_initialized()
    if not first:
        dist.all_reduce(torch.zeros(1))  # until the first process of this host has downloaded it
    try:
        found = kind(root, download=True, **which)
    except Exception as e:
        why = " ".join(str(e).split())
        raise ValueError(
            f"{name} cannot be read from {root!r}, nor downloaded into it ({why}); put torchvision's files "
            "there, or use --data shapes or --data some.npz") from None
    if first and dist.is_initialized():
        dist.all_reduce(torch.zeros(1))
    x = torch.from_numpy(found.data)
    y = torch.as_tensor(np.asarray(found.labels if name == "stl10" else found.targets), dtype=torch.int64)
    return (x if name == "stl10" else x.permute(0, 3, 1, 2)), y, {"cifar100": 100}.get(name, 10)


def _from_npz(path, split):
    """x (N, 3, H, W) uint8, y (N,) int64 and the number of classes; y is -1 where the file has no labels."""
    part = "test" if split == "test" else "train"
    arrays = _read_npz(path, f"x_{part}", f"y_{part}", "y_train")
    needed = [f"x_{part}"]
    if split != "train":
        needed += [f"y_{part}", "y_train"]
    for key in needed:
        if key not in arrays:
            raise ValueError(f"{path}: {key} is not in it; it must hold x_train, x_test and their labels "
                             "y_train, y_test (for pretraining x_train alone will do)")
    x = arrays[f"x_{part}"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or not x.size:
        raise ValueError(
            f"{path}: x_{part} is {x.dtype} {x.shape}; it must be uint8 (N, H, W, 3), and not empty")
    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    if "y_train" not in arrays:
        return x, torch.full((len(x),), -1), 1
    y = arrays[f"y_{part}"]
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise ValueError(f"{path}: y_{part} is {y.dtype} {y.shape}; it must be integers ({len(x)},)")
    labels = arrays["y_train"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError(
            f"{path}: y_train is {labels.dtype} {labels.shape}; it must be integers (N,), N > 0")
    classes = max(1, int(labels.max()) + 1)
    if classes > max(len(labels), 100_000):
        raise ValueError(f"{path}: the largest label in y_train is {classes - 1}; "
                         "labels must be class numbers 0 to C - 1, not ids")
    if y.min() < -1 or y.max() >= classes:
        raise ValueError(f"{path}: y_{part} goes from {y.min()} to {y.max()}; "
                         f"y_train has classes 0 to {classes - 1}")
    return x, torch.from_numpy(y.astype(np.int64)), classes


def _read_npz(path, *keys):
    """{key: array}, of the arrays `keys`, those that the file has."""
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
    arrays = {}
    reading = "the whole"
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in keys:
                reading = key
                if key in archive.files:
                    arrays[key] = archive[key]
    except Exception as e:
        why = " ".join(str(e).split())
        if "allow_pickle" in why:  # what is not numbers would have to be unpickled, that is, executed
            why = "no array of numbers"
        raise ValueError(f"{refused} ({reading}: {why})") from None
    return arrays


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
    epoch. Raises ValueError as `steps_per_epoch` does.
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


# ----------------------------------------------------------------------------------------------------------
# Augmentation
# ----------------------------------------------------------------------------------------------------------
def to_float(x):
    """uint8 (0 to 255) -> float32 in [0, 1]; floats, which are in [0, 1] already, stay as they are.

    Raises ValueError for other dtypes.
    """
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not x.is_floating_point():
        raise ValueError(f"images are {x.dtype}: they must be uint8 (0 to 255), or floats in [0, 1]")
    return x


def _refuse_integers(x, function):
    if not x.is_floating_point():
        raise ValueError(f"{function}: images are {x.dtype}; it takes floats in [0, 1], as to_float gives")


def resized_crop(x, top, left, height, width, size, flip=None, filter="bilinear"):
    """Cut the box of each image and resize it to (size, size): torchvision's `resized_crop`, antialiased.

    x (B, 3, H, W) floats in [0, 1] or uint8 -> float in [0, 1]; top, left, height, width (B,) and size in
    pixels; flip (B,) bool mirrors the result; filter "bilinear" or "bicubic" (which overshoots, and is
    clipped). Resizing is linear and separable, so it is two batched matrix products; a crop and a mirror are
    only other rows in those matrices. Raises ValueError for other dtypes, and where size is below 1.
    """
    if size < 1:
        raise ValueError(f"size {size}: a crop has at least one pixel; give a larger --image-size")
    B, C, H, W = x.shape
    rows = _resize_matrix(FILTERS[filter], top, height, H, size, x.device)
    columns = _resize_matrix(FILTERS[filter], left, width, W, size, x.device, flip)
    x = to_float(x.permute(0, 2, 1, 3).contiguous())  # (B, H, C, W): both products find their axis in place
    x = (x.view(B, H * C, W) @ columns.transpose(1, 2)).view(B, H, C * size)
    x = (rows @ x).view(B, size, C, size).permute(0, 2, 1, 3).contiguous()
    return x.clamp_(0, 1) if filter == "bicubic" else x


def _cubic(t):
    """Keys' cubic with a = -1/2 (1981) of distances t >= 0, as in PIL."""
    near, far = ((1.5 * t - 2.5) * t * t).add_(1), (((2.5 - 0.5 * t) * t - 4) * t).add_(2)
    return torch.where(t < 1, near, torch.where(t < 2, far, 0.0))


FILTERS = {"bilinear": lambda t: t.neg().add_(1).clamp_min_(0), "bicubic": _cubic}


def _resize_matrix(filter, start, length, n_in, n_out, device, flip=None):
    """(B, n_out, n_in): the filter that resizes [start, start + length) of n_in samples to n_out."""
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / n_out
    out = torch.arange(n_out).expand(len(start), n_out)
    if flip is not None:
        out = torch.where(flip[:, None], n_out - 1 - out, out)
    center = (start + (out[:, :, None] + 0.5) * scale).to(device, non_blocking=True)
    support = scale.clamp_min(1).to(device, non_blocking=True)
    start, end = start.to(device, non_blocking=True), (start + length).to(device, non_blocking=True)
    tap = torch.arange(n_in, device=device) + 0.5
    w = filter((tap - center).abs_().div_(support))
    w *= (tap > start) & (tap < end)
    return w.div_(w.sum(2, keepdim=True))


def resize(x, size):
    """Images x (B, 3, H, W), floats in [0, 1] or uint8, as floats in [0, 1] of side `size` pixels; of that
    side already, their pixels do not change. Raises ValueError for other dtypes."""
    if x.shape[2:] == (size, size):
        return to_float(x)
    zero, one = torch.zeros(len(x)), torch.ones(len(x))
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
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width > 0) & (width <= W) & (height > 0) & (height <= H)
    first = fits.int().argmax(1, keepdim=True)
    width, height, u_top, u_left = [v.gather(1, first)[:, 0] for v in (width, height, u[:, 2], u[:, 3])]
    whole_w, whole_h = min(W, round(H * ratio[1])), min(H, round(W / ratio[0]))
    none = ~fits.any(1)
    width, height = width.masked_fill(none, whole_w), height.masked_fill(none, whole_h)
    top, left = (u_top * (H - height + 1)).floor(), (u_left * (W - width + 1)).floor()
    top, left = top.masked_fill(none, (H - whole_h) // 2), left.masked_fill(none, (W - whole_w) // 2)
    return top, left, height, width


def color_jitter(x, brightness, contrast, saturation, hue, order):
    """torchvision's `ColorJitter` of x (B, 3, H, W), floats in [0, 1], with given factors (B,), 1 for none,
    and hue (B,) in turns, 0 for none. They are applied in `order` (B, 4): each row a permutation of 0
    brightness, 1 contrast, 2 saturation, 3 hue. Raises ValueError for integers."""
    _refuse_integers(x, "color_jitter")
    place, by_place = (order == 3).int().argmax(1).sort()  # images whose hue comes first, second, ...: slices
    ends = [0, *place.bincount(minlength=4).cumsum(0).tolist()]
    blends = order[order != 3].view(-1, 3)[by_place]
    factors = [v.float()[by_place] for v in (brightness, contrast, saturation)]
    hue = hue.float()[by_place]
    x = x[by_place.to(x.device, non_blocking=True)]
    for i in range(4):
        hued = slice(ends[i], ends[i + 1])
        x[hued] = adjust_hue(x[hued], hue[hued])
        if i < 3:  # the others blend with black, with the mean grey, with the grey image
            op = blends[:, i]
            factor = torch.where(op == 0, factors[0], torch.where(op == 1, factors[1], factors[2]))
            f, to_mean, to_grey = _columns(x, factor, (1 - factor) * (op == 1), (1 - factor) * (op == 2))
            grey = _grey(x)
            base = (grey * to_grey).add_(to_mean * grey.mean((2, 3), keepdim=True))
            x.mul_(f).add_(base).clamp_(0, 1)
    return x[by_place.argsort().to(x.device, non_blocking=True)]


def adjust_hue(x, turn):
    """Rotate the hue of x (B, 3, H, W), floats in [0, 1], by `turn` (B,) in turns (1 is the whole circle):
    torchvision's `adjust_hue`. Raises ValueError for integers.

    HSV's own definition, read backwards: with V the maximum, C the range and d the distance, in turns around
    the colour circle, to the hue that lacks this channel (3/6 for red, 5/6 for green, 7/6 for blue), it is V
    - C clamp(2 - 6d, 0, 1). V and C do not change.
    """
    _refuse_integers(x, "adjust_hue")
    r, g, b = x.unbind(1)
    v = x.amax(1)
    c = v - x.amin(1)
    h = torch.where(v == r, g - b, torch.where(v == g, (b - r).add_(c, alpha=2), (r - g).add_(c, alpha=4)))
    h = h.div_(c.clamp_min(1e-12)).div_(6).add_(_columns(x, turn)[0][:, 0])
    d = h[:, None] - torch.arange(3, 8, 2, device=x.device).view(3, 1, 1) / 6
    d = d.sub_(d.round()).abs_()
    return d.mul_(6).sub_(2).clamp_(-1, 0).mul_(c[:, None]).add_(v[:, None])


def random_color_jitter(x, rng, brightness, contrast, saturation, hue, p=1.0):
    """torchvision's `RandomApply([ColorJitter(...)], p)`; the order of the four is random too, as there.

    x (B, 3, H, W) floats in [0, 1]. The factors go from 1 - brightness to 1 + brightness, and so on; the hue
    from -hue to hue, in turns. Raises ValueError for integers.
    """
    _refuse_integers(x, "random_color_jitter")
    u, order = rng.uniform(5), rng.uniform(4).argsort(1)
    rows = (u[:, 4] < p).nonzero()[:, 0]
    u, order = 2 * u[rows] - 1, order[rows]
    factors = [1 + strength * u[:, i] for i, strength in enumerate((brightness, contrast, saturation))]
    return _apply(lambda some: color_jitter(some, *factors, hue * u[:, 3], order), x, rows)


def grayscale(x, where):
    """torchvision's `rgb_to_grayscale`, three channels out, for the images `where` (B,) bool says.

    x (B, 3, H, W) floats in [0, 1]; raises ValueError for integers.
    """
    _refuse_integers(x, "grayscale")
    return _apply(_grey, x, where.nonzero()[:, 0])


def random_grayscale(x, rng, p):
    """torchvision's `RandomGrayscale(p)` of x (B, 3, H, W), floats in [0, 1]. Raises ValueError for
    integers."""
    return grayscale(x, rng.uniform(1)[:, 0] < p)


def gaussian_blur(x, sigma, kernel_size):
    """torchvision's `gaussian_blur` (reflected edges) of x (B, 3, H, W), floats in [0, 1], with a sigma (B,)
    in pixels for each image; 0 leaves an image as it is. kernel_size is in pixels too.

    Like resizing, two batched matrix products: row i of the matrix holds the kernel around i, folded at the
    edges. Raises ValueError for integers, for a kernel size that is not odd, and where half of it, rounded
    down, is not below both sides.
    """
    _refuse_integers(x, "gaussian_blur")
    B, C, H, W = x.shape
    radius = kernel_size // 2
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel size {kernel_size}: must be odd and positive")
    if radius >= min(H, W):
        raise ValueError(f"kernel size {kernel_size}: images to blur are {H} x {W}, and their sides must be "
                         f"at least {radius + 1}; give a larger --image-size")
    rows = sigma.nonzero()[:, 0]
    tap = torch.arange(-radius, radius + 1, device=x.device)[:, None]
    width = sigma[rows].float()[:, None].to(x.device, non_blocking=True)
    kernel = torch.softmax(-0.5 * (tap.T / width) ** 2, 1)  # (b, kernel)

    def matrix(n):
        source = (torch.arange(n, device=x.device) + tap).abs()  # (kernel, n)
        source = torch.where(source >= n, 2 * (n - 1) - source, source)
        return (kernel @ F.one_hot(source, n).flatten(1).float()).view(-1, n, n)

    def blur(x):
        x = x.permute(0, 2, 1, 3).reshape(-1, H * C, W) @ matrix(W).transpose(1, 2)
        return (matrix(H) @ x.view(-1, H, C * W)).view(-1, H, C, W).permute(0, 2, 1, 3)

    return _apply(blur, x, rows)


def random_gaussian_blur(x, rng, sigma, p, kernel_size):
    """torchvision's `RandomApply([GaussianBlur(kernel_size, sigma)], p)`.

    x (B, 3, H, W) floats in [0, 1]; sigma (from, to) and kernel_size in pixels. Errors: `gaussian_blur`'s.
    """
    u = rng.uniform(2)
    drawn = sigma[0] + (sigma[1] - sigma[0]) * u[:, 0]
    return gaussian_blur(x, torch.where(u[:, 1] < p, drawn, 0.0), kernel_size)


def solarize(x, where, threshold=0.5):
    """torchvision's `solarize` (invert from the threshold up) for the images `where` (B,) bool says.

    x (B, 3, H, W) floats in [0, 1], and so is the threshold; raises ValueError for integers.
    """
    _refuse_integers(x, "solarize")
    return torch.where(_columns(x, where)[0] & (x >= threshold), 1 - x, x)


def random_solarize(x, rng, p, threshold=0.5):
    """torchvision's `RandomSolarize(threshold, p)` of x (B, 3, H, W), floats in [0, 1], as is the threshold;
    raises ValueError for integers."""
    return solarize(x, rng.uniform(1)[:, 0] < p, threshold)


def flip(x, where):
    """torchvision's `hflip` for the images `where` (B,) bool says; x (B, 3, H, W) of any dtype."""
    return torch.where(_columns(x, where)[0], x.flip(3), x)


def random_flip(x, rng, p=0.5):
    """torchvision's `RandomHorizontalFlip(p)` of x (B, 3, H, W) of any dtype."""
    return flip(x, rng.uniform(1)[:, 0] < p)


def pad_crop(x, top, left, padding, mode="constant"):
    """Pad all sides as torchvision's `pad` does (constant 0, or reflect), cut (H, W) at top, left (B,).

    x (B, 3, H, W) floats in [0, 1] or uint8 -> float in [0, 1]; padding, top and left in pixels. Raises
    ValueError for other dtypes, and where there is not enough to reflect: both sides must be above `padding`.
    """
    B, C, H, W = x.shape
    if mode == "reflect" and padding >= min(H, W):
        raise ValueError(f"padding {padding} by reflection: images are {H} x {W}, and their sides must be at "
                         f"least {padding + 1}; give a larger --image-size")
    padded = F.pad(to_float(x), [padding] * 4, mode=mode)
    rows = (top.long()[:, None] + torch.arange(H)).to(x.device, non_blocking=True)
    columns = (left.long()[:, None] + torch.arange(W)).to(x.device, non_blocking=True)
    image = torch.arange(B, device=x.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_pad_crop(x, rng, padding, mode="constant"):
    """torchvision's `RandomCrop(side, padding, padding_mode=mode)`; padding in pixels.

    x (B, 3, H, W) floats in [0, 1] or uint8 -> float in [0, 1]. Errors: `pad_crop`'s.
    """
    top, left = (rng.uniform(2) * (2 * padding + 1)).floor().unbind(1)
    return pad_crop(x, top, left, padding, mode)


def _apply(f, x, rows):
    """x with `f` applied to the images `rows` (a CPU tensor of indices: no host sync)."""
    if not len(rows):
        return x
    rows = rows.to(x.device, non_blocking=True)
    x = x.clone()
    x[rows] = f(x[rows])
    return x


def _grey(x):
    r, g, b = x.unbind(1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]


def _columns(x, *per_image):
    """(B,) tensors on the CPU -> (B, 1, 1, 1) on the device of `x`."""
    return [v.to(x.device, non_blocking=True).view(-1, 1, 1, 1) for v in per_image]


# ----------------------------------------------------------------------------------------------------------
# Shapes: ten classes that need no download
# ----------------------------------------------------------------------------------------------------------
def _star(u, v):
    r, a = torch.hypot(u, v), torch.atan2(u, v)
    a = (a + math.pi / 5).remainder(2 * math.pi / 5) - math.pi / 5  # five-fold symmetric: tip at 0
    p, q = r * a.cos(), r * a.sin().abs()
    return (1.05 - p) * 0.95 > 2.0 * q * 0.72


SHAPES = {  # where a point (u, v) of the square [-1.1, 1.1]^2 belongs to the shape
    "disc": lambda u, v: u**2 + v**2 < 0.75,
    "ring": lambda u, v: ((u**2 + v**2) - 0.65).abs() < 0.3,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.75,
    "triangle": lambda u, v: (v > -0.6) & (1.73 * u.abs() < 1.1 - v),
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.27) & (torch.maximum(u.abs(), v.abs()) < 0.95),
    "star": _star,
    "crescent": lambda u, v: (u**2 + v**2 < 0.95) & ((u - 0.5) ** 2 + v**2 > 0.55),
    "bar": lambda u, v: (u.abs() < 1.0) & (v.abs() < 0.36),
    "corner": lambda u, v: (torch.maximum(u.abs(), v.abs()) < 0.85) & (torch.minimum(u, v) < -0.25),
    "pair": lambda u, v: (u.abs() - 0.6) ** 2 + v**2 < 0.17,
}


def shapes(n, seed):
    """`n` procedural images: x (n, 3, 32, 32) uint8, y (n,) int64, mask (n, 32, 32) float, the covered part
    of a pixel.

    The label is the shape (`SHAPES`, evenly, in random order). Position, size, rotation, the two colours, the
    texture of figure and ground (gradients, stripes, blobs), and noise are drawn independently of it.
    """
    g = torch.Generator().manual_seed(_seed(seed, n))
    y = (torch.arange(n) % len(SHAPES))[torch.randperm(n, generator=g)]
    parts = [_draw_shapes(part, g) for part in y.split(1000)]
    return torch.cat([x for x, _ in parts]), y, torch.cat([mask for _, mask in parts])


def _draw_shapes(y, g):
    def rand(*shape, lo=0.0, hi=1.0):
        return lo + (hi - lo) * torch.rand(len(y), *shape, generator=g)

    # The figure: two samples a pixel each way, in the shape's own frame.
    at = (torch.arange(64) + 0.5) / 32 - 1
    size, angle = rand(1, 1, lo=0.5, hi=0.85), rand(1, 1, hi=2 * math.pi)
    cx, cy = ((1 - size) * rand(1, 1, lo=-1) for _ in range(2))
    dx, dy = (at[None, None, :] - cx) / size, (at[None, :, None] - cy) / size
    u, v = angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx
    inside = torch.empty(len(y), 64, 64)
    for label, shape in enumerate(SHAPES.values()):
        inside[y == label] = shape(u[y == label], v[y == label]).float()
    mask = F.avg_pool2d(inside[:, None], 2)

    def texture():  # (n, 3, 32, 32) about zero: a wave (a gradient to stripes) and blobs, each in a colour
        px = (torch.arange(32) + 0.5) / 16 - 1
        k, phase = rand(2, 1, 1, lo=-9, hi=9) * rand(1, 1, 1), rand(1, 1, hi=2 * math.pi)
        wave = torch.sin(k[:, 0] * px[None, None, :] + k[:, 1] * px[None, :, None] + phase)[:, None]
        blobs = F.interpolate(rand(3, 5, 5, lo=-1), size=32, mode="bicubic", align_corners=False)
        return 0.03 * rand(3, 1, 1, lo=-1) * wave + 0.05 * rand(1, 1, 1) * blobs

    # Colours that differ too much would tell images apart by themselves: nothing would be left to learn from
    # the figure.
    colour = rand(1, 1, 1, lo=0.3, hi=0.7) + rand(3, 1, 1, lo=-0.06, hi=0.06)
    side = torch.where(rand(1, 1, 1) < 0.5, -1.0, 1.0)  # the figure is darker or lighter than its ground
    figure = colour + side * (rand(1, 1, 1, lo=0.25, hi=0.5) + rand(3, 1, 1, lo=-0.045, hi=0.045)) + texture()
    ground = colour + texture()
    x = torch.lerp(ground, figure, mask)
    x = x + 0.06 * rand(1, 1, 1) * torch.randn(x.shape, generator=g)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8), mask[:, 0]
