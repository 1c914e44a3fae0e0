"""Rows (JSONL or parquet, from a path or the Hub) -> checked, tokenised, truncated, counted
examples.

An example is a `Group` (packing.py): a dialogue has one branch, a preference pair two. Every
row is either used whole, or cut, or dropped, and counted by the reason; a row that is not of the
right form ends the run before it starts, naming the file and the line.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from tqdm import tqdm

from zephyr import chat, hub
from zephyr.distributed import World
from zephyr.packing import Group
from zephyr.tokenizer import FILES as TOKENIZER_FILES
from zephyr.tokenizer import Tokenizer

Encode = Callable[..., tuple[list[int], list[bool]]]
"""messages, generation_prompt=False -> (ids, mask): `chat.encode` with its tokenizer bound."""

Row = tuple[str, dict[str, Any]]
"""Where a row stands ("file.jsonl:17"), and what it says."""


def read_rows(source: hub.Source, show: bool = False) -> Iterable[Row]:
    """The rows of a .jsonl or .parquet file, or of all such files of a folder, sorted by name.

    With `show`, a progress bar counts them on a terminal.

    A split selects the files of a folder that bear its name
    ("train_sft-00000-of-00003.parquet").
    Raises FileNotFoundError if there is no such file, ValueError naming a line that is no JSON
    object.
    """
    files = _files(source)
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".json": _read_jsonl}
    for file in files:
        if file.suffix not in readers:
            raise ValueError(f"{file}: data must be .jsonl or .parquet")
    rows = itertools.chain.from_iterable(readers[file.suffix](file) for file in files)
    return tqdm(rows, source.path.name, unit=" rows", leave=False, disable=None if show else True)


def _files(source: hub.Source) -> list[Path]:
    path, split = source.path, source.split
    if not path.is_dir():
        return [path]
    files = [file for file in path.rglob("*") if file.suffix in (".jsonl", ".parquet")]
    if split:
        files = [f for f in files if f.stem == split or f.name.startswith(f"{split}-")]
    if not files:
        raise FileNotFoundError(f"{path}: no .jsonl or .parquet file of split {split or 'any'}")
    return sorted(files)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row must be a JSON object")
            yield where, row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not parquet ({error})") from error


def load_dialogues(
    rows: Iterable[Row], encode: Encode, counts: Counter, max_length: int | None, loss_on: str
) -> list[Group]:
    """SFT rows {"messages": [...]} -> one group each.

    Args:
        counts: is added to: rows read, kept, cut, and dropped by reason.
        max_length: cut each dialogue to so many tokens; None leaves them whole (`concatenate`).
        loss_on: "assistant" learns the assistant's words and the eos after them; "all" learns every
            token but the first (as Zephyr did).

    Raises ValueError naming the row that is not a conversation.
    """
    groups = []
    for where, row in rows:
        counts["read"] += 1
        messages = _column(row, "messages", where)
        _check(messages, where)
        try:
            ids, mask = _encode(encode, messages, where)
        except chat.ControlText as reason:
            counts[f"dropped: {reason}"] += 1
            continue
        if loss_on == "all":
            mask = [False] + [True] * (len(ids) - 1)
        if max_length is not None and len(ids) > max_length:
            counts["cut at max_length"] += 1
            ids, mask = ids[:max_length], mask[:max_length]
        if not any(mask):
            counts["dropped: nothing to learn" + (" before max_length" if max_length else "")] += 1
            continue
        counts["kept"] += 1
        groups.append(_dialogue(ids, mask))
    return groups


def concatenate(
    dialogues: list[Group], order: Iterable[int], eos_id: int, loss_on: str, max_length: int
) -> list[Group]:
    """The original packing: dialogues end to end, an extra eos after each, cut into equal chunks.

    A chunk is one segment: tokens of one dialogue see those of the one before, as they did in
    Zephyr's training. The remainder at the end is dropped. One group a chunk, of max_length tokens.
    """
    ids, masks = [], []
    for i in order:
        dialogue = dialogues[i]
        ids += [dialogue.prefix, dialogue.branches[0], [eos_id]]
        masks += [[loss_on == "all"], dialogue.masks[0], [loss_on == "all"]]
    if not ids:
        return []
    stream = np.concatenate([np.asarray(part, np.int32) for part in ids])
    learnt = np.concatenate([np.asarray(part, bool) for part in masks])
    starts = range(0, len(stream) - max_length + 1, max_length)
    return [_dialogue(stream[i : i + max_length], learnt[i : i + max_length]) for i in starts]


def load_pairs(
    rows: Iterable[Row],
    encode: Encode,
    counts: Counter,
    max_length: int,
    max_prompt_length: int,
    bos_id: int | None,
) -> list[Group]:
    """DPO rows {"prompt", "chosen": [messages], "rejected": [messages]} -> one group each.

    The messages before the last are the prompt, and must be the same in both. The prefix is what
    the prompt with its generation prompt and both conversations begin with alike, in tokens; all
    that follows is learnt. Truncation is described at `truncate`.

    Raises ValueError naming the row that is not such a pair.
    """
    groups = []
    for where, row in rows:
        counts["read"] += 1
        chosen, rejected = _column(row, "chosen", where), _column(row, "rejected", where)
        for messages in (chosen, rejected):
            _check(messages, where)
            if messages[-1]["role"] != "assistant":
                raise ValueError(f"{where}: chosen and rejected must end with an assistant message")
        if chosen[:-1] != rejected[:-1]:
            raise ValueError(f"{where}: chosen and rejected have different prompts")
        answers = [chosen[-1]["content"], rejected[-1]["content"]]
        if not all(answer.strip() for answer in answers):
            counts["dropped: an empty answer"] += 1
            continue
        try:
            prompt, _ = _encode(encode, chosen[:-1], where, generation_prompt=True)
            branches = [_encode(encode, messages, where)[0] for messages in (chosen, rejected)]
        except chat.ControlText as reason:
            counts[f"dropped: {reason}"] += 1
            continue
        n = min(chat.common_prefix(prompt, branch) for branch in branches)
        prefix, branches = branches[0][:n], [branch[n:] for branch in branches]
        prefix, branches = truncate(prefix, branches, counts, max_length, max_prompt_length, bos_id)
        if not all(branches):
            counts["dropped: the prompt leaves no room"] += 1
        elif branches[0] == branches[1]:
            counts["dropped: equal answers"] += 1
        else:
            counts["kept"] += 1
            masks = [np.ones(len(branch), bool) for branch in branches]
            groups.append(Group(_ids(prefix), [_ids(branch) for branch in branches], masks))
    return groups


def truncate(
    prefix: list[int],
    branches: list[list[int]],
    counts: Counter,
    max_length: int,
    max_prompt_length: int,
    bos_id: int | None,
) -> tuple[list[int], list[list[int]]]:
    """Bring a pair to at most max_length tokens a sequence.

    If prompt and longer answer are too long together, the prompt keeps bos and its last tokens,
    max_prompt_length in all; if they still are, each answer is cut to the room that is left (a cut
    answer has no eos).
    """
    if len(prefix) + max(map(len, branches)) <= max_length:
        return prefix, branches
    if len(prefix) > max_prompt_length:
        counts["cut: the prompt"] += 1
        bos = prefix[:1] if prefix[0] == bos_id else []
        n_last = max_prompt_length - len(bos)
        prefix = bos + prefix[len(prefix) - n_last :]
    room = max(0, max_length - len(prefix))
    if max(map(len, branches)) > room:
        counts["cut: an answer"] += 1
        branches = [branch[:room] for branch in branches]
    return prefix, branches


class Examples(Sequence[Group]):
    """Groups with equally many branches, in flat arrays on disk: what is not asked for is not read.

    Made by `tokenised`. A folder holds ids.bin (int32) and masks.bin (bool), all examples end to
    end; sizes.npy (examples, 1 + K), the lengths of prefix and branches; and counts.json.
    """

    def __init__(self, folder: Path):
        self.sizes = np.load(folder / "sizes.npy")
        ends = self.sizes.sum(axis=1).cumsum()
        self.starts = np.concatenate(([0], ends)).astype(np.int64)
        n = int(self.starts[-1])
        self.ids = np.memmap(folder / "ids.bin", np.int32, "r", shape=(n,)) if n else np.empty(0)
        self.masks = np.memmap(folder / "masks.bin", bool, "r", shape=(n,)) if n else np.empty(0)
        self.counts = Counter(json.loads((folder / "counts.json").read_text()))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Group:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        cuts = self.starts[i % len(self)] + np.concatenate(([0], self.sizes[i].cumsum()))
        parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        branches = [self.ids[part] for part in parts[1:]]
        return Group(self.ids[parts[0]], branches, [self.masks[part] for part in parts[1:]])


def tokenised(
    source: hub.Source,
    load: Callable[..., list[Group]],
    tokenizer: Tokenizer,
    template: str,
    cache: Path,
    world: World,
) -> Examples:
    """The examples of a data set, tokenised once and kept in a folder of `cache`.

    Args:
        load: `load_dialogues` or `load_pairs` with its limits bound by `partial`; it is called with
            rows, encode and counts.
        template: as for `chat.encoder`.
        cache: must be the same folder on all nodes.

    The folder's name is a hash of the data's files, the tokenizer's files, the template and the
    limits. One rank makes it, with all the cores of its machine, while the others wait.
    """
    name = world.once(
        f"tokenise {source}", lambda: _tokenise(source, load, tokenizer, template, cache)
    )
    return Examples(cache / name)


FORMAT = 1  # of the cache; raise it when the same rows would give other examples
CHUNK = 256  # rows that a worker process takes at a time
SMALL = 16 * 2**20  # bytes of data for which workers would not pay


def _tokenise(
    source: hub.Source,
    load: Callable[..., list[Group]],
    tokenizer: Tokenizer,
    template: str,
    cache: Path,
) -> str:
    """Make the folder, unless it is there; returns its name."""
    digest = hashlib.sha256(f"{FORMAT} {template} {load.func.__name__} {load.keywords}".encode())
    settings = (*TOKENIZER_FILES, "tokenizer_config.json", "chat_template.jinja")
    files = [tokenizer.folder / name for name in settings]
    data = _files(source)
    for path in [*data, *files]:
        if path.is_file():
            digest.update(hub.file_hash(path).encode())
    name = f"{source.path.stem}-{digest.hexdigest()[:16]}"
    if (cache / name).is_dir():
        return name
    temporary = cache / f".{name}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    worker = (tokenizer.folder, template, load)
    n_workers = os.cpu_count() or 1
    if n_workers == 1 or sum(path.stat().st_size for path in data) < SMALL:
        _start_worker(*worker)
        _write(temporary, map(_tokenise_chunk, _chunks(source)))
    else:
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(n_workers, _start_worker, worker) as pool:
            _write(temporary, pool.imap(_tokenise_chunk, _chunks(source)))
    temporary.rename(cache / name)
    return name


def _chunks(source: hub.Source) -> Iterator[list[Row]]:
    rows = iter(read_rows(source, show=True))
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


_worker: Any = None


def _start_worker(folder: Path, template: str, load: Callable[..., list[Group]]) -> None:
    global _worker
    _worker = partial(load, encode=chat.encoder(Tokenizer(folder), template))


def _tokenise_chunk(rows: list[Row]) -> tuple[np.ndarray, np.ndarray, list[list[int]], Counter]:
    counts: Counter = Counter()
    groups = _worker(rows, counts=counts)
    ids = [part for group in groups for part in (group.prefix, *group.branches)]
    masks = [part for group in groups for part in (np.zeros(len(group.prefix), bool), *group.masks)]
    sizes = [[len(group.prefix), *map(len, group.branches)] for group in groups]
    return _flat(ids, np.int32), _flat(masks, bool), sizes, counts


def _flat(parts: list, dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def _write(folder: Path, chunks: Iterable) -> None:
    sizes: list[list[int]] = []
    counts: Counter = Counter()
    with (folder / "ids.bin").open("wb") as ids, (folder / "masks.bin").open("wb") as masks:
        for chunk_ids, chunk_masks, chunk_sizes, chunk_counts in chunks:
            chunk_ids.tofile(ids)
            chunk_masks.tofile(masks)
            sizes += chunk_sizes
            counts += chunk_counts
    np.save(folder / "sizes.npy", np.array(sizes or np.empty((0, 2)), np.int32))
    (folder / "counts.json").write_text(json.dumps(counts))


def report(name: str, groups: Sequence[Group], counts: Counter) -> str:
    """The counts as lines of text. Raises ValueError if no example is left."""
    total = sum(group.length() for group in groups)
    lines = [f"{name}: {counts['read']:,} rows, {len(groups):,} examples, {total:,} tokens"]
    lines += [f"  {n:8,} {what}" for what, n in sorted(counts.items()) if what != "read"]
    if not groups:
        raise ValueError("\n".join([f"{name}: no rows are left to train on", *lines[1:]]))
    return "\n".join(lines)


def _dialogue(ids: Any, mask: Any) -> Group:
    return Group(_ids(ids[:1]), [_ids(ids[1:])], [np.asarray(mask[1:], bool)])


def _ids(ids: Any) -> np.ndarray:
    return np.asarray(ids, np.int32)  # a list would take ten times the memory


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f"{where}: no column {name!r} (there are: {', '.join(map(str, row))})")
    return row[name]


def _check(messages: Any, where: str) -> None:
    try:
        chat.check(messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _encode(encode: Encode, messages: Any, where: str, **kwargs: bool) -> Any:
    try:
        return encode(messages, **kwargs)
    except chat.ControlText:
        raise
    except (ValueError, jinja2.TemplateError) as error:
        raise ValueError(f"{where}: {error}") from error
