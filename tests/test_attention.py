"""The sdpa back end against an explicit loop in float64, one head, one query and one key at a time,
with the alignment and the window of attention.py's docstring; and the choice of a back end.
"""

import math
import sys
from itertools import accumulate, pairwise
from types import ModuleType

import pytest
import torch

from zephyr import attention

FLOAT64 = 1e-13  # sums of at most 12 terms in another order; measured 2e-16
FLOAT32 = 1e-6  # against float64 from the same inputs; measured 8e-8
BF16 = 2**-7  # inputs exact, products and the output rounded to 8 bits; measured 2e-3
SEGMENTS = {  # name -> (queries, keys) of each segment
    "one sequence": [(9, 9)],
    "three sequences": [(4, 4), (1, 1), (7, 7)],
    "shared prefixes": [(4, 9), (1, 6), (5, 5), (3, 12)],
}


def error(a, b):
    return float((a - b).abs().max() / b.abs().max())


def plain(q, k, v, cu_q, cu_k, window):
    """Softmax attention written out. Query i of a segment stands at key i + n_k - n_q."""
    heads, width = q.shape[1:]
    rows = []
    for s in range(len(cu_q) - 1):
        n_q, n_k = cu_q[s + 1] - cu_q[s], cu_k[s + 1] - cu_k[s]
        for i in range(n_q):
            place = i + n_k - n_q
            seen = [j for j in range(n_k) if j <= place and (not window or j > place - window)]
            row = []
            for head in range(heads):
                shared = head // (heads // k.shape[1])
                query = q[cu_q[s] + i, head]
                keys = [k[cu_k[s] + j, shared] for j in seen]
                values = [v[cu_k[s] + j, shared] for j in seen]
                powers = [torch.exp(query @ key / math.sqrt(width)) for key in keys]
                weighted = [p * value for p, value in zip(powers, values, strict=True)]
                row.append(sum(weighted) / sum(powers))
            rows.append(torch.stack(row))
    return torch.stack(rows)  # (T, H, D)


def inputs(segments, heads, kv_heads, dtype=torch.float64, width=8):
    generator = torch.Generator().manual_seed(0)
    cu_q = [0, *accumulate(n_q for n_q, _ in segments)]
    cu_k = [0, *accumulate(n_k for _, n_k in segments)]
    shapes = [(cu_q[-1], heads), (cu_k[-1], kv_heads), (cu_k[-1], kv_heads)]
    qkv = [torch.randn(*shape, width, generator=generator).to(dtype) for shape in shapes]
    return qkv, cu_q, cu_k


def run(q, k, v, cu_q, cu_k, window):
    """The sdpa back end as the model calls it."""
    max_q = max(b - a for a, b in pairwise(cu_q))
    max_k = max(b - a for a, b in pairwise(cu_k))
    ends_q = torch.tensor(cu_q, dtype=torch.int32)
    ends_k = torch.tensor(cu_k, dtype=torch.int32)
    return attention.sdpa(q, k, v, ends_q, ends_k, max_q, max_k, window)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("window", [None, 1, 2, 5, 8, 9, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_sdpa_is_the_loop_in_float64(segments, window, heads, kv_heads):
    (q, k, v), cu_q, cu_k = inputs(segments, heads, kv_heads)
    out = run(q, k, v, cu_q, cu_k, window)
    assert out.shape == q.shape
    assert error(out, plain(q, k, v, cu_q, cu_k, window)) <= FLOAT64


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BF16)])
def test_sdpa_in_a_narrow_dtype_is_near_the_loop_and_keeps_the_dtype(window, dtype, tolerance):
    (q, k, v), cu_q, cu_k = inputs(SEGMENTS["shared prefixes"], 6, 2, dtype)
    out = run(q, k, v, cu_q, cu_k, window)
    assert out.dtype == dtype
    expected = plain(q.double(), k.double(), v.double(), cu_q, cu_k, window)
    assert error(out.double(), expected) <= tolerance


@pytest.mark.parametrize("window", [None, 3])
def test_sdpa_has_the_gradients_of_the_loop(window):
    leaves, cu_q, cu_k = inputs(SEGMENTS["shared prefixes"], 6, 2)
    for leaf in leaves:
        leaf.requires_grad_()
    out, expected = run(*leaves, cu_q, cu_k, window), plain(*leaves, cu_q, cu_k, window)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    ours = torch.autograd.grad(out, leaves, weight)
    theirs = torch.autograd.grad(expected, leaves, weight)
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) <= FLOAT64


def test_visible_is_aligned_at_the_last_query_and_the_last_key():
    picture = ["xxx..", ".xxx.", "..xxx"]  # 3 queries at keys 2, 3, 4; each sees 3 keys
    expected = torch.tensor([[mark == "x" for mark in row] for row in picture])
    assert torch.equal(attention.visible(3, 5, 3), expected)
    picture = ["xxx..", "xxxx.", "xxxxx"]
    expected = torch.tensor([[mark == "x" for mark in row] for row in picture])
    assert torch.equal(attention.visible(3, 5, None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_on_a_cpu_sdpa_is_chosen(name, dtype):
    assert attention.choose(name, "cpu", dtype) == "sdpa"
    assert attention.choose(name, torch.device("cpu"), dtype) == "sdpa"


@pytest.mark.parametrize("name", ["flash", "torch"])
@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cpu", torch.float32), ("cuda", torch.float32)]
)
def test_a_kernel_that_cannot_run_here_is_refused_with_the_way_out(name, device, dtype):
    with pytest.raises(ValueError, match=f"'{name}' needs a CUDA device and bf16.*auto"):
        attention.choose(name, device, dtype)


def test_an_unknown_back_end_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'fast' is unknown.*auto, flash, torch, sdpa"):
        attention.choose("fast", "cpu", torch.float32)


def pretend_flash_attn(monkeypatch, installed):
    """Make `import flash_attn` succeed or fail, whatever this machine has."""
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = None
    monkeypatch.setitem(sys.modules, "flash_attn", package if installed else None)


@pytest.mark.parametrize(("installed", "expected"), [(True, "flash"), (False, "torch")])
def test_on_cuda_in_bf16_auto_takes_flash_attn_where_it_is_installed(
    monkeypatch, installed, expected
):
    pretend_flash_attn(monkeypatch, installed)
    assert attention.choose("auto", "cuda", torch.bfloat16) == expected
    assert attention.choose("auto", "cuda", torch.float32) == "sdpa"  # neither kernel has float32
    assert attention.choose("torch", "cuda:1", torch.float16) == "torch"
    assert attention.choose("sdpa", "cuda", torch.bfloat16) == "sdpa"


def test_flash_without_its_package_is_refused_with_what_to_install(monkeypatch):
    pretend_flash_attn(monkeypatch, False)
    with pytest.raises(ValueError, match=r"pip install zephyr\[flash\]"):
        attention.choose("flash", "cuda", torch.bfloat16)
