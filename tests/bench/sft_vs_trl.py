"""A step of SFT, ours and TRL's SFTTrainer, on a CPU: tokens a second, the head's share, memory.

    python tests/bench/sft_vs_trl.py                  # float32: about four minutes on 2 cores
    python tests/bench/sft_vs_trl.py --dtype bf16     # bf16 compute, float32 masters
    python tests/bench/sft_vs_trl.py --quick          # a smoke check

The same documents, every token a target, go once through

    ours          isolated documents, best fit into rows of 2,048, a row a step
    TRL bfd       TRL's default packing: the same, a mask keeps the documents apart
    TRL wrapped   a stream cut into rows of 2,048, where a document sees the one before it
    TRL padded    no packing: four documents a step, padded to the longest

and all recompute no activations, clip, and step AdamW. Ours is built as the script builds it, on
one rank. A token is one that is not padding, by each side's own count. That they do the same work
is checked: all count as many tokens, and the mean loss of those that keep documents apart must
agree (the learning rate is 0, so that the steps' order does not matter).

What the figures mean. Times and rates are medians over the steps. `head s` is what the step spends
in the head, forward and backward. TRL's fused head is made for a GPU and takes a slow path on a
CPU, padding included: `w/o head` gives the rate as if the head took no time, and `body` the ratio
of that. TRL's attention is its default, sdpa, which is handed a mask where it packs or pads; with
flash-attn it would need none. `models` is the weights in GiB before training; `peak GiB` is what
training adds to it.
"""

import random
import sys
import tempfile
from functools import partial
from pathlib import Path

from common import (
    MAX_GRAD_NORM,
    MODEL,
    Report,
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

ROW, DOCUMENTS, PADDED_ROWS = 2048, 24, 4  # tokens; documents in all; documents a padded step
# Relative difference of the mean losses. XX and XX were seen; documents that see others are off by
# 8e-4.
SAME = {"float32": 1e-4, "bf16": 2e-4}


def make_documents(n: int, longest: int) -> list[list[int]]:
    """Random ids; lengths are log-normal."""
    draw = random.Random(0)
    lengths = [min(max(int(draw.lognormvariate(6.0, 0.9)), 30), longest) for _ in range(n)]
    return [[draw.randrange(3, MODEL.vocab_size) for _ in range(length)] for length in lengths]


def ours(side: Side, folder: Path, dtype: str, documents: list[list[int]]) -> None:
    """The loop of train_sft.py with `--packing documents --global-batch 1`, without its log."""
    from zephyr import distributed, head, optim
    from zephyr.losses import sft_loss
    from zephyr.packing import Group, Pack, best_fit

    side.imports_done()
    world = distributed.start()
    model = build_ours(folder, world, dtype)
    optimizer = optim.adamw(model)
    side.models_done(model, head=head._LogProbs)
    rows = best_fit([len(ids) for ids in documents], ROW)
    tokens, losses = [], []
    for row in [rows[0], *rows]:
        side.begin()
        groups = []
        for first, *rest in (documents[i] for i in row):
            groups.append(Group([first], [rest], [[True] * len(rest)]))
        n_targets = sum(group.n_targets for group in groups)
        pack = Pack.from_groups(groups)
        loss = sft_loss(model(pack)) / n_targets
        loss.backward()
        optim.update(optimizer, 0.0, MAX_GRAD_NORM)
        tokens.append(len(pack.tokens))
        losses.append(loss.item())
        side.end()
    side.finish(tokens, losses)


def trl(
    packing: str | None, side: Side, folder: Path, dtype: str, documents: list[list[int]]
) -> None:
    """TRL's trainer on the same ids, packed by TRL itself, or padded if `packing` is None."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import _ChunkedLogProbFunction

    batch = 1 if packing else PADDED_ROWS
    disable_progress_bars()

    class Trainer(SFTTrainer):
        def _prepare_dataset(self, *args):
            rows = super()._prepare_dataset(*args)
            return rows.select([*range(batch), *range(len(rows))])  # the warm-up step before all

    side.imports_done()
    arguments = trl_arguments(folder, dtype, batch) | {"learning_rate": 0.0}
    if packing:
        arguments |= {"packing": True, "packing_strategy": packing}
    trainer = Trainer(
        str(folder),
        args=SFTConfig(max_length=ROW, **arguments),
        train_dataset=Dataset.from_dict({"input_ids": documents}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[turn_taker(side)],
    )
    side.models_done(trainer.model, head=_ChunkedLogProbFunction)
    trainer.train()
    seen = logged(trainer, "num_tokens")  # so far
    tokens = [after - before for before, after in zip([0, *seen], seen)]
    side.finish(tokens, logged(trainer, "loss"))


SIDES = {
    "ours": ours,
    "TRL bfd": partial(trl, "bfd"),
    "TRL wrapped": partial(trl, "wrapped"),
    "TRL padded": partial(trl, None),
}


def check(sides: dict[str, Report], n_tokens: int, tolerance: float) -> None:
    """End the program unless the sides did the same work."""
    losses = {}
    for name, side in sides.items():
        if sum(side.amounts) != n_tokens:
            sys.exit(f"not the same work: {name} counts {sum(side.amounts)} tokens of {n_tokens}")
        terms = zip(side.amounts, side.facts, strict=True)
        losses[name] = sum(tokens * loss for tokens, loss in terms) / n_tokens
    for name in SIDES.keys() - {"TRL wrapped"}:  # there, documents see others
        if abs(losses[name] / losses["ours"] - 1) > tolerance:
            sys.exit(f"not the same work: the mean losses are {losses}")


def main() -> None:
    flags = parse(__doc__)
    documents = make_documents(PADDED_ROWS, 200) if flags.quick else make_documents(DOCUMENTS, ROW)
    with tempfile.TemporaryDirectory() as folder:
        sides = compare(SIDES, write_model(Path(folder)), flags.dtype, documents)
    n_tokens = sum(map(len, documents))
    check(sides, n_tokens, SAME[flags.dtype])
    print(table("tokens/s", flags.dtype, sides))
    real = n_tokens / sum(
        PADDED_ROWS * max(map(len, documents[i : i + PADDED_ROWS]))
        for i in range(0, len(documents), PADDED_ROWS)
    )
    steps = ", ".join(str(len(side.seconds)) for side in sides.values())
    print(
        footer(
            f"{len(documents)} documents, {n_tokens} tokens, in {steps} steps;"
            f" {real:.0%} of the padded positions real"
        )
    )


if __name__ == "__main__":
    main()
