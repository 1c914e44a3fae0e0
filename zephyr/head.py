"""From hidden rows to log p(target), without ever holding all the logits.

    N targets   C model width   V vocabulary

Written plainly the head is `log_probs_naive`: six lines and an (N, V) matrix in float32, which for
8,192 targets of Mistral is 1 GB for the logits and as much again for their gradient. `log_probs`
computes the same numbers in chunks of rows: the forward keeps one float a row (the log of the
softmax's denominator), the backward makes the logits of a chunk again. With p = softmax(logits) and
g the gradient that arrives,

    d log p(t) / d logits = onehot(t) - p,   so   d logits = g * (onehot(t) - p).

Logits, log-sum-exp and log-probabilities are float32 (float64 in a float64 model) whatever the
dtype of the model: a logit rounded to bf16 is off by up to 2^-8 of itself, which adds up over an
answer.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # logits alive at a time: 64 MiB in float32


def log_probs_naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What `log_probs` computes, written plainly. Same shapes, same dtypes."""
    dtype = torch.promote_types(torch.float32, hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T  # (N, V)
    log_p = logits.log_softmax(dim=-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1)  # (N,)


def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target under the row that predicts it.

    Args:
        hidden: (N, C), after the final norm; N may be 0.
        weight: (V, C), the head's matrix.
        targets: (N,) int64, ids below V.

    Returns: (N,) float32, or float64 for float64 input. Differentiable in hidden and weight.
    """
    return _LogProbs.apply(hidden, weight, targets)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(torch.float32, hidden.dtype)
        log_p = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)  # (N,)
        log_z = torch.empty_like(log_p)  # (N,) log of the softmax's denominator
        for rows, logits in _logits(hidden, weight):  # (chunk, V), ours to overwrite
            log_p[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1)
            top = logits.amax(dim=-1)
            log_z[rows] = logits.sub_(top[:, None]).exp_().sum(dim=-1).log_().add_(top)
        ctx.save_for_backward(hidden, weight, targets, log_z)
        return log_p.sub_(log_z)

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, targets, log_z = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=log_z.dtype, device=weight.device)
        for rows, logits in _logits(hidden, weight):
            p = logits.sub_(log_z[rows, None]).exp_()  # (chunk, V)
            grad_logits = p.mul_(-grad[rows, None])
            grad_logits.scatter_add_(-1, targets[rows, None], grad[rows, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None


def _logits(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """hidden @ weight.T, a chunk of rows at a time, always in the same memory: (rows, (chunk, V)).

    bf16 is multiplied as bf16 and accumulated and written as float32. A GPU has a kernel that does
    so; a CPU is handed float32 copies and told to multiply in bf16, of which the copies are exact.
    """
    wide = torch.promote_types(torch.float32, hidden.dtype)
    widened = not hidden.is_cuda and hidden.dtype != wide
    columns = weight.to(wide).T if widened else weight.T  # (C, V)
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    memory = torch.empty(
        min(size, hidden.shape[0]), weight.shape[0], dtype=wide, device=weight.device
    )
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        part = hidden[rows]
        out = memory[: part.shape[0]]
        with _bf16_products() if widened else nullcontext():
            out_dtype = {"out_dtype": wide} if part.dtype != wide and not widened else {}
            torch.mm(part.to(columns.dtype), columns, out=out, **out_dtype)
        yield rows, out


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Let a CPU multiply float32 matrices in bf16, accumulating in float32."""
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
