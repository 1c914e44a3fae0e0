"""The finished model, made ready for a machine from outside: checkpointing and shards.

The order matters. The model is built on the meta device, without memory. Activation checkpointing
wraps each block's forward first, so that FSDP's hooks, which gather a block's weights, stay outside
of what is computed again. FSDP cuts the parameters; only then is there memory, for this rank's rows
alone, and the weights are read into it last (weights.py).
"""

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from zephyr.attention import BACKENDS, choose
from zephyr.distributed import World
from zephyr.model import Config, Mistral


def build(
    config: Config,
    world: World,
    precision: str,
    attention: str = "auto",
    *,
    activation_checkpointing: str = "none",
    trainable: bool = True,
) -> nn.Module:
    """A model sharded over all ranks, with memory for its weights and nothing in it yet.

    Args:
        precision: "fp32", or "bf16": float32 master shards, gathered and computed with in bf16,
            gradients reduced in float32, log-probabilities returned in float32.
        activation_checkpointing: "none", "selective" or "full" (`recompute_blocks`).
        trainable: false for a frozen reference. Its shards are bf16 in bf16 precision.
    """
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    backend = choose(attention, world.device, compute)
    with torch.device("meta"):
        model = Mistral(config, BACKENDS[backend])
    name = "model" if trainable else "reference"
    size = f"{config.n_parameters:,} parameters"
    world.print(f"{name}: {size}, {precision} on {world.size} x {world.device.type}, {backend}")
    if not trainable:
        model.requires_grad_(False).eval().to(compute)
    elif activation_checkpointing != "none":
        recompute_blocks(model, activation_checkpointing)
    shard(model, world, compute)
    return model.to_empty(device=world.device)


def recompute_blocks(model: nn.Module, mode: str) -> None:
    """Activation checkpointing: the backward pass runs each block's forward again, in part or
    whole.

    "full" keeps a block's input only. "selective" keeps the results of matrix products and
    attention, the expensive ones, and computes the elementwise rest again: norms, rotary, SwiGLU.
    """
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)}
    for block in model.model.layers:
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing here draws numbers
            **(contexts if mode == "selective" else {}),
        )


def _keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    """Which results a selective checkpoint keeps, by the operator's name."""
    expensive = op == torch.ops.aten.mm.default or "attention" in str(op) or "attn" in str(op)
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


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
