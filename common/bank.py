"""The memory bank: a ring of old keys, and a differentiable op over them that keeps no (N, K) matrix.

`bank_logsumexp` comes twice: in PyTorch, chunk by chunk, and as Triton kernels, used on CUDA for banks large
enough to be worth it. The environment's BANK_OP=torch forces the first, BANK_OP=triton the second.
"""
import math
import os

import torch
import torch.distributed as dist
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:  # a PyTorch for CPUs comes without
    triton = None


class Bank(nn.Module):
    """`rows` (K, D): at first unit vectors of noise, equal on all ranks given one seed; then the last K keys.

    `pointer`, a Python int (one on the device would cost a host sync per step), is the row the next key goes
    to. Both are in the state dict. Raises ValueError for a size or dim below 1, or where there is no memory
    for the rows, here or on the device they are moved to.
    """

    def __init__(self, size, dim):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"bank size {size} x {dim}: must be at least 1 x 1")
        try:
            rows = nn.functional.normalize(torch.randn(size, dim), dim=1)
        except RuntimeError:  # of the allocator: nothing else can fail
            raise ValueError(_too_large(size, dim)) from None
        self.register_buffer("rows", rows)
        self.pointer = 0

    def _apply(self, fn, recurse=True):  # what .to(device) comes to, of this module or of one around it
        try:
            return super()._apply(fn, recurse)
        except torch.OutOfMemoryError:
            raise ValueError(_too_large(*self.rows.shape)) from None

    @torch.no_grad()
    def push(self, keys):
        """Write keys (n, D) of every rank, in rank order, over the oldest rows. Nothing is dropped: the ring
        wraps, and of more than K keys the last K stay, where writing one by one would put them. Call it after
        `backward`, on all ranks at once and with the same n on each.

        Keys are written as they are: normalise them first. Raises ValueError for another shape."""
        if keys.dim() != 2 or keys.shape[1] != self.rows.shape[1]:
            raise ValueError(f"keys {tuple(keys.shape)} for a bank of {tuple(self.rows.shape)}: must be (n, "
                             f"{self.rows.shape[1]})")
        if dist.is_initialized() and dist.get_world_size() > 1:
            keys = keys.contiguous()
            parts = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, keys)
            keys = torch.cat(parts)
        size = len(self.rows)
        at = self.pointer
        end = (at + len(keys)) % size
        if len(keys) > size:
            keys = keys[-size:]
            at = end
        fits = min(len(keys), size - at)
        self.rows[at : at + fits] = keys[:fits]
        self.rows[: len(keys) - fits] = keys[fits:]
        self.pointer = end

    def get_extra_state(self):
        return self.pointer

    def set_extra_state(self, pointer):
        self.pointer = pointer


def _too_large(size, dim):
    gib = size * dim * 4 / 2**30
    return f"bank size {size} x {dim}: needs {gib:.0f} GiB, which cannot be had; lower the size (--bank-size)"


def bank_logsumexp(q, bank, temperature):
    """y_i = ln sum_j exp(q_i . bank_j / temperature), differentiable (once) in q and in bank.

    q (N, D), bank (K, D), any rows (nothing is normalised here) -> (N,). Products are of rows in q's dtype,
    sums and y in fp32 (float64: all through), each gradient in its argument's dtype. Only q, bank and y are
    kept for backward. Raises ValueError for a temperature that is not positive and finite, an empty bank,
    rows of different lengths, a temperature that is learnt, fp16 (where small probabilities vanish), or a
    BANK_OP that is unknown or impossible.
    """
    _check(q, bank, temperature)
    return _BankLogSumExp.apply(q, bank, float(temperature))


def _check(q, bank, temperature):
    if isinstance(temperature, torch.Tensor) and temperature.requires_grad:
        raise ValueError("temperature: must be a number; no gradient is made for one that is learnt")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature}: must be positive and finite")
    _check_rows(q, bank)
    if q.dtype == torch.float16:
        raise ValueError("q is float16: use bfloat16 or float32")


def _check_rows(q, bank):
    if q.dim() != 2 or bank.dim() != 2 or q.shape[1] != bank.shape[1] or not len(bank):
        raise ValueError(f"q {tuple(q.shape)} and bank {tuple(bank.shape)}: must be (N, D) and (K, D), K > 0")


