"""What a run does when something around it goes wrong: other data, damaged files, full disks, NaN, signals.

Behaviour of all scripts is tried on all of them; what lies in `common/run.py` alone, on one or two.
"""
import argparse
import contextlib
import errno
import functools
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from common import data, dist, encoders, files, run
from common.log import Log, check_spread
from tests.processes import Forked, free_port, in_two_processes, script_in_two_processes
from tests.scripts import PICTURES, SCRIPTS, TINY, environment, scripts_with, tiny_npz
from tests.steps import first_step

BANKS = ("adco", "caco")
WITH_WARMUP = scripts_with("warmup")
BATCH_NORM = [s for s in SCRIPTS if s not in ("adv_mae", "adpe")]
ONE_STEP = ["--limit", "16"]  # an epoch
every_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(autouse=True)
def signals_stay():
    kept = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    for s, handler in kept:
        signal.signal(s, handler)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return tiny_npz(tmp_path_factory.mktemp("data") / "tiny.npz")


def flags(script, npz, out, *more):
    return [*TINY, "--epochs", "1", *SCRIPTS[script], "--warmup", "0", "--data", str(npz), "--out", str(out), *more]


def main(script, npz, out, *more):
    words = flags(script, npz, out, *more)
    if script not in WITH_WARMUP:
        at = words.index("--warmup")
        del words[at : at + 2]
    importlib.import_module(script).main(words)
    return pathlib.Path(out)


def same_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# Other data -----------------------------------------------------------------------------------------------
@every_script
def test_a_run_on_other_data_is_refused_and_loses_nothing(script, npz, tmp_path):
    small = tiny_npz(tmp_path / "small.npz", 16)
    out = main(script, small, tmp_path / "run")
    header = files.json_lines(out / "log.jsonl")[0][1]
    assert header["data"]["images"] == 16 and len(header["data"]["checksum"]) == 64
    before = same_files(out)
    with replaced(small, npz):
        with pytest.raises(ValueError, match=r"on other data \(16 images there, 44 here\); use another --out"):
            main(script, small, out)
    assert same_files(out) == before


@contextlib.contextmanager
def replaced(path, other):
    kept = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(pathlib.Path(other).read_bytes())
    try:
        yield
    finally:
        pathlib.Path(path).write_bytes(kept)


