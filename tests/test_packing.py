"""Packs against the worked example and against what a stream must mean; their gradients against
chapter 0; the plan (rows, steps, ranks, micro-batches) against its promises, by hypothesis.

What a pack must mean does not depend on how it is laid out: every target is predicted from the
token before it, and every segment's keys read, in order, as the whole of one sequence.
"""

from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr.losses import branch_sums, dpo_loss, sft_loss
from zephyr.model import Config, Mistral
from zephyr.packing import (
    Group,
    Pack,
    best_fit,
    rows_of_step,
    shuffled,
    split_step,
    steps_of_run,
)

TOLERANCE = {  # of gradients, against chapter 0 in float64 with the same weights
    torch.float64: 1e-10,
    torch.float32: 1e-5,
}
BETA = 0.7
WINDOWS = [1, 3, 7, None]
CONFIG = Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=100.0,
)
often = settings(max_examples=200, deadline=None, derandomize=True)


# What a pack looks like.


def fields(pack):
    """A pack as plain lists and numbers."""
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(pack).items()}


def all_targets(prefix, *branches):
    return Group(prefix, branches, [[True] * len(branch) for branch in branches])


def test_the_worked_example_field_by_field():
    """P P P A A A A B B B: targets 20 to 23 of A and 30 to 32 of B. The first of each is predicted
    by the last P (row 2), the others by the token before them."""
    pack = Pack.from_groups([all_targets([10, 11, 12], [20, 21, 22, 23], [30, 31, 32])])
    assert fields(pack) == {
        "tokens": [10, 11, 12, 20, 21, 22, 23, 30, 31, 32],
        "positions": [0, 1, 2, 3, 4, 5, 6, 3, 4, 5],
        "cu_q": [0, 7, 10],
        "cu_k": [0, 7, 13],
        "max_q": 7,
        "max_k": 7,
        "kv_index": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 7, 8, 9],
        "rows": [2, 3, 4, 5, 2, 7, 8],
        "targets": [20, 21, 22, 23, 30, 31, 32],
        "branch_of_target": [0, 0, 0, 0, 1, 1, 1],
        "n_branches": 2,
    }


def test_the_worked_example_laid_out_the_long_way():
    groups = [all_targets([10, 11, 12], [20, 21, 22, 23], [30, 31, 32])]
    assert fields(Pack.from_groups(groups, share_prefix=False)) == {
        "tokens": [10, 11, 12, 20, 21, 22, 23, 10, 11, 12, 30, 31, 32],
        "positions": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5],
        "cu_q": [0, 7, 13],
        "cu_k": [0, 7, 13],
        "max_q": 7,
        "max_k": 7,
        "kv_index": None,
        "rows": [2, 3, 4, 5, 9, 10, 11],
        "targets": [20, 21, 22, 23, 30, 31, 32],
        "branch_of_target": [0, 0, 0, 0, 1, 1, 1],
        "n_branches": 2,
    }


def test_a_second_group_starts_where_the_first_ends_and_masks_leave_targets_out():
    first = Group([1, 2], [[3, 4], [5]], [[True, False], [True]])
    second = Group([], [[6, 7, 8]], [[False, False, True]])
    assert fields(Pack.from_groups([first, second])) == {
        "tokens": [1, 2, 3, 4, 5, 6, 7, 8],
        "positions": [0, 1, 2, 3, 2, 0, 1, 2],
        "cu_q": [0, 4, 5, 8],
        "cu_k": [0, 4, 7, 10],
        "max_q": 4,
        "max_k": 4,
        "kv_index": [0, 1, 2, 3, 0, 1, 4, 5, 6, 7],
        "rows": [1, 1, 6],
        "targets": [3, 5, 8],
        "branch_of_target": [0, 1, 2],
        "n_branches": 3,
    }


