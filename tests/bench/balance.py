"""How evenly the plan loads 16 ranks, on the lengths of real pairs. Arithmetic, a few seconds.

    python tests/bench/balance.py                              # data: shared/ beside the repository
    python tests/bench/balance.py --data PAIRS.jsonl --tokenizer FOLDER --ranks 8

A step lasts as long as its slowest rank. Over the whole steps of an epoch, laid out as train_dpo.py
lays them out (rows_of_step, split_step, prompts shared, 8,192 tokens a micro-batch), the cost of a
rank is summed over its micro-batches, once in tokens and once in useful FLOPs of Mistral-7B.

    time    the slowest ranks' costs of all steps, over the ranks' means of all steps: 1.00 is even
    worst   the same of the worst step

A naive deal gives each rank the same number of pairs in shuffled order. The floor is what no deal
of whole pairs can beat: a rank holds at least the longest pair, and where there are more pairs than
ranks, two of the ranks + 1 longest share one.
"""

from collections.abc import Callable
from itertools import chain

import numpy as np
from flops import arguments, real_pairs

from zephyr.metrics import useful_flops
from zephyr.model import Config
from zephyr.packing import rows_of_step, split_step

Deal = Callable[[list[int]], list[list[int]]]
"""The rows of a step -> the rows of each rank."""


def loads(deal: Deal, steps: list[list[int]], cost: np.ndarray) -> np.ndarray:
    """(steps, ranks) what each rank computes."""
    return np.array([[cost[rows].sum() for rows in deal(step)] for step in steps])


def floor(steps: list[list[int]], cost: np.ndarray, ranks: int) -> np.ndarray:
    """(steps,) a lower bound of the slowest rank's cost."""
    bounds = []
    for step in steps:
        longest = np.sort(cost[step])[::-1]
        crowded = longest[ranks - 1] + longest[ranks] if len(step) > ranks else 0
        bounds.append(max(longest.sum() / ranks, longest[0], crowded))
    return np.array(bounds)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--budget", type=int, default=8192, help="tokens a micro-batch")
    parser.add_argument("--seed", type=int, default=42)
    flags = parser.parse_args()
    pairs = real_pairs(flags.data, flags.tokenizer)
    ranks, config = flags.ranks, Config()
    costs = {
        "tokens": np.array([pair.length() for pair in pairs]),
        "FLOPs": np.array([useful_flops(config, [pair]) for pair in pairs]),
    }
    lengths = costs["tokens"].tolist()

    def planned(step):
        plan = split_step(step, lengths, ranks, flags.budget)
        return [list(chain.from_iterable(micro_batches)) for micro_batches in plan]

    def naive(step):
        return [step[rank::ranks] for rank in range(ranks)]

    print(
        f"{len(pairs):,} real pairs, mean {np.mean(lengths):.0f} tokens, longest {max(lengths):,}"
    )
    print(f"{ranks} ranks, {flags.budget:,} tokens a micro-batch\n")
    print(f"{'':22}{'by tokens':>16}{'by useful FLOPs':>18}")
    print(f"{'global batch':22}{'time':>8}{'worst':>8}{'time':>10}{'worst':>8}")
    for batch in (32, 128):
        steps = [
            rows_of_step(len(pairs), batch, flags.seed, step).tolist()
            for step in range(len(pairs) // batch)
        ]
        for name, deal in (("the plan", planned), ("naive deal", naive), ("floor", None)):
            figures = []
            for cost in costs.values():
                means = np.array([cost[step].sum() / ranks for step in steps])
                slowest = (
                    loads(deal, steps, cost).max(axis=1) if deal else floor(steps, cost, ranks)
                )
                figures += [slowest.sum() / means.sum(), (slowest / means).max()]
            print("{:>4}  {:16}{:8.3f}{:8.3f}{:10.3f}{:8.3f}".format(batch, name, *figures))


if __name__ == "__main__":
    main()
