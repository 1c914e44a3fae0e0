"""A tiny world to try things in: a tokenizer and a random Mistral, made on the spot."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from zephyr import hub
from zephyr.attention import sdpa
from zephyr.checkpoint import save_model
from zephyr.distributed import World
from zephyr.model import Config, Mistral
from zephyr.tokenizer import Tokenizer

TINY = Config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    sliding_window=64,
)


def find_model(name: str, output: Path, texts: Path, world: World) -> Path:
    """The folder of `--model`; "tiny" is built into the run's output when it is first asked for."""
    if name != "tiny":
        return hub.resolve(name, "model", world).path
    folder = output / "tiny-model"

    def build() -> None:
        if not (folder / "model.safetensors").is_file():  # the weights are written last
            build_tiny(folder, sorted(texts.glob("*.jsonl")))

    world.once("tiny model", build)
    return folder


def build_tiny(folder: Path, texts: list[Path], config: Config = TINY, seed: int = 0) -> None:
    """Write a Hugging Face model folder: a byte-level BPE trained on the text of JSONL files, and a
    model with seeded random weights, float32. The same input gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(folder, texts, config.vocab_size)
    save_model(Mistral(config, sdpa).init_weights(seed), Tokenizer(folder), folder)


def train_tokenizer(folder: Path, texts: list[Path], vocab_size: int) -> None:
    """Train a byte-level BPE with Mistral's control tokens on the strings of JSONL files."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_strings(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _strings(texts: list[Path]) -> list[str]:
    """The contents of all messages in JSONL files."""
    strings = []
    for path in texts:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for key in ("messages", "chosen", "rejected"):
                strings += [message["content"] for message in row.get(key, [])]
    return strings
