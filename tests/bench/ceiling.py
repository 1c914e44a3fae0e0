"""How near a DPO gradient comes to what this machine can multiply. About 2 minutes on 2 cores.

    python tests/bench/ceiling.py                              # data: shared/ beside the repository
    python tests/bench/ceiling.py --data PAIRS.jsonl --tokenizer FOLDER

A model of 8 blocks, width 512, vocabulary 32,000 takes the gradient of four real pairs in one pack,
prompts shared. Its useful FLOPs (zephyr/metrics.py: nothing that is computed twice, the head on
target rows, attention as the causal mask has it) over its seconds is what the gradient achieves.

The ceiling is what torch.mm alone achieves here at the very shapes of the gradient, into memory
that is there: for each projection, and for each chunk of the head's rows, the forward product
(tokens, in) x (in, out) and both of the backward, each as often as the model has it. The FLOPs of
that list over its seconds is the ceiling. What a share lacks of 1 is norms, rotary, SwiGLU,
softmax, attention and copies; and in the head the logits, which the backward pass computes a second
time: 0.75 is the most that it can show.

Body (all up to the final norm) and head are also run apart. Gradient and products take turns,
medians of the rounds. In bf16 a CPU's head makes its logits in float32, as no CPU kernel multiplies
bf16 into float32; its ceiling is bf16's all the same.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from flops import arguments, real_pairs

from zephyr import head
from zephyr.losses import branch_sums, dpo_loss
from zephyr.metrics import useful_flops
from zephyr.model import Config, Mistral
from zephyr.packing import Pack, shuffled

BETA = 0.1
MODEL = Config(
    hidden_size=512,
    intermediate_size=1792,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def shapes(config: Config, tokens: int, targets: int) -> dict[str, Counter]:
    """(rows, in, out) of every linear layer, and how many there are of it, in body and head."""
    width, inner = config.hidden_size, config.intermediate_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    block = Counter()
    for n_in, n_out in ((width, q_width), (q_width, width), (width, kv_width), (width, kv_width)):
        block[tokens, n_in, n_out] += config.num_hidden_layers
    for n_in, n_out in ((width, inner), (width, inner), (inner, width)):
        block[tokens, n_in, n_out] += config.num_hidden_layers
    chunk = min(targets, head.CHUNK_ELEMENTS // config.vocab_size)
    logits = Counter({(chunk, width, config.vocab_size): targets / chunk})
    return {"body": block, "head": logits}


def products(rows: int, n_in: int, n_out: int, dtype: torch.dtype) -> float:
    """Seconds of a linear layer's three products, its weight stored as (out, in)."""
    x, weight, grad = (
        torch.randn(shape).to(dtype) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out))
    )
    seconds = 0.0
    for a, b in ((x, weight.T), (grad, weight), (grad.T, x)):
        out = torch.ones(a.shape[0], b.shape[1], dtype=dtype)
        seconds += timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    return seconds


def gradients(model: Mistral, pack: Pack, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed: the body's gradient for a given gradient of its rows, the head's for a given
    one of the log-probabilities, and the whole of DPO's."""
    weight, reference = model.lm_head.weight, torch.zeros(pack.n_branches // 2)
    rows = torch.randn(len(pack.rows), MODEL.hidden_size).to(dtype).requires_grad_()
    grad = torch.randn(len(pack.tokens), MODEL.hidden_size).to(dtype)

    def whole():
        chosen, rejected = branch_sums(model(pack), pack).view(-1, 2).T
        dpo_loss(chosen, rejected, reference, reference, BETA)[0].mean().backward()

    return {
        "body": lambda: model.model(pack).backward(grad),
        "head": lambda: head.log_probs(rows, weight, pack.targets).sum().backward(),
        "both": whole,
    }


def measure(
    dtype: torch.dtype, pack: Pack, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the gradients, and of their products alone: body, head, both. Medians."""
    model = Mistral(MODEL).init_weights(0).to(dtype)
    seconds = defaultdict(list)
    layers = shapes(MODEL, len(pack.tokens), len(pack.targets))
    distinct = [shape for part in layers.values() for shape in part]
    for _ in range(rounds + 1):
        for shape in distinct:
            seconds[shape].append(products(*shape, dtype))
        for name, run in gradients(model, pack, dtype).items():
            model.zero_grad()
            seconds[name].append(timed(run))
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # 1: warm-up
    alone = {
        name: sum(count * median[shape] for shape, count in part.items())
        for name, part in layers.items()
    }
    return {name: median[name] for name in ("body", "head", "both")}, alone | {
        "both": alone["body"] + alone["head"]
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=4)
    flags = parser.parse_args()
    if flags.quick:
        flags.rounds, flags.pairs = 1, 2
    torch.set_num_threads(flags.threads)
    every = real_pairs(flags.data, flags.tokenizer)
    groups = [every[i] for i in shuffled(len(every), 42, 0)[: flags.pairs]]
    pack = Pack.from_groups(groups)
    useful = {"both": useful_flops(MODEL, groups)}
    useful["head"] = 6 * len(pack.targets) * MODEL.hidden_size * MODEL.vocab_size
    useful["body"] = useful["both"] - useful["head"]
    layers = shapes(MODEL, len(pack.tokens), len(pack.targets))
    multiplied = {
        name: sum(6 * a * b * c * count for (a, b, c), count in part.items())
        for name, part in layers.items()
    }
    multiplied["both"] = sum(multiplied.values())
    print(
        f"{flags.pairs} real pairs, {len(pack.tokens):,} tokens, {len(pack.targets):,} targets;"
        f" {flags.threads} threads; median of {flags.rounds}\n"
    )
    print(f"{'':14}{'useful':>9}{'seconds':>9}{'achieved':>10}{'ceiling':>10}{'share':>8}")
    print(f"{'':14}{'GFLOP':>9}{'':>9}{'GFLOP/s':>10}{'GFLOP/s':>10}")
    for dtype in (torch.float32, torch.bfloat16):
        seconds, alone = measure(dtype, pack, flags.rounds)
        for name in ("body", "head", "both"):
            achieved = useful[name] / seconds[name]
            ceiling = multiplied[name] / alone[name]
            label = f"{str(dtype).removeprefix('torch.')} {name}"
            figures = f"{useful[name] / 1e9:9.0f}{seconds[name]:9.2f}{achieved / 1e9:10.0f}"
            print(f"{label:14}{figures}{ceiling / 1e9:10.0f}{achieved / ceiling:8.2f}")


if __name__ == "__main__":
    main()
