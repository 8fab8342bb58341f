"""What strangers do: finished runs without their checkpoint, data that has moved, networks of one's own that
change, share a BatchNorm or import their neighbours, weights of older programs, consoles of few letters."""
import argparse
import importlib
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import amoc
import eval as command
from common import encoders, resnet, run
from common.resnet import BranchNorm, branch
from evaluation import foreign, results
from tests.scripts import ROOT, SCRIPTS, TINY, tiny_npz

OWN = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn
from beside_it import WIDTH

@dataclass
class Sizes:
    width: int = WIDTH

class Net(nn.Module):
    def __init__(self, **norm):
        super().__init__()
        width = Sizes().width
        self.conv = nn.Conv2d(3, width, 3, 2)
        self.again = nn.Conv2d(width, width, 3, 2)
        self.norm = nn.BatchNorm2d(width, **norm)
        self.same_norm = self.norm

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.same_norm(self.again(x)).mean((2, 3))

def make():
    return Net()

def of_batches():
    return Net(track_running_stats=False)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    # As in a process of its own: the folders of other tests may hold modules of the same names.
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if "pytest-of" not in folder])
    monkeypatch.delitem(sys.modules, "beside_it", raising=False)
    (tmp_path / "beside_it.py").write_text("WIDTH = 6\n")
    (tmp_path / "mine.py").write_text(OWN)
    return str(tmp_path / "mine.py")


def run_amoc(npz, out, *more):
    amoc.main([*TINY, *SCRIPTS["amoc"], "--epochs", "1", "--warmup", "0", "--data", str(npz), "--out", str(out), *more])


@pytest.fixture
def ended(tmp_path):
    """A run that has ended, and its data."""
    tiny_npz(tmp_path / "images.npz")
    run_amoc(tmp_path / "images.npz", tmp_path / "run")
    return tmp_path / "run", tmp_path / "images.npz"


def test_an_ended_run_without_its_checkpoint_is_not_written_over(ended):
    out, npz = ended
    (out / "last.pt").unlink()
    before = {name: (out / name).read_bytes() for name in ("log.jsonl", "encoder.pt")}
    with pytest.raises(ValueError, match="holds the encoder.pt of a run that has ended, but no last.pt"):
        run_amoc(npz, out)
    (out / "log.jsonl").rename(out / "elsewhere")
    with pytest.raises(ValueError, match="move encoder.pt away"):
        run_amoc(npz, out, "--seed", "1")
    assert before == {"log.jsonl": (out / "elsewhere").read_bytes(), "encoder.pt": (out / "encoder.pt").read_bytes()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_writes_over_a_run_of_its_default_length(script, tmp_path):
    """--epochs may be a default that only the script knows; the log has the number of steps."""
    (tmp_path / "encoder.pt").write_bytes(b"hours of work")
    args = importlib.import_module(script).parser().parse_args(["--out", str(tmp_path)])
    with pytest.raises(ValueError, match="move encoder.pt away"):
        run.resume(args, None, {"log": SimpleNamespace(steps=10, data={}, listing=None)})
    assert run.resume(args, None, {"log": SimpleNamespace(steps=0, data={}, listing=None)}) == 0


def test_a_run_that_came_to_nothing_does_not_keep_its_folder(ended, tmp_path):
    out, npz = ended
    first, epoch = (out / "log.jsonl").read_text().splitlines()
    new = tmp_path / "new"
    new.mkdir()
    (new / "log.jsonl").write_text(f"{first}\n{epoch}\n")
    with pytest.raises(ValueError, match="--lr 0.1 there, 0.5 here"):
        run_amoc(npz, new, "--lr", "0.5")
    (new / "log.jsonl").write_text(f"{first}\n")
    run_amoc(npz, new, "--lr", "0.5")
    assert '"lr": 0.5' in (new / "log.jsonl").read_text().splitlines()[0]


def test_a_run_goes_on_where_its_images_have_moved_and_only_with_them(ended, tmp_path, capsys):
    out, npz = ended
    moved = tmp_path / "moved.npz"
    shutil.copy(npz, moved)
    capsys.readouterr()
    run_amoc(moved, out)
    assert "continues after 3 steps" in capsys.readouterr().out
    tiny_npz(moved, 48)
    with pytest.raises(ValueError, match=r"--data .*images.npz there, .*moved.npz here"):
        run_amoc(moved, out)


def test_a_run_from_before_a_flag_was_there_goes_on_where_it_is_off(ended, capsys):
    out, npz = ended
    saved = torch.load(out / "last.pt", weights_only=True)
    flags = {name: value for name, value in saved["flags"].items() if name not in ("warmup", "graph")}
    torch.save({**saved, "flags": flags}, out / "last.pt")
    run_amoc(npz, out)  # with --warmup 0
    assert "continues after 3 steps" in capsys.readouterr().out
    torch.save({**saved, "flags": {name: value for name, value in flags.items() if name != "lam"}}, out / "last.pt")
    with pytest.raises(ValueError, match="--lam None there, 0.5 here"):
        run_amoc(npz, out)


def test_a_checkpoint_from_beyond_the_end_is_refused(ended):
    out, npz = ended
    saved = torch.load(out / "last.pt", weights_only=True)
    for step in (10**6, "2"):
        torch.save({**saved, "step": step}, out / "last.pt")
        with pytest.raises(ValueError, match=f"is after {step} steps, and the run has 3"):
            run_amoc(npz, out)


@pytest.mark.parametrize("file, old, new", [("mine.py", "relu()", "tanh()"), ("beside_it.py", "6", "3 + 3")])
def test_a_network_of_ones_own_that_has_changed_is_another_one(own, tmp_path, file, old, new):
    npz = tmp_path / "images.npz"
    tiny_npz(npz)
    run_amoc(npz, tmp_path / "run", "--arch", f"{own}:make")
    args = argparse.Namespace(encoder=None, seed=0, data="x")
    shown = argparse.Namespace(size=32, train_digest="t")

    def key():
        encoder = encoders.load_encoder(tmp_path / "run" / "encoder.pt")
        return results.key_of(tmp_path / "run" / "encoder.pt", encoder, "knn", None, args, shown)

    before = key()
    assert key() == before
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(old, new))
    with pytest.warns(UserWarning, match="mine.py:make has changed"):
        assert key() != before
    with pytest.raises(ValueError, match="a run of another network: .*mine.py, or what it imports, has changed since"):
        run_amoc(npz, tmp_path / "run", "--arch", f"{own}:make")


