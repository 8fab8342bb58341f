"""The memory bank: a ring of old keys, and a differentiable op over them that keeps no (N, K) matrix."""
import torch
import torch.distributed as dist
from torch import nn


class Bank(nn.Module):
    """`rows` (K, D), unit vectors: at first noise, equal on all ranks given one seed; then the last K keys.

    `pointer`, a Python int (one on the device would cost a host sync a step), is the row the next key goes
    to. Both are in the state dict.
    """

    def __init__(self, size, dim):
        super().__init__()
        if size < 1:
            raise ValueError(f"bank size {size}: must be at least 1")
        self.register_buffer("rows", nn.functional.normalize(torch.randn(size, dim), dim=1))
        self.pointer = 0

    @torch.no_grad()
    def push(self, keys):
        """Write keys (n, D) of every rank, in rank order, over the oldest rows. Nothing is dropped: the ring
        wraps, and of more than K keys the last K stay, where writing one by one would put them. Call it after
        `backward`."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            keys = keys.contiguous()
            parts = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, keys)
            keys = torch.cat(parts)
        size = len(self.rows)
        at, end = self.pointer, (self.pointer + len(keys)) % size
        if len(keys) > size:
            keys, at = keys[-size:], end
        fits = min(len(keys), size - at)
        self.rows[at : at + fits] = keys[:fits]
        self.rows[: len(keys) - fits] = keys[fits:]
        self.pointer = end

    def get_extra_state(self):
        return self.pointer

    def set_extra_state(self, pointer):
        self.pointer = pointer


def bank_logsumexp(q, bank, temperature):
    """y_i = ln sum_j exp(q_i . bank_j / temperature), differentiable (once) in q and in bank.

    q (N, D), bank (K, D), any rows (nothing is normalised here) -> (N,). Products are in q's dtype, sums and
    y in fp32 (float64: all through), each gradient in its argument's dtype. Only q, bank and y are kept for
    backward. Raises ValueError for a temperature that is not positive, an empty bank, rows of different
    lengths, or fp16 (where small probabilities vanish).
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    if q.dim() != 2 or bank.dim() != 2 or q.shape[1] != bank.shape[1] or not len(bank):
        raise ValueError(f"q {tuple(q.shape)} and bank {tuple(bank.shape)}: must be (N, D) and (K, D), K > 0")
    if q.dtype == torch.float16:
        raise ValueError("q is float16: use bfloat16 or float32")
    return _BankLogSumExp.apply(q, bank, temperature)


@torch.no_grad()
def bank_argmax(q, bank):
    """(N,) int64: for each row of q (N, D) the row of bank (K, D) of largest inner product, the first of several.
    Products are in fp32 (float64: in that)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    best = torch.full((len(q),), -torch.inf, dtype=wide, device=q.device)
    index = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    for rows, b in _chunks(q, bank):
        top, at = _scores(q, b, 1.0).max(1)
        index = torch.where(top > best, at + rows.start, index)
        best = torch.maximum(top, best)
    return index


class _BankLogSumExp(torch.autograd.Function):
    """With P_ij = exp(q_i . b_j / T - y_i), whose rows sum to 1, and the incoming gradient g (N,): dq_i =
    (g_i / T) sum_j P_ij b_j and db_j = (1 / T) sum_i g_i P_ij q_i. P is made again, chunk by chunk."""

    @staticmethod
    def forward(ctx, q, bank, temperature):
        wide = torch.promote_types(q.dtype, torch.float32)
        top = torch.full((len(q),), -torch.inf, dtype=wide, device=q.device)
        total = torch.zeros_like(top)
        for _, b in _chunks(q, bank):
            s = _scores(q, b, temperature)
            new = torch.maximum(top, s.amax(1))
            total = total * (top - new).exp() + (s - new[:, None]).exp_().sum(1)
            top = new
        y = top + total.log()
        ctx.save_for_backward(q, bank, y)
        ctx.temperature = temperature
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        q, bank, y = ctx.saved_tensors
        T, wide = ctx.temperature, y.dtype
        dq = torch.zeros(q.shape, dtype=wide, device=q.device) if ctx.needs_input_grad[0] else None
        dbank = torch.empty_like(bank) if ctx.needs_input_grad[1] else None
        with torch.autocast(q.device.type, enabled=False):
            for rows, b in _chunks(q, bank):
                p = (_scores(q, b, T) - y[:, None]).exp_()
                if dq is not None:
                    dq += (p.to(q.dtype) @ b).to(wide)
                if dbank is not None:
                    dbank[rows] = (p.mul_((g / T)[:, None]).to(q.dtype).T @ q).to(bank.dtype)
        return None if dq is None else (dq * (g / T)[:, None]).to(q.dtype), dbank, None


def _chunks(q, bank):
    """`(slice, rows in q's dtype)` of the bank, so that N x chunk stays below 2^24 numbers."""
    size = max(1, 2**24 // max(1, len(q)))
    for start in range(0, len(bank), size):
        rows = slice(start, start + size)
        yield rows, bank[rows].to(q.dtype)


def _scores(q, b, temperature):
    with torch.autocast(q.device.type, enabled=False):
        return (q @ b.T).to(torch.promote_types(q.dtype, torch.float32)) / temperature
