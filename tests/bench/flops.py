"""FLOPs of one DPO gradient on real pairs: TRL's defaults against ours. About 20 s on one core.

    python tests/bench/flops.py                                # data: shared/ beside the repository
    python tests/bench/flops.py --data PAIRS.jsonl --tokenizer FOLDER

TRL 1.16's defaults: sequences padded to the longest of their batch, each with its own copy of the
prompt; the reference's forward at every step; every block's forward again in the backward pass;
the head on completion positions only. Ours: no padding, a prompt once, the reference's
log-probabilities from a file, nothing of a block computed twice; the head's logits twice, so as not
to keep them.

First a small Mistral runs both in float32 on the same pairs: transformers' model with a plain DPO
loss on padded batches, and ours. Their gradients must agree to 1e-5 (exit status 1 if not). Matrix
products are counted by PyTorch's FlopCounterMode as they run, attention by arithmetic (4 D FLOPs a
head and pair of tokens that the causal mask lets through, pads too; the backward is twice that).
The same arithmetic then gives Mistral-7B's FLOPs for all pairs, laid out in shuffled batches.

It is kind to TRL: its kernels under a padding mask also compute what the causal mask throws away,
and its head, too, computes its logits twice; neither is counted.
"""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from zephyr import chat, dataset, hub
from zephyr.losses import branch_sums, dpo_loss
from zephyr.metrics import visible_pairs
from zephyr.model import Config, Mistral
from zephyr.packing import Group, Pack, shuffled
from zephyr.tokenizer import Tokenizer

REAL = ROOT.parent / "shared" / "real"
BETA, TOLERANCE = 0.1, 1e-5  # of a gradient: max|a - b| / max|b|, the worst tensor
SMALL = Config(  # Mistral's proportions: block to head, width to MLP, queries to keys
    vocab_size=512,
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
)


