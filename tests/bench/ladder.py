"""What each idea is worth: DPO on real pairs, one idea more a row. About 5 minutes on 2 cores.

    python tests/bench/ladder.py                               # data: shared/ beside the repository
    python tests/bench/ladder.py --data PAIRS.jsonl --tokenizer FOLDER

A model of 8 blocks, width 512, vocabulary 32,000, in float32 takes the gradients of two steps of
four pairs. The first row is the textbook loop: chosen and rejected answers in two forward passes,
each padded to its longest, logits at all positions, and the reference run at every step. Each row
adds one idea; all rows run our own blocks and the same kernels, so that nothing else differs, and
take the same gradient. The last line says how nearly: an untrained model's log-probability of an
answer is near -5,000, float32 knows it to 5e-4, and the gradient to some 5e-5.

    GFLOP a pair    matrix products and attention that are computed, pads and what is computed twice
                    included (attention: pairs that the causal mask lets through); both steps
    seconds a pair  measured, both steps, median of the rounds; rows take turns
    peak            most memory in use at a time on the first step, weights not counted; the
                    gradient, which is 229 MiB, is
    7B              FLOPs, by arithmetic, of Mistral-7B on all pairs in batches of four, where the
                    head is 2% of the model; here it is 38%

A cached reference is one pass over the pairs in three epochs: a third of it is charged. The last
two rows are not ideas but prices: activation checkpointing, for where memory is short.
"""

import statistics
import sys
import time
import weakref
from dataclasses import dataclass, replace

import torch
from flops import arguments, cut, forward_of, pad, real_pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zephyr import head
from zephyr.losses import branch_sums, dpo_loss
from zephyr.model import Config, Mistral
from zephyr.packing import Group, Pack, shuffled
from zephyr.parallel import recompute_blocks

BETA = 0.1
MODEL = Config(
    hidden_size=512,
    intermediate_size=1792,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
)


@dataclass(frozen=True)
class Rung:
    """A way to take the same gradient."""

    name: str
    padded: bool = True
    logits: str = "all"  # positions: all, those that predict a target, these in chunks
    share_prefix: bool = False
    reference: float = 1.0  # reference passes charged to a gradient
    recompute: str = "none"  # as --activation-checkpointing


FIRST = Rung("padded, all logits, live reference")
UNPADDED = replace(FIRST, name="no padding", padded=False)
ROWS = replace(UNPADDED, name="logits of targets only", logits="targets")
CHUNKS = replace(ROWS, name="these in chunks, computed twice", logits="chunks")
SHARED = replace(CHUNKS, name="a prompt once", share_prefix=True)
CACHED = replace(SHARED, name="cached reference", reference=1 / 3)
SELECTIVE = replace(CACHED, name="(checkpointing: selective)", recompute="selective")
FULL = replace(CACHED, name="(checkpointing: full)", recompute="full")
LADDER = [FIRST, UNPADDED, ROWS, CHUNKS, SHARED, CACHED, SELECTIVE, FULL]


def lay_out(rung: Rung, batch: list[Group]) -> list[list[Group]]:
    """The forward passes of a batch, as groups."""
    if rung.padded:
        answers = zip(*(group.split() for group in batch), strict=True)  # chosen, rejected
        return [pad(list(groups)) for groups in answers]
    return [batch if rung.share_prefix else [part for group in batch for part in group.split()]]


def flops(rung: Rung, config: Config, batches: list[list[Group]]) -> float:
    """By arithmetic (flops.py holds its parts to a counter)."""
    total = 0.0
    for batch in batches:
        for groups in lay_out(rung, batch):
            blocks, down, attention, logits = forward_of(config, groups).values()
            if rung.logits == "all":
                tokens = sum(group.length() for group in groups)
                logits = 2 * tokens * config.hidden_size * config.vocab_size
            total += (rung.logits == "chunks") * logits
            total += (3 + rung.reference) * (blocks + attention + logits)
            total += (rung.recompute == "full") * (blocks - down + attention)
    return total


def log_probs(model: Mistral, rung: Rung, packs: list[Pack]) -> Tensor:
    """(P, 2) log-probabilities: chosen, rejected."""
    sums = []
    for pack in packs:
        hidden, weight = model.model(pack), model.lm_head.weight
        if rung.logits == "all":
            logps = (hidden @ weight.T).log_softmax(-1)[pack.rows, pack.targets]  # of (T, V)
        else:
            plain = rung.logits == "targets"
            compute = head.log_probs_naive if plain else head.log_probs
            logps = compute(hidden.index_select(0, pack.rows), weight, pack.targets)
        sums.append(branch_sums(logps, pack))
    return torch.stack(sums, dim=1) if rung.padded else sums[0].view(-1, 2)


