"""Behaviour that all scripts share. A fault found in one gets its test here, so that the siblings are tried
too."""

import argparse
import ast
import importlib
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from common import encoders, run
from tests.scripts import PICTURES, ROOT, SCRIPTS, TINY, command, environment, launch, tiny_npz

pytestmark = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return tiny_npz(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(autouse=True)
def quiet_signals():
    kept = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    for s, handler in kept:
        signal.signal(s, handler)


def flags(script, npz, out, *more):
    return [*TINY, *SCRIPTS[script], "--data", npz, "--out", str(out), *more]


def main(script, npz, out, *more):
    importlib.import_module(script).main(flags(script, npz, out, *more))
    return pathlib.Path(out)


def lines(out):
    return [json.loads(line) for line in open(pathlib.Path(out) / "log.jsonl")]


def same_result(a, b):
    """Checkpoints, exported encoders and logged numbers (not the clock's) are equal bit for bit."""
    for name in ("last.pt", "encoder.pt"):
        x, y = (torch.load(pathlib.Path(out) / name, weights_only=True) for out in (a, b))
        for part in ("state", "step", "branch"):
            assert equal(x.get(part), y.get(part)), (name, part)
    clock = {"images_per_second", "seconds", "cpu_seconds"}
    for x, y in zip(lines(a)[1:], lines(b)[1:], strict=True):
        assert {k: v for k, v in x.items() if k not in clock} == {
            k: v for k, v in y.items() if k not in clock
        }


def equal(x, y):
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x if k not in ("log",))
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_a_run_writes_log_checkpoint_encoder_and_pictures(script, npz, tmp_path):
    out = main(script, npz, tmp_path)
    head, *epochs = lines(out)
    assert (
        head["flags"]["batch_size"] == 16 and {"command", "commit", "torch", "device", "world"} <= head.keys()
    )
    assert [e["epoch"] for e in epochs] == [0, 1]
    assert all({"loss", "lr", "images_per_second", "seconds", "cpu_seconds"} <= e.keys() for e in epochs)
    x = torch.rand(2, 3, 32, 32)
    encoder = encoders.load_encoder(out / "encoder.pt")
    assert encoder(x).shape == (2, encoder.dim)
    assert (out / PICTURES.get(script, "views.png")).stat().st_size > 1000 and not list(out.glob("*tmp*"))
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 6


def test_same_seed_same_run_and_another_seed_another(script, npz, tmp_path):
    a, b = main(script, npz, tmp_path / "a"), main(script, npz, tmp_path / "b")
    same_result(a, b)
    c = main(script, npz, tmp_path / "c", "--seed", "1")
    assert lines(c)[1]["loss"] != lines(a)[1]["loss"]


def test_a_finished_run_continues_to_the_same_end(script, npz, tmp_path):
    a, b = main(script, npz, tmp_path / "a"), main(script, npz, tmp_path / "b")
    (a / "encoder.pt").unlink()
    main(script, npz, a)
    same_result(a, b)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at_step", [1, 3, 4])
def test_a_killed_run_resumes_bit_for_bit(script, npz, tmp_path, monkeypatch, at_step):
    """Death without notice after any step: the run goes on from the last checkpoint, and nothing shows."""
    whole = main(script, npz, tmp_path / "whole")

    def die(args, env, state, step):
        if step == at_step:
            raise Killed

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(run, "interrupted", die)
        main(script, npz, tmp_path / "cut")
    same_result(main(script, npz, tmp_path / "cut"), whole)


@pytest.mark.parametrize("number, at_step", [(signal.SIGTERM, 2), (signal.SIGTERM, 3), (signal.SIGINT, 4)])
def test_a_signal_saves_within_the_epoch_and_the_run_resumes_bit_for_bit(
    script, npz, tmp_path, monkeypatch, number, at_step
):
    whole = main(script, npz, tmp_path / "whole")
    ask = run.interrupted

    def after(args, env, state, step):
        if step == at_step:
            signal.raise_signal(number)
        ask(args, env, state, step)

    with monkeypatch.context() as m, pytest.raises(SystemExit) as stopped:
        m.setattr(run, "interrupted", after)
        main(script, npz, tmp_path / "cut")
    assert stopped.value.code == 128 + number
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == at_step
    same_result(main(script, npz, tmp_path / "cut"), whole)


def test_kill_9_from_outside(script, npz, tmp_path):
    """A real process, killed once its first checkpoint is there; what it was writing is no obstacle."""
    whole = main(script, npz, tmp_path / "whole", "--epochs", "6")
    cut = tmp_path / "cut"
    process = subprocess.Popen(command(script, *flags(script, npz, cut, "--epochs", "6")), env=environment())
    while not (cut / "last.pt").exists():
        assert process.poll() is None or (cut / "last.pt").exists()
        time.sleep(0.01)
    process.kill()
    process.wait()
    (cut / "last.pt.tmp").write_bytes(b"half a checkpoint")
    with open(cut / "log.jsonl", "a") as f:
        f.write('{"epoch": 7, "lo')
    main(script, npz, cut, "--epochs", "6")
    same_result(cut, whole)


