"""Behaviour that all scripts share. A fault found in one gets its test here, so that the siblings are tried
too."""

import argparse
import ast
import functools
import importlib
import json
import pathlib
import shutil
import signal

import pytest
import torch

from common import encoders, run
from tests.processes import copy_of_a_death, left_by_a_death, script_in_two_processes
from tests.scripts import PICTURES, ROOT, SCRIPTS, TINY, tiny_npz

pytestmark = pytest.mark.parametrize("script", SCRIPTS)
UNIT_ROWS = ("amoc", "adco", "caco", "hardneg")  # what their `embed` returns


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


@pytest.fixture(scope="module")
def undisturbed(npz, tmp_path_factory):
    """The folder of a script's run that nothing disturbs, made once. Beside it lies what a death without notice after
    the first, third or fourth step would have left."""
    ask = run.stop_if_signalled

    def copied_before(args, env, state, step):
        if step in (1, 3, 4):
            copy_of_a_death(args.out, step)
        ask(args, env, state, step)

    @functools.cache
    def run_of(script):
        out = tmp_path_factory.mktemp(script) / "run"
        with pytest.MonkeyPatch.context() as m:
            m.setattr(run, "stop_if_signalled", copied_before)
            return main(script, npz, out)

    return run_of


def copied(folder, out):
    """A copy of a run's folder at `out`, without the lock, which another process would not hold."""
    return shutil.copytree(folder, out, ignore=shutil.ignore_patterns(".lock"))


def test_a_run_writes_log_checkpoint_encoder_and_pictures(script, undisturbed):
    out = undisturbed(script)
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


class Killed(Exception):
    pass


def die(at_step):
    """In place of run.stop_if_signalled: ends the run there."""
    def ask(args, env, state, step):
        if step == at_step:
            raise Killed

    return ask


def test_same_seed_same_run_and_another_seed_another(script, npz, tmp_path, monkeypatch, undisturbed):
    """The seed's second run begins where a death after the first step left a log, but no checkpoint."""
    a = undisturbed(script)
    b = left_by_a_death(a, 1)
    assert (b / "log.jsonl").exists() and not (b / "last.pt").exists()
    same_result(a, main(script, npz, b))
    monkeypatch.setattr(run, "stop_if_signalled", die(3))  # after the first epoch
    with pytest.raises(Killed):
        main(script, npz, tmp_path / "c", "--seed", "1")
    assert lines(tmp_path / "c")[1]["loss"] != lines(a)[1]["loss"]


def test_a_finished_run_continues_to_the_same_end(script, npz, tmp_path, undisturbed):
    a = copied(undisturbed(script), tmp_path / "a")
    (a / "encoder.pt").unlink()
    main(script, npz, a)
    same_result(a, undisturbed(script))


def test_a_killed_run_resumes_bit_for_bit(script, npz, undisturbed):
    """Death without notice after the fourth step: the run goes on from the last checkpoint, and nothing shows. After
    the third, the last of its epoch, there were the same files; for the first see the test of the seed."""
    third, fourth = (left_by_a_death(undisturbed(script), step) for step in (3, 4))
    names = sorted(path.name for path in fourth.iterdir())
    assert names == sorted(path.name for path in third.iterdir())
    assert all((third / name).read_bytes() == (fourth / name).read_bytes() for name in names)
    assert torch.load(fourth / "last.pt", weights_only=True)["step"] == 3
    same_result(main(script, npz, fourth), undisturbed(script))


def test_a_signal_saves_within_the_epoch_and_the_run_resumes_bit_for_bit(
    script, npz, tmp_path, monkeypatch, undisturbed
):
    """Three times in one run: within the first epoch, between the two, and within the second."""
    ask = run.stop_if_signalled
    for number, at_step in ((signal.SIGTERM, 2), (signal.SIGTERM, 3), (signal.SIGINT, 4)):
        def after(args, env, state, step):
            if step == at_step:
                signal.raise_signal(number)
            ask(args, env, state, step)

        with monkeypatch.context() as m, pytest.raises(SystemExit) as stopped:
            m.setattr(run, "stop_if_signalled", after)
            main(script, npz, tmp_path / "cut")
        assert stopped.value.code == 128 + number
        assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == at_step
    same_result(main(script, npz, tmp_path / "cut"), undisturbed(script))


@pytest.fixture(scope="module")
def by_two(npz, tmp_path_factory):
    """The folder of a script's run in two processes, made once; beside it, what their death after the fourth step of
    six would have left (test_processes.py has them die)."""
    @functools.cache
    def run_of(script):
        out = tmp_path_factory.mktemp(script) / "run"
        script_in_two_processes(script, *flags(script, npz, out), copy_at=4, dump=out)
        return out

    return run_of


def test_two_processes_run_and_start_about_where_one_does(script, by_two, undisturbed):
    """The loss is a mean over the same views with the same attack; BatchNorm's batches differ, hence 'about'."""
    one = undisturbed(script)
    assert lines(by_two(script))[0]["world"] == 2
    assert lines(by_two(script))[1]["loss"] == pytest.approx(lines(one)[1]["loss"], rel=0.2)


