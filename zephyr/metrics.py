"""What a run says of itself: sums on the device, one reduction a log line, one line for people and
one for machines.

Useful FLOPs, the convention behind `mfu`, are those that the gradient needs and no others: a
shared prefix counts once, the head on target rows only, attention on the pairs of tokens that see
each other, the backward pass twice the forward; nothing for recomputation, padding or the
reference.
"""

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from zephyr.distributed import World
from zephyr.packing import Group

# dense bf16 FLOP/s by the vendors' data sheets; other devices, CPUs among them, report no mfu
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


class Meter:
    """Adds up a log interval: sums on the device, not read back until the line is due.

    Args:
        tokens: trained on before this run went on.
    """

    def __init__(self, world: World, tokens: int = 0):
        self.world, self.tokens, self.peak = world, tokens, peak_flops(world)
        self.sums: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Begin a new interval: what lay before, such as an evaluation, does not count as
        training."""
        self.start, self.sums = time.perf_counter(), {}
        self.steps, self.divisor, self.rows, self.new_tokens, self.flops = 0, 0, 0, 0, 0.0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add a micro-batch of this rank: each tensor by the sum of its elements."""
        for name, value in values.items():
            total = value.detach().sum(dtype=torch.float64)
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def step(self, divisor: int, rows: int, tokens: int, flops: float) -> None:
        """Count a step of all ranks; the sums will be divided by the divisors' sum."""
        self.steps, self.rows, self.flops = self.steps + 1, self.rows + rows, self.flops + flops
        self.divisor, self.new_tokens = self.divisor + divisor, self.new_tokens + tokens
        self.tokens += tokens

    def read(self, row_name: str) -> dict[str, float | None]:
        """The means over all ranks, in one all-reduce, and the rates; begins a new interval.

        tokens, tokens_per_second and {row_name}_per_second are of all ranks together; mfu is a
        fraction; peak_memory_gib is this rank's.
        """
        sums = self.world.sum(torch.stack(list(self.sums.values()))).tolist()
        means = {name: total / self.divisor for name, total in zip(self.sums, sums, strict=True)}
        seconds = time.perf_counter() - self.start
        rates = {
            "tokens": self.tokens,
            "tokens_per_second": self.new_tokens / seconds,
            f"{row_name}_per_second": self.rows / seconds,
            "mfu": self.flops / seconds / (self.peak * self.world.size) if self.peak else None,
            "peak_memory_gib": peak_memory_gib(self.world.device),
            "step_seconds": seconds / self.steps,
        }
        self.restart()
        return means | rates


def peak_flops(world: World) -> float | None:
    """The device's bf16 FLOP/s, or None where that is not known."""
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def useful_flops(config, groups: list[Group]) -> float:
    """FLOPs of one gradient for these groups (the convention stands at the top of this page).

    A matrix product of (m, k) and (k, n) is 2 m k n; attention is 4 D per head and visible pair of
    tokens (scores and values); the backward pass is twice the forward.
    """
    width, head_dim = config.hidden_size, config.head_dim
    q_width = config.num_attention_heads * head_dim
    kv_width = config.num_key_value_heads * head_dim
    layer = 2 * width * (q_width + kv_width) + 3 * width * config.intermediate_size
    tokens = sum(group.length() for group in groups)
    targets = sum(group.n_targets for group in groups)
    pairs = sum(visible_pairs(group, config.sliding_window) for group in groups)
    forward = config.num_hidden_layers * (2 * tokens * layer + 4 * q_width * pairs)
    return 3 * (forward + 2 * targets * width * config.vocab_size)


def visible_pairs(group: Group, window: int | None) -> int:
    """How many (query, key) pairs attention computes for a group laid out with a shared prefix."""
    prefix = len(group.prefix)
    starts = [0] + [prefix] * (len(group.branches) - 1)
    ends = [prefix + len(branch) for branch in group.branches]
    total = 0
    for start, end in zip(starts, ends, strict=True):
        seen = np.arange(start + 1, end + 1)
        total += int(np.minimum(seen, window or end).sum())
    return total