@torch.no_grad()
def bank_argmax(q, bank):
    """For each row of q (N, D) the row of bank (K, D) with the largest inner product: (N,) int64, without
    gradient.

    Where several are largest but for rounding, it is one of them, and which is not promised: a GPU may round
    the products of equal rows differently. Raises ValueError for an empty bank, or rows of different lengths.
    """
    _check_rows(q, bank)
    top = torch.full((len(q),), -torch.inf, dtype=_wide(q), device=q.device)
    index = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    for rows, b in _chunks(q, bank):
        best, at = _scores(q, b, 1.0).max(1)
        index = torch.where(best > top, at + rows.start, index)
        top = torch.maximum(best, top)
    return index


@torch.no_grad()
def bank_summary(q, bank, temperature):
    """`bank_logsumexp`, and of each q_i the largest q_i . bank_j / temperature, found in one pass: (N,) both,
    without gradient. Arguments and errors are those of `bank_logsumexp`."""
    _check(q, bank, temperature)
    return _op(q, bank).logsumexp(q, bank, float(temperature))


@torch.no_grad()
def unit_rows(w):
    """n = w / |w| and the lengths |w| of the rows w (K, D): (K, D) and (K, 1), without gradient, for which
    there is `through_unit_rows`. A row of zeros stays one, and counts as of length 1e-12."""
    length = torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-12)
    return w / length, length


@torch.no_grad()
def through_unit_rows(grad, n, length):
    """The gradient in the rows w of a function of n = w / |w|, from its gradient g in n, `grad`; all (K, D),
    and `length` (K, 1) of `unit_rows`: (g - (g . n) n) / |w|. It is at right angles to w, so that to first
    order no step changes a length. In a row of zeros it is g / 1e-12."""
    along = (grad * n).sum(1, keepdim=True)
    return torch.addcmul(grad, along, n, value=-1).div_(length)


class _BankLogSumExp(torch.autograd.Function):
    """With P_ij = exp(q_i . b_j / T - y_i), whose rows sum to 1, and the incoming gradient g (N,): dq_i =
    (g_i / T) sum_j P_ij b_j and db_j = (1 / T) sum_i g_i P_ij q_i. P is made again, tile by tile."""

    @staticmethod
    def forward(ctx, q, bank, temperature):
        ctx.op = _op(q, bank)
        y, _ = ctx.op.logsumexp(q, bank, temperature)
        ctx.save_for_backward(q, bank, y)
        ctx.temperature = temperature
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        q, bank, y = ctx.saved_tensors
        weight = g / ctx.temperature
        dq, dbank = ctx.op.gradients(q, bank, y, ctx.temperature, weight, *ctx.needs_input_grad[:2])
        return None if dq is None else (dq * weight[:, None]).to(q.dtype), dbank, None


def _op(q, bank):
    return _Kernels if _use_kernels(q, bank) else _Chunks


class _Chunks:
    """In PyTorch, over chunks of the bank."""

    @staticmethod
    def logsumexp(q, bank, T):
        """y (N,), and the largest score q . b / T of each query (N,)."""
        top = torch.full((len(q),), -torch.inf, dtype=_wide(q), device=q.device)
        total = torch.zeros_like(top)
        for _, b in _chunks(q, bank):
            s = _scores(q, b, T)
            new = torch.maximum(top, s.amax(1))
            total = total * (top - new).exp() + s.sub_(new[:, None]).exp_().sum(1)
            top = new
        return top + total.log(), top

    @staticmethod
    def gradients(q, bank, y, T, weight, of_q, of_bank):
        """sum_j P_ij b_j, (N, D), and sum_i weight_i P_ij q_i, (K, D), in the bank's dtype; None where not
        asked for."""
        rows_sum = torch.zeros(q.shape, dtype=y.dtype, device=q.device) if of_q else None
        dbank = torch.empty_like(bank) if of_bank else None
        weighted = q.to(y.dtype) * weight[:, None]
        with torch.autocast(q.device.type, enabled=False):
            for rows, b in _chunks(q, bank):
                p = _scores(q, b, T).sub_(y[:, None]).exp_()
                if of_q:
                    rows_sum += p @ b
                if of_bank:
                    dbank[rows] = (p.T @ weighted).to(bank.dtype)
        return rows_sum, dbank


def _wide(q):
    return torch.promote_types(q.dtype, torch.float32)