def test_a_pack_has_the_dtypes_that_kernels_and_indexing_want():
    pack = Pack.from_groups([all_targets([1, 2], [3], [4])])
    ends = {"cu_q", "cu_k"}
    dtypes = {name: x.dtype for name, x in vars(pack).items() if isinstance(x, torch.Tensor)}
    assert dtypes == {n: torch.int32 if n in ends else torch.int64 for n in dtypes}
    moved = pack.to("meta")
    assert {x.device.type for x in vars(moved).values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert moved.max_k == pack.max_k
    assert Pack.from_groups([all_targets([1], [2])]).to("cpu").kv_index is None


def test_numpy_arrays_are_laid_out_as_lists_are():
    lists = Group([1, 2], [[3, 4], [5]], [[True, False], [True]])
    arrays = Group(
        np.array([1, 2], dtype=np.int32),
        [np.array([3, 4], dtype=np.uint16), np.array([5])],
        [np.array([True, False]), np.array([True])],
    )
    assert fields(Pack.from_groups([arrays])) == fields(Pack.from_groups([lists]))
    assert arrays.n_targets == lists.n_targets == 2
    assert arrays.sequence(0) == ([1, 2, 3, 4], [False, False, True, False])
    assert arrays.sequence(1) == ([1, 2, 5], [False, False, True])


ids = st.integers(0, CONFIG.vocab_size - 1)


@st.composite
def groups_of_branches(draw):
    prefix = draw(st.lists(ids, max_size=5))
    n_branches = draw(st.integers(1, 4)) if prefix else 1
    size = {"min_size": n_branches, "max_size": n_branches}
    branches = draw(st.lists(st.lists(ids, min_size=1, max_size=5), **size))
    masks = [draw(st.lists(st.booleans(), min_size=len(b), max_size=len(b))) for b in branches]
    masks[0][0] &= bool(prefix)
    return Group(prefix, branches, masks)


@often
@given(st.lists(groups_of_branches(), min_size=1, max_size=4), st.booleans())
def test_every_segment_reads_as_one_sequence_and_every_target_follows_its_row(groups, share):
    pack = Pack.from_groups(groups, share)
    sequences = [group.sequence(b) for group in groups for b in range(len(group.branches))]
    everything = torch.arange(len(pack.tokens))
    keys = everything if pack.kv_index is None else pack.kv_index
    assert len(pack.tokens) == sum(group.length(share) for group in groups)
    assert len(pack.cu_q) == len(pack.cu_k) == len(sequences) + 1
    assert pack.cu_q[-1] == len(pack.tokens)
    assert pack.cu_k[-1] == len(keys)
    expected = []  # (branch, position of the target in its sequence, its id)
    for s, (tokens, mask) in enumerate(sequences):
        own_keys = keys[pack.cu_k[s] : pack.cu_k[s + 1]]
        own_queries = everything[pack.cu_q[s] : pack.cu_q[s + 1]]
        assert pack.tokens[own_keys].tolist() == tokens
        assert pack.positions[own_keys].tolist() == list(range(len(tokens)))
        assert own_keys[len(own_keys) - len(own_queries) :].tolist() == own_queries.tolist()
        expected += [(s, i, tokens[i]) for i in range(len(tokens)) if mask[i]]
    at = (pack.positions[pack.rows] + 1).tolist()
    branch, targets = pack.branch_of_target.tolist(), pack.targets.tolist()
    assert list(zip(branch, at, targets, strict=True)) == expected
    for row, b, position in zip(pack.rows.tolist(), branch, at, strict=True):
        assert row == keys[pack.cu_k[b] + position - 1]  # the row is of the target's own sequence
    assert len(expected) == sum(group.n_targets for group in groups)
    assert pack.n_branches == len(sequences)
    assert pack.max_q == int(pack.cu_q.diff().max())
    assert pack.max_k == int(pack.cu_k.diff().max())


@pytest.mark.parametrize(
    ("prefix", "branches", "masks", "message"),
    [
        ([1], [], [], "at least one branch"),
        ([1], [[2], []], [[True], []], "no branch may be empty"),
        ([1], [[2], [3]], [[True]], "one mask a branch"),
        ([1], [[2, 3]], [[True]], "as long as the branch"),
        ([], [[2, 3]], [[True, True]], "empty prefix"),
        ([], [[2], [3]], [[False], [False]], "empty prefix"),
    ],
)
def test_a_group_whose_parts_do_not_fit_is_refused(prefix, branches, masks, message):
    with pytest.raises(ValueError, match=message):
        Group(prefix, branches, masks)


# What a model makes of it.


def scaled_weights(seed):
    """Chapter 0's weights, larger so that attention peaks, and such as float32 can hold."""
    weights = reference.random_weights(asdict(CONFIG), seed)
    larger = {name: w if w.ndim == 1 else 4 * w for name, w in weights.items()}
    return {name: w.float().double().requires_grad_() for name, w in larger.items()}


def model_of(weights, window, dtype):
    model = Mistral(replace(CONFIG, sliding_window=window)).to(dtype)
    model.load_state_dict(weights)
    return model


def random_groups(shapes, seed=0):
    """Groups of random ids and masks; a shape is (prefix length, answer lengths)."""
    rng = np.random.default_rng(seed)
    groups = []
    for n_prefix, lengths in shapes:
        branches = [rng.integers(CONFIG.vocab_size, size=n).tolist() for n in lengths]
        masks = [(rng.random(n) < 0.7).tolist() for n in lengths]
        masks = [[first and n_prefix > 0, *rest] for first, *rest in masks]
        prefix = rng.integers(CONFIG.vocab_size, size=n_prefix).tolist()
        groups.append(Group(prefix, branches, masks))
    return groups


def worst_error(model, loss, expected):
    """The largest error of the gradients of `loss`: max|a-b| / max|b| per parameter.

    With window 1 a query sees one key, whose weight is 1 whatever the query: the gradients of query
    and key matrices are exactly 0, and no error can be relative to that. There ours may be rounding
    noise, which is measured against the largest of all gradients (1e-16 in float64).
    """
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    largest_of_all = max(float(gradient.abs().max()) for gradient in expected.values())
    errors = []
    for name, gradient in zip(names, gradients, strict=True):
        largest = float(expected[name].abs().max()) or largest_of_all
        errors.append(float((gradient - expected[name]).abs().max()) / largest)
    return max(errors)


def gradients_of(loss, weights):
    return dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))