def arguments(doc: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks on real pairs share."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=REAL / "pref_train.jsonl", help="pairs")
    parser.add_argument("--tokenizer", type=Path, default=REAL / "mistral_tokenizer", help="folder")
    parser.add_argument("--quick", action="store_true", help="a smoke check, under a minute")
    return parser


def real_pairs(data: Path, tokenizer: Path) -> list[Group]:
    """The pairs as train_dpo.py loads them by default: 1,024 tokens, of prompts 512."""
    for path, flag in ((data, "--data FILE.jsonl"), (tokenizer, "--tokenizer MODEL_FOLDER")):
        if not path.exists():
            sys.exit(f"{path} is absent: pass {flag}")
    words = Tokenizer(tokenizer)
    rows, encode = dataset.read_rows(hub.resolve(str(data))), chat.encoder(words, "zephyr")
    return dataset.load_pairs(rows, encode, Counter(), 1024, 512, words.bos_id)


# The arithmetic.


def forward_flops(config: Config, tokens: int, pairs: int, rows: int) -> dict[str, int]:
    """One forward pass over `tokens` tokens, `pairs` visible (query, key) pairs, head on `rows`."""
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    down = config.intermediate_size * config.hidden_size
    block = 2 * config.hidden_size * (q_width + kv_width) + 3 * down
    return {
        "blocks": 2 * tokens * config.num_hidden_layers * block,
        "down": 2 * tokens * config.num_hidden_layers * down,
        "attention": 4 * q_width * pairs * config.num_hidden_layers,
        "head": 2 * rows * config.hidden_size * config.vocab_size,
    }


def pad(batch: list[Group]) -> list[Group]:
    """Each sequence of a batch on its own, as long as the longest, pads being no targets."""
    sequences = [group.sequence(i) for group in batch for i in range(len(group.branches))]
    length = max(len(ids) for ids, _ in sequences)
    return [
        Group([], [ids + [0] * (length - len(ids))], [mask + [False] * (length - len(ids))])
        for ids, mask in sequences
    ]


def forward_of(config: Config, groups: list[Group]) -> dict[str, int]:
    tokens, rows = sum(g.length() for g in groups), sum(g.n_targets for g in groups)
    pairs = sum(visible_pairs(g, config.sliding_window) for g in groups)
    return forward_flops(config, tokens, pairs, rows)


def trl_flops(config: Config, batches: list[list[Group]]) -> tuple[int, int]:
    """(matrix products, attention) of a gradient: policy 1 + 2, blocks once more, reference 1.

    The blocks' second forward stops at the last tensor that the backward pass needs: the input of
    the MLP's last product, which is not multiplied again.
    """
    parts = [forward_of(config, pad(batch)) for batch in batches]
    blocks, down, attention, head = (sum(part[key] for part in parts) for key in parts[0])
    return 5 * blocks - down + 4 * head, 5 * attention


def our_flops(config: Config, groups: list[Group], reference: float = 0) -> tuple[float, float]:
    """(matrix products, attention) of a gradient, and `reference` forward passes."""
    blocks, _, attention, head = forward_of(config, groups).values()
    return (3 + reference) * blocks + (4 + reference) * head, (3 + reference) * attention


# The run.


def reduce_words(group: Group) -> Group:
    """The same lengths in a vocabulary of 512."""
    small = [[int(i) % SMALL.vocab_size for i in ids] for ids in (group.prefix, *group.branches)]
    return Group(small[0], small[1:], group.masks)


def theirs(policy, reference, batches: list[list[Group]], n_pairs: int) -> None:
    """A gradient as TRL takes it by default: transformers' model, padded, reference live."""
    policy.gradient_checkpointing_enable()
    policy.train()
    for batch in batches:
        sequences = [group.sequence(i) for i in (0, 1) for group in batch]  # chosen, then rejected
        with torch.no_grad():
            reference_chosen, reference_rejected = padded_log_probs(reference, sequences)
        chosen, rejected = padded_log_probs(policy, sequences)
        margins = BETA * ((chosen - reference_chosen) - (rejected - reference_rejected))
        (-F.logsigmoid(margins).sum() / n_pairs).backward()


def padded_log_probs(model, sequences: list[tuple[list[int], list[bool]]]) -> torch.Tensor:
    """(2, P) log-probabilities of the targets of 2 P sequences."""
    longest = max(len(ids) for ids, _ in sequences)
    ids, targets, real = torch.zeros(3, len(sequences), longest, dtype=torch.int64)
    for row, (sequence, mask) in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        targets[row, : len(sequence)] = torch.tensor(mask)
        real[row, : len(sequence)] = 1
    targets, labels = targets[:, 1:].bool(), ids[:, 1:]
    hidden = model.model(ids, attention_mask=real).last_hidden_state[:, :-1]
    log_p = model.lm_head(hidden[targets]).log_softmax(-1)
    of_labels = log_p.gather(-1, labels[targets][:, None]).squeeze(-1)
    return torch.zeros(len(ids)).index_add(0, targets.nonzero()[:, 0], of_labels).view(2, -1)


def ours(policy: Mistral, cached: torch.Tensor, groups: list[Group]) -> None:
    """The same gradient as train_dpo.py takes it, in one micro-batch."""
    pack = Pack.from_groups(groups)
    logps = branch_sums(policy(pack), pack).view(-1, 2)
    losses, _, _ = dpo_loss(*logps.T, *cached.T, BETA)
    (losses.sum() / len(groups)).backward()


def products(step) -> int:
    """FLOPs of the matrix products while `step` runs."""
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def twin(model: Mistral) -> MistralForCausalLM:
    """transformers' model with the same weights."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    keys += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "sliding_window")
    config = MistralConfig(**{key: getattr(model.config, key) for key in keys})
    config.rope_parameters = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    copy = MistralForCausalLM(config)
    copy.load_state_dict(model.state_dict())
    return copy


def worst_error(ours: Mistral, theirs: MistralForCausalLM) -> float:
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    return max(
        ((p.grad - gradients[name]).abs().max() / gradients[name].abs().max()).item()
        for name, p in ours.named_parameters()
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=4, help="pairs a padded batch")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of the gradient that is run")
    flags = parser.parse_args()
    warnings.filterwarnings("ignore")  # transformers announces its futures
    every = real_pairs(flags.data, flags.tokenizer)
    order = [every[i] for i in shuffled(len(every), 42, 0)]

    groups = [reduce_words(group) for group in order[: 4 if flags.quick else flags.pairs]]
    batches = cut(groups, flags.batch)
    policy, reference = (Mistral(SMALL).init_weights(seed) for seed in (0, 1))
    their_policy, their_reference = twin(policy), twin(reference)
    with torch.no_grad():
        pack = Pack.from_groups(groups)
        cached = branch_sums(reference(pack), pack).view(-1, 2)
    counted = {
        "TRL's defaults": products(
            lambda: theirs(their_policy, their_reference, batches, len(groups))
        ),
        "ours": products(lambda: ours(policy, cached, groups)),
    }
    arithmetic = {"TRL's defaults": trl_flops(SMALL, batches), "ours": our_flops(SMALL, groups)}
    padded = sum(g.length() for batch in batches for g in pad(batch))
    print(
        f"A gradient of {len(groups)} real pairs, small model (4 blocks of width 256, vocabulary"
        f" 512), GFLOP\n{padded:,} tokens in padded batches of {flags.batch} pairs,"
        f" {sum(g.length() for g in groups):,} in ours\n"
    )
    print(f"{'':34}{'products':>10}{'(by':>12}{'attention':>11}{'all':>8}{'share':>8}")
    print(f"{'':34}{'counted':>10}{'arithmetic)':>12}")
    whole = counted["TRL's defaults"] + arithmetic["TRL's defaults"][1]
    for name, (matrix, attention) in arithmetic.items():
        total = counted[name] + attention
        figures = f"{counted[name] / 1e9:10.2f}{matrix / 1e9:12.2f}{attention / 1e9:11.2f}"
        print(f"{name:34}{figures}{total / 1e9:8.1f}{total / whole:8.3f}")
    error = worst_error(policy, their_policy)
    print(f"\nthe two gradients agree: worst max|a-b|/max|b| of a tensor {error:.1e} (float32)\n")

    config = Config()
    print(f"Mistral-7B by arithmetic, all {len(every):,} pairs, TFLOP a pair\n")
    print(f"{'':44}{'products':>11}{'attention':>11}{'all':>9}{'share':>8}")
    table = {
        f"TRL's defaults, {flags.batch} pairs a batch": trl_flops(config, cut(order, flags.batch)),
        f"TRL's defaults, {2 * flags.batch} pairs a batch": trl_flops(
            config, cut(order, 2 * flags.batch)
        ),
        "ours, the gradient alone": our_flops(config, order),
        "ours, 3 epochs: a third of a reference pass": our_flops(config, order, 1 / 3),
        "ours, 1 epoch: a whole reference pass": our_flops(config, order, 1),
    }
    whole = sum(next(iter(table.values())))
    for name, (matrix, attention) in table.items():
        figures = (x / len(order) / 1e12 for x in (matrix, attention, matrix + attention))
        print("{:44}{:11.2f}{:11.2f}{:9.2f}".format(name, *figures), end="")
        print(f"{(matrix + attention) / whole:8.3f}")
    sys.exit(error > TOLERANCE)


def cut(groups: list[Group], size: int) -> list[list[Group]]:
    return [groups[i : i + size] for i in range(0, len(groups), size)]


if __name__ == "__main__":
    main()
