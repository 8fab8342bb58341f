import collections
import copy
import math
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common import bank as bank_module
from common.bank import Bank, bank_logsumexp, bank_summary, through_unit_rows, unit_rows
from tests.recipes import A, unit
from tests.test_adco import S

# Where the kernels can run: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1, before the import).
INTERPRETED = bank_module.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu"] if INTERPRETED else []


def slow(q, bank, temperature):
    """ln sum_j exp(q_i . b_j / T), and its gradients for upstream ones, with loops."""
    y, dq, db = torch.zeros(len(q)), torch.zeros_like(q), torch.zeros_like(bank)
    y = y.double()
    for i in range(len(q)):
        e = [
            math.exp(sum((q[i, d] * bank[j, d]).item() for d in range(q.shape[1])) / temperature)
            for j in range(len(bank))
        ]
        y[i] = math.log(sum(e))
        for j in range(len(bank)):
            dq[i] += e[j] / sum(e) * bank[j] / temperature
            db[j] += e[j] / sum(e) * q[i] / temperature
    return y, dq, db


@pytest.mark.parametrize("N, K, D, T", [(3, 7, 4, 0.2), (1, 1, 5, 0.02), (5, 16, 8, 1.0)])
def test_logsumexp_and_both_gradients_equal_slow_loops(N, K, D, T):
    q, b = unit(A(N, D, 0)).requires_grad_(), A(K, D, 3).requires_grad_()
    y = bank_logsumexp(q, b, T)
    y.sum().backward()
    want = slow(q.detach(), b.detach(), T)
    for got, expected in zip((y.detach(), q.grad, b.grad), want):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_gradients_equal_finite_differences():
    q, b = unit(A(4, 6, 1)).requires_grad_(), A(9, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, b: bank_logsumexp(q, b, 0.5) * torch.arange(1, 5), (q, b))


