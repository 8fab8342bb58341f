"""Collectives for runs that torchrun started. In a single process everything here but `meet` is a no-op:
`gather` returns its argument, `gather_objects` a list of it."""
import datetime

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

MEETING = datetime.timedelta(minutes=1)  # how long a process waits for the others to start


def meet(backend, rank, world):
    """Start the process group. Collectives, and NCCL's communicators, which meet at the first of them, have
    torch's own, longer, time limit. Raises ValueError where the others could not be met."""
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=MEETING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        store.set_timeout(default_pg_timeout)
    except (RuntimeError, ValueError) as e:  # torch.distributed's errors are RuntimeErrors
        raise ValueError(f"process {rank} of {world}: the others could not be met within "
                         f"{MEETING.total_seconds():.0f} s ({str(e).splitlines()[0]})") from None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        z = z.contiguous()
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, g):
        g = g.clone(memory_format=torch.contiguous_format)  # it may be another's gradient, too
        dist.all_reduce(g)
        return g.chunk(dist.get_world_size())[dist.get_rank()]


def gather(z):
    """Rows (B, D) of every rank, B the same on all -> (world B, D) in rank order, with gradient: a row
    receives the sum of what all ranks' losses ask of it, so that, with `average_grads`, the gradient is
    that of the mean over ranks of their losses."""
    return _Gather.apply(z) if dist.is_initialized() and dist.get_world_size() > 1 else z


def gather_objects(value):
    """A list of what each rank gives as `value` (anything that can be pickled), in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)  # through the host: gloo
    return found


def barrier():
    """Wait here until all ranks are."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # through the host: gloo


def average_grads(params):
    """Average gradients over ranks: the one line of data parallel between `backward` and `step`. Which of
    `params` have a gradient must be the same on all ranks."""
    average([p.grad for p in params if p.grad is not None])


def average_buffers(*nets):
    """Average floating-point buffers (running statistics) over ranks, so that all ranks keep one network. In
    float64, where the mean of equal numbers is that number, so that constants do not move."""
    average([b for net in nets for b in net.buffers() if b.is_floating_point()], torch.float64)


@torch.no_grad()
def average(tensors, dtype=None):
    """Average a list of tensors over ranks, in place, by one collective operation, in `dtype` (None: their
    own)."""
    if not tensors or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    flat = flat.to(dtype or flat.dtype)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for t, new in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(new.view_as(t))
