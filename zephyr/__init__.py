"""Zephyr-7B from scratch, in plain PyTorch. Names are imported when they are first asked for."""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Config": "model",
    "Mistral": "model",
    "Group": "packing",
    "Pack": "packing",
    "load_model": "weights",
    "save_model": "checkpoint",
    "load_tokenizer": "tokenizer",
    "sft_loss": "losses",
    "branch_sums": "losses",
    "dpo_loss": "losses",
}
_MODULES = {path.stem for path in Path(__file__).parent.glob("*.py")} - {"__init__"}

__all__ = sorted([*_EXPORTS, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"zephyr.{_EXPORTS[name]}"), name)
    if name in _MODULES:
        return import_module(f"zephyr.{name}")
    raise AttributeError(f"module 'zephyr' has no attribute {name!r}")
