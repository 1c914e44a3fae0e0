"""Held-out numbers: the loss of a model on dialogues, its preferences between two answers.

One pass serves them all, and the reference of DPO too: `score` gives the log-probability of every
branch of every group, on all ranks.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from zephyr import hub
from zephyr.distributed import World
from zephyr.losses import branch_sums, dpo_loss
from zephyr.packing import Group, Pack, split_step


@torch.no_grad()
def score_pack(model: nn.Module, pack: Pack, n_branches: int) -> Tensor:
    """(groups, n_branches) log-probability of every branch of a pack, float32, without gradient."""
    return branch_sums(model(pack), pack).view(-1, n_branches)


def score(
    model: nn.Module,
    groups: Sequence[Group],
    world: World,
    budget: int,
    share_prefix: bool = True,
    plan: list[list[int]] | None = None,
    what: str = "scoring",
) -> Tensor:
    """Log-probability of every branch given its prefix, summed over its targets.

    Args:
        model: sharded or not; every rank must call this, with the same groups.
        budget: tokens a micro-batch may hold.
        plan: this rank's micro-batches, lists of indices, where they matter; the ranks' plans must
            be equally long and cover each group once.

    Returns: (groups, K) float64 on the CPU, the same on all ranks. All groups have K branches;
    without groups it is (0, 0).
    """
    if not groups:
        return torch.zeros(0, 0, dtype=torch.float64)
    if plan is None:
        lengths = [group.length(share_prefix) for group in groups]
        plan = split_step(range(len(groups)), lengths, world.size, budget)[world.rank]
    scores = torch.zeros(len(groups), len(groups[0].branches), dtype=torch.float64)
    bar = tqdm(plan, desc=what, unit=" packs", leave=False, disable=None if world.is_main else True)
    for indices in bar:
        pack = Pack.from_groups([groups[i] for i in indices], share_prefix).to(world.device)
        scores[indices] = score_pack(model, pack, scores.shape[1]).double().cpu()
    if isinstance(model, FSDPModule):
        model.reshard()  # FSDP keeps the root's whole parameters after a forward without a backward
    return world.sum(scores.to(world.device)).cpu()


def cached_scores(
    build: Callable[[], nn.Module],
    groups: Sequence[Group],
    world: World,
    budget: int,
    share_prefix: bool,
    plan: list[list[int]] | None,
    output: Path,
    key: str,
) -> Tensor:
    """`score`, kept in OUTPUT/reference-<hash>.safetensors: computed once, read ever after.

    `build` makes the model if it is needed; `key` says which model and layout that is, the hash
    adds the token ids. Raises ValueError if the file does not fit the groups.
    """
    if not groups:
        return torch.zeros(0, 0)
    digest = hashlib.sha256(key.encode())
    for group in groups:
        for ids in (group.prefix, *group.branches):
            digest.update(len(ids).to_bytes(4, "little") + np.asarray(ids, np.int32).tobytes())
    path = output / f"reference-{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        scores = score(build(), groups, world, budget, share_prefix, plan, "reference")
        if world.is_main:
            temporary = path.with_suffix(".writing")
            save_file({"logps": scores.float()}, temporary)
            temporary.replace(path)
        world.barrier()
    scores = load_file(path)["logps"]
    if scores.shape != (len(groups), len(groups[0].branches)):
        raise ValueError(f"{path}: damaged, delete it and it is made again")
    return scores  # (groups, K) float32


def folder_hash(folder: Path) -> str:
    """sha256 over the names and contents of a model folder's weights and config."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name} {hub.file_hash(path)}\n".encode())
    return digest.hexdigest()


def sft_metrics(
    model: nn.Module, groups: Sequence[Group], world: World, budget: int
) -> dict[str, float]:
    """eval/loss: negative log-likelihood per target over the whole set."""
    total = score(model, groups, world, budget, what="held-out loss").sum().item()
    return {"eval/loss": -total / sum(group.n_targets for group in groups)}


def dpo_metrics(
    policy: Tensor, reference: Tensor, beta: float, label_smoothing: float
) -> dict[str, float]:
    """The DPO loss and rewards over a whole set of pairs, from the scores (P, 2) of both models."""
    losses, chosen, rejected = dpo_loss(*policy.T, *reference.T, beta, label_smoothing)
    return {
        "eval/loss": losses.mean().item(),
        "eval/rewards/chosen": chosen.mean().item(),
        "eval/rewards/rejected": rejected.mean().item(),
        "eval/rewards/accuracies": (chosen > rejected).double().mean().item(),
        "eval/rewards/margins": (chosen - rejected).mean().item(),
        "eval/logps/chosen": policy[:, 0].mean().item(),
        "eval/logps/rejected": policy[:, 1].mean().item(),
    }