def test_chunks_change_nothing(monkeypatch):
    q, b = unit(A(5, 8, 0)).requires_grad_(), unit(A(33, 8, 3)).requires_grad_()
    results = []
    for numbers in (2**24, 5 * 7, 1):  # all at once, 7 rows, 1 row
        chunk = max(1, numbers // 5)
        monkeypatch.setattr(
            bank_module,
            "_chunks",
            lambda q, b, c=chunk: ((slice(s, s + c), b[s : s + c].to(q.dtype)) for s in range(0, len(b), c)),
        )
        y = bank_logsumexp(q, b, 0.1)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, b))))
    for other in results[1:]:
        for got, want in zip(other, results[0]):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_matrix_is_kept_for_backward():
    q, b = torch.randn(64, 16, requires_grad=True), torch.randn(4096, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        bank_logsumexp(q, b, 0.2).sum()
    assert max(kept) == 4096 * 16


def test_only_the_gradient_asked_for_is_made():
    q, b = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    bank_logsumexp(q, b, 0.2).sum().backward()
    assert q.grad is not None and b.grad is None


@pytest.mark.parametrize("chunk", [2**24, 5 * 7, 1])
def test_the_summary_is_the_logsumexp_and_the_largest_score(monkeypatch, chunk):
    q, b = unit(A(5, 8, 0)), A(33, 8, 3)
    scores = [[sum((q[i, d] * b[j, d]).item() for d in range(8)) / 0.3 for j in range(33)] for i in range(5)]

    def chunks(q, bank):
        size = max(1, chunk // 5)
        return ((slice(i, i + size), bank[i : i + size]) for i in range(0, 33, size))

    monkeypatch.setattr(bank_module, "_chunks", chunks)
    y, top = bank_summary(q.requires_grad_(), b, 0.3)
    assert not y.requires_grad and not top.requires_grad
    for i, row in enumerate(scores):
        assert top[i].item() == pytest.approx(max(row), rel=1e-12)
        assert y[i].item() == pytest.approx(math.log(sum(math.exp(s) for s in row)), rel=1e-12)


def test_the_gradient_through_unit_rows_is_autograds():
    w, a = A(7, 5, 1).requires_grad_(), A(7, 5, 2)
    n, length = unit_rows(w.detach())
    for row, unit_row, size in zip(w.detach(), n, length):
        assert size.item() == pytest.approx(math.sqrt(sum(v.item() ** 2 for v in row)), rel=1e-12)
        torch.testing.assert_close(unit_row * size, row, rtol=1e-12, atol=0)
    free = n.clone().requires_grad_()
    (of_n,) = torch.autograd.grad((free * a).sin().sum(), free)
    (want,) = torch.autograd.grad((w / w.norm(dim=1, keepdim=True) * a).sin().sum(), w)
    found = through_unit_rows(of_n, n, length)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)
    assert (found * w).sum(1).abs().max() < 1e-12
    zero, _ = unit_rows(torch.zeros(1, 5))
    assert zero.isfinite().all()


def test_identities():
    q, b = unit(A(4, 8, 0)), unit(A(10, 8, 3))
    y, s = bank_logsumexp(q, b, 0.2), q @ b.T / 0.2
    torch.testing.assert_close(
        torch.logaddexp(bank_logsumexp(q, b[:3], 0.2), bank_logsumexp(q, b[3:], 0.2)), y
    )
    assert (s.amax(1) <= y).all() and (y <= s.amax(1) + math.log(10)).all()
    torch.testing.assert_close(bank_logsumexp(q, b[:1].expand(6, 8), 0.2), s[:, 0] + math.log(6))
    torch.testing.assert_close(bank_logsumexp(q, b[:1], 0.2), s[:, 0])
    assert bank_logsumexp(q[:0], b, 0.2).shape == (0,)


def test_extreme_scores_stay_finite_in_float32():
    q = unit(A(4, 8, 0)).float()
    y = bank_logsumexp(q, torch.cat([q, -q]), 0.005)
    torch.testing.assert_close(y, torch.full((4,), 200.0), rtol=1e-4, atol=0)


def test_autocast_does_not_round_the_scores():
    q, b = unit(A(4, 128, 0)).float().requires_grad_(), unit(A(50, 128, 3)).float()
    plain = bank_logsumexp(q, b, 0.02)
    (g,) = torch.autograd.grad(plain.sum(), q)
    with torch.autocast("cpu", torch.bfloat16):
        cast = bank_logsumexp(q, b, 0.02)
        (g_cast,) = torch.autograd.grad(cast.sum(), q)
    assert torch.equal(plain, cast) and torch.equal(g, g_cast)


def test_bfloat16_rows_give_float32_sums_and_gradients_of_their_own_type():
    q, b = unit(A(4, 16, 0)).bfloat16().requires_grad_(), unit(A(50, 16, 3)).float().requires_grad_()
    y = bank_logsumexp(q, b, 0.2)
    y.sum().backward()
    assert (y.dtype, q.grad.dtype, b.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    want = bank_logsumexp(q.detach().double(), b.detach().bfloat16().double(), 0.2)
    assert (y.detach().double() - want).abs().max() < 5e-5  # only the rows are rounded, no score is


def rows_exact_in_bfloat16(n, d, a):
    i, j = torch.arange(n)[:, None] + a, 2 * torch.arange(d) + a
    return ((((i**2 * j + 7919 * torch.arange(d)) % 65521) % 257) - 128).double() / 1024


def gradients(q, b, g, T):
    q, b = q.clone().requires_grad_(), b.clone().requires_grad_()
    y = bank_logsumexp(q, b, T)
    return y.detach(), *torch.autograd.grad(y, (q, b), g)


@pytest.mark.parametrize(
    "T, y, dq, dbank",
    [
        (
            0.2,
            (2.947922551415559, 4.565745056033254, 4.4174175620403515, 4.633995075604956),
            (8.932055515797718, -0.5627454177281236),
            (8.901412469329028, -1.1732226287856864, -0.10847652388515452),
        ),
        (
            0.02,
            (24.792449699896327, 44.03908444444164, 41.355728774394976, 45.31873051227962),
            (115.24406842654038, -6.5304354580091735),
            (116.7448948233039, -13.846804365784973, -7.4315e-8),
        ),
    ],
)
def test_values_and_gradients_equal_printed_ones(T, y, dq, dbank):
    q, b = unit(S(4, 6, 0)), unit(S(9, 6, 2))
    got, a, w = gradients(q, b, torch.tensor([1, -0.5, 2, 0.25], dtype=torch.float64), T)
    assert got.tolist() == pytest.approx(y, rel=1e-9)
    assert (a.norm().item(), a[3, 5].item()) == pytest.approx(dq, rel=1e-9)
    assert (w.norm().item(), w[0, 0].item(), w[8, 5].item()) == pytest.approx(dbank, rel=1e-9, abs=1e-12)


def test_infonce_by_identity_and_scores_that_would_overflow_equal_printed_values():
    q, b, k = unit(S(4, 6, 0)), unit(S(9, 6, 2)), unit(S(4, 6, 0.5))
    loss = F.softplus(bank_logsumexp(q, b, 0.2) - (q * k).sum(1) / 0.2).mean()
    assert loss.item() == pytest.approx(0.6802742622338622, rel=1e-9)
    y, dq, _ = gradients(30 * S(3, 5, 0.4), 20 * S(7, 5, 1.1), torch.ones(3, dtype=torch.float64), 0.05)
    assert y.tolist() == pytest.approx([21635.829724214036, 21059.122197026707, 21337.983362318202], rel=1e-12)
    assert dq.norm().item() == pytest.approx(1054.7364115587625, rel=1e-9)


def test_full_size_equals_printed_values():
    q, b = rows_exact_in_bfloat16(256, 128, 1), rows_exact_in_bfloat16(65536, 128, 0)
    assert torch.equal(q.bfloat16().double(), q) and torch.equal(b.bfloat16().double(), b)
    y, dq, dbank = gradients(q, b, ((torch.arange(256) % 7) - 2) / 4.0, 0.05)
    assert [y.sum().item(), y[0].item()] == pytest.approx([3433.262992185082, 15.853970736065921], rel=1e-9)
    assert [dq.norm().item(), dq[0, 5].item()] == pytest.approx([95.17751253225615, 0.953438071902861], rel=1e-9)
    assert [dbank.norm().item(), dbank[65535, 127].item()] == pytest.approx(
        [13.406313956095126, 0.0004437497797617583], rel=1e-9
    )


def test_argmax_is_the_first_largest_product_whatever_the_chunks(monkeypatch):
    q, b = unit(S(4, 6, 0)), unit(S(9, 6, 2))
    assert bank_module.bank_argmax(q, b).tolist() == [2, 0, 1, 2]
    assert bank_module.bank_argmax(q[:0], b).shape == (0,)
    twice = torch.cat([b, b])
    for chunk in (1, 4, 9, 18):
        monkeypatch.setattr(
            bank_module,
            "_chunks",
            lambda q, b, c=chunk: ((slice(s, s + c), b[s : s + c]) for s in range(0, len(b), c)),
        )
        assert bank_module.bank_argmax(q, twice).tolist() == [2, 0, 1, 2]


RELATIVE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (3e-3, 6e-3)}  # dq, dbank
if not torch.cuda.is_available():  # the interpreter cuts fp32 off to bf16 where a GPU rounds
    RELATIVE[torch.bfloat16] = 6e-3, 6e-3


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(
    "N, K, D, T",
    [(4, 9, 16, 0.05), (70, 300, 24, 0.2), (5, 1000, 100, 0.02), (130, 650, 128, 0.05), (3, 70, 256, 0.05), (2, 40, 512, 0.1)],
)
def test_kernels_equal_the_plain_op_in_float64(device, dtype, N, K, D, T, monkeypatch):
    q, b = rows_exact_in_bfloat16(N, D, 1), rows_exact_in_bfloat16(K, D, 0)
    g = torch.linspace(-1, 2, N, dtype=torch.float64)
    want = gradients(q, b, g, T)
    monkeypatch.setenv("BANK_OP", "triton")
    for bank_dtype in (torch.float32, torch.bfloat16):
        inputs = q.to(device, dtype), b.to(device, bank_dtype), g.to(device, torch.float32), T
        got = gradients(*inputs)
        assert [t.dtype for t in got] == [torch.float32, dtype, bank_dtype]
        assert all(torch.equal(a, again) for a, again in zip(got, gradients(*inputs)))
        assert (got[0].double().cpu() - want[0]).abs().max() < 5e-5
        for a, expected, tolerance in zip(got[1:], want[1:], RELATIVE[dtype]):
            rounding = 5e-3 if a.dtype == torch.bfloat16 else 0  # of the result itself
            assert (a.double().cpu() - expected).norm() <= (tolerance + rounding) * expected.norm()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernels_make_only_the_gradient_asked_for_and_ignore_autocast(device, monkeypatch):
    q, b = F.normalize(torch.randn(4, 16, device=device)), torch.randn(40, 16, device=device)
    monkeypatch.setenv("BANK_OP", "triton")
    with torch.autocast(device, torch.bfloat16):
        y = bank_logsumexp(q.requires_grad_(), b, 0.2)
    y.sum().backward()
    assert b.grad is None
    found = bank_summary(q, b, 0.2)
    monkeypatch.setenv("BANK_OP", "torch")
    torch.testing.assert_close(y, bank_logsumexp(q, b, 0.2), rtol=0, atol=5e-5)
    for ours, plain in zip(found, bank_summary(q, b, 0.2)):
        torch.testing.assert_close(ours, plain, rtol=0, atol=5e-5)


@pytest.mark.parametrize("device", [d for d in KERNEL_DEVICES if d == "cuda"])
def test_kernels_at_full_size_equal_printed_values_without_the_matrix(device, monkeypatch):
    q, b = rows_exact_in_bfloat16(256, 128, 1), rows_exact_in_bfloat16(65536, 128, 0)
    inputs = q.to(device, torch.bfloat16), b.to(device, torch.float32), ((torch.arange(256) % 7) - 2).to(device) / 4, 0.05
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, dq, dbank = gradients(*inputs)
    assert torch.cuda.max_memory_allocated() - before < 256 * 65536 * 4 + 3 * b.numel() * 4
    assert y.double().sum().item() == pytest.approx(3433.262992185082, abs=256 * 5e-5)
    assert dq.double().norm().item() == pytest.approx(95.17751253225615, rel=3e-3)
    assert dbank.double().norm().item() == pytest.approx(13.406313956095126, rel=6e-3)


@pytest.mark.parametrize("interpreter", [["1"]] if bank_module.triton and not KERNEL_DEVICES else [])
def test_the_kernels_tests_pass_in_tritons_interpreter(interpreter):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "kernels_equal or kernels_make"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


KERNELS = ("_logsumexp_kernel", "_weighted_rows_kernel", "_weighted_queries_kernel")
if bank_module.triton is None or os.environ.get("TRITON_INTERPRET") == "1":
    KERNELS = ()  # there is no compiler


def made_for_a_gpu(name, D, dtype, folder, monkeypatch):
    """The shared memory of a program of the kernel `name`, and what it spills of its registers, in bytes, as compiled
    for an RTX 30 (capability 8.6). Neither needs a GPU, but a Triton that can be asked in this way."""
    ptxas = pathlib.Path(bank_module.triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not ptxas.exists():
        pytest.skip(f"this Triton comes without {ptxas}")
    q, b = torch.empty(256, D, dtype=dtype), torch.empty(32768, D)
    _, numbers, options = bank_module._launch(q, b, 0.2)
    how = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    kernel = getattr(bank_module, name)
    types = {"q": "*bf16" if dtype == torch.bfloat16 else "*fp32", "scale": "fp32",
             **dict.fromkeys(("bank", "top", "total", "y", "weight", "out"), "*fp32"),
             **dict.fromkeys(("N", "K", "D", "per_part"), "i32"), **dict.fromkeys(options, "constexpr")}
    signature = {argument: types[argument] for argument in kernel.arg_names}
    sixteens = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names)
                if types[argument] in ("i32", "*fp32", "*bf16")}  # as tensors' addresses and these sizes are
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    try:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(fn=kernel, signature=signature, constexprs=options, attrs=sixteens)
        gpu = GPUTarget("cuda", 86, 32)
    except (ImportError, TypeError) as e:
        pytest.skip(f"Triton {bank_module.triton.__version__} is asked in another way: {e}")
    compiled = bank_module.triton.compile(source, target=gpu, options=how)
    (folder / "kernel.ptx").write_text(compiled.asm["ptx"])
    found = subprocess.run([ptxas, "-v", "-arch=sm_86", folder / "kernel.ptx", "-o", folder / "kernel.cubin"],
                           capture_output=True, text=True, check=True)
    return compiled.metadata.shared, int(re.search(r"(\d+) bytes spill stores", found.stderr).group(1))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_fits_into_the_smallest_gpu_and_its_registers(name, tmp_path, monkeypatch):
    """At D = 128, in float32, as all scripts have it."""
    shared, spilt = made_for_a_gpu(name, 128, torch.float32, tmp_path, monkeypatch)
    assert 0 < shared <= 99 * 1024 and spilt < 512


