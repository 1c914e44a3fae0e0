"""The finished model, made ready for a machine from outside: checkpointing, compile, shards.

The order matters. Activation checkpointing wraps the blocks first, so that compile sees what is
recomputed; compile comes before FSDP, so that FSDP's hooks, which wait for communication, stay out
of the graphs; the weights are read last, each rank its own rows, into memory that did not exist
before.
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from zephyr.attention import choose
from zephyr.distributed import World
from zephyr.weights import load_weights, meta_model


def build(
    folder: Path,
    world: World,
    *,
    precision: str,
    attention: str = "auto",
    activation_checkpointing: str = "none",
    trainable: bool = True,
) -> nn.Module:
    """The folder's model, sharded over all ranks, its weights loaded.

    Args:
        precision: "fp32", or "bf16": float32 master shards, gathered and computed with in bf16,
            gradients reduced in float32, log-probabilities returned in float32.
        activation_checkpointing: "none" keeps all activations; "full" keeps each block's input and
            computes the rest again in the backward pass (a third more compute).
        trainable: false for a frozen reference. Its shards are bf16 in bf16 precision.
    """
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    backend = choose(attention, world.device, compute)
    model = meta_model(folder, backend)
    name = "model" if trainable else "reference"
    world.print(f"{name}: {folder}, {precision} on {world.size} x {world.device.type}, {backend}")
    if not trainable:
        model.requires_grad_(False).eval().to(compute)
    elif activation_checkpointing == "full":
        recompute_blocks(model)
    shard(model, world, compute)
    model.to_empty(device=world.device)
    load_weights(model, folder)
    return model


def recompute_blocks(model: nn.Module) -> None:
    """Full activation checkpointing: the backward pass runs each block's forward a second time."""
    for block in model.model.layers:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def shard(model: nn.Module, world: World, compute: torch.dtype) -> None:
    """FSDP2: each block is a unit that is gathered when it runs; embedding, final norm and head
    make the root unit, so that the head finds its whole weight inside the root's forward."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=compute,
        reduce_dtype=torch.float32,
        output_dtype=None,  # log-probabilities leave in float32, hidden rows stay as they are
        cast_forward_inputs=False,  # cos and sin are float32 on purpose
    )
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
