"""Tokens, not batches: groups of sequences laid end to end in one flat stream, and the plan that
says which rank reads which.

    T tokens   S segments   N targets   P prefix length   A answer (branch) length

A *group* is one prefix and K branches that go on from it: K = 1 is a dialogue (SFT), K = 2 a
preference pair (DPO), K = 4 a multiple-choice question. A *pack* is a stream of groups: one
micro-batch on one rank. Of one dialogue `[P | A]` there is one segment. The prefix of a pair is
computed once:

    tokens        P P P  A A A A  B B B        the stream, T = 10
    positions     0 1 2  3 4 5 6  3 4 5        each branch goes on where the prefix ends
    segment 1     q q q  q q q q               queries P + A, keys P + A
    segment 2     k k k           q q q        queries B, keys P + B
                                               (k k k also are keys of segment 1)

This is exact, not an approximation: B's tokens see what they would see in a stream `[P | B]` of
their own, at the same positions (attention.py aligns the last query with the last key).
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """One prefix, and the branches that follow it.

    Attributes:
        prefix: token ids, never targets. May be empty only for a single branch.
        branches: token ids of each branch, none empty.
        masks: for each branch, which of its tokens are targets. The first token of a stream has
            nothing before it, so with an empty prefix it cannot be one.

    Raises ValueError if the parts do not fit together.

        Group([1, 5], [[7, 2], [8, 9, 2]], [[True, True], [True, True, True]])   # a pair
    """

    prefix: Sequence[int]
    branches: Sequence[Sequence[int]]
    masks: Sequence[Sequence[bool]]

    def __post_init__(self):
        if not self.branches or not all(len(branch) for branch in self.branches):
            raise ValueError("a group needs at least one branch, and no branch may be empty")
        if [len(branch) for branch in self.branches] != [len(mask) for mask in self.masks]:
            raise ValueError("a group needs one mask a branch, as long as the branch")
        if not len(self.prefix) and (len(self.branches) > 1 or self.masks[0][0]):
            raise ValueError("with an empty prefix nothing predicts a branch's first token")

    def length(self, share_prefix: bool = True) -> int:
        """Tokens as laid out in a pack."""
        prefixes = 1 if share_prefix else len(self.branches)
        return prefixes * len(self.prefix) + sum(len(branch) for branch in self.branches)

    @property
    def n_targets(self) -> int:
        return int(sum(np.count_nonzero(mask) for mask in self.masks))

    def sequence(self, branch: int = 0) -> tuple[list[int], list[bool]]:
        """(ids, mask) of one branch with its prefix, as plain lists."""
        ids = [*self.prefix, *self.branches[branch]]
        mask = [False] * len(self.prefix) + [bool(m) for m in self.masks[branch]]
        return [int(i) for i in ids], mask

    def split(self) -> list["Group"]:
        """One group a branch, each with its own copy of the prefix: the long layout."""
        parts = zip(self.branches, self.masks, strict=True)
        return [Group(self.prefix, [branch], [mask]) for branch, mask in parts]


@dataclass(frozen=True)
class Pack:
    """A flat stream of tokens and all that the model needs to know about it.

    Attributes:
        tokens: (T,) int64.
        positions: (T,) int64, of each token in its own sequence.
        cu_q, cu_k: (S + 1,) int32, where the segments' queries and keys begin and end.
        max_q, max_k: the longest segment, in queries and in keys.
        kv_index: (cu_k[-1],) int64, which rows the keys are; None when keys and queries are the
            same rows, that is when no prefix is shared.
        rows: (N,) int64, the token from which each target is predicted.
        targets: (N,) int64, the ids to predict.
        branch_of_target: (N,) int64, counting the branches of the pack from 0.
        n_branches: how many there are.
    """

    tokens: Tensor
    positions: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    kv_index: Tensor | None
    rows: Tensor
    targets: Tensor
    branch_of_target: Tensor
    n_branches: int

    @classmethod
    def from_groups(cls, groups: Sequence[Group], share_prefix: bool = True) -> "Pack":
        """Lay groups end to end, in order, on the CPU.

        No groups give a stream of one token and no targets: a rank that has nothing left to do
        still takes part in the step's collectives, forward and backward.
        """
        if not groups:
            return cls.from_tokens(torch.zeros(1, dtype=torch.int64))
        if not share_prefix:
            groups = [part for group in groups for part in group.split()]
        layouts, start, n_branches = [], 0, 0
        for group in groups:
            layouts.append(_lay_out(group, start, n_branches))
            start += group.length()
            n_branches += len(group.branches)
        joined = {
            name: torch.from_numpy(np.concatenate([layout[name] for layout in layouts]))
            for name in layouts[0]
        }
        len_q, len_k = joined.pop("len_q"), joined.pop("len_k")
        shared = any(len(group.branches) > 1 for group in groups)
        kv_index = joined.pop("kv_index")
        return cls(
            cu_q=_cumulative(len_q),
            cu_k=_cumulative(len_k),
            max_q=int(len_q.max()),
            max_k=int(len_k.max()),
            kv_index=kv_index if shared else None,
            n_branches=n_branches,
            **joined,
        )

    @classmethod
    def from_tokens(cls, tokens: Tensor) -> "Pack":
        """One sequence (T,), on its device, without targets."""
        none = tokens.new_empty(0)
        ends = torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device)
        return cls(
            tokens=tokens,
            positions=torch.arange(len(tokens), device=tokens.device),
            cu_q=ends,
            cu_k=ends,
            max_q=len(tokens),
            max_k=len(tokens),
            kv_index=None,
            rows=none,
            targets=none,
            branch_of_target=none,
            n_branches=0,
        )

    def to(self, device: torch.device | str) -> "Pack":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def _lay_out(group: Group, start: int, first_branch: int) -> dict[str, np.ndarray]:
    """The arrays of one group whose stream begins at `start`, its branches numbered from
    `first_branch`. Names as in `Pack`; len_q and len_k are the segments' lengths."""
    n_prefix = len(group.prefix)
    prefix_rows = np.arange(start, start + n_prefix)
    tokens, positions, kv_index = [group.prefix], [np.arange(n_prefix)], []
    rows, targets, branch_of_target, len_q, len_k = [], [], [], [], []
    at = start + n_prefix
    for number, (branch, mask) in enumerate(zip(group.branches, group.masks, strict=True)):
        length, mask = len(branch), np.asarray(mask, dtype=bool)
        branch_rows = np.arange(at, at + length)
        tokens.append(branch)
        positions.append(np.arange(n_prefix, n_prefix + length))
        kv_index += [prefix_rows, branch_rows]
        # each token is predicted by the one before it; a branch's first by the prefix's last
        before = np.concatenate(([start + n_prefix - 1], branch_rows[:-1]))
        rows.append(before[mask])
        targets.append(np.asarray(branch)[mask])
        branch_of_target.append(np.full(mask.sum(), first_branch + number))
        len_q.append(length if number else n_prefix + length)
        len_k.append(n_prefix + length)
        at += length
    return {
        "tokens": _join(tokens),
        "positions": _join(positions),
        "kv_index": _join(kv_index),
        "rows": _join(rows),
        "targets": _join(targets),
        "branch_of_target": _join(branch_of_target),
        "len_q": np.asarray(len_q),
        "len_k": np.asarray(len_k),
    }


