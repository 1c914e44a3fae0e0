"""Both training scripts, whole, against TRL: ten updates, every number of every step.

`train_dpo.py` and `train_sft.py` run as a user runs them, in processes of their own, and leave
metrics.jsonl; TRL's DPOTrainer and SFTTrainer read the same rows and start from the same folder, in
float32 on the CPU. Nothing is shared below that: TRL renders and tokenises the rows itself (with
jinja2 and transformers), finds the targets itself, pads, runs transformers' Mistral with a mask and
its own head, and steps torch's plain AdamW. Ours shares prefixes, packs, cuts micro-batches.

Ten steps at a learning rate of 1e-3 move a weight by up to 0.01, half the deviation it was drawn
with: an error in a gradient, in the clip or in a moment shows in the next step's numbers.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from zephyr import chat, dataset, demo, hub
from zephyr.packing import Group
from zephyr.tokenizer import Tokenizer

SAMPLES = ROOT / "data" / "samples"
STEPS, LEARNING_RATE, BETA = 10, 1e-3, 0.1

# Float32 programs that add in another order differ by some 1e-7; AdamW, which divides by the size
# of the gradient, makes more of it where that is small. 4e-6 was seen in ten steps of DPO.
RELATIVE = 1e-5
# A reward is beta times the small difference of two log-probabilities near -200, each known to
# about 1e-5: its error is measured against 1 where it is smaller. 2e-6 was seen.
REWARD = 1e-4

# Zephyr's format, written out once more: with bos, which the scripts' tokenizer adds, and with
# transformers' marks of what the assistant says, from which TRL takes its targets.
TEMPLATE = """\
{{ bos_token }}\
{% if messages[0]['role'] != 'system' %}{{ '<|system|>\n' + eos_token + '\n' }}{% endif %}\
{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}\
{% else %}{{ message['content'] + eos_token + '\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and TRL announce their futures

Sequences = list[tuple[list[int], list[bool]]]
"""What a side trains on: (ids, which of them are targets) of each sequence."""


def build_model(folder: Path, window: int | None) -> Path:
    """A random Mistral of 512 words as a Hugging Face folder."""
    config = replace(demo.TINY, sliding_window=window)
    demo.build_tiny(folder, sorted(SAMPLES.glob("*.jsonl")), config)
    return folder


@pytest.fixture(scope="module", params=[None, 40], ids=["no window", "window 40"])
def dpo_model(request, tmp_path_factory) -> Path:
    """Without a window, and with one that is shorter than every conversation."""
    return build_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def sft_model(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), None)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> Path:
    """16 pairs, of single turns, several turns and system turns; none contradicts another. Where
    two cancel, rounding is all that is left of some gradients, AdamW makes steps of it, and neither
    TRL nor we keep within 1e-5 of float64."""
    rows = read_jsonl(SAMPLES / "preferences.jsonl")[:16]
    return write_jsonl(tmp_path_factory.mktemp("preferences") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory) -> Path:
    """14 dialogues, of up to three turns: in fours, the last micro-batch is a short one."""
    rows = read_jsonl(SAMPLES / "sft.jsonl")[6:20]
    return write_jsonl(tmp_path_factory.mktemp("dialogues") / "dialogues.jsonl", rows)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_script(script: str, model: Path, data: Path, output: Path, *flags: str) -> list[dict]:
    """Run a training script with one update an epoch, of all the data; returns its metrics."""
    command = f"--recipe tiny --model {model} --data {data} --output {output} --global-batch 16"
    command += f" --epochs {STEPS} --learning-rate {LEARNING_RATE} --schedule constant"
    command += " --warmup-ratio 0 --save-every 0 --log-every 1"
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *command.split(), "--eval-data", "", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert result.returncode == 0, result.stderr
    return read_jsonl(output / "metrics.jsonl")


def load_groups(model: Path, data: Path, **sft: str) -> list[Group]:
    """The data as the scripts load it; nothing is cut or dropped."""
    tokenizer, counts = Tokenizer(model), Counter()
    rows, encode = dataset.read_rows(hub.resolve(str(data))), chat.encoder(tokenizer, "zephyr")
    if sft:
        groups = dataset.load_dialogues(rows, encode, counts, 256, **sft)
    else:
        groups = dataset.load_pairs(rows, encode, counts, 512, 256, tokenizer.bos_id)
    assert counts == {"read": len(groups), "kept": len(groups)}
    return groups


def trl_arguments(output: Path, rows: int, accumulation: int = 1) -> dict:
    """What both of TRL's configurations need to do what the scripts do, and to do it quietly."""
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"},
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def trl_tokenizer(model: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def trl_dpo(model: Path, data: Path, output: Path):
    """TRL's trainer on the rows of `data`, from which it takes the prompt itself."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{key: row[key] for key in ("chosen", "rejected")} for row in read_jsonl(data)]
    return DPOTrainer(
        str(model),
        args=DPOConfig(beta=BETA, **trl_arguments(output, len(rows))),
        train_dataset=Dataset.from_list(rows),
        processing_class=trl_tokenizer(model),
    )


def trl_sft(model: Path, data: Path, output: Path, loss_on: str, micro_batches: int):
    """TRL's trainer on the rows of `data`, unpacked, in so many micro-batches."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = read_jsonl(data)
    arguments = trl_arguments(output, -(-len(rows) // micro_batches), micro_batches)
    return SFTTrainer(
        str(model),
        args=SFTConfig(assistant_only_loss=loss_on == "assistant", **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=trl_tokenizer(model),
    )


def trl_metrics(trainer) -> list[dict]:
    """Train; returns what TRL logged at each step."""
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def unpad(batch: dict, targets) -> Sequences:
    """The sequences of a batch that TRL has padded; `targets` marks what they learn."""
    real = batch["attention_mask"].bool()
    return [
        (ids[keep].tolist(), mask[keep].tolist())
        for ids, mask, keep in zip(batch["input_ids"], targets, real, strict=True)
    ]


def assert_close(ours: list[dict], theirs: list[dict], tolerances: dict[str, tuple]) -> None:
    """Hold every step of a run to TRL's: |difference| <= tolerance * max(floor, |TRL's number|)."""
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert len(theirs) == STEPS
    far = []
    for row, their in zip(ours, theirs, strict=True):
        assert row["learning_rate"] == their["learning_rate"] == LEARNING_RATE
        for name, (tolerance, floor) in tolerances.items():
            difference = abs(row[name] - their[name])
            if not difference <= tolerance * max(floor, abs(their[name])):
                far.append(f"step {row['step']} {name}: {row[name]!r}, TRL {their[name]!r}")
    assert not far, "\n".join(far)


@pytest.fixture(scope="module")
def dpo_in_trl(dpo_model, preferences, tmp_path_factory) -> tuple[Sequences, list[dict]]:
    """TRL's DPO: what it trains on (all chosen answers, then all rejected ones), and its log."""
    trainer = trl_dpo(dpo_model, preferences, tmp_path_factory.mktemp("trl"))
    [batch] = trainer.get_train_dataloader()
    return unpad(batch, batch["completion_mask"].bool()), trl_metrics(trainer)


def test_dpo_pairs_have_the_ids_and_targets_that_trl_finds(dpo_model, preferences, dpo_in_trl):
    sequences, _ = dpo_in_trl
    pairs = load_groups(dpo_model, preferences)
    theirs = sorted(zip(sequences[: len(pairs)], sequences[len(pairs) :], strict=True))
    assert sorted((pair.sequence(0), pair.sequence(1)) for pair in pairs) == theirs


DPO_LAYOUTS = {
    "prefix shared, reference live": (True, "--share-prefix --reference live"),
    "prefix shared, reference cached": (True, "--share-prefix --reference cached"),
    "long layout, many micro-batches": (False, "--no-share-prefix --tokens-per-microbatch 300"),
}


@pytest.mark.parametrize(("share_prefix", "flags"), DPO_LAYOUTS.values(), ids=DPO_LAYOUTS)
def test_dpo_takes_trls_ten_steps(
    share_prefix, flags, dpo_model, preferences, dpo_in_trl, tmp_path
):
    flags = [*flags.split(), "--beta", str(BETA)]
    ours = run_script("train_dpo.py", dpo_model, preferences, tmp_path, *flags)
    pairs = load_groups(dpo_model, preferences)
    assert ours[-1]["tokens"] == STEPS * sum(pair.length(share_prefix) for pair in pairs)
    _, theirs = dpo_in_trl
    tolerances = {"loss": (RELATIVE, 0), "grad_norm": (RELATIVE, 0)}
    tolerances |= dict.fromkeys(("logps/chosen", "logps/rejected"), (RELATIVE, 0))
    tolerances |= dict.fromkeys(("rewards/chosen", "rewards/rejected"), (REWARD, 1))
    tolerances |= {"rewards/margins": (REWARD, 1), "rewards/accuracies": (0, 0)}
    assert_close(ours, theirs, tolerances)


@pytest.fixture(scope="module", params=["assistant", "all"])
def loss_on(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def sft_in_trl(sft_model, dialogues, loss_on, tmp_path_factory) -> tuple[Sequences, dict]:
    """TRL's SFT: what it trains on, and its log by the number of its micro-batches."""
    folder, logs = tmp_path_factory.mktemp("trl"), {}
    for micro_batches in (1, 4):
        trainer = trl_sft(sft_model, dialogues, folder, loss_on, micro_batches)
        batches = list(trainer.get_train_dataloader())
        logs[micro_batches] = trl_metrics(trainer)
    sequences = []
    for batch in batches:
        learnt = batch["labels"] != -100
        learnt[:, 0] = False  # nothing stands before it; TRL shifts it away
        sequences += unpad(batch, learnt)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 2]
    return sequences, logs


def test_sft_dialogues_have_the_ids_and_targets_that_trl_finds(
    sft_model, dialogues, loss_on, sft_in_trl
):
    sequences, _ = sft_in_trl
    groups = load_groups(sft_model, dialogues, loss_on=loss_on)
    assert sorted(group.sequence() for group in groups) == sorted(sequences)


@pytest.mark.parametrize("budget", [4096, 256], ids=["one micro-batch", "many micro-batches"])
def test_sft_takes_trls_ten_steps(budget, sft_model, dialogues, loss_on, sft_in_trl, tmp_path):
    flags = f"--packing documents --loss-on {loss_on} --tokens-per-microbatch {budget}"
    ours = run_script("train_sft.py", sft_model, dialogues, tmp_path, *flags.split())
    groups = load_groups(sft_model, dialogues, loss_on=loss_on)
    assert ours[-1]["tokens"] == STEPS * sum(group.length() for group in groups)
    for theirs in sft_in_trl[1].values():
        assert_close(ours, theirs, {"loss": (RELATIVE, 0), "grad_norm": (RELATIVE, 0)})
