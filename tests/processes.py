"""Work in two processes, as torchrun starts them on one host. They are forked from one that has imported the
libraries, which takes longer than the work."""
import importlib
import inspect
import math
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


def script_in_two_processes(script, *flags, die_at=None, signal_at=None, nan_at=None, dump=None):
    """Run a script in the environment that torchrun makes. With `die_at` both processes die, without notice,
    after that step: ProcessExitedException with exit_code 9. With `signal_at` the second alone gets SIGTERM there,
    with `nan_at` its loss alone is NaN. With `dump` each leaves the networks and banks that it ends with there."""
    _fork(_script, script, flags, free_port(), die_at, signal_at, nan_at, dump)


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _fork(f, *args):
    multiprocessing.set_forkserver_preload(["torchvision"])
    mp.start_processes(f, args, nprocs=2, start_method="forkserver")


def _work(rank, work, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(work(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _script(rank, script, flags, port, die_at, signal_at, nan_at, dump):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if die_at is not None:
        run.stop_if_signalled = lambda args, env, state, step: step == die_at and os._exit(9)
    module = importlib.import_module(script)
    train_step, count, parts = module.train_step, [], {}
    ask = run.stop_if_signalled

    def signalled(args, env, state, step):
        if rank == 1 and step == signal_at:
            signal.raise_signal(signal.SIGTERM)
        ask(args, env, state, step)

    def watched(*args, **kwargs):
        losses = train_step(*args, **kwargs)
        parts.update(inspect.signature(train_step).bind(*args, **kwargs).arguments)
        count.append(1)
        if rank == 1 and len(count) - 1 == nan_at:
            return {name: value * math.nan for name, value in losses.items()}
        return losses

    if signal_at is not None:
        run.stop_if_signalled = signalled
    module.train_step = watched
    run.cli(lambda: module.main(flags))
    if dump:
        modules = {name: part.state_dict() for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        torch.save(modules, f"{dump}/{rank}.pt")
