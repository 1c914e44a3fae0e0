"""The two scripts, end to end, on the tiny recipe: what a run computes does not depend on ranks,
micro-batches, layout or the reference's keeping; a run that stops goes on; its folder is a model.
"""

import math

import pytest
from launch import launch, metrics

RATES = {"tokens_per_second", "pairs_per_second", "rows_per_second", "mfu", "step_seconds"}
NOT_COMPARED = RATES | {"peak_memory_gib", "tokens"}  # tokens count the layout
TOLERANCE = 1e-5  # of max(1, |x|), float32


def assert_same(ours: list[dict], theirs: list[dict], tolerance: float = TOLERANCE) -> None:
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key in a.keys() - NOT_COMPARED:
            assert abs(a[key] - b[key]) <= tolerance * max(1.0, abs(b[key])), (key, a, b)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    """DPO for 10 steps on one rank, by the defaults of the tiny recipe."""
    output = tmp_path_factory.mktemp("dpo")
    launch("train_dpo.py", "--recipe", "tiny", "--max-steps", 10, "--output", output)
    return output


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ["--reference", "live", "--no-share-prefix", "--tokens-per-microbatch", 300]),
        (2, ["--tokens-per-microbatch", 300, "--activation-checkpointing", "selective"]),
        (2, ["--reference", "live", "--activation-checkpointing", "full"]),
        (4, ["--no-share-prefix"]),
    ],
)
def test_dpo_does_not_depend_on_how_it_is_divided(dpo, tmp_path, ranks, flags):
    flags = ["--recipe", "tiny", "--max-steps", 10, "--output", tmp_path, *flags]
    launch("train_dpo.py", *flags, ranks=ranks)
    assert_same(metrics(tmp_path), metrics(dpo))


def test_dpo_starts_at_ln_2_and_learns(dpo):
    rows = metrics(dpo)
    before, first = rows[0], rows[1]
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["learning_rate"] == 0.0
    train = [row for row in rows if "loss" in row]
    assert train[-1]["rewards/margins"] > 0.3
    assert [row["step"] for row in train] == list(range(1, 11))


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    output = tmp_path_factory.mktemp("sft")
    launch("train_sft.py", "--recipe", "tiny", "--max-steps", 10, "--output", output)
    return output


@pytest.mark.parametrize(("ranks", "budget"), [(2, 300), (4, 1024)])
def test_sft_does_not_depend_on_how_it_is_divided(sft, tmp_path, ranks, budget):
    flags = ["--recipe", "tiny", "--max-steps", 10, "--output", tmp_path]
    launch("train_sft.py", *flags, "--tokens-per-microbatch", budget, ranks=ranks)
    assert_same(metrics(tmp_path), metrics(sft))


def test_concatenated_sft_does_not_depend_on_how_it_is_divided(tmp_path):
    flags = ["--recipe", "tiny", "--packing", "concatenate", "--max-length", 128, "--max-steps", 12]
    launch("train_sft.py", *flags, "--output", tmp_path / "1")
    launch("train_sft.py", *flags, "--output", tmp_path / "2", ranks=2)
    assert_same(metrics(tmp_path / "2"), metrics(tmp_path / "1"))


def test_a_stopped_run_goes_on_where_it_was(dpo, tmp_path):
    """Six steps on two ranks (a checkpoint), then to the end of ten on one: as if never stopped."""
    flags = ["--recipe", "tiny", "--output", tmp_path, "--schedule", "constant"]
    launch("train_dpo.py", *flags, "--max-steps", 7, ranks=2)
    launch("train_dpo.py", *flags, "--max-steps", 10)
    whole = tmp_path / "whole"
    launch("train_dpo.py", *flags, "--max-steps", 10, "--output", whole)
    stopped = [row for row in metrics(tmp_path) if row["step"] > 6]
    assert [row["step"] for row in stopped if "loss" in row] == [7, 8, 9, 10]
    expected = [row for row in metrics(whole) if row["step"] > 6]
    for a, b in zip(stopped, expected, strict=True):
        for key in a.keys() - RATES - {"peak_memory_gib"}:
            assert abs(a[key] - b[key]) <= TOLERANCE * max(1.0, abs(b[key])), (key, a, b)
