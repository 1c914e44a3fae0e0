"""A step of DPO, ours and TRL's DPOTrainer, on a CPU: pairs a second, the head's share, memory.

    python tests/bench/dpo_vs_trl.py                  # float32: about five minutes on 2 cores
    python tests/bench/dpo_vs_trl.py --dtype bf16     # bf16 compute, float32 masters
    python tests/bench/dpo_vs_trl.py --quick          # a smoke check

Both sides get the same ids, four pairs a step in one micro-batch; both keep their reference live,
recompute no activations, clip, and step AdamW. Ours is built as the script builds it, on one rank,
and computes each pair's prompt once; TRL's trainer makes two padded sequences of a pair. That they
do the same work is checked: every step's log p(chosen) must agree before any time is printed.

What the figures mean. Times and rates are medians over the steps. `head s` is what the step spends
in the head: policy and reference, forward and backward. TRL's fused head is made for a GPU; on a
CPU it has no kernel and takes a slow path, which scores every position, prompts and padding too,
not the answers alone. So `w/o head` gives the rate as if neither side's head took any time, and
`body` is the ratio that says something of the rest: a prompt computed once, no padding, no mask.
How much was padding depends on which pairs meet in a batch: the last line gives the share of real
ids in TRL's batches here and in many. `models` is the weights in GiB, policy and reference, before
training; `peak GiB` is what training adds to it.
"""

import random
import sys
import tempfile
from pathlib import Path

from common import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MODEL,
    Side,
    build_ours,
    compare,
    footer,
    logged,
    parse,
    table,
    trl_arguments,
    turn_taker,
    write_model,
)

PAIRS, STEPS, BETA, MAX_LENGTH = 4, 5, 0.1, 1024  # pairs a step; steps measured
# Relative difference of a step's mean log p(chosen): 1e-7 and XX were seen.
SAME = {"float32": 1e-5, "bf16": 2e-3}

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # what TRL's collator reads
Pair = dict[str, list[int]]
Lengths = tuple[int, int, int]


def draw_lengths(draw: random.Random, n: int) -> list[Lengths]:
    """Of n prompts and their answers, log-normal; an answer ends where the pair would be too
    long."""
    lengths = []
    for _ in range(n):
        prompt = min(max(int(draw.lognormvariate(4.9, 0.8)), 20), 512)
        answers = (int(draw.lognormvariate(mean, 0.7)) for mean in (5.5, 5.4))
        lengths.append((prompt, *(min(max(a, 10), MAX_LENGTH - prompt) for a in answers)))
    return lengths


def make_pairs(lengths: list[Lengths], draw: random.Random) -> list[Pair]:
    def ids(n: int) -> list[int]:
        return [draw.randrange(3, MODEL.vocab_size) for _ in range(n)]

    return [dict(zip(COLUMNS, map(ids, pair), strict=True)) for pair in lengths]


def steps_of(items: list) -> list[list]:
    return [items[i : i + PAIRS] for i in range(0, len(items), PAIRS)]


def real_share(lengths: list[Lengths]) -> float:
    """Which part of the positions of TRL's padded batches holds an id."""
    real = sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths)
    longest = (max(p + max(a, b) for p, a, b in step) for step in steps_of(lengths))
    return real / sum(2 * PAIRS * length for length in longest)


def ours(side: Side, folder: Path, dtype: str, steps: list[list[Pair]]) -> None:
    """The loop of train_dpo.py with `--reference live`, without its log."""
    from zephyr import distributed, evaluate, head, optim
    from zephyr.losses import branch_sums, dpo_loss
    from zephyr.packing import Group, Pack

    side.imports_done()
    world = distributed.start()
    policy = build_ours(folder, world, dtype)
    reference = build_ours(folder, world, dtype, trainable=False)
    optimizer = optim.adamw(policy)
    side.models_done(policy, reference, head=head._LogProbs)
    chosen_logps = []
    for pairs in steps:
        side.begin()
        groups = []
        for prompt, *branches in (pair.values() for pair in pairs):
            groups.append(Group(prompt, branches, [[True] * len(ids) for ids in branches]))
        pack = Pack.from_groups(groups)
        logps = branch_sums(policy(pack), pack).view(-1, 2)  # (P, 2): chosen, rejected
        scores = evaluate.score_pack(reference, pack, 2)
        losses, _, _ = dpo_loss(*logps.T, *scores.T, BETA)
        (losses.sum() / len(pairs)).backward()
        optim.update(optimizer, LEARNING_RATE, MAX_GRAD_NORM)
        chosen_logps.append(logps[:, 0].mean().item())
        side.end()
    side.finish([len(pairs) for pairs in steps], chosen_logps)


def trl(side: Side, folder: Path, dtype: str, steps: list[list[Pair]]) -> None:
    """TRL's trainer on the same ids: it is kept from tokenising anything."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.utils import _ChunkedLogProbFunction

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    side.imports_done()
    trainer = Trainer(
        str(folder),
        args=DPOConfig(beta=BETA, max_length=None, **trl_arguments(folder, dtype, PAIRS)),
        train_dataset=Dataset.from_list([pair for step in steps for pair in step]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[turn_taker(side)],
    )
    side.models_done(trainer.model, trainer.ref_model, head=_ChunkedLogProbFunction)
    trainer.train()
    side.finish([len(pairs) for pairs in steps], logged(trainer, "logps/chosen"))


def main() -> None:
    flags = parse(__doc__)
    draw = random.Random(0)
    lengths = draw_lengths(draw, PAIRS * (1 if flags.quick else STEPS))
    if flags.quick:
        lengths = [(prompt // 5, a // 5 + 1, b // 5 + 1) for prompt, a, b in lengths]
    steps = steps_of(make_pairs(lengths, draw))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (write_model(Path(folder)), flags.dtype, [steps[0], *steps])
        sides = compare({"ours": ours, "TRL": trl}, *arguments)
    for a, b in zip(sides["ours"].facts, sides["TRL"].facts, strict=True):
        if abs(a - b) > SAME[flags.dtype] * abs(b):
            sys.exit(f"not the same work: log p(chosen) is {a} in ours and {b} in TRL")
    print(table("pairs/s", flags.dtype, sides))
    ids = sum(map(sum, lengths)) / len(steps)
    shares = f"{real_share(lengths):.0%} ({real_share(draw_lengths(draw, 40000)):.0%} in 10,000)"
    print(
        footer(
            f"{len(steps)} steps of {PAIRS} pairs, {ids:.0f} ids a step as ours lays them out,"
            f" {shares} of TRL's positions real"
        )
    )


if __name__ == "__main__":
    main()
