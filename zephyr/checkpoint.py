"""Training state, whole or not at all; and the finished model as a Hugging Face folder.

A checkpoint is a folder `checkpoints/step_000100` of tensors and JSON:

    rank_00000.safetensors ...   each rank's rows of the weights and of Adam's two moments, float32
    state.json                   the step, the knobs, and what the reader needs to fit the rows
    together

It is written under another name and renamed when every rank is done, so what bears the name is
whole. It can be read by any number of ranks: each takes the rows it needs from the files that have
them.
"""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zephyr import hub
from zephyr.distributed import World
from zephyr.tokenizer import Tokenizer
from zephyr.weights import config_json, save_weights, shard_rows

PARTS = ("weight", "exp_avg", "exp_avg_sq")  # Adam's names for its first and second moment


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    world: World,
    keep: int,
) -> None:
    """Write checkpoint `step` into `folder`, then delete all but the newest `keep`.

    `state` is what the script wants back when it goes on, as JSON.
    """
    final, temporary = folder / _name(step), folder / f".{_name(step)}.writing"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    tensors, starts = {}, {}
    for name, parameter in model.named_parameters():
        starts[name] = str(shard_rows(parameter).start)
        for part, tensor in zip(PARTS, _state(parameter, optimizer), strict=True):
            tensors[f"{part}/{name}"] = _local(tensor).detach().cpu().contiguous()
    save_file(tensors, temporary / f"rank_{world.rank:05d}.safetensors", metadata=starts)
    world.barrier()
    if world.is_main:
        text = json.dumps({"step": step, "ranks": world.size, **state}, indent=2) + "\n"
        (temporary / "state.json").write_text(text)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in _all(folder)[:-keep] if keep > 0 else []:
            shutil.rmtree(old)
    world.barrier()


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the newest checkpoint in a folder; returns its state, or that of a run at its
    beginning."""
    found = _all(folder)
    return load(found[-1], model, optimizer) if found else {"step": 0, "tokens": 0}


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Put a checkpoint's weights and moments into a model and its optimizer; returns its
    state.json.

    Any number of ranks may have written it. Raises ValueError if it is not of this model.
    """
    state = hub.read_json(path / "state.json")
    with ExitStack() as stack:
        files = []
        for rank in range(state["ranks"]):
            file = stack.enter_context(safe_open(path / f"rank_{rank:05d}.safetensors", "pt"))
            files.append((file, file.metadata()))
        for name, parameter in model.named_parameters():
            step = torch.tensor(float(state["step"]), device=_local(parameter).device)
            moments = {part: torch.zeros_like(parameter) for part in PARTS[1:]}
            optimizer.state[parameter] = {"step": step, **moments}
            for part, tensor in zip(PARTS, _state(parameter, optimizer), strict=True):
                _fill(_local(tensor), shard_rows(parameter), files, part, name)
    return state


@torch.no_grad()
def _fill(local: Tensor, rows: slice, files: list, part: str, name: str) -> None:
    """Copy rows of a stored tensor, which may lie in several files, into a rank's shard."""
    filled = 0
    for file, starts in files:
        if name not in starts:
            raise ValueError(f"the checkpoint has no tensor {name}: it is of another model")
        stored, start = file.get_slice(f"{part}/{name}"), int(starts[name])
        n_stored = stored.get_shape()[0]
        begin, end = max(rows.start, start), min(rows.stop, start + n_stored)
        if begin < end:
            local[begin - rows.start : end - rows.start].copy_(stored[begin - start : end - start])
            filled += end - begin
    if filled != local.shape[0]:
        raise ValueError(f"the checkpoint has not all rows of {name}: it is of another model")


def _state(parameter: Tensor, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor, Tensor]:
    moments = optimizer.state[parameter]
    return parameter, moments["exp_avg"], moments["exp_avg_sq"]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _all(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step_*") if (path / "state.json").is_file())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def model_card(stage: str, knobs: dict[str, Any]) -> str:
    """README.md of an exported model, with the Hub's metadata."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in knobs.items())
    base = f"base_model: {knobs['model']}\n" if not Path(knobs["model"]).exists() else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}---\n\n"
        f"# Trained by zephyr: {stage}\n\nThe numbers of the run are in metrics.jsonl.\n\n"
        f"| flag | value |\n|---|---|\n{rows}\n"
    )


def save_model(
    model: nn.Module,
    tokenizer: Tokenizer,
    path: str | Path,
    dtype: torch.dtype | None = None,
    card: str = "",
    is_main: bool = True,
) -> None:
    """Write a Hugging Face model folder: weights, config, tokenizer with its chat template.

    Args:
        dtype: of the stored weights; None for the model's own.
        card: the model card (README.md); empty for none.
        is_main: whether this rank writes. A sharded model is gathered: call it on every rank.
    """
    path, dtype = Path(path), dtype or next(model.parameters()).dtype
    if is_main:
        path.mkdir(parents=True, exist_ok=True)
        config = config_json(model.config, dtype) | {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
        }
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        ends |= {"pad_token_id": tokenizer.eos_id}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (path / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
        tokenizer.save(path)
        if card:
            (path / "README.md").write_text(card, encoding="utf-8")
    save_weights(model, path, dtype, write=is_main)
