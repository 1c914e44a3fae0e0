#!/usr/bin/env python3
"""Stage 1, dSFT: teach a base model to answer, on dialogues distilled from a larger model.

    torchrun --nproc_per_node 16 train_sft.py                    # the paper's run: zephyr-7b-beta
    torchrun --nproc_per_node 2 train_sft.py --recipe tiny       # seconds on a laptop
    python train_sft.py --model MY_BASE --data dialogues.jsonl   # your own, on one device

rows -> dialogues -> packs -> log-probs -> loss -> update.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from zephyr import chat, checkpoint, dataset, distributed, evaluate, hub, metrics, optim, parallel
from zephyr.demo import find_model
from zephyr.distributed import World
from zephyr.losses import sft_loss
from zephyr.packing import Group, Pack, best_fit, rows_of_step, shuffled, split_step, steps_of_run
from zephyr.tokenizer import Tokenizer
from zephyr.weights import check_fits, load_weights, read_config

SAMPLES = Path(__file__).parent / "data" / "samples"


@dataclass(frozen=True)
class Knobs:
    """Supervised fine-tuning on dialogues. Defaults: the paper's zephyr-7b-beta."""

    recipe: Literal["zephyr-7b-beta", "zephyr-7b-alpha", "handbook", "tiny"] = "zephyr-7b-beta"
    model: str = "mistralai/Mistral-7B-v0.1"  # the base model: a folder, or ID[@revision]
    template: Literal["zephyr", "model"] = "zephyr"  # chat format: Zephyr's, or the model's own
    data: str = "HuggingFaceH4/ultrachat_200k:train_sft"  # a path, or ID[@revision][:split]
    eval_data: str = "HuggingFaceH4/ultrachat_200k:test_sft"  # held out; empty for none
    output: str = "runs/sft"  # folder of this run; in the end a Hugging Face model folder
    loss_on: Literal["all", "assistant"] = "all"  # learn every token, or the assistant's alone
    packing: Literal["documents", "concatenate"] = "concatenate"  # isolated, or cut from a stream
    learning_rate: float = 2e-5  # of AdamW, at its peak
    schedule: Literal["linear", "cosine", "constant"] = "cosine"  # after warm-up
    warmup_ratio: float = 0.1  # share of the steps in which the learning rate rises from 0
    epochs: float = 1.0  # passes over the dialogues
    max_steps: int = -1  # updates; overrides epochs unless -1
    global_batch: int = 512  # rows of at most max_length tokens an update, over all ranks
    max_length: int = 2048  # tokens of a row, and of a dialogue (documents)
    tokens_per_microbatch: int = 8192  # tokens a rank computes at a time: memory, not results
    max_grad_norm: float = 1.0  # clip the gradient to this norm; 0 for never
    precision: Literal["bf16", "fp32"] = "bf16"  # of the compute; master weights are float32
    attention: Literal["auto", "flash", "torch", "sdpa"] = "auto"  # kernels
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # less memory
    log_every: int = 5  # steps between log lines
    eval_every: int = 100  # steps between evaluations; one more before and one after
    save_every: int = 100  # steps between checkpoints; 0 for none
    keep: int = 2  # checkpoints kept
    resume: Literal["auto", "never"] = "auto"  # go on from the newest checkpoint in output
    timeout: float = 10.0  # minutes until a rank that hangs ends the job
    seed: int = 42  # of the data order
    dry_run: bool = False  # print the plan and stop


RECIPES = {
    "zephyr-7b-beta": {},
    "zephyr-7b-alpha": {},  # its SFT differed in data that was never published
    "handbook": {"global_batch": 128},
    "tiny": {
        "model": "tiny",
        "data": str(SAMPLES / "sft.jsonl"),
        "eval_data": str(SAMPLES / "sft_eval.jsonl"),
        "output": "runs/tiny-sft",
        "packing": "documents",
        "learning_rate": 3e-3,
        "epochs": 4.0,
        "global_batch": 8,
        "max_length": 256,
        "tokens_per_microbatch": 1024,
        "precision": "fp32",
        "log_every": 1,
        "eval_every": 10,
        "save_every": 10,
    },
}