def test_a_batchnorm_with_two_names_stays_one(own):
    net = encoders.make(f"{own}:make", ("clean", "adv")).net
    assert isinstance(net.norm, BranchNorm) and net.same_norm is net.norm
    with branch(net, "adv"):
        net.train()(torch.rand(4, 3, 16, 16))
    assert net.norm.branches["adv"].num_batches_tracked == 2 and net.norm.branches["clean"].num_batches_tracked == 0


def test_a_batchnorm_without_running_statistics_is_refused(own):
    with pytest.raises(ValueError, match="its BatchNorm norm keeps no running statistics"):
        encoders.make(f"{own}:of_batches")


def test_weights_that_do_not_count_batches_are_taken():
    net = encoders.make("slim")
    state = {key: value + 1 for key, value in net.state_dict().items() if "num_batches" not in key}
    foreign.load_into(net, state, "old.pth")
    assert torch.equal(net.state_dict()["bn1.running_mean"], state["bn1.running_mean"])
    del state["bn1.running_mean"]
    with pytest.raises(ValueError, match="1 missing .bn1.running_mean."):
        foreign.load_into(net, state, "old.pth")


def test_only_the_blocks_of_this_projects_networks_are_known():
    assert all(encoders.has_blocks(encoders.make(arch)) for arch in ("slim", "preact_slim", "vit_slim"))
    assert not encoders.has_blocks(nn.Sequential(resnet._conv(3, 4, 3), nn.TransformerEncoderLayer(8, 2)))


def test_a_rate_by_depth_is_not_claimed_for_a_network_whose_depth_is_not_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npz = tiny_npz("images.npz")
    (tmp_path / "plain.py").write_text(
        "from torch import nn\n\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n")
    torch.save({"0.weight": torch.rand(4, 3, 3, 3), "0.bias": torch.zeros(4)}, "weights.pth")
    words = ["weights.pth", "--encoder", "plain.py:make", "--data", npz, "--device", "cpu", "--preset", "mae-tune-cifar",
             "--epochs", "1", "--warmup", "0", "--batch-size", "16", "--attacks", "clean"]
    for flag in ("--layer-decay", "--drop-path"):
        with pytest.raises(ValueError, match=f"weights.pth: {flag} needs a network of this project"):
            command.main([*words, flag, "0.5"])
    command.main(words)
    (line,) = [json.loads(line) for line in open("eval.jsonl")]
    (warning,) = line["results"]["clean"]["warnings"]
    assert "layer decay and drop path have no effect" in warning


def test_an_encoder_of_another_side_says_which_flag_would_help(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    npz = tiny_npz("images.npz")
    (tmp_path / "large.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5))\n")
    torch.save({"1.weight": torch.rand(5, 3 * 64 * 64), "1.bias": torch.zeros(5)}, "weights.pth")
    words = ["weights.pth", "--encoder", "large.py:make", "--data", npz, "--device", "cpu", "--preset", "knn"]
    with pytest.raises(ValueError, match="weights.pth: takes no images of side 32 .*by --image-size"):
        command.main(words)
    command.main([*words, "--image-size", "64"])
    assert "weights.pth knn clean" in capsys.readouterr().out


def test_a_console_without_a_letter_shows_something_else():
    code = "from common import run; run.cli(lambda: print('42 \\u00b1 1\\u2020'))"
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={"PYTHONIOENCODING": "ascii", "PATH": ""}, timeout=120)
    assert (done.returncode, done.stdout) == (0, "42 ? 1?\n"), done.stderr
