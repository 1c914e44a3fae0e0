"""Run the training scripts as a user does, in processes of their own, and read what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch(script: str, *flags: object, ranks: int = 1, timeout: int = 240, check: bool = True):
    """Run a script on so many ranks; returns the finished process. It is judged by its files: gloo
    workers may abort at exit after all their work is done."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / script)]
    process = subprocess.run(
        [*command, *map(str, flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and process.returncode:
        raise AssertionError(f"{command} failed:\n{process.stdout[-3000:]}{process.stderr[-6000:]}")
    return process


def metrics(output: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
