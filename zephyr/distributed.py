"""Who am I in this torchrun job? The world of ranks: start, sum, print once, stop.

This is the only file that reads the launch environment (RANK, WORLD_SIZE, ...). Without it, that is
under plain `python`, the world is one rank: the scripts have one code path.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, local_rank of local_size on its node, its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: dist.Store

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words: Any) -> None:
        """Print on rank 0 alone."""
        if self.is_main:
            print(*words, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place: any shape, on this rank's device."""
        dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(1, device=self.device))

    def once(self, name: str, work: Callable[[], str | None], per_node: bool = False) -> str:
        """Run `work` on one rank (of the job, or of each node); every rank returns what it
        returned.

        The others wait at the store and not in a collective, so long work (a download) trips no
        time-out. `name` must be new in this job. If the work fails, every rank raises.
        """
        node = self.rank // self.local_size if per_node else 0
        key = f"once/{name}/{node}"
        if self.local_rank == 0 if per_node else self.is_main:
            try:
                result = work() or ""
            except Exception as error:
                self.store.set(key, f"failed:{error}")
                raise
            self.store.set(key, f"done:{result}")
            return result
        self.store.wait([key], timedelta(days=7))
        state, _, result = self.store.get(key).decode().partition(":")
        if state == "failed":
            raise ValueError(result)
        return result


def start(timeout_minutes: float = 10.0) -> World:
    """Join the process group that torchrun describes, or make one of a single rank.

    Collectives run over NCCL on GPUs and over gloo on CPUs. A collective that waits longer than
    `timeout_minutes` for a rank ends the job.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cuda:nccl,cpu:gloo"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        store = dist.PrefixStore("zephyr", store)
    else:
        store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, local_rank, local_size, device, store)


def parse(knobs: type[T], recipes: dict[str, dict[str, Any]]) -> T:
    """The command line -> a script's knobs: `--recipe` sets the defaults, the other flags override.

    An unknown flag or value ends the program with status 2 and says which.
    """
    import tyro  # the library and its GPU tests do without

    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", default=next(iter(recipes)))
    recipe = first.parse_known_args()[0].recipe
    default = knobs(recipe=recipe, **recipes.get(recipe, {}))
    return tyro.cli(knobs, default=default, console_outputs=is_main())


def is_main() -> bool:
    """Whether this process is rank 0, or alone; known before the job has started."""
    return int(os.environ.get("RANK", 0)) == 0


def run(main: Callable[[], None]) -> None:
    """Call a script's main; end the job in order, or with one message that says what to mend.

    Mistakes in files and flags (ValueError, OSError) and a full memory print their message without
    a traceback; where all ranks made the same one, rank 0 speaks for them. The exit status is 1
    then.
    """
    try:
        main()
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        if not is_main():
            time.sleep(3)  # all ranks often fail alike: rank 0 speaks, and torchrun ends the others
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # a rank in a collective would wait for this one: leave without it
    if dist.is_initialized():
        dist.barrier()  # gloo workers that leave at different times sometimes abort
        dist.destroy_process_group()


def _message(error: Exception) -> str | None:
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return (
            f"out of memory ({str(error).splitlines()[0]}). What helps: a smaller "
            "--tokens-per-microbatch, --activation-checkpointing full, a smaller --max-length"
        )
    return str(error) if isinstance(error, ValueError | OSError) else None