def plan(config, knobs, world: World, n_steps: int, lengths: list[int], flops: float) -> str:
    """The exact arithmetic of a run, as text: steps, tokens, memory, FLOPs.

    Args:
        lengths: tokens of each row (what a step counts: a pair, a packed row), as laid out.
        flops: useful FLOPs of an epoch.
    """
    n_rows, batch, ranks = len(lengths), knobs.global_batch, world.size
    per_epoch = -(-n_rows // batch)
    last = n_rows - (per_epoch - 1) * batch
    total = sum(lengths)
    budget = max(knobs.tokens_per_microbatch, max(lengths))
    raised = f" (raised from {knobs.tokens_per_microbatch:,} by the longest row)"
    gib = 16 * config.n_parameters / ranks / 2**30
    return "\n".join(
        (
            f"plan: {n_rows:,} rows / {batch} a step = {per_epoch:,} steps an epoch"
            f" (the last of {last}); {n_steps:,} steps in all",
            f"  {total:,} tokens an epoch, {total / per_epoch:,.0f} a step on {ranks} ranks, in"
            f" micro-batches of at most {budget:,} tokens"
            + raised
            * (budget > knobs.tokens_per_microbatch),
            f"  {config.n_parameters:,} parameters; weights, gradients and Adam in float32:"
            f" {gib:.2f} GiB a rank",
            f"  {flops / per_epoch:.2e} useful FLOPs a step,"
            f" {flops * n_steps / per_epoch:.2e} in all",
        )
    )


def write_run(path: Path, knobs: Any, world: World, **facts: Any) -> None:
    """run.json: every knob, the versions and the machine, and the facts given."""
    if not world.is_main:
        return
    packages = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "huggingface_hub")
    on_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else platform.machine()
    content = {
        "knobs": asdict(knobs),
        "ranks": world.size,
        "device": device,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        **facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def due(step: int, n_steps: int, knobs: Any) -> tuple[bool, bool, bool]:
    """Whether to log, to evaluate and to save when `step` updates are done.

    The last step logs and evaluates. An evaluation or a checkpoint comes with a log line, so that
    no log interval reaches across it: a run that goes on from there logs the same numbers.
    """
    last = step == n_steps
    evaluate = last or bool(knobs.eval_every and step % knobs.eval_every == 0)
    save = bool(knobs.save_every and step % knobs.save_every == 0)
    return evaluate or save or step % knobs.log_every == 0, evaluate, save


class Log:
    """metrics.jsonl, the console and the progress bar, on rank 0.

    A run that goes on after `step` drops the rows after it, so that each step stands there once.
    """

    def __init__(self, path: Path, world: World, step: int):
        self.path, self.world, self.bar = path, world, None
        if world.is_main:
            rows = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
            kept = [row for row in rows if json.loads(row)["step"] <= step]
            path.write_text("".join(row + "\n" for row in kept), encoding="utf-8")

    def steps(self, first: int, n_steps: int) -> Iterator[int]:
        """The numbers of the steps to do, under a progress bar where there is a terminal."""
        hidden = None if self.world.is_main else True
        self.bar = tqdm(
            range(first, n_steps), initial=first, total=n_steps, unit="step", disable=hidden
        )
        yield from self.bar

    def write(self, row: dict[str, Any]) -> None:
        """Append one JSON line; print its main numbers in one line of fixed width."""
        if not self.world.is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        tqdm.write(line(row))  # goes above the bar
        if self.bar is not None:
            on_bar = ("loss", "rewards/margins", "tokens_per_second")
            self.bar.set_postfix_str(line({key: row.get(key) for key in on_bar}))


SHORT = {  # key -> (name on the console, format)
    "step": ("step", "6d"),
    "loss": ("loss", "7.4f"),
    "eval/loss": ("held-out loss", "7.4f"),
    "rewards/margins": ("margin", "7.3f"),
    "eval/rewards/margins": ("margin", "7.3f"),
    "rewards/accuracies": ("acc", "5.3f"),
    "eval/rewards/accuracies": ("acc", "5.3f"),
    "learning_rate": ("lr", "8.2e"),
    "grad_norm": ("norm", "8.3g"),
    "tokens_per_second": ("tok/s", "7.0f"),
    "mfu": ("mfu", "5.1%"),
}


def line(row: dict[str, Any]) -> str:
    """One row of metrics as a line of at most 100 columns."""
    shown = [(SHORT[key], row[key]) for key in SHORT if row.get(key) is not None]
    return "  ".join(f"{name} {value:{form}}" for (name, form), value in shown)
