"""The chunked head against its naive twin, against float64, and against numerical derivatives."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zephyr import head

N, C, V = 13, 16, 37
FLOAT64 = 1e-13  # the same sums in another order; measured 2e-16
FLOAT32 = 2e-6  # against float64 from the same inputs; measured 2e-7
BF16_FORWARD = 1e-6  # float32 arithmetic; measured 3e-8, with logits rounded to bf16 1e-3
BF16_BACKWARD = (
    2**-7
)  # the gradient of the logits and the result are rounded to bf16; measured 5e-3
CHUNKS = {"one row": 1, "uneven": 3 * V + 5, "all at once": 2**24}  # 13 rows: 13 x 1, 4 x 3 + 1, 13


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def _chunks(request, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", request.param)


def error(a, b):
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def inputs(dtype, n=N):
    """Hidden rows, weight, targets (0, V - 1 and a repeated one among them), incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, C, generator=generator).to(dtype)
    weight = torch.randn(V, C, generator=generator).to(dtype)
    targets = torch.tensor([0, V - 1, 5, 5, *range(7, 7 + N - 4)])[:n]
    wide = torch.promote_types(torch.float32, dtype)
    return hidden, weight, targets, torch.randn(n, generator=generator).to(wide)


def value_and_gradients(function, hidden, weight, targets, grad):
    """log-probs, and what `grad` becomes in hidden and in weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    log_p = function(hidden, weight, targets)
    return log_p.detach(), *torch.autograd.grad(log_p, (hidden, weight), grad)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [
        (torch.float64, FLOAT64, FLOAT64),
        (torch.float32, FLOAT32, FLOAT32),
        (torch.bfloat16, BF16_FORWARD, BF16_BACKWARD),
    ],
)
def test_log_probs_is_its_naive_twin_and_float64_in_value_and_gradients(dtype, forward, backward):
    hidden, weight, targets, grad = inputs(dtype)
    ours = value_and_gradients(head.log_probs, hidden, weight, targets, grad)
    naive = value_and_gradients(head.log_probs_naive, hidden, weight, targets, grad)
    wide = value_and_gradients(
        head.log_probs_naive, hidden.double(), weight.double(), targets, grad.double()
    )
    for expected in (naive, wide):
        for a, b, tolerance in zip(ours, expected, (forward, backward, backward), strict=True):
            assert a.shape == b.shape
            assert error(a, b) <= tolerance
    assert [x.dtype for x in ours] == [torch.promote_types(torch.float32, dtype), dtype, dtype]


@pytest.mark.usefixtures("_chunks")
def test_gradcheck_agrees_in_float64():
    hidden, weight, targets, _ = inputs(torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: head.log_probs(h, w, targets), leaves)


@pytest.mark.parametrize("function", [head.log_probs, head.log_probs_naive])
def test_equal_logits_give_minus_the_log_of_the_vocabulary(function):
    """All logits equal: each of V candidates has probability 1 / V."""
    weight = torch.ones(V, C, dtype=torch.float64)
    log_p = function(torch.randn(4, C).double(), weight, torch.tensor([0, 1, 2, V - 1]))
    assert log_p.tolist() == pytest.approx([-math.log(V)] * 4, rel=1e-14)


def test_the_probabilities_of_a_row_over_all_targets_sum_to_one():
    hidden, weight, _, _ = inputs(torch.float64)
    log_p = head.log_probs(hidden[:1].expand(V, C).contiguous(), weight, torch.arange(V))
    assert float(log_p.exp().sum()) == pytest.approx(1.0, rel=1e-14)


def test_huge_logits_neither_overflow_nor_lose_the_certain_target():
    """Logits are 1e4 for token 0 and 0 for the rest: log p(0) = 0, log p(1) = -1e4."""
    weight = torch.zeros(V, C)
    weight[0, 0] = 1e4
    hidden = torch.zeros(2, C)
    hidden[:, 0] = 1.0
    log_p, *gradients = value_and_gradients(
        head.log_probs, hidden, weight, torch.tensor([0, 1]), torch.ones(2)
    )
    assert log_p.tolist() == [0.0, -1e4]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_targets_give_no_log_probs_and_zero_gradients(dtype):
    log_p, grad_hidden, grad_weight = value_and_gradients(head.log_probs, *inputs(dtype, n=0))
    assert log_p.shape == (0,)
    assert log_p.dtype == torch.promote_types(torch.float32, dtype)
    assert grad_hidden.shape == (0, C)
    assert torch.equal(grad_weight, torch.zeros(V, C, dtype=dtype))


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return out


def test_never_more_logits_than_a_chunk_are_alive(monkeypatch):
    n, width, vocabulary, chunk = 200, 4, 50, 8 * 50
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    hidden = torch.randn(n, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (n,))
    inputs_and_results = n * width  # the hidden rows and their gradient
    with Largest() as chunked:
        head.log_probs(hidden, weight, targets).sum().backward()
    assert chunked.elements <= max(chunk, inputs_and_results)
    with Largest() as naive:
        head.log_probs_naive(hidden, weight, targets).sum().backward()
    assert naive.elements == n * vocabulary  # the measure works: here they are all there