PAIRS = [
    all_targets([3, 4, 5, 6, 7, 8], [20, 21, 22, 23, 24], [30, 31, 32]),
    all_targets([4], [11, 12], [7, 8, 9, 10, 11, 12, 13, 14, 15]),
    all_targets([40, 41, 42, 43, 44, 45, 46, 47, 48], [12], [15]),
]
# (prefix length, answer lengths) of each group
SFT_SHAPES = [(0, [12]), (3, [5]), (0, [2]), (1, [9])]
MIXED = [(5, [4, 6]), (0, [7]), (3, [2, 5, 1, 3])]
BRANCHING = {
    1: [(4, [9]), (0, [8]), (1, [3])],
    2: [(5, [4, 6]), (1, [1, 7])],
    4: [(6, [3, 1, 5, 2])],
}


@cache
def dpo_of_chapter_0(window):
    """Loss, rewards and gradients of PAIRS."""
    weights, frozen = scaled_weights(1), scaled_weights(2)
    pairs = [(pair.prefix, *pair.branches) for pair in PAIRS]
    config = asdict(replace(CONFIG, sliding_window=window))
    loss, chosen, rejected = reference.dpo_loss(weights, frozen, config, pairs, BETA)
    return loss.detach(), chosen, rejected, gradients_of(loss, weights)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", WINDOWS)
def test_dpo_of_both_layouts_is_chapter_0s(window, dtype, share_prefix):
    loss, chosen, rejected, gradients = dpo_of_chapter_0(window)
    policy = model_of(scaled_weights(1), window, dtype)
    frozen = model_of(scaled_weights(2), window, dtype)
    pack = Pack.from_groups(PAIRS, share_prefix)
    logps = branch_sums(policy(pack), pack)
    with torch.no_grad():
        reference_logps = branch_sums(frozen(pack), pack)
    parts = logps[0::2], logps[1::2], reference_logps[0::2], reference_logps[1::2]
    losses, *rewards = dpo_loss(*parts, BETA)
    tolerance = TOLERANCE[dtype]
    assert losses.mean().item() == pytest.approx(loss.item(), rel=tolerance)
    for ours, expected in zip(rewards, (chosen, rejected), strict=True):
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
    assert worst_error(policy, losses.mean(), gradients) <= tolerance


def coefficients(n):
    """One number a target, of both signs: a loss in which no target can stand for another."""
    return torch.linspace(-1, 2, n, dtype=torch.float64)


@cache
def branches_of_chapter_0(n_branches, window):
    """log-probs and gradients of their weighted sum, for the groups of BRANCHING."""
    weights = scaled_weights(1)
    config = asdict(replace(CONFIG, sliding_window=window))
    rows = []
    for group in random_groups(BRANCHING[n_branches]):
        for branch in range(len(group.branches)):
            rows.append(reference.log_probs(weights, config, *group.sequence(branch)))
    logps = torch.cat(rows)
    return logps.detach(), gradients_of(coefficients(len(logps)) @ logps, weights)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("n_branches", BRANCHING)