def test_one_changed_pixel_is_other_data_even_before_the_first_checkpoint(npz, tmp_path):
    out = main("rocl", npz, tmp_path / "run")
    arrays = dict(np.load(npz))
    arrays["x_train"][5, 3, 3, 0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    for last in ("last.pt", "log.jsonl"):  # by the checkpoint; by the log alone
        with replaced(npz, tmp_path / "other.npz"), pytest.raises(ValueError, match="44 images, which have changed"):
            main("rocl", npz, out)
        (out / "last.pt").unlink(missing_ok=True)


# Sizes ----------------------------------------------------------------------------------------------------
@every_script
def test_views_have_the_side_of_the_data_and_the_encoder_says_so(script, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (16, 24, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "side24.npz", x_train=x, y_train=np.arange(16) % 2, x_test=x, y_test=np.arange(16) % 2)
    side = 24
    if script == "adios":  # its U-Net takes powers of two
        x = np.repeat(np.repeat(x[:, :8, :8], 2, 1), 2, 2)
        np.savez(tmp_path / "side24.npz", x_train=x, y_train=np.arange(16) % 2, x_test=x, y_test=np.arange(16) % 2)
        side = 16
    out = main(script, tmp_path / "side24.npz", tmp_path / "run")
    encoder = encoders.load_encoder(out / "encoder.pt")
    assert encoder.image_size == side
    if script in ("adv_mae", "adpe", "unified"):
        assert encoder.grid == (6, 6)


@every_script
def test_images_that_are_not_square_need_image_size(script, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (16, 20, 28, 3), dtype=np.uint8)
    np.savez(tmp_path / "wide.npz", x_train=x, y_train=np.arange(16) % 2, x_test=x, y_test=np.arange(16) % 2)
    with pytest.raises(ValueError, match="not square; give their side by --image-size"):
        main(script, tmp_path / "wide.npz", tmp_path / "run")
    main(script, tmp_path / "wide.npz", tmp_path / "run", "--image-size", "16")


@every_script
@pytest.mark.parametrize("side", [1, 2, 4, 6])
def test_tiny_images_work_or_are_refused_by_the_flags_name(script, side, npz, tmp_path):
    try:
        main(script, npz, tmp_path, "--image-size", str(side), *ONE_STEP)
    except ValueError as e:
        assert ("--image-size" in str(e) or "collapsed" in str(e)) and "\n" not in str(e)
        assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("script", BATCH_NORM)
def test_one_image_a_process_is_refused(script, npz, tmp_path):
    with pytest.raises(ValueError, match="--batch-size 1: this method needs at least 2 images"):
        main(script, npz, tmp_path, "--batch-size", "1")


@pytest.mark.parametrize("script", ["adv_mae", "adpe"])
def test_one_image_is_enough_where_images_do_not_meet(script, npz, tmp_path):
    main(script, npz, tmp_path, "--batch-size", "1", "--limit", "2")


# Numbers --------------------------------------------------------------------------------------------------
def numeric_flags(script):
    for action in importlib.import_module(script).parser()._actions:
        if action.type in (int, float):
            raise AssertionError(f"{script} {action.option_strings}: a bare {action.type}")
        if action.type not in (None, run.path):
            yield action.option_strings[0], 3 if action.nargs == 3 else 1


@every_script
def test_every_number_has_a_finite_range(script):
    """inf, NaN and 1e300 are refused, and so is -1, wherever a number is asked for."""
    parser = importlib.import_module(script).parser()
    checked = list(numeric_flags(script))
    assert {"--lr", "--epochs", "--batch-size", "--weight-decay", "--seed", "--workers"} <= {f for f, _ in checked}
    for flag, count in checked:
        below = [] if (script, flag) in (("pretext", "--lam"), ("caco", "--cooperation")) else ["-1"]
        for value in ("inf", "nan", *below, "1e300", "9" * 30, "", "x"):
            with pytest.raises(ValueError, match=f"{flag} {value}.*: must be a"):
                parser.parse_args([flag] + [value] * count)


@every_script
@pytest.mark.parametrize("flag", ["--data", "--out", "--data-dir"])
def test_an_empty_path_is_refused(script, flag):
    with pytest.raises(ValueError, match=f"{flag} .*must name a file or a folder"):
        importlib.import_module(script).parser().parse_args([flag, ""])


@pytest.mark.parametrize("device", ["mps", "meta", "tpu", "cuda:77"])
def test_a_device_that_is_not_there_is_one_line(device, npz, tmp_path):
    with pytest.raises(ValueError, match=f"--device {device} cannot be used: .") as raised:
        main("rocl", npz, tmp_path, "--device", device)
    assert "\n" not in str(raised.value)


@every_script
def test_synchronised_batch_norm_needs_cuda(script, npz, tmp_path):
    with pytest.raises(ValueError, match="--sync-bn: PyTorch's SyncBatchNorm needs CUDA"):
        main(script, npz, tmp_path, "--sync-bn", *(["--tasks", "rotation"] if script == "pretext" else []))


def batch_norms(net):
    return [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("script", [script for script in BATCH_NORM if script != "unified"])  # a ViT, which has none
def test_every_batch_norm_of_a_run_went_through_to_device(script, tmp_path, monkeypatch):
    """Or is of a copy of a network that did: there --sync-bn replaces them."""
    to_device = run.to_device

    def marking(net, args, env):
        made = to_device(net, args, env)
        for norm in batch_norms(made):
            norm.went_through = True
        return made

    monkeypatch.setattr(run, "to_device", marking)
    seen = first_step(importlib.import_module(script), monkeypatch, tmp_path, *SCRIPTS[script])
    nets = [value for value in seen.values() if isinstance(value, torch.nn.Module)]
    assert any(batch_norms(net) for net in nets)
    for net in nets:
        assert all(hasattr(norm, "went_through") for norm in batch_norms(net))


def test_synchronised_batch_norm_replaces_every_batch_norm():
    """On a CPU it cannot run, so only the conversion is seen."""
    for branches in ((), ("clean", "adv")):
        net = encoders.make("slim", branches)
        args = argparse.Namespace(sync_bn=True)
        plain = {name for name, m in net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
        keys = list(net.state_dict())
        made = run.to_device(net, args, run.Env(torch.device("cpu"), 0, 2))
        assert plain == {name for name, m in made.named_modules() if isinstance(m, torch.nn.SyncBatchNorm)}
        assert list(made.state_dict()) == keys
    with pytest.raises(ValueError, match="--sync-bn: this network has no BatchNorm"):
        run.to_device(encoders.make("vit_slim"), args, run.Env(torch.device("cpu"), 0, 2))


@pytest.mark.parametrize("script, side", [("adco", 27), ("caco", 14)])
def test_crops_that_a_vit_cannot_take_are_refused_before_the_bank_is_filled(script, side, npz, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "fill", lambda *_: pytest.fail("the bank was filled first"))
    flags = ["--arch", "vit_slim", "--multi-crop", "--bank-size", "32", "--image-size", "32", "--optimizer", "adamw",
             "--lr", "0.001"]
    words = f"--multi-crop: crops of {side} x {side} pixels are no multiple of the patch size 4"
    with pytest.raises(ValueError, match=words):
        module.main(["--data", npz, "--batch-size", "4", "--epochs", "1", "--out", str(tmp_path / "run"), *flags])


@pytest.mark.parametrize("script", ["adco", "hardneg"])
@pytest.mark.parametrize("world", [1, 2])
def test_synchronised_batch_norm_does_not_replace_grouped_batch_norm(script, world):
    """It would undo the groups, and a query's key could be told by its batch."""
    net = importlib.import_module(script).network("slim")
    args = argparse.Namespace(sync_bn=True)
    with pytest.raises(ValueError, match="--sync-bn: this network has a GroupedNorm, which normalises in its"):
        run.to_device(net, args, run.Env(torch.device("cpu"), 0, world))


def test_memory_that_cannot_be_had_is_one_line():
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")):
        def fail():
            raise error

        with pytest.raises(SystemExit, match="not enough memory .*--batch-size"):
            run.cli(fail)
    with pytest.raises(RuntimeError, match="shapes"):
        run.cli(lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")))


def test_setup_takes_the_housekeeping_flags_alone(tmp_path):
    args = run.parser("", "x", "slim").parse_args(["--out", str(tmp_path / "x"), "--device", "cpu"])
    assert run.setup(args) == run.Env(torch.device("cpu"), 0, 1)


# NaN ------------------------------------------------------------------------------------------------------
@every_script
def test_a_loss_that_turns_nan_ends_in_the_stop_line(script, npz, tmp_path):
    """Whatever is computed after the loss, in the step or at the end of the epoch, must not fall over it."""
    module = importlib.import_module(script)
    step = module.train_step

    def poisoned(*args, **kwargs):
        for net in args:
            if isinstance(net, torch.nn.Module):
                for p in net.parameters():
                    p.data.fill_(float("nan"))
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as m, pytest.raises(ValueError, match="not finite in epoch 0, step 0"):
        m.setattr(module, "train_step", poisoned)
        main(script, npz, tmp_path, "--limit", "32")
    assert not (tmp_path / "encoder.pt").exists() and not (tmp_path / "last.pt").exists()


@every_script
def test_an_infinite_buffer_is_neither_saved_nor_exported(script, npz, tmp_path):
    """The loss may still be finite: running statistics are not read in train mode."""
    module = importlib.import_module(script)
    step = module.train_step

    def poisoned(*args, **kwargs):
        losses = step(*args, **kwargs)
        for net in args:
            if isinstance(net, torch.nn.Module):
                buffers = [b for b in net.buffers() if b.is_floating_point()] or list(net.parameters())
                buffers[-1].data.view(-1)[0] = float("inf")
        return {k: torch.zeros(()) for k in losses}

    with pytest.MonkeyPatch.context() as m, pytest.raises(ValueError, match="not finite|collapsed"):
        m.setattr(module, "train_step", poisoned)
        main(script, npz, tmp_path, "--limit", "32")
    assert not (tmp_path / "encoder.pt").exists() and not (tmp_path / "last.pt").exists()


def test_embeddings_that_are_nan_count_as_collapsed(tmp_path):
    with pytest.raises(ValueError, match="collapsed"):
        check_spread(torch.full((4, 3), float("nan")), argparse.Namespace(out=tmp_path))


# Files ----------------------------------------------------------------------------------------------------
def test_a_flipped_bit_in_the_checkpoint_is_seen(npz, tmp_path):
    out = main("rocl", npz, tmp_path)
    whole = (out / "last.pt").read_bytes()
    middle = len(whole) // 2
    (out / "last.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"last\.pt: not a checkpoint that can be read \(is damaged"):
        main("rocl", npz, out)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="/proc tells which file a descriptor is of")
@every_script
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(script, npz, tmp_path, monkeypatch):
    """Pictures, checkpoint and encoder in turn cannot be written; then there is room again."""
    names = [PICTURES.get(script, "views.png"), "last.pt", "encoder.pt"]
    fsync = os.fsync
    for name in names:
        def full(descriptor, name=name):
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{name}.tmp"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with monkeypatch.context() as m, pytest.raises(OSError, match=f"{name} cannot be written: No space left"):
            m.setattr(os, "fsync", full)
            main(script, npz, tmp_path, *ONE_STEP)
        assert not list(tmp_path.glob("*.tmp"))
        assert (tmp_path / "last.pt").exists() == (name == "encoder.pt")
    main(script, npz, tmp_path, *ONE_STEP)
    assert all((tmp_path / name).exists() for name in names)


def test_a_picture_is_there_whenever_its_checkpoint_is(npz, tmp_path, monkeypatch):
    """Killed between the two, the same command makes the picture again."""
    def killed(*_):
        assert (tmp_path / "views.png").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(run, "save", killed)
        main("rocl", npz, tmp_path)


@pytest.mark.parametrize("text", ["my own notes\n", "5\n", "[1, 2]\n", '{"epoch": 3}\n', "\xff\xfe\n"])
def test_somebodys_own_log_is_refused_and_stays(text, npz, tmp_path):
    (tmp_path / "log.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"log\.jsonl: not a log of this program"):
        main("rocl", npz, tmp_path)
    assert (tmp_path / "log.jsonl").read_text(encoding="latin-1") == text


def test_a_hole_in_the_log_is_named_and_the_run_goes_on(npz, tmp_path, capsys):
    out = main("rocl", npz, tmp_path, "--epochs", "2", *ONE_STEP)
    header, first, second = (out / "log.jsonl").read_text().splitlines()
    for damage in ("\xff\xfe", "5", '{"epo', None):
        kept = [header, *([damage] if damage else []), second]
        (out / "log.jsonl").write_text("\n".join(kept) + "\n", encoding="latin-1")
        main("rocl", npz, tmp_path, "--epochs", "2", *ONE_STEP)
        assert "log.jsonl: the lines of these epochs are damaged or missing: [0]" in capsys.readouterr().out
        lines = [line for _, line in files.json_lines(out / "log.jsonl")]
        assert lines[0]["missing_epochs"] == [0] and [line["epoch"] for line in lines[1:]] == [1]


@every_script
def test_two_processes_cannot_work_in_one_folder(script, npz, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys\nf = open(sys.argv[1], 'a')\nfcntl.lockf(f, fcntl.LOCK_EX)\n"
         "print(1, flush=True)\nsys.stdin.read()", str(tmp_path / ".lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(ValueError, match="another process is at work there"):
        main(script, npz, tmp_path)
    assert os.listdir(tmp_path) == [".lock"]
    holder.kill()
    holder.wait()
    main(script, npz, tmp_path, *ONE_STEP)


# Signals and processes --------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", BANKS)
@pytest.mark.parametrize("at", [0, 2, 4])  # within the steps of MoCo, and within the keys that follow
def test_a_signal_during_the_fill_is_answered_within_a_step(script, at, npz, tmp_path, monkeypatch):
    count = []
    ask = run.stop_if_signalled

    def counted(args, env, state, step):
        count.append(state)
        if len(count) == at + 1:
            signal.raise_signal(signal.SIGTERM)
        ask(args, env, state, step)

    monkeypatch.setattr(run, "stop_if_signalled", counted)
    with pytest.raises(SystemExit) as stopped:
        main(script, npz, tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM and count == [None] * (at + 1)
    assert not (tmp_path / "last.pt").exists()  # the fill starts again, as if nothing had been
    monkeypatch.undo()
    main(script, npz, tmp_path)


TWICE = """
import signal, sys
from types import SimpleNamespace
from common import run
run.setup(run.parser("", "x", "slim").parse_args(["--out", sys.argv[1], "--device", "cpu"]))
for seconds in (0, 1, 4, 60):
    run.time = SimpleNamespace(monotonic=lambda: seconds)
    print(seconds, flush=True)
    signal.raise_signal(signal.SIGTERM)
"""


def test_a_second_signal_kills_only_some_seconds_after_the_first(tmp_path):
    """A manager may signal all processes, and torchrun then signals its own: that is one request to stop."""
    (tmp_path / "twice.py").write_text(TWICE)
    with open(tmp_path / "printed.txt", "w") as printed:
        process = Forked([sys.executable, str(tmp_path / "twice.py"), str(tmp_path / "run")], printed, env=environment())
    assert process.wait(100) == -signal.SIGTERM
    assert (tmp_path / "printed.txt").read_text().split() == ["0", "1", "4", "60"]


def stopped_while_the_first_process_writes(folder, rank, world):
    """Whether the checkpoint is there when a process leaves."""
    args = argparse.Namespace(out=folder)
    save = run.save

    def slow_save(*what):
        time.sleep(1 - rank)
        save(*what)

    run.save = slow_save
    signal.signal(signal.SIGTERM, run._note)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run.stop_if_signalled(args, run.Env(torch.device("cpu"), rank, world), {}, 3)
    return (pathlib.Path(folder) / "last.pt").exists()


def test_no_process_leaves_before_the_checkpoint_is_there(tmp_path):
    """Else whoever started them may end the first one, which writes it."""
    work = functools.partial(stopped_while_the_first_process_writes, str(tmp_path))
    assert in_two_processes(work, tmp_path) == [True, True]


@pytest.mark.parametrize("script", ["amoc", "rocl"])
def test_two_processes_stopped_within_an_epoch_log_the_same_means(script, npz, tmp_path):
    """The partial sums of both are in the checkpoint: the resumed line of the epoch is bit for bit the same."""
    def losses(out):
        return [line["loss"] for _, line in files.json_lines(out / "log.jsonl")[1:]]

    words = flags(script, npz, tmp_path / "b")
    script_in_two_processes(script, *flags(script, npz, tmp_path / "a"))
    with pytest.raises(ProcessExitedException) as stopped:
        script_in_two_processes(script, *words, signal_at=2)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "b" / "last.pt", weights_only=True)["step"] == 2
    script_in_two_processes(script, *words)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_does_not_wait_for_ever_for_one_that_does_not_start(rank, npz, tmp_path):
    (tmp_path / "impatient.py").write_text(
        "import datetime\nfrom common import dist, run\ndist.MEETING = datetime.timedelta(seconds=1)\n"
        "import rocl, sys\nrun.cli(lambda: rocl.main(sys.argv[1:]))")
    alone = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port())}
    words = [*TINY, *SCRIPTS["rocl"], "--data", str(npz), "--out", str(tmp_path)]
    with open(tmp_path / "printed.txt", "w") as printed:
        process = Forked([sys.executable, str(tmp_path / "impatient.py"), *words], printed,
                         env={**environment(), **alone})
    assert process.wait(100) == 1
    said = (tmp_path / "printed.txt").read_text()
    assert f"error: process {rank} of 2: the others could not be met within 1 s" in said
    assert "Traceback" not in said


def test_a_nan_on_one_process_stops_both_and_keeps_the_checkpoint(npz, tmp_path):
    """Three steps an epoch: the fifth, of the second epoch, is bad on the second process alone."""
    words = [*TINY, *SCRIPTS["rocl"], "--data", str(npz), "--out", str(tmp_path)]
    with pytest.raises(ProcessExitedException) as stopped:
        script_in_two_processes("rocl", *words, nan_at=4)
    assert stopped.value.exit_code == 1
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3


def logged(rank, world):
    """The loss that rank 0 logs where the ranks have 1 and 2, then 3 and 6: the mean over steps and ranks."""
    with tempfile.TemporaryDirectory() as folder:
        images = data.Images(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 1)
        args = argparse.Namespace(out=folder, seed=0, device="cpu")
        log = Log(args, run.Env(torch.device("cpu"), rank, world), 2, images)
        log.start(0)
        log.step(0, 4, loss=torch.tensor(1.0 + rank))
        log.step(1, 4, loss=torch.tensor(3.0 + 3 * rank))
        log.epoch(0, 2)
        lines = files.json_lines(pathlib.Path(folder) / "log.jsonl")
    return [line["loss"] for _, line in lines if "loss" in line]


def test_logged_values_are_means_over_processes(tmp_path):
    assert in_two_processes(logged, tmp_path) == [[3.0], []]


# Flags that change who talks to whom: a collective that one process alone calls would hang.
TALKS = {
    "acl": [["--variant", "a2s"], ["--variant", "a2a"]],
    "adco": [["--eps", "4", "--steps", "1", "--batch-negatives", "--clean-weight", "0.5"], ["--symmetric", "--batch-negatives"],
             ["--multi-crop", "--eps", "90", "--norm", "l2", "--steps", "1", "--batch-negatives"]],
    "adios": [["--objective", "byol"], ["--objective", "simsiam", "--single"], ["--masker", "random"],
              ["--objective", "mae", "--arch", "vit_slim"]],
    "adpe": [["--adversary", "pgd"], ["--position", "absolute", "--mode", "embedding", "--adversary", "pgd"]],
    "adv_mae": [["--norm", "l2", "--eps", "90"]],
    "unified": [["--share", "--norm", "l2", "--eps", "90"], ["--lam", "0"], ["--con-weight", "0"]],
    "advcl": [["--teacher", "TEACHER", "--clusters", "2", "3"]],
    "amoc": [["--variant", "AAA"], ["--variant", "ACA_PLUS"], ["--variant", "CAC"]],
    "byorl": [["--eps", "0"]],
    "clae": [["--random"]],
    "caco": [["--cooperation", "-1", "--multi-crop"], ["--optimizer", "lars", "--lr", "0.06"],
             ["--multi-crop", "--eps", "90", "--norm", "l2", "--steps", "1"]],
    "hardneg": [["--base", "simclr", "--negatives", "hcl"], ["--negatives", "ifm"]],
    "pretext": [["--tasks", "jigsaw"], ["--tasks", "selfie", "--noise", "8"]],
    "rocl": [["--reg-weight", "0"], ["--attack-to", "original"]],
}


@pytest.mark.parametrize("script, more", [(script, more) for script in TALKS for more in TALKS[script]])
def test_two_processes_reach_the_end_whatever_they_talk_about(script, more, npz, tmp_path):
    encoders.export(encoders.make("slim"), tmp_path / "teacher.pt")
    more = [str(tmp_path / "teacher.pt") if word == "TEACHER" else word for word in more]
    words = flags(script, npz, tmp_path / "run", *more, "--limit", "32")
    if script not in WITH_WARMUP:
        del words[words.index("--warmup") : words.index("--warmup") + 2]
    script_in_two_processes(script, *words, dump=tmp_path)
    assert (tmp_path / "run" / "encoder.pt").exists()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in first:
        for key, value in first[name].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, second[name][key]), (name, key)
