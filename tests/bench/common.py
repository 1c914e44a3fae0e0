"""What the comparisons with TRL share: the model, the sides and their turns, clocks and memory.

Each side is a process of its own, so that its peak of memory is its own. All are built first, then
they step in turns, A B A B: while one works the others wait at a pipe, and a slow minute of the
machine is a slow minute for all. A side's first step is warm-up and counts for nothing but memory.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

from zephyr import demo, parallel
from zephyr.distributed import World
from zephyr.model import Config
from zephyr.weights import load_weights

THREADS = 2
LEARNING_RATE, MAX_GRAD_NORM = 5e-7, 1.0
MODEL = Config(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    sliding_window=None,
)
PRECISION = {"float32": "fp32", "bf16": "bf16"}  # the choices of --dtype, as parallel.py has them


def parse(description: str) -> argparse.Namespace:
    """The flags of both comparisons."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=PRECISION, default="float32", help="of the compute")
    parser.add_argument("--quick", action="store_true", help="a smoke check, under a minute")
    return parser.parse_args()


def write_model(folder: Path) -> Path:
    """The random model, as a Hugging Face folder in float32, with a small tokenizer."""
    demo.build_tiny(folder, sorted((ROOT / "data" / "samples").glob("*.jsonl")), MODEL)
    return folder


def build_ours(folder: Path, world: World, dtype: str, trainable: bool = True) -> nn.Module:
    """The folder's model as the scripts build it: FSDP2, on one rank here."""
    model = parallel.build(MODEL, world, PRECISION[dtype], trainable=trainable)
    load_weights(model, folder)
    return model


@dataclass
class Report:
    """What a side did. Lists have one entry a step, without the warm-up.

    Attributes:
        amounts: what the step got through: pairs, or tokens that are not padding.
        facts: a number of each step that the sides can be compared by.
        models: GiB of resident memory that its models took, before any training.
        peak: GiB that training added to that at the worst moment (gradients, moments of AdamW,
            activations): ru_maxrss at the end, less what was resident after imports and building.
        seconds: of each step.
        heads: seconds of them in the head, forward and backward, policy and reference.
    """

    amounts: list[float]
    facts: list[float]
    models: float
    peak: float
    seconds: list[float] = field(default_factory=list)
    heads: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Amount a second: the median over the steps."""
        return median(n / s for n, s in zip(self.amounts, self.seconds, strict=True))

    @property
    def body_rate(self) -> float:
        """The same, as if the head took no time."""
        steps = zip(self.amounts, self.seconds, self.heads, strict=True)
        return median(n / (s - head) for n, s, head in steps)


class Side:
    """A side's end of the pipe, in its own process: waits for its turns and keeps the clocks."""

    def __init__(self, pipe: Connection):
        self.pipe, self.start, self.head = pipe, 0.0, 0.0
        self.imported, self.built = resident_gib(), 0.0

    def imports_done(self) -> None:
        self.imported = resident_gib()

    def models_done(self, *models: nn.Module, head: type[torch.autograd.Function]) -> None:
        """The models are built. From here on the head's clock runs in that function's forward and
        backward. The weights are read once: a file mapped to memory is resident only then."""
        for model in models:
            for parameter in model.parameters():
                parameter.detach().sum()
        self.built = resident_gib()
        head.forward = staticmethod(self._on_clock(head.forward))
        head.backward = staticmethod(self._on_clock(head.backward))

    def _on_clock(self, call: Callable) -> Callable:
        def timed(*args):
            start = time.perf_counter()
            result = call(*args)
            self.head += time.perf_counter() - start
            return result

        return timed

    def begin(self) -> None:
        """Wait for the turn, then start the clocks."""
        self.pipe.send("ready")
        self.pipe.recv()
        self.head, self.start = 0.0, time.perf_counter()

    def end(self) -> None:
        self.pipe.send((time.perf_counter() - self.start, self.head))

    def finish(self, amounts: Sequence[float], facts: Sequence[float]) -> None:
        """Report; the lists are those of `Report` and the warm-up's entry before them."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        models = self.built - self.imported
        self.pipe.send(Report(list(amounts[1:]), list(facts[1:]), models, peak - self.built))


def resident_gib() -> float:
    """Memory of this process that is resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def compare(sides: dict[str, Callable], *args) -> dict[str, Report]:
    """Run the sides, functions of (Side, *args), in processes of their own and in turns."""
    os.environ |= {
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes, steps = [], {name: [] for name in sides}
    for name, side in sides.items():
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=_run, args=(side, end, *args), daemon=True))
        processes[-1].start()
        end.close()  # a side that fails then ends the comparison
    for pipe in pipes.values():
        pipe.recv()  # built, and ready for its first step
    reports: dict[str, Report] = {}
    while pipes:
        for name, pipe in list(pipes.items()):
            pipe.send("your turn")
            steps[name].append(pipe.recv())
            message = pipe.recv()
            if message != "ready":
                reports[name] = message
                del pipes[name]
    for process in processes:
        process.join()
    for name, report in reports.items():
        for seconds, head in steps[name][1:]:
            report.seconds.append(seconds)
            report.heads.append(head)
    return {name: reports[name] for name in sides}


def _run(side: Callable, pipe: Connection, *args) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- both sides tell of their steps there
    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    side(Side(pipe), *args)


def turn_taker(side: Side):
    """A callback by which TRL's trainer steps when it is its side's turn."""
    from transformers import TrainerCallback

    class TurnTaker(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            side.begin()

        def on_step_end(self, *args, **kwargs):
            side.end()

    return TurnTaker()


def trl_arguments(output: Path, dtype: str, rows: int) -> dict:
    """What both of TRL's configurations need to take steps of `rows` rows as ours does.

    Weights are float32 and attention is sdpa, as TRL has them by default; bf16 is its autocast;
    AdamW is the fused one, as ours is.
    """
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": rows,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "gradient_checkpointing": False,
        "bf16": dtype == "bf16",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def logged(trainer, key: str) -> list[float]:
    """What TRL logged under `key`, step by step."""
    return [row[key] for row in trainer.state.log_history if "loss" in row]


def table(unit: str, dtype: str, sides: dict[str, Report]) -> str:
    """One line a side; the first is ours, and the others' last columns say what ours gains: how
    many times as fast, how many times as fast without the heads, in which part of the memory."""
    names = (unit, "w/o head", "s/step", "head s", "models", "peak GiB", "speed", "body", "memory")
    widths = (9, 9, 7, 7, 7, 9, 7, 6, 7)
    lines = ["side        dtype  " + _columns(names, widths)]
    first = next(iter(sides.values()))
    for name, side in sides.items():
        values = [f"{side.rate:.4g}", f"{side.body_rate:.4g}"]
        values += [f"{median(side.seconds):.2f}", f"{median(side.heads):.2f}"]
        values += [f"{side.models:.2f}", f"{side.peak:.2f}"]
        if side is not first:
            values += [f"{first.rate / side.rate:.2f}", f"{first.body_rate / side.body_rate:.2f}"]
            values += [f"{first.peak / side.peak:.2f}"]
        lines.append(f"{name:12}{dtype:7}" + _columns(values, widths))
    return "\n".join(lines)


def _columns(values: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=False))


def footer(what: str) -> str:
    """What was measured, with which versions."""
    names = ("torch", "transformers", "trl")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{what}; {versions}, Python {platform.python_version()}, {THREADS} CPU threads"
