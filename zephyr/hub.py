"""A name on the command line -> a local folder or file: a path as it is, or a download from the
Hub."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zephyr.distributed import World


@dataclass(frozen=True)
class Source:
    """What `--model`, `--data` and `--eval-data` name: a local path, and a split for data sets."""

    path: Path
    split: str | None = None


def resolve(name: str, kind: str = "model", world: World | None = None) -> Source:
    """Find `name`, downloading it if need be.

    Args:
        name: a path, or `ID[@revision][:split]` on the Hugging Face Hub. What exists as a path is
            one; a folder of data may have a split behind it too.
        kind: "model" or "dataset".
        world: in a job of many ranks, one rank of each node downloads and the others wait.

    Raises FileNotFoundError if it is neither, or the Hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.exists():
        return Source(path)
    folder, _, part = name.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return Source(Path(folder).expanduser(), part)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?::(\w+))?", name)
    if not match or name.startswith("."):
        raise FileNotFoundError(
            f"{name}: no such file or folder (on the Hub it would be OWNER/NAME[@revision][:split])"
        )
    repo, revision, split = match.groups()
    if world is not None:
        world.once(f"download {kind} {name}", lambda: _download(repo, revision, split, kind), True)
    return Source(Path(_download(repo, revision, split, kind)), split)


def _download(repo: str, revision: str | None, split: str | None, kind: str) -> str:
    from huggingface_hub import snapshot_download

    if kind == "model":
        patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    else:
        patterns = [f"*{split or ''}*.parquet", f"*{split or ''}*.jsonl"]
    try:
        return snapshot_download(repo, revision=revision, repo_type=kind, allow_patterns=patterns)
    except Exception as error:  # the client raises dozens of kinds, from DNS to missing rights
        raise FileNotFoundError(
            f"{repo}: no such local path, and the Hugging Face Hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name "
            "and the network, or download it elsewhere and pass the folder"
        ) from error


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """A text file of a model folder; FileNotFoundError or ValueError names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; FileNotFoundError or ValueError names the
    file."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