class Alive(TorchDispatchMode):
    """The most bytes alive at a time, of tensors that were made while this is on."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, int] = {}
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.storages:
                    self.storages[storage.data_ptr()] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, storage.data_ptr())
        return result

    def forget(self, address: int) -> None:
        self.now -= self.storages.pop(address)


def gradient(rung: Rung, policy: Mistral, reference: Mistral, batch: list[Group]) -> float:
    """Take one gradient, and leave it in the policy's parameters: the seconds charged for it."""
    policy.zero_grad()
    if rung.recompute != "none":
        recompute_blocks(policy, rung.recompute)
    packs = [Pack.from_groups(groups) for groups in lay_out(rung, batch)]
    start = time.perf_counter()
    with torch.no_grad():
        reference_logps = log_probs(reference, rung, packs)
    middle = time.perf_counter()
    logps = log_probs(policy, rung, packs)
    losses, _, _ = dpo_loss(*logps.T, *reference_logps.T, BETA)
    losses.mean().backward()
    end = time.perf_counter()
    for block in policy.model.layers:
        vars(block).pop("forward", None)  # without activation checkpointing again
    return rung.reference * (middle - start) + end - middle


def peak_mib(rung: Rung, policy: Mistral, reference: Mistral, batch: list[Group]) -> float:
    policy.zero_grad()
    with Alive() as alive:
        gradient(rung, policy, reference, batch)
    return alive.peak / 2**20


def difference(policy: Mistral, first: dict[str, Tensor]) -> float:
    """The worst tensor's max|a-b|/max|b| against the first row's gradient; keeps that one."""
    if not first:
        first |= {name: p.grad.clone() for name, p in policy.named_parameters()}
    return max(
        ((p.grad - first[name]).abs().max() / first[name].abs().max()).item()
        for name, p in policy.named_parameters()
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    flags = parser.parse_args()
    if flags.quick:  # and short pairs
        flags.rounds, flags.steps, flags.batch = 1, 1, 2
    torch.set_num_threads(flags.threads)
    pairs = real_pairs(flags.data, flags.tokenizer)
    if flags.quick:
        pairs = sorted(pairs, key=Group.length)[: len(pairs) // 4]
    batches = cut([pairs[i] for i in shuffled(len(pairs), 42, 0)], flags.batch)
    steps = batches[: flags.steps]
    policy, reference = (Mistral(MODEL).init_weights(seed) for seed in (0, 1))

    peak = {rung.name: peak_mib(rung, policy, reference, steps[0]) for rung in LADDER}  # warms up
    seconds = {rung.name: [0.0] * flags.rounds for rung in LADDER}
    worst = 0.0
    for turn in range(flags.rounds):
        for batch in steps:
            first: dict[str, Tensor] = {}
            for rung in LADDER:
                seconds[rung.name][turn] += gradient(rung, policy, reference, batch)
                worst = max(worst, difference(policy, first))
            print(".", end="", file=sys.stderr, flush=True)

    n_pairs = sum(map(len, steps))
    print(f"\n{n_pairs} real pairs in steps of {flags.batch}, {flags.threads} threads, float32\n")
    print(f"{'':36}{'GFLOP':>8}{'':>7}{'seconds':>9}{'':>7}{'peak':>7}{'7B TFLOP':>10}{'':>7}")
    print(f"{'':36}{'a pair':>8}{'share':>7}{'a pair':>9}{'share':>7}{'MiB':>7}", end="")
    print(f"{'a pair':>10}{'share':>7}")
    rows = {
        rung.name: (
            flops(rung, MODEL, steps) / n_pairs / 1e9,
            statistics.median(seconds[rung.name]) / n_pairs,
            flops(rung, Config(), batches) / len(pairs) / 1e12,
        )
        for rung in LADDER
    }
    whole = rows[FIRST.name]
    for name, row in rows.items():
        small, taken, large = (f"{a / b:7.3f}" for a, b in zip(row, whole, strict=True))
        print(f"{name:36}{row[0]:8.1f}{small}{row[1]:9.3f}{taken}", end="")
        print(f"{peak[name]:7.0f}{row[2]:10.2f}{large}")
    print(f"\nall rows' gradients agree with the first's: worst max|a-b|/max|b| {worst:.1e}")


if __name__ == "__main__":
    main()
