#!/usr/bin/env python3
"""Stage 3, dDPO: align an SFT model on preference pairs, against a frozen copy of itself.

    torchrun --nproc_per_node 16 train_dpo.py                    # the paper's run: zephyr-7b-beta
    torchrun --nproc_per_node 2 train_dpo.py --recipe tiny       # seconds on a laptop
    python train_dpo.py --model MY_SFT --data pairs.jsonl        # your own, on one device

rows -> pairs -> packs -> log-probs -> loss -> update.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from zephyr import chat, checkpoint, dataset, distributed, evaluate, hub, metrics, optim, parallel
from zephyr.demo import find_model
from zephyr.distributed import World
from zephyr.losses import branch_sums, dpo_loss
from zephyr.packing import Group, Pack, rows_of_step, split_step, steps_of_run
from zephyr.tokenizer import Tokenizer
from zephyr.weights import check_fits, load_weights, read_config

SAMPLES = Path(__file__).parent / "data" / "samples"
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
AT_BETA = "@292c16329d921287c4166934cac1a6ad1e13a6c5"  # the revision with 61,966 pairs


@dataclass(frozen=True)
class Knobs:
    """Direct preference optimisation on preference pairs. Defaults: the paper's zephyr-7b-beta."""

    recipe: Literal["zephyr-7b-beta", "zephyr-7b-alpha", "handbook", "tiny"] = "zephyr-7b-beta"
    model: str = "HuggingFaceH4/mistral-7b-sft-beta"  # the SFT model: a folder, or ID[@revision]
    template: Literal["zephyr", "model"] = "zephyr"  # chat format: Zephyr's, or the model's own
    data: str = f"{ULTRAFEEDBACK}{AT_BETA}:train_prefs"  # a path, or ID[@revision][:split]
    eval_data: str = f"{ULTRAFEEDBACK}{AT_BETA}:test_prefs"  # held out; empty for none
    output: str = "runs/dpo"  # folder of this run; in the end a Hugging Face model folder
    beta: float = 0.1  # pull towards the reference
    label_smoothing: float = 0.0  # share of labels believed to be wrong (conservative DPO)
    learning_rate: float = 5e-7  # of AdamW, at its peak
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after warm-up
    warmup_ratio: float = 0.1  # share of the steps in which the learning rate rises from 0
    epochs: float = 3.0  # passes over the pairs
    max_steps: int = -1  # updates; overrides epochs unless -1
    global_batch: int = 32  # pairs an update, over all ranks
    max_length: int = 1024  # tokens of prompt and answer; longer ones are cut
    max_prompt_length: int = 512  # tokens a prompt keeps where a pair is over max_length
    tokens_per_microbatch: int = 8192  # tokens a rank computes at a time: memory, not results
    max_grad_norm: float = 1.0  # clip the gradient to this norm; 0 for never
    precision: Literal["bf16", "fp32"] = "bf16"  # of the compute; master weights are float32
    attention: Literal["auto", "flash", "torch", "sdpa"] = "auto"  # kernels
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # less memory
    reference: Literal["cached", "live"] = "cached"  # score the pairs once, or keep the reference
    share_prefix: bool = True  # compute a pair's prompt once
    log_every: int = 10  # steps between log lines
    eval_every: int = 100  # steps between evaluations; one more before and one after
    save_every: int = 500  # steps between checkpoints; 0 for none
    keep: int = 2  # checkpoints kept
    resume: Literal["auto", "never"] = "auto"  # go on from the newest checkpoint in output
    timeout: float = 10.0  # minutes until a rank that hangs ends the job
    seed: int = 42  # of the data order
    dry_run: bool = False  # print the plan and stop