def test_two_processes_end_with_the_same_networks_statistics_and_banks(script, by_two):
    first, second = (torch.load(by_two(script) / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first and equal(first, second)


def test_a_checkpoint_of_two_processes_is_refused_by_one(script, npz, by_two):
    before = (by_two(script) / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run of 2 processes, this is one of 1"):
        main(script, npz, by_two(script))
    assert (by_two(script) / "last.pt").read_bytes() == before


def test_two_processes_resume_bit_for_bit(script, npz, by_two):
    """After the death of both the same flags go on from the checkpoint of the third step."""
    cut = left_by_a_death(by_two(script), 4)
    assert torch.load(cut / "last.pt", weights_only=True)["step"] == 3
    script_in_two_processes(script, *flags(script, npz, cut))
    same_result(cut, by_two(script))


def test_under_autocast_only_the_networks_are_cast(script, npz, tmp_path, monkeypatch):
    """bf16 on CUDA: losses are fp32, no backward runs under autocast, no weight loses its gradient. Embeddings are fp32, and
    unit rows are of length 1 in fp32."""
    module, steps, embeddings = importlib.import_module(script), [], []
    embed = getattr(module, "embed", None)
    step, backward = module.train_step, torch.Tensor.backward

    def watched(*args, **settings):
        losses = step(*args, **settings)
        nets = [a for a in args if isinstance(a, torch.nn.Module)]
        steps.append((losses, [p.grad is not None for net in nets for p in net.parameters()]))
        return losses

    def outside(loss, *args, **kwargs):
        assert not torch.is_autocast_enabled("cpu") and loss.dtype == torch.float32
        backward(loss, *args, **kwargs)

    def watched_embed(*args, **settings):
        rows = embed(*args, **settings)
        embeddings.extend(rows if isinstance(rows, tuple) else [rows])
        return rows

    monkeypatch.setattr(module, "train_step", watched)
    monkeypatch.setattr(torch.Tensor, "backward", outside)
    if embed is not None:
        monkeypatch.setattr(module, "embed", watched_embed)
    more = ["--fill-steps", "0"] if script == "caco" else []  # its positives jump with the rounding of a fill
    for out, last in (("plain", 1), ("cast", 4)):  # one step; an epoch with its end, and a step more
        monkeypatch.setattr(run, "stop_if_signalled", die(last))
        with pytest.raises(Killed):
            main(script, npz, tmp_path / out, *more)
        monkeypatch.setattr(run, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    plain, cast = steps[:2]
    assert len(steps) == 5 and cast[1] == plain[1] and any(cast[1])
    assert cast[0]["loss"] != plain[0]["loss"] and cast[0]["loss"].item() == pytest.approx(
        plain[0]["loss"].item(), rel=0.05)
    assert all(v.dtype == torch.float32 for v in cast[0].values())
    assert bool(embeddings) == (embed is not None) and all(rows.dtype == torch.float32 for rows in embeddings)
    if script in UNIT_ROWS:
        lengths = torch.cat([rows.detach().norm(dim=1) for rows in embeddings])
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)


def test_another_configuration_in_the_same_folder_is_refused(script, npz, tmp_path, undisturbed):
    out = copied(undisturbed(script), tmp_path / "run")
    before = (out / "last.pt").read_bytes(), (out / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"--lr .* there, 0\.123 here.*another --out"):
        main(script, npz, out, "--lr", "0.123")
    (out / "last.pt").rename(out / "kept")
    with pytest.raises(ValueError, match="--seed 0 there, 3 here"):
        main(script, npz, out, "--seed", "3")
    assert before == ((out / "kept").read_bytes(), (out / "log.jsonl").read_bytes())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    script, npz, tmp_path, monkeypatch, undisturbed
):
    """In the second step after the first epoch, which is taken from the run that nothing disturbs."""
    out = copied(left_by_a_death(undisturbed(script), 3), tmp_path / "run")
    module = importlib.import_module(script)
    step, count = module.train_step, []

    def broken(*args, **settings):
        losses = step(*args, **settings)
        count.append(1)
        return {k: v * float("nan") for k, v in losses.items()} if len(count) == 2 else losses

    monkeypatch.setattr(module, "train_step", broken)
    with pytest.raises(
        ValueError, match=r"not finite in epoch 1, step 4; the last good checkpoint is .*last\.pt"
    ):
        main(script, npz, out)
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize(
    "more, words",
    [
        (["--data", "cifar11"], "cifar11.*cifar10, cifar100, stl10, shapes"),
        (["--data", "none.npz"], "none.npz: no such file"),
        (["--batch-size", "64"], "64 is larger than the data: 44"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--arch", "resnet1"], "resnet1.*choose one of .*slim, "),
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


def test_imports_run_one_way_and_an_error_is_left_to_run_cli(script, npz, tmp_path):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} | {
        a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    assert not {m.split(".")[0] for m in modules} & ({*SCRIPTS, "eval"} - {script})
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    run.cli(main)"


def test_order_of_the_file_and_its_width(script, npz, tmp_path):
    text = (ROOT / f"{script}.py").read_text()
    names = [n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    places = [names.index(n) for n in ("train_step", "parser", "main")]
    assert places == sorted(places)
    wide = [f"{script}.py:{number} has {len(line)} columns, 110 are allowed"
            for number, line in enumerate(text.splitlines(), 1) if len(line) > 110]
    assert not wide, wide


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
