import collections
import copy
import math

import pytest
import torch

from common import bank as bank_module
from common.bank import Bank, bank_logsumexp
from tests.recipes import A, unit


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
    assert (y.detach().double() - want).abs().max() < 0.05  # a CPU rounds bf16 products to bf16


@pytest.mark.parametrize(
    "q, b, T, word",
    [
        (torch.randn(2, 3), torch.randn(4, 3), 0.0, "temperature"),
        (torch.randn(2, 3), torch.randn(0, 3), 0.2, "K > 0"),
        (torch.randn(2, 3), torch.randn(4, 5), 0.2, r"\(4, 5\)"),
        (torch.randn(2, 3).half(), torch.randn(4, 3), 0.2, "float16"),
    ],
)
def test_bad_arguments_are_named(q, b, T, word):
    with pytest.raises(ValueError, match=word):
        bank_logsumexp(q, b, T)


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


def test_push_keeps_no_gradient():
    bank = Bank(4, 3)
    bank.push(torch.randn(2, 3, requires_grad=True))
    assert not bank.rows.requires_grad