@pytest.mark.parametrize("name", KERNELS[1:2])
@pytest.mark.parametrize("D, dtype", [(512, torch.float32), (128, torch.bfloat16)])
def test_a_kernel_of_the_largest_tiles_fits_into_the_smallest_gpu(name, D, dtype, tmp_path, monkeypatch):
    shared, _ = made_for_a_gpu(name, D, dtype, tmp_path, monkeypatch)
    assert 0 < shared <= 99 * 1024


def test_float32_rows_too_long_for_registers_are_left_to_pytorch(monkeypatch):
    monkeypatch.delenv("BANK_OP", raising=False)
    monkeypatch.setattr(bank_module, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class Rows(SimpleNamespace):
        def __len__(self):
            return self.shape[0]

    for D, dtype, wanted in ((128, torch.float32, True), (129, torch.float32, False), (512, torch.bfloat16, True)):
        q = Rows(shape=(4, D), dtype=dtype, is_cuda=True, device="cuda")
        assert bank_module._use_kernels(q, Rows(shape=(32768, D), dtype=torch.float32)) == wanted


def test_bank_op_is_named_when_unknown_or_impossible(monkeypatch):
    q, b = torch.randn(2, 16).double(), torch.randn(4, 16).double()
    monkeypatch.setenv("BANK_OP", "cuda")
    with pytest.raises(ValueError, match="BANK_OP=cuda: must be torch, triton or unset"):
        bank_logsumexp(q, b, 0.2)
    monkeypatch.setenv("BANK_OP", "triton")
    with pytest.raises(ValueError, match="BANK_OP=triton needs .*float64"):
        bank_logsumexp(q, b, 0.2)
    monkeypatch.setenv("BANK_OP", "torch")
    assert bank_logsumexp(q, b, 0.2).shape == (2,)


def test_full_banks_on_a_gpu_use_the_kernels_and_small_ones_do_not(monkeypatch):
    monkeypatch.delenv("BANK_OP", raising=False)
    for device, n, used in (("cuda", 65536, True), ("cuda", 4096, False), ("cpu", 65536, False)):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        q, b = torch.randn(2, 16, device=device), torch.randn(n, 16, device=device)
        assert bank_module._use_kernels(q, b) == used


@pytest.mark.parametrize(
    "q, b, T, word",
    [
        *((torch.randn(2, 3), torch.randn(4, 3), T, f"temperature {T}: must be positive and finite")
          for T in (0.0, -0.2, math.nan, math.inf)),
        (torch.randn(2, 3), torch.randn(0, 3), 0.2, "K > 0"),
        (torch.randn(2, 3), torch.randn(4, 5), 0.2, r"\(4, 5\)"),
        (torch.randn(2, 3).half(), torch.randn(4, 3), 0.2, "float16"),
    ],
)
def test_bad_arguments_are_named(q, b, T, word):
    for function in (bank_logsumexp, bank_summary):
        with pytest.raises(ValueError, match=word):
            function(q, b, T)


@pytest.mark.parametrize("q, b", [((2, 3), (0, 3)), ((2, 3), (4, 5)), ((3,), (4, 3)), ((2, 3), (3,))])
def test_argmax_needs_rows_of_equal_length_and_at_least_one(q, b):
    with pytest.raises(ValueError, match=r"must be \(N, D\) and \(K, D\), K > 0"):
        bank_module.bank_argmax(torch.randn(q), torch.randn(b))


def test_argmax_of_equal_products_is_one_of_them():
    q, b = unit(S(4, 6, 0)), unit(S(9, 6, 2))
    found = bank_module.bank_argmax(q, b.repeat(3, 1))
    assert (found % 9).tolist() == [2, 0, 1, 2] and found.max() < 27


@pytest.mark.parametrize("size, dim, words", [
    (0, 4, "bank size 0 x 4: must be at least 1 x 1"), (-3, 4, "bank size -3 x 4"), (4, 0, "bank size 4 x 0"),
    (4, -1, "bank size 4 x -1"),
    (10**15, 128, f"bank size {10**15} x 128: needs 476837158 GiB, which cannot be had; lower the size \\(--bank-size\\)"),
    (10**18, 128, "which cannot be had; lower the size \\(--bank-size\\)")])  # more bytes than an int64 counts
def test_a_bank_that_cannot_be_made_is_refused_in_one_line(size, dim, words):
    with pytest.raises(ValueError, match=f"^.*{words}.*$"):
        Bank(size, dim)


def test_a_bank_that_a_device_has_no_memory_for_is_refused_in_one_line(monkeypatch):
    """Alone, and as a part of a network; other errors on the way stay as they are."""
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 95.37 GiB")

    def broken(*args, **kwargs):
        raise RuntimeError("no such device")

    bank = Bank(8, 4)
    monkeypatch.setattr(torch.Tensor, "to", full)
    for module in (bank, torch.nn.ModuleList([bank])):
        with pytest.raises(ValueError, match="^bank size 8 x 4: needs 0 GiB, .*; lower the size \\(--bank-size\\)$"):
            module.to(torch.float64)
    monkeypatch.setattr(torch.Tensor, "to", broken)
    with pytest.raises(RuntimeError, match="no such device"):
        bank.to(torch.float64)


def test_a_bank_moves_as_other_modules_do():
    bank = Bank(8, 4)
    assert bank.double() is bank and bank.rows.dtype == torch.float64 and bank.to("meta").rows.is_meta


@pytest.mark.parametrize("size", [1, 5, 16])
def test_bank_is_a_deque(size):
    """Pushing batches of any length leaves what deque(maxlen=K) holds, where a pointer would write it."""
    g = torch.Generator().manual_seed(size)
    bank, ring, count = Bank(size, 4), collections.deque(maxlen=size), 0
    first = bank.rows.clone()
    for n in (3, 1, 0, 7, 16, 5, 40, 2):
        keys = torch.randn(n, 4, generator=g)
        bank.push(keys)
        ring.extend(keys)
        count += n
        assert bank.pointer == count % size
        for age, key in enumerate(reversed(ring), 1):
            assert torch.equal(bank.rows[(count - age) % size], key)
        assert torch.equal(bank.rows[len(ring) :], first[len(ring) :])


def test_bank_printed_example():
    bank = Bank(16, 3)
    bank.pointer = 14
    bank.push(torch.arange(12.0).view(4, 3))
    assert bank.rows[[14, 15, 0, 1], 0].tolist() == [0, 3, 6, 9] and bank.pointer == 2


def test_bank_starts_on_the_sphere_and_survives_a_checkpoint(tmp_path):
    bank = Bank(10, 6)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(10))
    bank.push(torch.randn(7, 6))
    torch.save(bank.state_dict(), tmp_path / "b")
    other = Bank(10, 6)
    other.load_state_dict(torch.load(tmp_path / "b", weights_only=True))
    assert torch.equal(other.rows, bank.rows) and other.pointer == 7
    assert copy.deepcopy(bank).pointer == 7


