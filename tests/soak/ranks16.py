"""`torchrun --nproc_per_node 16 train_dpo.py --recipe tiny` runs, and computes what one rank does.

    python tests/soak/ranks16.py          # about two minutes on 2 cores, most of it imports

Every metric over all steps: |difference| <= 1e-5 * max(1, |x|). Exits with status 1 if not.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch import launch, metrics

NOT_COMPARED = {"tokens_per_second", "pairs_per_second", "mfu", "step_seconds", "peak_memory_gib"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for ranks in (1, 16):
            output = Path(folder) / f"{ranks}"
            flags = ("--recipe", "tiny", "--output", output)
            launch("train_dpo.py", *flags, ranks=ranks, timeout=900)
            rows.append(metrics(output))
    worst = 0.0
    for one, sixteen in zip(*rows, strict=True):
        for key in one.keys() - NOT_COMPARED:
            worst = max(worst, abs(one[key] - sixteen[key]) / max(1.0, abs(one[key])))
    print(f"{len(rows[0])} rows of metrics, worst |difference| / max(1, |x|): {worst:.1e}")
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