def _chunks(q, bank):
    """`(slice, those rows)` of the bank, rounded to q's dtype but held in the wide one, in which products of
    bf16 rows lose next to nothing. N x chunk is at most 2^24 numbers on a GPU, and on a CPU 2^18, which its
    cache holds."""
    size = max(1, (2**18 if q.device.type == "cpu" else 2**24) // max(1, len(q)))
    for start in range(0, len(bank), size):
        rows = slice(start, start + size)
        yield rows, bank[rows].to(q.dtype).to(_wide(q))


def _scores(q, b, temperature):
    with torch.autocast(q.device.type, enabled=False):
        return (q.to(b.dtype) / temperature) @ b.T


# ----------------------------------------------------------------------------------------------------------
# Triton
# ----------------------------------------------------------------------------------------------------------
KERNEL_ROWS = 16384  # from this many rows of bank; below, launches cost more than the work
KERNEL_WIDTH = 128  # and up to this D in fp32: of longer rows registers hold too few for a tile that pays


def _use_kernels(q, bank):
    choice = os.environ.get("BANK_OP", "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"BANK_OP={choice}: must be torch, triton or unset")
    if choice == "torch":
        return False
    possible = (triton is not None and len(q) > 0 and 16 <= q.shape[1] <= 512
                and {q.dtype, bank.dtype} <= {torch.float32, torch.bfloat16}
                and (_interpreted() or q.is_cuda and torch.version.hip is None
                     and torch.cuda.get_device_capability(q.device) >= (8, 0)))
    if choice == "triton" and not possible:
        raise ValueError("BANK_OP=triton needs Triton, CUDA (or TRITON_INTERPRET=1), fp32 or bf16, D from "
                         f"16 to 512; got {q.device.type}, {q.dtype}, {bank.dtype}, {tuple(q.shape)}")
    pays = len(bank) >= KERNEL_ROWS and (q.dtype == torch.bfloat16 or q.shape[1] <= KERNEL_WIDTH)
    return possible and (choice == "triton" or q.is_cuda and pays)


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"  # as it was when Triton was imported


def _tiles(width, dtype):
    """Queries and bank rows of a tile, warps, stages, for queries of `dtype`. A program's shared memory stays
    within 99 KiB, which is all that capabilities 8.6, 8.9 and 12.0 have; larger tiles of fp32, each of whose
    products is three (`_dot`), would also spill thousands of bytes of registers."""
    if dtype == torch.bfloat16:
        return (64 if width <= 128 else 32), min(64, 8192 // width), 4, 2
    if width <= 128:
        return 32, 32, 4, 1
    return 16, 16, 8, 1


class _Kernels:
    """As three Triton kernels. A program of the first two has a tile of queries and a part of
    the bank, so that few queries still fill the GPU; one of the third a tile of the bank and all queries.
    Each number has one writer, and partial sums are added in a fixed order: the same bits every time."""

    @staticmethod
    def logsumexp(q, bank, T):
        grid, numbers, common = _launch(q, bank, T)
        top, total = torch.empty(2, grid[1], len(q), device=q.device)
        with _on(q):
            _logsumexp_kernel[grid](q.contiguous(), bank.contiguous(), top, total, *numbers, **common)
        return torch.logsumexp((top + total.log2()) * math.log(2), 0), top.amax(0) * math.log(2)

    @staticmethod
    def gradients(q, bank, y, T, weight, of_q, of_bank):
        return (_Kernels.weighted_rows(q, bank, y, T) if of_q else None,
                _Kernels.weighted_queries(q, bank, y, T, weight) if of_bank else None)

    @staticmethod
    def weighted_rows(q, bank, y, T):
        grid, numbers, common = _launch(q, bank, T)
        out = torch.empty(grid[1], *q.shape, device=q.device)
        with _on(q):
            _weighted_rows_kernel[grid](q.contiguous(), bank.contiguous(), y, out, *numbers, **common)
        return out.sum(0)

    @staticmethod
    def weighted_queries(q, bank, y, T, weight):
        _, (N, K, *rest), common = _launch(q, bank, T)
        out = torch.empty(bank.shape, dtype=bank.dtype, device=bank.device)
        with _on(q):
            _weighted_queries_kernel[(triton.cdiv(K, common["ROWS"]),)](
                q.contiguous(), bank.contiguous(), y, weight.contiguous(), out, N, K, *rest, **common)
        return out


def _on(q):
    return torch.cuda.device(q.device if q.is_cuda else -1)  # Triton launches on the current one; -1: none


def _launch(q, bank, T):
    """Grid (query tiles, parts of the bank), arguments, and options, of the kernels."""
    (N, D), K = q.shape, len(bank)
    width = max(16, triton.next_power_of_2(D))
    queries, rows, warps, stages = _tiles(width, q.dtype)
    programs = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 6
    tiles = triton.cdiv(N, queries)
    per_part = rows * triton.cdiv(triton.cdiv(K, rows), max(1, programs // tiles))
    bf16 = q.dtype == torch.bfloat16 and not _interpreted()  # which multiplies bf16 as if they were integers
    common = dict(QUERIES=queries, ROWS=rows, WIDTH=width, OPERAND=tl.bfloat16 if bf16 else tl.float32,
                  num_warps=warps, num_stages=stages)
    return (tiles, triton.cdiv(K, per_part)), (N, K, D, math.log2(math.e) / T, per_part), common


if triton is not None:
    @triton.jit
    def _load(rows, first, n, D, TILE: tl.constexpr, WIDTH: tl.constexpr):
        """Rows `first` to first + TILE of (n, D); zeros beyond both."""
        i, d = first + tl.arange(0, TILE).to(tl.int64)[:, None], tl.arange(0, WIDTH)[None, :]
        return tl.load(rows + i * D + d, mask=(i < n) & (d < D), other=0.0)

    @triton.jit
    def _dot(a, b):
        return tl.dot(a, b, input_precision="tf32x3")  # of fp32; nearly its precision, on tensor cores

    @triton.jit
    def _logsumexp_kernel(q, bank, top, total, N, K, D, scale, per_part, QUERIES: tl.constexpr,
                          ROWS: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr):
        """Of each query over a part of the bank: the largest score (in units of ln 2) and sum 2^(score - it)."""
        n, part = tl.program_id(0) * QUERIES, tl.program_id(1)
        queries = _load(q, n, N, D, QUERIES, WIDTH).to(OPERAND)
        best = tl.full([QUERIES], float("-inf"), tl.float32)
        s = tl.zeros([QUERIES], tl.float32)
        for k in range(part * per_part, tl.minimum((part + 1) * per_part, K), ROWS):
            b = _load(bank, k, K, D, ROWS, WIDTH).to(q.dtype.element_ty).to(OPERAND)
            scores = _dot(queries, tl.trans(b)) * scale
            scores = tl.where(k + tl.arange(0, ROWS)[None, :] < K, scores, float("-inf"))
            new = tl.maximum(best, tl.max(scores, 1))
            s = s * tl.exp2(best - new) + tl.sum(tl.exp2(scores - new[:, None]), 1)
            best = new
        i = n + tl.arange(0, QUERIES)
        tl.store(top + part * N + i, best, mask=i < N)
        tl.store(total + part * N + i, s, mask=i < N)

    @triton.jit
    def _weighted_rows_kernel(q, bank, y, out, N, K, D, scale, per_part, QUERIES: tl.constexpr,
                              ROWS: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr):
        n, part = tl.program_id(0) * QUERIES, tl.program_id(1)
        i, d = n + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
        queries = _load(q, n, N, D, QUERIES, WIDTH).to(OPERAND)
        y2 = tl.load(y + i, mask=i < N, other=0.0) * 1.4426950408889634  # log2(e)
        sums = tl.zeros([QUERIES, WIDTH], tl.float32)
        for k in range(part * per_part, tl.minimum((part + 1) * per_part, K), ROWS):
            b = _load(bank, k, K, D, ROWS, WIDTH).to(q.dtype.element_ty).to(OPERAND)
            p = tl.exp2(_dot(queries, tl.trans(b)) * scale - y2[:, None])
            p = tl.where(k + tl.arange(0, ROWS)[None, :] < K, p, 0.0)
            sums += _dot(p.to(q.dtype.element_ty).to(OPERAND), b)
        at = part * N * D + i[:, None] * D + d[None, :]
        tl.store(out + at, sums, mask=(i[:, None] < N) & (d[None, :] < D))

    @triton.jit
    def _weighted_queries_kernel(q, bank, y, weight, out, N, K, D, scale, per_part, QUERIES: tl.constexpr,
                                 ROWS: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr):
        k = tl.program_id(0) * ROWS
        b = _load(bank, k, K, D, ROWS, WIDTH).to(q.dtype.element_ty).to(OPERAND)
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        for n in range(0, N, QUERIES):
            i = n + tl.arange(0, QUERIES)
            queries = _load(q, n, N, D, QUERIES, WIDTH).to(OPERAND)
            y2 = tl.load(y + i, mask=i < N, other=0.0) * 1.4426950408889634
            w = tl.load(weight + i, mask=i < N, other=0.0)
            p = tl.exp2(_dot(b, tl.trans(queries)) * scale - y2[None, :]) * w[None, :]
            sums += _dot(p.to(q.dtype.element_ty).to(OPERAND), queries)
        i, d = k + tl.arange(0, ROWS).to(tl.int64)[:, None], tl.arange(0, WIDTH)[None, :]
        tl.store(out + i * D + d, sums, mask=(i < K) & (d < D))