def test_log_probs_and_gradients_of_1_2_and_4_branches_are_chapter_0s(
    n_branches, window, dtype, share_prefix
):
    expected, gradients = branches_of_chapter_0(n_branches, window)
    model = model_of(scaled_weights(1), window, dtype)
    logps = model(Pack.from_groups(random_groups(BRANCHING[n_branches]), share_prefix))
    assert (logps - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    loss = coefficients(len(logps)).to(dtype) @ logps
    assert worst_error(model, loss, gradients) <= TOLERANCE[dtype]


@cache
def sft_of_chapter_0(window):
    weights = scaled_weights(1)
    batch = [group.sequence() for group in random_groups(SFT_SHAPES, seed=1)]
    config = asdict(replace(CONFIG, sliding_window=window))
    loss = reference.sft_loss(weights, config, batch)
    return loss.detach(), gradients_of(loss, weights)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", WINDOWS)
def test_sft_of_a_pack_is_chapter_0s_of_a_padded_batch(window, dtype):
    expected, gradients = sft_of_chapter_0(window)
    model = model_of(scaled_weights(1), window, dtype)
    groups = random_groups(SFT_SHAPES, seed=1)
    loss = sft_loss(model(Pack.from_groups(groups))) / sum(group.n_targets for group in groups)
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
    assert worst_error(model, loss, gradients) <= TOLERANCE[dtype]


def test_gradients_of_micro_batches_add_up_to_those_of_one_pack():
    model, groups = model_of(scaled_weights(1), 3, torch.float64), random_groups(SFT_SHAPES)
    whole = sft_loss(model(Pack.from_groups(groups)))
    expected = dict(model.named_parameters())
    expected = dict(zip(expected, torch.autograd.grad(whole, expected.values()), strict=True))
    parts = sum(sft_loss(model(Pack.from_groups([group]))) for group in groups)
    assert worst_error(model, parts, expected) <= TOLERANCE[torch.float64]


def other_tokens(tokens):
    return [(token + 1) % CONFIG.vocab_size for token in tokens]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("window", [3, None])
@torch.no_grad()
def test_changing_one_branch_leaves_all_others_bit_equal(window, share_prefix):
    model = model_of(scaled_weights(1), window, torch.float32)
    groups = [all_targets(g.prefix or [0], *g.branches) for g in random_groups(MIXED)]
    pack = Pack.from_groups(groups, share_prefix)
    before = model(pack)
    number = 0
    for g, group in enumerate(groups):
        for b in range(len(group.branches)):
            branches = list(group.branches)
            branches[b] = other_tokens(branches[b])
            changed = [*groups[:g], all_targets(group.prefix, *branches), *groups[g + 1 :]]
            after = model(Pack.from_groups(changed, share_prefix))
            own = pack.branch_of_target == number
            assert torch.equal(after[~own], before[~own])
            assert (after[own] != before[own]).all()
            number += 1
    assert number == pack.n_branches


@pytest.mark.parametrize("share_prefix", [True, False])
@torch.no_grad()
def test_changing_a_prefix_changes_its_own_branches_and_no_others(share_prefix):
    model = model_of(scaled_weights(1), None, torch.float32)
    groups = [all_targets(g.prefix or [0], *g.branches) for g in random_groups(MIXED)]
    pack = Pack.from_groups(groups, share_prefix)
    changed = [
        groups[0],
        groups[1],
        all_targets(other_tokens(groups[2].prefix), *groups[2].branches),
    ]
    before, after = model(pack), model(Pack.from_groups(changed, share_prefix))
    own = pack.branch_of_target >= 3
    assert torch.equal(after[~own], before[~own])
    assert (after[own] != before[own]).all()


def test_an_empty_pack_trains_and_leaves_every_gradient_zero():
    pack = Pack.from_groups([])
    assert (len(pack.tokens), len(pack.targets), pack.n_branches) == (1, 0, 0)
    model = model_of(scaled_weights(1), 3, torch.float32)
    logps = model(pack)
    assert logps.shape == (0,)
    losses, *_ = dpo_loss(*[branch_sums(logps, pack)] * 4, BETA)
    (sft_loss(logps) + losses.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # FSDP reduces a gradient of every parameter
        assert not parameter.grad.any(), name


# The plan.


def test_best_fit_of_its_docstring():
    assert best_fit([3, 6, 4, 5], capacity=9) == [[1, 0], [3, 2]]
    assert best_fit([], capacity=9) == []


def test_best_fit_refuses_what_fits_no_row():
    with pytest.raises(ValueError, match="10 tokens does not fit a row of 9"):
        best_fit([3, 10], capacity=9)


def plain_best_fit(lengths, capacity):
    """The fill of each row, by trying every row for every item."""
    fills = []
    for length in sorted(lengths, reverse=True):
        rooms = [(capacity - fill, r) for r, fill in enumerate(fills) if fill + length <= capacity]
        if rooms:
            fills[min(rooms)[1]] += length
        else:
            fills.append(length)
    return sorted(fills)


@often
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 60))
def test_best_fit_puts_each_item_once_into_rows_filled_as_the_plain_way_fills(lengths, capacity):
    rows = best_fit(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    fills = sorted(sum(lengths[item] for item in row) for row in rows)
    assert fills == plain_best_fit(lengths, capacity)
    assert max(fills, default=0) <= capacity
    assert best_fit(lengths, capacity) == rows


@often
@given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 2**31), st.integers(0, 3))
def test_an_epoch_reads_each_row_once_in_full_steps_but_the_last(n_rows, batch, seed, epoch):
    per_epoch = steps_of_run(n_rows, batch, epochs=1, max_steps=-1)
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    parts = [rows_of_step(n_rows, batch, seed, step).tolist() for step in steps]
    assert [len(part) for part in parts[:-1]] == [batch] * (per_epoch - 1)
    assert 1 <= len(parts[-1]) <= batch
    order = [row for part in parts for row in part]
    assert sorted(order) == list(range(n_rows))
    assert order == shuffled(n_rows, seed, epoch).tolist()


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    orders = {tuple(shuffled(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    np.random.seed(1)
    first = rows_of_step(50, 8, seed=3, step=9).tolist()
    np.random.seed(2)
    assert rows_of_step(50, 8, seed=3, step=9).tolist() == first


@pytest.mark.parametrize(
    ("n_rows", "batch", "epochs", "max_steps", "expected"),
    [
        (61_966, 32, 1, -1, 1937),  # the paper's pairs: 1,936 full steps and one of 14
        (61_966, 32, 3, -1, 5811),  # each epoch keeps its short step: 3 x 1,937
        (64, 32, 1, -1, 2),  # no short step
        (65, 32, 0.5, -1, 2),  # 3 steps an epoch, half of them: 1.5, rounded up
        (5, 32, 1, -1, 1),
        (61_966, 32, 3, 10, 10),
        (5, 32, 1, 100, 100),  # max_steps goes on into further epochs
    ],
)
def test_steps_of_a_run(n_rows, batch, epochs, max_steps, expected):
    assert steps_of_run(n_rows, batch, epochs, max_steps) == expected


lengths_of_rows = st.lists(st.integers(1, 100), max_size=40)


@often
@given(lengths_of_rows, st.integers(1, 8), st.integers(1, 300), st.randoms(use_true_random=False))
def test_split_step_deals_each_row_once_within_the_budget(lengths, world_size, budget, random):
    rows = [row for row in range(len(lengths)) if random.random() < 0.8]
    plan = split_step(rows, lengths, world_size, budget)
    assert len(plan) == world_size
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    assert plan[0], "even a step without rows runs one empty pack"
    flat = [row for micro_batches in plan for micro_batch in micro_batches for row in micro_batch]
    assert sorted(flat) == rows
    loads = [[sum(lengths[row] for row in micro) for micro in rank] for rank in plan]
    limit = max([budget, *(lengths[row] for row in rows)])
    assert max(max(of_rank) for of_rank in loads) <= limit
    # like weights run at the same time: no micro-batch is lighter than any that runs later
    by_time = list(zip(*loads, strict=True))
    for now, later in pairwise(by_time):
        assert min(now) >= max(later)
    random.shuffle(rows)
    assert split_step(rows, lengths, world_size, budget) == plan


def test_split_step_takes_as_few_micro_batches_as_the_budget_allows():
    """Eight rows of 50: on two ranks with a budget of 100 two rows fit, so 2 micro-batches; with
    200 one holds all four; with 20 the longest row raises the budget to 50, so 4 of one row."""
    counts = [len(split_step(range(8), [50] * 8, 2, budget)[0]) for budget in (100, 200, 20)]
    assert counts == [2, 1, 4]


def test_split_step_gives_a_rank_without_rows_an_empty_micro_batch():
    assert split_step([4, 7], [10] * 8, world_size=4, budget=10) == [[[4]], [[7]], [[]], [[]]]