@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (4, 4), (3,), (), (4, 3, 1), (0,)])
def test_keys_of_another_shape_are_refused_and_change_nothing(shape):
    """(n, 1) would be spread over the row."""
    bank = Bank(6, 3)
    before = bank.rows.clone()
    with pytest.raises(ValueError, match=r"keys .* for a bank of \(6, 3\): must be \(n, 3\)$"):
        bank.push(torch.ones(shape))
    assert torch.equal(bank.rows, before) and bank.pointer == 0


def test_keys_are_written_as_they_are():
    bank = Bank(6, 3)
    bank.push(2 * torch.eye(3))
    assert torch.equal(bank.rows[:3], 2 * torch.eye(3))


def test_unit_rows_carry_no_gradient_and_keep_a_row_of_zeros():
    w = torch.cat([torch.zeros(1, 3), torch.ones(1, 3)]).requires_grad_()
    n, length = unit_rows(w)
    assert not n.requires_grad and not length.requires_grad
    assert torch.equal(n[0], torch.zeros(3)) and length[0].item() == pytest.approx(1e-12)


def test_push_keeps_no_gradient():
    bank = Bank(4, 3)
    bank.push(torch.randn(2, 3, requires_grad=True))
    assert not bank.rows.requires_grad


def test_a_temperature_that_is_learnt_is_refused_for_it_would_get_no_gradient():
    q, rows = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match="temperature: must be a number; no gradient"):
        bank_logsumexp(q, rows, torch.tensor(0.2, requires_grad=True))
    assert torch.equal(bank_logsumexp(q, rows, torch.tensor(0.2)), bank_logsumexp(q, rows, torch.tensor(0.2).item()))