def test_sigterm_from_outside_exits_without_a_traceback(script, npz, tmp_path):
    process = subprocess.Popen(
        command(script, *flags(script, npz, tmp_path, "--epochs", "1000")),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "last.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in output and "the same command continues" in output


def test_two_processes_run_and_start_about_where_one_does(script, npz, tmp_path):
    """The first step's loss is a mean over the same views with the same attack; BatchNorm's batches differ,
    hence 'about'."""
    one = main(script, npz, tmp_path / "one", "--epochs", "1", "--limit", "16")
    done = launch(
        script, *flags(script, npz, tmp_path / "two", "--epochs", "1", "--limit", "16"), processes=2
    )
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "two")[0]["world"] == 2
    assert lines(tmp_path / "two")[1]["loss"] == pytest.approx(lines(one)[1]["loss"], rel=0.2)


def test_two_processes_resume_bit_for_bit(script, npz, tmp_path):
    for out, more in (("whole", []), ("cut", ["--save-every", "5"])):
        done = launch(script, *flags(script, npz, tmp_path / out, *more), processes=2)
        assert done.returncode == 0, done.stderr
    path = tmp_path / "cut" / "last.pt"
    finished = torch.load(path, weights_only=True)
    assert finished["step"] == 6
    path.unlink()
    done = launch(script, *flags(script, npz, tmp_path / "cut"), processes=2)
    assert done.returncode == 0, done.stderr
    same_result(tmp_path / "cut", tmp_path / "whole")


def test_another_configuration_in_the_same_folder_is_refused(script, npz, tmp_path):
    out = main(script, npz, tmp_path, "--epochs", "1")
    before = (out / "last.pt").read_bytes(), (out / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"--lr .* there, 0\.5 here.*another --out"):
        main(script, npz, tmp_path, "--epochs", "1", "--lr", "0.5")
    (out / "last.pt").rename(out / "kept")
    with pytest.raises(ValueError, match="--seed 0 there, 3 here"):
        main(script, npz, tmp_path, "--epochs", "1", "--seed", "3")
    assert before == ((out / "kept").read_bytes(), (out / "log.jsonl").read_bytes())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(script, npz, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    step, count = module.train_step, []

    def broken(*args):
        losses = step(*args)
        count.append(1)
        return {k: v * float("nan") for k, v in losses.items()} if len(count) == 5 else losses

    monkeypatch.setattr(module, "train_step", broken)
    with pytest.raises(
        ValueError, match=r"not finite in epoch 1, step 4; the last good checkpoint is .*last\.pt"
    ):
        main(script, npz, tmp_path)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize(
    "more, words",
    [
        (["--data", "cifar11"], "cifar11.*cifar10, cifar100, stl10, shapes"),
        (["--data", "none.npz"], "none.npz: no such file"),
        (["--batch-size", "64"], "64 is larger than the data: 44"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--arch", "resnet1"], "resnet1.*slim, resnet18"),
        (["--device", "cuda:9"], "cuda:9 cannot be used"),
        (["--limit", "0"], "limit 0"),
        (["--save-every", "0"], "--save-every 0"),
        (["--epochs", "-1"], "--epochs -1"),
    ],
)
def test_bad_flags_are_named_before_anything_is_lost(script, npz, tmp_path, more, words):
    with pytest.raises((ValueError, OSError), match=words):
        main(script, npz, tmp_path, *more)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", None])
def test_a_checkpoint_that_cannot_be_read_is_named(script, npz, tmp_path, content):
    if content is None:
        torch.save({"weights": torch.zeros(3)}, tmp_path / "last.pt")
    else:
        (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt: not a checkpoint that can be read"):
        main(script, npz, tmp_path)
    assert (tmp_path / "last.pt").exists()


def test_an_error_is_one_line_and_a_non_zero_exit(script, npz, tmp_path):
    (tmp_path / "file").touch()
    for more in (["--data", "cifar11"], ["--out", str(tmp_path / "file" / "run")]):
        done = launch(script, *flags(script, npz, tmp_path, *more))
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
            done.stderr
        )


def test_importing_does_nothing_and_imports_run_one_way(script, npz, tmp_path):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} | {
        a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    assert not {m.split(".")[0] for m in modules} & ({*SCRIPTS, "eval"} - {script})
    done = subprocess.run(
        [sys.executable, "-c", f"import {script}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stdout and not done.stderr


def test_order_of_the_file_and_its_width(script, npz, tmp_path):
    text = (ROOT / f"{script}.py").read_text()
    names = [n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    places = [names.index(n) for n in ("train_step", "parser", "main")]
    assert places == sorted(places)
    assert len(text.splitlines()) <= 300 and max(map(len, text.splitlines())) <= 110


def test_housekeeping_flags_are_the_same_everywhere(script, npz, tmp_path):
    house = {a.option_strings[0]: a for a in run.parser("", "x", "resnet18")._actions}
    own = {a.option_strings[0]: a for a in importlib.import_module(script).parser()._actions}
    assert isinstance(importlib.import_module(script).parser(), argparse.ArgumentParser)
    for name, action in house.items():
        assert own[name].type == action.type and own[name].help == action.help
        if name not in ("--arch", "--out"):
            assert own[name].default == action.default
    assert own["--out"].default == f"runs/{script}"
    assert {"--batch-size", "--epochs", "--lr"} <= own.keys()