def _join(parts: list) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)  # (S + 1,)


# The plan: from (seed, epoch, step) to what each rank reads. A *row* is what a step counts: a pair
# (DPO), or a list of dialogues that together fill at most max_length tokens (SFT).


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into rows of at most `capacity` tokens: best-fit decreasing.

    Each item, longest first, goes to the fullest row that still has room for it. Returns the rows
    as lists of indices. Raises ValueError if an item is longer than a row.

        best_fit([3, 6, 4, 5], capacity=9) -> [[1, 0], [3, 2]]
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # free tokens -> the rows that have just so many
    spaces: list[int] = []  # the keys of with_space, sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, lengths[item])
        if place == len(spaces):
            rows.append([])
            row, space = len(rows) - 1, capacity
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        rows[row].append(item)
        left = space - lengths[item]
        if left not in with_space:
            with_space[left] = []
            insort(spaces, left)
        with_space[left].append(row)
    return rows


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) a permutation that depends on the seed and the epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def steps_of_run(n_rows: int, global_batch: int, epochs: float, max_steps: int) -> int:
    """Updates in all: ceil(epochs * steps an epoch), or max_steps unless it is negative."""
    steps_per_epoch = math.ceil(n_rows / global_batch)  # the last, short step is kept
    return max_steps if max_steps >= 0 else math.ceil(epochs * steps_per_epoch)


def rows_of_step(n_rows: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """Which of the n_rows rows update number `step` (from 0) reads; the last of an epoch may be
    short."""
    epoch, place = divmod(step, math.ceil(n_rows / global_batch))
    return shuffled(n_rows, seed, epoch)[place * global_batch : (place + 1) * global_batch]


def split_step(
    rows: Sequence[int], lengths: Sequence[int], world_size: int, budget: int
) -> list[list[list[int]]]:
    """Divide a step's rows into micro-batches: plan[rank][micro_batch] = list of rows.

    Every rank gets the same number of micro-batches (FSDP's collectives need that), as few as the
    budget of tokens allows; a row longer than the budget raises it. Longest row first, each goes to
    the lightest micro-batch; micro-batches of like weight run at the same time. A list may be
    empty.

    Args:
        rows: numbers of the rows of this step.
        lengths: tokens of every row, indexed by row number.
        budget: tokens a micro-batch may hold, as laid out.
    """
    longest_first = sorted((int(row) for row in rows), key=lambda row: (-lengths[row], row))
    budget = max([budget] + [lengths[row] for row in longest_first])
    total = sum(lengths[row] for row in longest_first)
    n_micro = max(1, math.ceil(total / (world_size * budget)))
    while True:
        heap = [(0, number) for number in range(world_size * n_micro)]
        bins: list[list[int]] = [[] for _ in heap]
        for row in longest_first:
            load, number = heapq.heappop(heap)
            bins[number].append(row)
            heapq.heappush(heap, (load + lengths[row], number))
        if max(load for load, _ in heap) <= budget:
            break
        n_micro = max(n_micro + 1, math.ceil(1.02 * n_micro))
    heaviest_first = [bins[number] for _, number in sorted(heap, key=lambda x: (-x[0], x[1]))]
    return [heaviest_first[rank::world_size] for rank in range(world_size)]
