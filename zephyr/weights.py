"""A Hugging Face model folder <-> a model: config.json and (sharded) safetensors.

Parameters bear Hugging Face's names, so loading is copying. It is strict: a tensor too many, too
few or of another shape is an error that names it. Weights are read by slice: under FSDP a rank
reads the rows of its own shards and nothing else, one tensor at a time.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zephyr import hub
from zephyr.attention import BACKENDS, choose
from zephyr.model import Config, Mistral

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # what Hugging Face's tools write and expect


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: str = "auto",
) -> Mistral:
    """A model on one device, from a folder or from `ID[@revision]` on the Hub.

    Raises FileNotFoundError or ValueError, naming the file, key or tensor that is at fault.
    """
    folder = hub.resolve(str(path)).path
    with torch.device("meta"):
        model = Mistral(read_config(folder), BACKENDS[choose(attention, device, dtype)])
    model.to(dtype).to_empty(device=device)
    model.tie_weights()
    load_weights(model, folder)
    return model


def read_config(folder: str | Path) -> Config:
    """Read config.json, in the spelling of transformers 4 (rope_theta) or 5 (rope_parameters).

    Raises ValueError for a model that this is not, naming the key.
    """
    path = Path(folder) / "config.json"
    raw = hub.read_json(path)
    rope, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    rope_types = {spec.get("rope_type", spec.get("type", "default")) for spec in (rope, scaling)}
    layer_types = set(raw.get("layer_types") or [])
    supported = {
        "model_type": raw.get("model_type") in ("mistral", "llama"),
        "hidden_act": raw.get("hidden_act", "silu") == "silu",
        "rope_scaling": rope_types == {"default"},
        "attention_bias": not raw.get("attention_bias"),
        "mlp_bias": not raw.get("mlp_bias"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) == 1.0,
        "layer_types": layer_types in (set(), {"full_attention"}, {"sliding_attention"}),
        "quantization_config": not raw.get("quantization_config"),
    }
    shown = {**raw, "rope_scaling": scaling or rope, "partial_rotary_factor": rope}
    for key, fine in supported.items():
        if not fine:
            raise ValueError(f"{path}: {key} = {json.dumps(shown.get(key))} is not supported here")
    names = {field.name for field in fields(Config)} & raw.keys()
    values = {name: raw[name] for name in names if raw[name] is not None}
    values["rope_theta"] = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    # Where a key may be left out its meaning is transformers', not ours.
    is_mistral = raw["model_type"] == "mistral"
    values["sliding_window"] = raw.get("sliding_window", 4096 if is_mistral else None)
    values.setdefault("tie_word_embeddings", False)
    values.setdefault("rms_norm_eps", 1e-6)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    for key in (*required, "num_attention_heads", "max_position_embeddings"):
        if not isinstance(raw.get(key), int) or raw[key] < 1:
            raise ValueError(f"{path}: {key} must be a positive number, found {raw.get(key)!r}")
    n_heads = raw["num_attention_heads"]
    values.setdefault("head_dim", raw["hidden_size"] // n_heads)
    values.setdefault("num_key_value_heads", 8 if is_mistral else n_heads)
    if n_heads % values["num_key_value_heads"]:
        raise ValueError(f"{path}: {n_heads} heads do not divide into num_key_value_heads")
    eos = values.get("eos_token_id", 2)
    values["eos_token_id"] = eos[0] if isinstance(eos, list) else eos
    return Config(**values)


def config_json(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """config.json in transformers 4's spelling, which every tool reads."""
    model_type = "mistral" if config.sliding_window or not config.tie_word_embeddings else "llama"
    return {
        "architectures": ["MistralForCausalLM" if model_type == "mistral" else "LlamaForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **asdict(config),
    }


def check_fits(folder: Path, config: Config, vocab_size: int, max_length: int) -> None:
    """Find, before any long work, what would stop a run of this folder's model later.

    Raises ValueError if the tokenizer has ids, or the run has positions, that the model lacks, or
    the weights are not those of the config (`open_weights`).
    """
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {vocab_size:,} ids and the model an embedding for "
            f"{config.vocab_size:,} (vocab_size in config.json): they do not belong together"
        )
    if max_length > config.max_position_embeddings:
        raise ValueError(
            f"--max-length {max_length} is over the model's max_position_embeddings "
            f"{config.max_position_embeddings}: choose at most that"
        )
    with torch.device("meta"):
        model = Mistral(config)
    with ExitStack() as stack:
        open_weights(model, folder, stack)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy a folder's weights into a model, sharded or not, converting to its dtype.

    Raises what `open_weights` raises.
    """
    with ExitStack() as stack, torch.no_grad():
        stored = open_weights(model, Path(folder), stack)
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.copy_(stored[name][shard_rows(parameter)])


def open_weights(model: nn.Module, folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Parameter name -> its slice of a safetensors file, not read yet; the files close with
    `stack`.

    Raises ValueError naming the tensor that is missing, not known or of another shape, and the file
    that is damaged; FileNotFoundError naming the file that is not there.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    files = _open_files(folder, stack)
    ignored = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    ignored |= {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if extra := files.keys() - wanted.keys() - ignored:
        raise ValueError(f"{folder}: the model has no tensor {_some(extra)}")
    if missing := wanted.keys() - files.keys():
        raise ValueError(f"{folder}: the weights lack the tensor {_some(missing)}")
    slices = {name: files[name].get_slice(name) for name in wanted}
    for name, shape in wanted.items():
        if (found := tuple(slices[name].get_shape())) != shape:
            raise ValueError(f"{folder}: {name} has shape {found}, the config asks for {shape}")
    return slices


def shard_rows(parameter: Tensor) -> slice:
    """Which rows (of dimension 0) of a parameter this rank holds: all, or those of its FSDP
    shard."""
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    mesh_dim = parameter.device_mesh.ndim - 1  # the last one shards, an earlier one replicates
    n_shards, shard = (
        parameter.device_mesh.size(mesh_dim),
        parameter.device_mesh.get_local_rank(mesh_dim),
    )
    size = -(-parameter.shape[0] // n_shards)  # as torch.chunk cuts: the last ones may be short
    start = min(shard * size, parameter.shape[0])
    return slice(start, start + parameter.to_local().shape[0])


def _open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> open safetensors file, for all files of the folder."""
    index = folder / INDEX
    if index.is_file():
        weight_map = hub.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            linked = (folder / name).is_symlink() and not _is_hub(folder)
            if Path(name).name != name or linked:
                raise ValueError(f"{index}: {name!r} is not a file of this folder")
    else:
        names = ["model.safetensors"]
    found: dict[str, Any] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file (weights are read from safetensors)"
            )
        try:
            file = stack.enter_context(safe_open(folder / name, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: damaged or truncated ({error})") from error
        found |= dict.fromkeys(file.keys(), file)
    return found


def _is_hub(folder: Path) -> bool:
    """A snapshot in huggingface_hub's cache is made of links into its store of blobs."""
    return folder.parent.name == "snapshots"


def save_weights(model: nn.Module, folder: str | Path, dtype: torch.dtype, write: bool) -> None:
    """Write safetensors in shards of at most 5 GB, with an index if there are several.

    Under FSDP every rank must call this: each parameter is gathered in turn, and the rank with
    `write` keeps one shard at a time in memory.
    """
    folder, weight_map, total, number = Path(folder), {}, 0, 0
    for number, shard in enumerate(_file_shards(model, dtype, write), start=1):
        name = f"part-{number:05d}.safetensors"
        if write:
            save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        total += sum(tensor.numel() * dtype.itemsize for tensor in shard.values())
    if not write:
        return
    final = {f"part-{i:05d}.safetensors": _file_name(i, number) for i in range(1, number + 1)}
    for temporary, name in final.items():
        (folder / temporary).replace(folder / name)
    for old in [*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors"]:
        if old.name not in final.values():  # of an older model in this folder
            old.unlink(missing_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    if number > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: final[file] for name, file in weight_map.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _file_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def _file_shards(model: nn.Module, dtype: torch.dtype, write: bool) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        n_bytes = whole.numel() * dtype.itemsize
        if shard and size + n_bytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        if write:
            shard[name] = whole.detach().to("cpu", dtype, copy=True).contiguous()
        size += n_bytes
    yield shard


def _some(names: set[str]) -> str:
    first = sorted(names)[0]
    return first if len(names) == 1 else f"{first} (and {len(names) - 1} more)"
