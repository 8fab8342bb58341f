"""Files that survive: written whole or not at all, read back only if intact, and one process to a
folder."""
import collections
import contextlib
import json
import os
import pathlib
import pickle
import zipfile

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# In what torch.save says where a file cannot be written.
WRITER_SAYS = ("inline_container", "PytorchStreamWriter", "PyTorchFileWriter", "iostream error")


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; when the block ends well, what was written there becomes
    `path`.

    The file is forced to disk before it is renamed, so that a crash leaves the old file or the new one.
    Raises OSError that names `path` and the reason where it cannot be written; the old file then stays.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save says RuntimeError where the disk is full
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(e, RuntimeError) and not any(words in str(e) for words in WRITER_SAYS):
            raise
        raise OSError(f"{path} cannot be written: {_reason(e, path)}") from None
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _reason(error, path):
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with contextlib.suppress(OSError):
        free = os.statvfs(path.parent)
        if free.f_bavail * free.f_frsize < 2**24:
            return "No space left on device"
    why = str(error).splitlines()[0]
    return f"the disk, or a quota, may be full ({why})" if isinstance(error, RuntimeError) else why


def save(value, path):
    """`torch.save` of tensors and plain types, by `replacing`."""
    with replacing(path) as temporary:
        torch.save(value, temporary)


def load(path):
    """What `save` wrote to `path`, on the CPU. Nothing in the file is executed.

    Raises FileNotFoundError, or ValueError that says why the file cannot be used: every part of it has a
    checksum, so that one flipped bit is seen.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: holds more than tensors and plain types (a whole pickled module?); save its "
                         "state_dict() instead") from None
    except Exception as e:
        raise ValueError(f"{path}: cannot be read ({type(e).__name__}), perhaps truncated") from None
    raise ValueError(f"{path}: is damaged ({damaged} does not have its checksum)")


def end_of(path):
    """The last 64 KiB of a file, None where there is none to be read. In what `save` wrote they hold the
    checksums of its last parts."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, os.path.getsize(path) - 2**16))
            return f.read()
    except OSError:
        return None


def not_finite(value, name=""):
    """The name of the first tensor within `value` (dicts, lists, tensors) that has a NaN or an infinity;
    None if there is none. Names are the keys, joined by dots."""
    if isinstance(value, torch.Tensor):
        bad = value.is_floating_point() and not value.isfinite().all()
        return name if bad else None
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return None
    for key, part in items:
        found = not_finite(part, f"{name}.{key}" if name else str(key))
        if found:
            return found
    return None


def json_lines(path):
    """The lines of a .jsonl file as (line number from 1, object or None); None: not a JSON object. An
    absent file has no lines. A last line that was cut off, as by a crash, is such a None."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text.decode())
        except ValueError:  # not JSON, not UTF-8
            line = None
        found.append((number, line if isinstance(line, dict) else None))
    return found


def append_json_line(path, line):
    """Add an object to a .jsonl file and force it to disk, on a line of its own even where the last was cut
    off. Raises OSError that names the file."""
    path = pathlib.Path(path)
    try:
        cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        with open(path, "a") as f:
            f.write("\n" * cut + json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise OSError(f"{path} cannot be written: {e.strerror}") from None


_locks = {}  # folder -> open file; closing it would release the lock


def lock(folder):
    """Keep other processes out of `folder` until this one ends, however it ends. It may ask again.

    Raises ValueError where another process is at work there, OSError where the folder cannot be written.
    The lock is POSIX's: processes that this one forks (workers) do not hold it. Without fcntl (Windows),
    nothing.
    """
    folder = pathlib.Path(folder).resolve()
    if fcntl is None or folder in _locks:
        return
    try:
        file = open(folder / ".lock", "a")
    except OSError as e:
        raise OSError(f"{folder} cannot be written: {e.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder}: another process is at work there; wait for it, or use another "
                         "folder") from None
    except OSError:  # a file system without locks
        file.close()
        return
    _locks[folder] = file


def load_strict(net, state, path):
    """`net.load_state_dict(state)`; a missing, unexpected or misshaped tensor, or one that is not finite,
    is a ValueError naming it and the file, `path`. Nothing is loaded then."""
    want = net.state_dict()
    for key in dict.fromkeys([*want, *state]):
        if key not in state:
            raise ValueError(f"{path}: {key} is missing")
        if key not in want:
            raise ValueError(f"{path}: {key} is unexpected")
        if not isinstance(state[key], torch.Tensor):
            raise ValueError(f"{path}: {key} is a {type(state[key]).__name__}, not a tensor")
        if state[key].shape != want[key].shape:
            raise ValueError(f"{path}: {key} is {tuple(state[key].shape)}, expected {tuple(want[key].shape)}")
    bad = not_finite(state)
    if bad:
        raise ValueError(f"{path}: {bad} is not finite")
    load_state(net, state)


def load_state(net, state):
    """`net.load_state_dict(state)` of a plain dict, whose layout is the one that `net` itself would write:
    torchvision's MNASNet asks which one it is."""
    state = collections.OrderedDict(state)
    state._metadata = getattr(net.state_dict(), "_metadata", {})
    net.load_state_dict(state)
