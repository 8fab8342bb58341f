import os
import pathlib
import sys
import time

import pytest
import torch

from common import files
from tests.processes import Forked


def test_any_flipped_bit_is_seen(tmp_path):
    """Each byte of the file in turn, or a sample of them: what loads without a word is what was saved."""
    path = tmp_path / "x.pt"
    want = {"weights": torch.arange(6.0), "step": 3}
    files.save(want, path)
    whole, silent = path.read_bytes(), []
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            got = files.load(path)
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e)
        else:
            if got["step"] != 3 or not torch.equal(got["weights"], want["weights"]):
                silent.append(at)
    assert not silent


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"),
                                   RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
                                   RuntimeError("basic_ios::clear: iostream error")])
def test_a_write_that_fails_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, error):
    files.save({"step": 1}, tmp_path / "x.pt")

    def fail(value, path):
        pathlib.Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"x\.pt cannot be written: \S") as raised:
        files.save({"step": 2}, tmp_path / "x.pt")
    assert "\n" not in str(raised.value)
    assert files.load(tmp_path / "x.pt") == {"step": 1} and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a leaf variable was overwritten by an in-place write")])
def test_an_exception_inside_leaves_the_old_file_and_passes(tmp_path, error):
    (tmp_path / "x").write_text("old")
    with pytest.raises(type(error)) as raised, files.replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
        raise error
    assert raised.value is error
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_a_pickled_module_is_named_for_what_it_is(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="state_dict"):
        files.load(tmp_path / "x.pt")


def test_the_first_tensor_that_is_not_finite_is_named():
    value = {"a": torch.zeros(2), "b": [torch.tensor([1]), {"c": torch.tensor([1.0, float("inf")])}], "d": 5}
    assert files.not_finite(value) == "b.1.c"
    assert files.not_finite({"a": [torch.zeros(2), "text", None, float("nan")]}) is None


def test_lines_that_are_no_objects_are_none(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n5\n[1]\n\xff\xfe\n\n{"b": 2}\n{"c"')
    assert files.json_lines(path) == [(1, {"a": 1}), (2, None), (3, None), (4, None), (6, {"b": 2}), (7, None)]
    files.append_json_line(path, {"d": 4})
    assert files.json_lines(path)[-1] == (8, {"d": 4})
    assert files.json_lines(tmp_path / "absent") == []


def test_a_folder_is_locked_against_other_processes_until_death(tmp_path):
    def other(number, more=""):
        (tmp_path / "lock.py").write_text(f"from common import files\nfiles.lock({str(tmp_path / 'run')!r})\n{more}")
        with open(tmp_path / f"{number}.txt", "w") as printed:
            return Forked([sys.executable, str(tmp_path / "lock.py")], printed)

    (tmp_path / "run").mkdir()
    holder = other(1, "import time\nprint('locked', flush=True)\ntime.sleep(600)")
    while "locked" not in (tmp_path / "1.txt").read_text():
        assert holder.poll() is None
        time.sleep(0.01)
    assert other(2).wait(60) == 1
    assert "another process is at work there" in (tmp_path / "2.txt").read_text()
    holder.kill()
    holder.wait(60)
    assert other(3).wait(60) == 0
    tmp_path = tmp_path / "run"
    files.lock(tmp_path), files.lock(tmp_path)  # the same process may ask again
