"""Useful FLOPs against a counter of what really is multiplied, visible pairs against a brute count.

PyTorch's FlopCounterMode counts the matrix products of a forward and a backward pass as they run.
With the naive head (nothing computed twice) and attention done one query at a time over the keys it
sees (nothing computed that a mask throws away), all that it counts is useful, to the last FLOP.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from zephyr import head
from zephyr.attention import sdpa, visible
from zephyr.metrics import useful_flops, visible_pairs
from zephyr.model import Config, Mistral
from zephyr.packing import Group, Pack

ROUNDING = 1e-12  # float64 log-probabilities by two orders of addition
CONFIG = Config(
    vocab_size=53,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,  # 4 * 10 is not 24: width and query width must not be mixed up
    sliding_window=None,
)
WINDOWS = [None, 1, 3, 7]
often = settings(max_examples=200, deadline=None, derandomize=True)


def group_of(n_prefix, *branches):
    """A group of these lengths; every third token of a branch is no target."""
    masks = [[(i + 1) % 3 > 0 for i in range(n)] for n in branches]
    if not n_prefix:
        masks[0][0] = False
    return Group([1] * n_prefix, [[2] * n for n in branches], masks)


GROUPS = {  # by K, of several groups each: prefixes and answers longer and shorter than a window
    1: [group_of(1, 9), group_of(0, 5), group_of(6, 1)],
    2: [group_of(5, 4, 7), group_of(1, 8, 1)],
    4: [group_of(9, 1, 2, 3, 4), group_of(2, 6, 1, 1, 2)],
}


def one_query_at_a_time(q, k, v, cu_q, cu_k, max_q, max_k, window):
    """Attention that multiplies what is seen and nothing else: (H, 1, D) by (H, D, seen)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(0, 1) for x in (k, v))
    outputs = []
    for segment in range(len(cu_q) - 1):
        q_start, q_end = cu_q[segment : segment + 2].tolist()
        k_start, k_end = cu_k[segment : segment + 2].tolist()
        for row in range(q_start, q_end):
            end = k_end - (q_end - 1 - row)  # the last query stands at the last key
            seen = slice(max(k_start, end - (window or end)), end)
            scores = q[row, :, None] @ k[:, seen].transpose(1, 2) / q.shape[-1] ** 0.5
            outputs.append((scores.softmax(-1) @ v[:, seen]).squeeze(1))  # (H, D)
    return torch.stack(outputs)


def counted(model, pack, ops=("mm", "addmm", "bmm", "baddbmm")):
    """FLOPs of these operations in one gradient, as PyTorch counts them while it runs."""
    with FlopCounterMode(display=False) as counter:
        model(pack).sum().backward()
    flops = counter.get_flop_counts()["Global"]
    return sum(n for op, n in flops.items() if str(op).removeprefix("aten.") in ops)


@pytest.fixture
def naive_head(monkeypatch):
    """The head that keeps its logits; the chunked one computes them twice, which is not useful."""
    monkeypatch.setattr(head, "log_probs", head.log_probs_naive)


def build(window, attend):
    config = Config(**vars(CONFIG) | {"sliding_window": window})
    return Mistral(config, attend).double().init_weights(0)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("k", GROUPS)
def test_useful_flops_are_all_that_a_gradient_without_waste_multiplies(k, window, naive_head):
    model, pack = build(window, one_query_at_a_time), Pack.from_groups(GROUPS[k])
    torch.testing.assert_close(model(pack), build(window, sdpa)(pack), rtol=0, atol=ROUNDING)
    assert counted(model, pack) == useful_flops(model.config, GROUPS[k])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("k", GROUPS)
def test_useful_flops_are_matrix_products_and_4d_a_head_and_pair_in_the_mask(k, window, naive_head):
    pack, q_width = Pack.from_groups(GROUPS[k]), CONFIG.num_attention_heads * CONFIG.head_dim
    attention = 3 * CONFIG.num_hidden_layers * 4 * q_width * pairs_in_masks(pack, window)
    model = build(window, sdpa)
    products = counted(model, pack, ops=("mm", "addmm"))
    assert products + attention == useful_flops(model.config, GROUPS[k])


def test_the_chunked_head_computes_its_logits_twice_and_that_is_all_it_adds():
    groups = GROUPS[2]
    again = 2 * sum(g.n_targets for g in groups) * CONFIG.hidden_size * CONFIG.vocab_size
    flops = counted(build(None, one_query_at_a_time), Pack.from_groups(groups))
    assert flops == useful_flops(CONFIG, groups) + again


def test_useful_flops_of_mistral_7b_are_those_counted_on_the_meta_device(naive_head):
    """The real sizes, without the weights. Attention is replaced by a sum, and counted by hand."""
    config, groups = Config(), [group_of(300, 4000, 700), group_of(20, 30, 40)]
    with torch.device("meta"):
        model = Mistral(config, lambda q, k, v, *_: q + (k + v).mean())
    products = counted(model, Pack.from_groups(groups).to("meta"), ops=("mm", "addmm"))
    first = 4096 * 4097 // 2 + (4300 - 4096) * 4096  # causal, then the window's 4,096 keys each
    later = sum(range(301, 1001)) + sum(range(1, 51)) + sum(range(21, 61))
    assert useful_flops(config, groups) == products + 3 * 32 * 4 * 4096 * (first + later)


def test_mistral_7b_costs_44_gflop_a_token_of_a_2048_token_row():
    """6 FLOPs a weight of blocks and head, and causal attention: 42.7 and 1.6 GFLOP."""
    row = Group([1], [[2] * 2047], [[True] * 2047])
    per_token = 6 * (6_979_321_856 + 131_072_000 * 2047 / 2048) + 12 * 32 * 4096 * 2049 / 2
    assert useful_flops(Config(), [row]) / 2048 == pytest.approx(per_token, rel=1e-12)
    assert per_token == pytest.approx(44.3e9, rel=1e-3)


def test_sharing_a_prefix_saves_exactly_the_gradient_of_the_prefix_alone():
    for window in WINDOWS:
        config = Config(**vars(CONFIG) | {"sliding_window": window})
        for pair in GROUPS[2]:
            n = len(pair.prefix)
            prefix = Group([], [[1] * n], [[False] * n])
            saved = useful_flops(config, pair.split()) - useful_flops(config, [pair])
            assert saved == useful_flops(config, [prefix])


def pairs_in_masks(pack, window):
    """What attention's own masks let through, over the segments of a pack."""
    lengths = zip(pack.cu_q.diff().tolist(), pack.cu_k.diff().tolist(), strict=True)
    return sum(int(visible(n_q, n_k, window).sum()) for n_q, n_k in lengths)


@often
@given(
    st.integers(0, 20),
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(1, 45)),
)
def test_visible_pairs_are_those_that_masks_and_a_brute_count_let_through(
    n_prefix, branches, window
):
    branches = branches if n_prefix else branches[:1]
    group = group_of(n_prefix, *branches)
    brute = 0
    for number, n_branch in enumerate(branches):
        query = np.arange(n_prefix if number else 0, n_prefix + n_branch)  # a prefix asks once
        behind = query[:, None] - np.arange(n_prefix + n_branch)
        brute += int(((behind >= 0) & (behind < (window or 1000))).sum())
    assert visible_pairs(group, window) == brute
    assert pairs_in_masks(Pack.from_groups([group]), window) == brute
