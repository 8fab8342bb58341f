"""Work in two processes, as torchrun starts them on one host."""
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(work, folder):
    """Run work(rank, world) in two gloo processes; returns what each gave."""
    mp.spawn(_worker, (work, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _worker(rank, work, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(work(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
