"""Work in two processes, as torchrun starts them on one host. They are forked from one that has imported the
libraries, which takes longer than the work."""
import importlib
import multiprocessing
import os
import signal
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common import run


def in_two_processes(work, folder):
    """Run work(rank, world) in two gloo processes; returns what each gave."""
    _fork(_work, work, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def script_in_two_processes(script, *flags, die_at=None, signal_at=None):
    """Run a script in the environment that torchrun makes. With `die_at` both processes die, without notice,
    after that step: ProcessExitedException with exit_code 9. With `signal_at` the second alone gets SIGTERM there."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    _fork(_script, script, flags, port, die_at, signal_at)


def _fork(f, *args):
    multiprocessing.set_forkserver_preload(["torchvision"])
    mp.start_processes(f, args, nprocs=2, start_method="forkserver")


def _work(rank, work, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(work(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _script(rank, script, flags, port, die_at, signal_at):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if die_at is not None:
        run.stop_if_signalled = lambda args, env, state, step: step == die_at and os._exit(9)
    if signal_at is not None and rank == 1:
        ask = run.stop_if_signalled

        def signalled(args, env, state, step):
            if step == signal_at:
                signal.raise_signal(signal.SIGTERM)
            ask(args, env, state, step)

        run.stop_if_signalled = signalled
    run.cli(lambda: importlib.import_module(script).main(flags))