def main() -> None:
    knobs = distributed.parse(Knobs, RECIPES)
    world = distributed.start(knobs.timeout)
    output = Path(knobs.output)
    folder = find_model(knobs.model, output, SAMPLES, world)
    tokenizer = Tokenizer(folder)
    chat.encoder(tokenizer, knobs.template)  # the format that the model will be saved with
    config = read_config(folder)
    check_fits(folder, config, tokenizer.vocab_size, knobs.max_length)

    cut_at = knobs.max_length if knobs.packing == "documents" else None
    loader = partial(dataset.load_dialogues, max_length=cut_at, loss_on=knobs.loss_on)

    def load(name: str) -> Sequence[Group]:
        source, cache = hub.resolve(name, "dataset", world), output / "tokenised"
        found = dataset.tokenised(source, loader, tokenizer, knobs.template, cache, world)
        world.print(dataset.report(name, found, found.counts))
        return found

    dialogues = load(knobs.data)
    eval_dialogues = load(knobs.eval_data) if knobs.eval_data else []
    world.print(chat.colour(tokenizer, *dialogues[0].sequence()))
    rows_of_epoch = row_maker(knobs, dialogues, tokenizer.eos_id)
    held_out = eval_dialogues
    if knobs.packing == "concatenate" and eval_dialogues:
        held_out = [row for [row] in row_maker(knobs, eval_dialogues, tokenizer.eos_id)(0)]
    rows = rows_of_epoch(0)
    lengths = [sum(group.length() for group in row) for row in rows]
    n_steps = steps_of_run(len(rows), knobs.global_batch, knobs.epochs, knobs.max_steps)
    flops = metrics.useful_flops(config, [group for row in rows for group in row])
    world.print(metrics.plan(config, knobs, world, n_steps, lengths, flops))
    if knobs.dry_run:
        return
    model_hash = world.once("hash of the model", lambda: evaluate.folder_hash(folder))
    counts = {"data": dialogues.counts}
    counts |= {"eval_data": eval_dialogues.counts} if eval_dialogues else {}
    metrics.write_run(output / "run.json", knobs, world, model_sha256=model_hash, rows=counts)

    how = {"activation_checkpointing": knobs.activation_checkpointing}
    model = parallel.build(config, world, knobs.precision, knobs.attention, **how)
    load_weights(model, folder)
    train(knobs, world, model, rows_of_epoch, held_out, n_steps)
    dtype = torch.bfloat16 if knobs.precision == "bf16" else torch.float32
    card = checkpoint.model_card("dSFT", asdict(knobs))
    checkpoint.save_model(model, tokenizer, output, dtype, card, world.is_main)
    world.print(f"the model is in {output}")


Rows = list[list[Group]]
"""What a step counts: rows of at most max_length tokens, each of one or more dialogues."""


def row_maker(knobs: Knobs, dialogues: Sequence[Group], eos_id: int) -> Callable[[int], Rows]:
    """A function from the epoch's number to its rows; each epoch has as many."""
    if knobs.packing == "documents":
        fit = best_fit([dialogue.length() for dialogue in dialogues], knobs.max_length)
        rows = [[dialogues[i] for i in row] for row in fit]
        return lambda epoch: rows

    @lru_cache(maxsize=1)
    def chunks(epoch: int) -> Rows:
        order = shuffled(len(dialogues), knobs.seed, epoch)
        stream = (dialogues, order, eos_id, knobs.loss_on, knobs.max_length)
        return [[chunk] for chunk in dataset.concatenate(*stream)]

    if not chunks(0):
        raise ValueError(
            f"the dialogues do not fill one row of --max-length {knobs.max_length}: "
            "lower it, or use --packing documents"
        )
    return chunks


def train(
    knobs: Knobs,
    world: World,
    model: nn.Module,
    rows_of_epoch: Callable[[int], Rows],
    held_out: Sequence[Group],
    n_steps: int,
) -> None:
    """The loop. An update reads global_batch rows; each number logged is over all of them."""
    optimizer = optim.adamw(model)
    checkpoints, state = Path(knobs.output) / "checkpoints", {"step": 0, "tokens": 0}
    if knobs.resume == "auto":
        state |= checkpoint.resume(checkpoints, model, optimizer)
    log = metrics.Log(Path(knobs.output) / "metrics.jsonl", world, state["step"])

    def evaluate_model(step: int) -> None:
        row = evaluate.sft_metrics(model, held_out, world, knobs.tokens_per_microbatch)
        log.write({"step": step, **row})

    if held_out and state["step"] == 0:
        evaluate_model(0)
    meter = metrics.Meter(world, state["tokens"])
    steps_per_epoch = steps_of_run(len(rows_of_epoch(0)), knobs.global_batch, 1.0, -1)
    for step in log.steps(state["step"], n_steps):
        rows = rows_of_epoch(step // steps_per_epoch)
        batch = rows_of_step(len(rows), knobs.global_batch, knobs.seed, step)
        groups = [group for i in batch for group in rows[i]]
        n_targets = sum(group.n_targets for group in groups)
        lengths = {i: sum(group.length() for group in rows[i]) for i in batch}
        plan = split_step(batch, lengths, world.size, knobs.tokens_per_microbatch)
        for indices in plan[world.rank]:
            pack = Pack.from_groups([group for i in indices for group in rows[i]])
            loss = sft_loss(model(pack.to(world.device)))
            # the mean over the step's targets; FSDP divides the ranks' sum by their number
            (loss * (world.size / n_targets)).backward()
            meter.add({"loss": loss})
        rate = optim.learning_rate(
            step, n_steps, knobs.learning_rate, knobs.schedule, knobs.warmup_ratio
        )
        norm = optim.update(optimizer, rate, knobs.max_grad_norm)
        flops = metrics.useful_flops(model.config, groups)
        meter.step(n_targets, rows=len(batch), tokens=sum(lengths.values()), flops=flops)

        done = step + 1
        log_now, evaluate_now, save_now = metrics.due(done, n_steps, knobs)
        if log_now:
            now = {"step": done, "epoch": done / steps_per_epoch}
            now |= {"learning_rate": rate, "grad_norm": norm.item()}
            log.write(now | meter.read("rows"))
        if evaluate_now and held_out:
            evaluate_model(done)
        if save_now:
            state = {"tokens": meter.tokens, "knobs": asdict(knobs)}
            checkpoint.save(checkpoints, done, model, optimizer, state, world, knobs.keep)
        if evaluate_now or save_now:
            meter.restart()


if __name__ == "__main__":
    distributed.run(main)
