"""Work in other processes: in two, as torchrun starts them on one host; and programs, as the shell starts them. All
are forked from one that has imported the libraries and the scripts, which takes longer than the work."""
import contextlib
import importlib
import inspect
import itertools
import math
import multiprocessing
import os
import pathlib
import runpy
import shutil
import signal
import socket
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common import run


def in_two_processes(work, folder):
    """Run work(rank, world) in two gloo processes; returns what each gave."""
    _fork(_work, work, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def script_in_two_processes(script, *flags, die_at=None, signal_at=None, nan_at=None, copy_at=None, dump=None):
    """Run a script in the environment that torchrun makes. With `die_at` both processes die, without notice,
    after that step: ProcessExitedException with exit_code 9. With `signal_at` the second alone gets SIGTERM there,
    with `nan_at` its loss alone is NaN. With `dump` each leaves the networks and banks that it ends with there. With
    `copy_at` the folder of the run is copied after that step, as a death would leave it (`left_by_a_death`)."""
    _fork(_script, script, flags, free_port(), die_at, signal_at, nan_at, copy_at, dump)


def left_by_a_death(out, step):
    """Where a copy of the run's folder `out` is, or goes, as a death without notice after `step` steps leaves it."""
    return pathlib.Path(out).with_name(f"{pathlib.Path(out).name}-after-{step}")


def copy_of_a_death(out, step):
    """Make it. Without the lock, which dies with its process, and which to read here would open."""
    shutil.copytree(out, left_by_a_death(out, step), ignore=shutil.ignore_patterns(".lock"))


class Forked:
    """As subprocess.Popen of `python file.py ...` or `python -m module ...`, with the output in the open file
    `stdout`; of `stderr` None (there too) or another open file."""

    def __init__(self, command, stdout, stderr=None, cwd=None, env=None):
        assert command[0] == sys.executable
        names = [stdout.name, getattr(stderr, "name", stdout.name)]
        context = _server()
        self.process = context.Process(target=_program, args=(command[1:], names, str(cwd or os.getcwd()),
                                                              dict(env or os.environ)))
        self.process.start()

    def poll(self):
        """The exit status; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()


def _program(words, names, folder, environment):
    for descriptor, name in zip((1, 2), names):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


asked = itertools.count()


def free_port():
    """A port of this machine that nobody listens on. Each pytest has twenty to itself, which it gives in turns, so that no other
    takes one before it is used; and the system gives those below 32768 to no connection."""
    first = 10_000 + 20 * (os.getpid() % 1000)
    for _ in range(20):
        port = first + next(asked) % 20
        with socket.socket() as s, contextlib.suppress(OSError):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was used a minute ago is free
            s.bind(("127.0.0.1", port))
            return port
    raise OSError(f"ports {first} to {first + 19}: all are in use")


def _server():
    """The context of processes that are forked from one that has done `tests.imported`."""
    multiprocessing.set_forkserver_preload(["tests.imported"])
    return multiprocessing.get_context("forkserver")


def _fork(f, *args):
    _server()
    mp.start_processes(f, args, nprocs=2, start_method="forkserver")


def _work(rank, work, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(work(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _script(rank, script, flags, port, die_at, signal_at, nan_at, copy_at, dump):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if die_at is not None:
        run.stop_if_signalled = lambda args, env, state, step: step == die_at and os._exit(9)
    module = importlib.import_module(script)
    train_step, count, parts = module.train_step, [], {}
    ask = run.stop_if_signalled

    def watched_ask(args, env, state, step):
        if rank == 1 and step == signal_at:
            signal.raise_signal(signal.SIGTERM)
        if rank == 0 and step == copy_at:
            copy_of_a_death(args.out, step)
        ask(args, env, state, step)

    def watched(*args, **kwargs):
        losses = train_step(*args, **kwargs)
        parts.update(inspect.signature(train_step).bind(*args, **kwargs).arguments)
        count.append(1)
        if rank == 1 and len(count) - 1 == nan_at:
            return {name: value * math.nan for name, value in losses.items()}
        return losses

    if signal_at is not None or copy_at is not None:
        run.stop_if_signalled = watched_ask
    module.train_step = watched
    run.cli(lambda: module.main(flags))
    if dump:
        modules = {name: part.state_dict() for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        torch.save(modules, f"{dump}/{rank}.pt")
