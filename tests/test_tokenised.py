"""The tokenised data kept on disk is what the loaders give, is made once, and is made anew when
anything that it depends on is another."""

import json
from collections import Counter
from functools import partial

import pytest
import torch.distributed as dist
from launch import ROOT

from zephyr import chat, dataset, demo, distributed, hub
from zephyr.tokenizer import Tokenizer

SAMPLES = ROOT / "data" / "samples"


@pytest.fixture(scope="module")
def world():
    world = distributed.start()
    yield world
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    demo.train_tokenizer(folder, sorted(SAMPLES.glob("*.jsonl")), 400)
    return Tokenizer(folder)


def plain(groups):
    return [
        (
            [*map(int, g.prefix)],
            [[*map(int, b)] for b in g.branches],
            [[*map(bool, m)] for m in g.masks],
        )
        for g in groups
    ]


LOADERS = {
    "sft": partial(dataset.load_dialogues, max_length=90, loss_on="assistant"),
    "preferences": partial(dataset.load_pairs, max_length=120, max_prompt_length=60, bos_id=1),
}


@pytest.mark.parametrize("small", [0, 10**9])  # bytes: by worker processes, and without
@pytest.mark.parametrize("name", LOADERS)
def test_it_is_what_the_loader_gives(name, small, tokenizer, world, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SMALL", small)
    monkeypatch.setattr(dataset, "CHUNK", 7)
    source = hub.Source(SAMPLES / f"{name}.jsonl")
    found = dataset.tokenised(source, LOADERS[name], tokenizer, "zephyr", tmp_path, world)
    counts = Counter()
    encode = chat.encoder(tokenizer, "zephyr")
    expected = LOADERS[name](dataset.read_rows(source), encode=encode, counts=counts)
    assert len(found) == len(expected) > 50
    assert plain(found) == plain(expected)
    assert plain([found[-1]]) == plain(expected[-1:])
    assert found.counts == counts
    assert counts["cut at max_length"] or counts["cut: an answer"]


def test_it_is_made_once_and_anew_when_something_changes(tokenizer, world, tmp_path):
    rows = (SAMPLES / "sft.jsonl").read_text().splitlines()[:5]
    path = tmp_path / "rows.jsonl"

    def find(load=LOADERS["sft"], template="zephyr"):
        path.write_text("\n".join(rows) + "\n")
        dataset.tokenised(hub.Source(path), load, tokenizer, template, tmp_path / "c", world)
        return len([*(tmp_path / "c").iterdir()])

    assert find() == 1
    written = next((tmp_path / "c").iterdir()) / "ids.bin"
    before = written.stat().st_mtime_ns
    assert find() == 1
    assert written.stat().st_mtime_ns == before
    assert find(partial(dataset.load_dialogues, max_length=91, loss_on="assistant")) == 2
    assert find(template="model") == 3
    rows.append(json.dumps({"messages": json.loads(rows[0])["messages"]}))
    assert find() == 4


def test_a_bad_row_is_named_and_leaves_nothing_behind(tokenizer, world, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SMALL", 0)
    path = tmp_path / "rows.jsonl"
    path.write_text((SAMPLES / "sft.jsonl").read_text() + '{"messages": []}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:97: messages must be a list"):
        dataset.tokenised(
            hub.Source(path), LOADERS["sft"], tokenizer, "zephyr", tmp_path / "c", world
        )
    assert not [p for p in (tmp_path / "c").iterdir() if not p.name.startswith(".")]


def test_no_rows_are_no_examples(tokenizer, world, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    found = dataset.tokenised(
        hub.Source(path), LOADERS["sft"], tokenizer, "zephyr", tmp_path / "c", world
    )
    assert len(found) == 0
    assert [*found] == []
    with pytest.raises(ValueError, match="no rows are left"):
        dataset.report("rows", found, found.counts)
