"""How long until the first step, and how much memory: reading and tokenising, loading weights.

    python tests/bench/start.py [--rows 100000] [--hidden 1024] [--layers 16] [--quick]

Rows: synthetic dialogues of about 1.2 kB (words drawn from the sample texts), tokenised by a
byte-level BPE of 512 tokens made on the spot, in this process, then by workers, then read back from
the cache. Weights: a random Mistral in float32, sharded over 4 gloo ranks by parallel.build; each
rank reports the growth of its peak memory over its own shard. About two minutes on 2 cores.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from zephyr import dataset, demo, distributed, hub, parallel, weights
from zephyr.model import Config
from zephyr.tokenizer import Tokenizer

SAMPLES = sorted((ROOT / "data" / "samples").glob("*.jsonl"))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def write_rows(path: Path, n: int) -> float:
    """n dialogues of two turns; returns the megabytes of their text."""
    draw = random.Random(0)
    words = " ".join(p.read_text() for p in SAMPLES).replace('"', " ").replace("\\", " ").split()
    size = 0
    with path.open("w") as file:
        for _ in range(n):
            texts = [" ".join(draw.choices(words, k=k)) for k in (20, draw.randrange(50, 320))]
            turns = zip(("user", "assistant"), texts, strict=True)
            row = {"messages": [{"role": role, "content": text} for role, text in turns]}
            file.write(json.dumps(row) + "\n")
            size += sum(map(len, texts))
    return size / 1e6


def tokenising(folder: Path, n_rows: int) -> None:
    world = distributed.start()
    demo.train_tokenizer(folder, SAMPLES, 512)
    megabytes = write_rows(folder / "rows.jsonl", n_rows)
    load = partial(dataset.load_dialogues, max_length=2048, loss_on="assistant")
    print(f"{n_rows:,} rows, {megabytes:.0f} MB of text, {os.cpu_count()} cores")
    print(f"{'':24}{'seconds':>9}{'MB/s':>8}{'peak MiB':>10}")
    for name, small, cache in (
        ("one process", 2**60, "a"),
        ("a worker a core", 0, "b"),
        ("from the cache", 0, "b"),
    ):
        dataset.SMALL = small
        source = hub.Source(folder / "rows.jsonl", name)
        start = time.perf_counter()
        found = dataset.tokenised(source, load, Tokenizer(folder), "zephyr", folder / cache, world)
        seconds = time.perf_counter() - start
        assert len(found) == n_rows
        print(f"{name:24}{seconds:9.1f}{megabytes / seconds:8.1f}{peak_mib():10.0f}")


def loading(folder: Path, hidden: int, layers: int) -> None:
    config = Config(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        head_dim=64,
    )
    demo.build_tiny(folder / "model", SAMPLES, config)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    command = [sys.executable, *torchrun, __file__, "--rank-of", str(folder / "model")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, timeout=300)


def one_rank(folder: Path) -> None:
    world = distributed.start()
    before = peak_mib()
    start = time.perf_counter()
    model = parallel.build(weights.read_config(folder), world, "bf16")
    weights.load_weights(model, folder)
    seconds = time.perf_counter() - start
    shard = sum(p.to_local().numel() * p.to_local().itemsize for p in model.parameters()) / 2**20
    largest = max(p.numel() * p.itemsize for p in model.parameters()) / 2**20
    world.print(
        f"weights: {seconds:.1f} s; rank 0 grew by {peak_mib() - before:.0f} MiB for a shard of "
        f"{shard:.0f} MiB (largest tensor {largest:.0f} MiB, whole model {4 * shard:.0f} MiB)"
    )
    world.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rank-of", type=Path)
    flags = parser.parse_args()
    if flags.rank_of:
        one_rank(flags.rank_of)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, layers = (5_000, 2) if flags.quick else (flags.rows, flags.layers)
        tokenising(Path(folder), rows)
        loading(Path(folder), flags.hidden, layers)


if __name__ == "__main__":
    main()