RECIPES = {
    "zephyr-7b-beta": {},
    "zephyr-7b-alpha": {"model": "HuggingFaceH4/mistral-7b-sft-alpha", "epochs": 1.0},
    "handbook": {
        "model": "alignment-handbook/zephyr-7b-sft-full",
        "data": f"{ULTRAFEEDBACK}:train_prefs",
        "eval_data": f"{ULTRAFEEDBACK}:test_prefs",
        "beta": 0.01,
        "schedule": "cosine",
        "epochs": 1.0,
        "global_batch": 128,
    },
    "tiny": {
        "model": "tiny",
        "data": str(SAMPLES / "preferences.jsonl"),
        "eval_data": str(SAMPLES / "preferences_eval.jsonl"),
        "output": "runs/tiny-dpo",
        "learning_rate": 1e-3,
        "global_batch": 16,
        "max_length": 512,
        "max_prompt_length": 256,
        "tokens_per_microbatch": 1024,
        "precision": "fp32",
        "log_every": 1,
        "eval_every": 4,
        "save_every": 6,
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

    limits = {"max_length": knobs.max_length, "max_prompt_length": knobs.max_prompt_length}
    loader = partial(dataset.load_pairs, **limits, bos_id=tokenizer.bos_id)

    def load(name: str) -> Sequence[Group]:
        source, cache = hub.resolve(name, "dataset", world), output / "tokenised"
        found = dataset.tokenised(source, loader, tokenizer, knobs.template, cache, world)
        world.print(dataset.report(name, found, found.counts))
        return found

    pairs = load(knobs.data)
    held_out = load(knobs.eval_data) if knobs.eval_data else []
    lengths = [pair.length(knobs.share_prefix) for pair in pairs]
    n_steps = steps_of_run(len(pairs), knobs.global_batch, knobs.epochs, knobs.max_steps)
    world.print(chat.colour(tokenizer, *pairs[0].sequence()))
    flops = metrics.useful_flops(config, pairs)
    world.print(metrics.plan(config, knobs, world, n_steps, lengths, flops))
    if knobs.dry_run:
        return
    model_hash = world.once("hash of the model", lambda: evaluate.folder_hash(folder))
    counts = {"data": pairs.counts}
    counts |= {"eval_data": held_out.counts} if held_out else {}
    metrics.write_run(output / "run.json", knobs, world, model_sha256=model_hash, rows=counts)

    def build(**how: object) -> nn.Module:
        model = parallel.build(config, world, knobs.precision, knobs.attention, **how)
        load_weights(model, folder)
        return model

    reference, held_out_reference = load_reference(knobs, build, world, model_hash, pairs, held_out)
    policy = build(activation_checkpointing=knobs.activation_checkpointing)
    train(knobs, world, policy, reference, pairs, held_out, held_out_reference, n_steps)
    dtype = torch.bfloat16 if knobs.precision == "bf16" else torch.float32
    card = checkpoint.model_card("dDPO", asdict(knobs))
    checkpoint.save_model(policy, tokenizer, output, dtype, card, world.is_main)
    world.print(f"the model is in {output}")


Reference = Callable[[list[int], Pack], Tensor]
"""A micro-batch of pairs (their indices, their pack) -> (P, 2) log-probabilities by the
reference."""


def load_reference(
    knobs: Knobs,
    build: Callable[..., nn.Module],
    world: World,
    model_hash: str,
    pairs: Sequence[Group],
    held_out: Sequence[Group],
) -> tuple[Reference, Tensor]:
    """The frozen model that DPO starts from: how to score a micro-batch by it, and its scores of
    the held-out pairs. It is `--model` always, also when the policy goes on from a checkpoint."""
    build = cache(partial(build, trainable=False))
    layout = (world, knobs.tokens_per_microbatch, knobs.share_prefix)
    if knobs.reference == "live":
        held_out_scores = evaluate.score(build(), held_out, *layout)
        return lambda indices, pack: evaluate.score_pack(build(), pack, 2), held_out_scores
    # The pairs are scored in the packs of the first epoch: kernels round differently in packs of
    # another shape, and in bf16 that would show as a margin before the first update.
    lengths = [pair.length(knobs.share_prefix) for pair in pairs]
    plan = []
    for step in range(steps_of_run(len(pairs), knobs.global_batch, 1, -1)):
        batch = rows_of_step(len(pairs), knobs.global_batch, knobs.seed, step)
        plan += split_step(batch, lengths, world.size, knobs.tokens_per_microbatch)[world.rank]
    key = f"{model_hash} {knobs.precision} share_prefix={knobs.share_prefix}"
    store = (Path(knobs.output), key)
    scores = evaluate.cached_scores(build, pairs, *layout, plan, *store)
    held_out_scores = evaluate.cached_scores(build, held_out, *layout, None, *store)
    return lambda indices, pack: scores[indices].to(world.device), held_out_scores


def train(
    knobs: Knobs,
    world: World,
    policy: nn.Module,
    reference: Reference,
    pairs: Sequence[Group],
    held_out: Sequence[Group],
    held_out_reference: Tensor,
    n_steps: int,
) -> None:
    """The loop. An update reads global_batch pairs; each number logged is over all of them."""
    optimizer = optim.adamw(policy)
    checkpoints, state = Path(knobs.output) / "checkpoints", {"step": 0, "tokens": 0}
    if knobs.resume == "auto":
        state |= checkpoint.resume(checkpoints, policy, optimizer)
    log = metrics.Log(Path(knobs.output) / "metrics.jsonl", world, state["step"])
    lengths = [pair.length(knobs.share_prefix) for pair in pairs]
    flops = [metrics.useful_flops(policy.config, [pair]) for pair in pairs]

    def evaluate_policy(step: int) -> None:
        budget = knobs.tokens_per_microbatch
        scores = evaluate.score(policy, held_out, world, budget, knobs.share_prefix)
        smoothing = knobs.label_smoothing
        row = evaluate.dpo_metrics(scores, held_out_reference, knobs.beta, smoothing)
        log.write({"step": step, **row})

    if held_out and state["step"] == 0:
        evaluate_policy(0)
    meter = metrics.Meter(world, state["tokens"])
    for step in log.steps(state["step"], n_steps):
        batch = rows_of_step(len(pairs), knobs.global_batch, knobs.seed, step)
        plan = split_step(batch, lengths, world.size, knobs.tokens_per_microbatch)
        for indices in plan[world.rank]:
            pack = Pack.from_groups([pairs[i] for i in indices], knobs.share_prefix)
            pack = pack.to(world.device)
            logps = branch_sums(policy(pack), pack).view(-1, 2)  # (P, 2): chosen, rejected
            losses, chosen, rejected = dpo_loss(
                *logps.T, *reference(indices, pack).T, knobs.beta, knobs.label_smoothing
            )
            # the mean over the step's pairs; FSDP divides the ranks' sum by their number
            (losses.sum() * (world.size / len(batch))).backward()
            meter.add(
                {
                    "loss": losses,
                    "rewards/chosen": chosen,
                    "rewards/rejected": rejected,
                    "rewards/accuracies": chosen > rejected,
                    "rewards/margins": chosen - rejected,
                    "logps/chosen": logps[:, 0],
                    "logps/rejected": logps[:, 1],
                }
            )
        rate = optim.learning_rate(
            step, n_steps, knobs.learning_rate, knobs.schedule, knobs.warmup_ratio
        )
        norm = optim.update(optimizer, rate, knobs.max_grad_norm)
        n_tokens, n_flops = sum(lengths[i] for i in batch), sum(flops[i] for i in batch)
        meter.step(divisor=len(batch), rows=len(batch), tokens=n_tokens, flops=n_flops)

        done = step + 1
        log_now, evaluate_now, save_now = metrics.due(done, n_steps, knobs)
        if log_now:
            now = {"step": done, "epoch": done / math.ceil(len(pairs) / knobs.global_batch)}
            now |= {"learning_rate": rate, "grad_norm": norm.item()}
            log.write(now | meter.read("pairs"))
        if evaluate_now and held_out:
            evaluate_policy(done)
        if save_now:
            state = {"tokens": meter.tokens, "knobs": asdict(knobs)}
            checkpoint.save(checkpoints, done, policy, optimizer, state, world, knobs.keep)
        if evaluate_now or save_now:
            meter.restart()


if __name__ == "__main__":
    distributed.run(main)
