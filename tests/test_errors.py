"""Bad input ends a run before its first step with one message that names what to mend.

The library's own errors are tested beside each module; here is what a user of the scripts sees.
"""

import json
import re
import subprocess
import sys

import pytest
from launch import ROOT, launch
from safetensors.torch import load_file, save_file

from zephyr.demo import build_tiny
from zephyr.distributed import parse

SAMPLES = ROOT / "data" / "samples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tiny(folder, [SAMPLES / "sft.jsonl"])
    return folder


def break_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def a_vocabulary_too_small(folder):
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:500].clone()
    save_file(weights, folder / "model.safetensors")
    break_config(folder, vocab_size=500)


def a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def a_missing_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


CASES = [
    ("train_sft.py", ["--max-length", 4096], "--max-length 4096 .* max_position_embeddings 1024"),
    ("train_sft.py", ["--data", "no/such/file.jsonl"], "no/such/file.jsonl: no such file"),
    ("train_dpo.py", ["--data", "owner/name"], r"owner/name: .*Hugging Face Hub"),
    ("train_dpo.py", ["--data", SAMPLES / "sft.jsonl"], r"sft.jsonl:1: no column 'chosen'"),
    ("train_sft.py", ["--max-length", 5, "--loss-on", "assistant"], "no rows are left"),
    ("train_sft.py", a_vocabulary_too_small, "tokenizer has 512 ids .* 500"),
    ("train_sft.py", a_truncated_file, "model.safetensors: damaged or truncated"),
    ("train_dpo.py", a_missing_tensor, "lack the tensor model.norm.weight"),
]


@pytest.mark.parametrize(("script", "fault", "message"), CASES)
def test_bad_input_is_one_message_before_the_first_step(script, fault, message, model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    flags = ["--recipe", "tiny", "--model", folder, "--output", tmp_path / "run"]
    if callable(fault):
        fault(folder)
    else:
        flags += fault
    process = launch(script, *flags, check=False)
    assert process.returncode == 1
    errors = [line for line in process.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, process.stderr
    assert re.search(message, errors[0])
    assert "Traceback" not in process.stderr
    assert not re.search(r"^step +\d", process.stdout, re.MULTILINE)


def test_all_ranks_speak_with_one_voice(tmp_path):
    flags = ["--recipe", "tiny", "--data", "no/such/file.jsonl", "--output", tmp_path]
    process = launch("train_sft.py", *flags, ranks=2, check=False)
    assert process.returncode != 0
    assert process.stderr.count("error: no/such/file.jsonl") == 1


@pytest.mark.parametrize("script", ["train_sft.py", "train_dpo.py"])
def test_an_unknown_flag_is_an_error(script):
    process = launch(script, "--learning-speed", 1, check=False)
    assert process.returncode == 2
    assert "--learning-speed" in process.stderr


def test_a_full_memory_names_the_flags_that_help():
    code = (
        "import torch; from zephyr import distributed; "
        "distributed.run(lambda: torch.empty(2**55))"  # no machine has 128 PiB
    )
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert process.returncode == 1
    for flag in ("--tokens-per-microbatch", "--activation-checkpointing full", "--max-length"):
        assert flag in process.stderr


COMMON = """recipe model template data eval_data output learning_rate schedule warmup_ratio epochs
    max_steps global_batch max_length tokens_per_microbatch max_grad_norm precision attention
    activation_checkpointing log_every eval_every save_every keep resume timeout seed dry_run"""


@pytest.mark.parametrize(
    ("script", "own"),
    [
        ("train_sft", "loss_on packing"),
        ("train_dpo", "beta label_smoothing max_prompt_length reference share_prefix"),
    ],
)
def test_the_flags_are_frozen(script, own, monkeypatch):
    """A new flag is a decision: it must earn its place, here and in the README's table."""
    module = __import__(script)
    monkeypatch.setattr(sys, "argv", [script, "--recipe", "handbook", "--seed", "7"])
    knobs = parse(module.Knobs, module.RECIPES)
    assert set(vars(knobs)) == set(COMMON.split() + own.split())
    assert (knobs.recipe, knobs.global_batch, knobs.seed) == ("handbook", 128, 7)
