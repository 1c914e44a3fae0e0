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
        dtype = torch.promote_types(torch.float32, hidden.dtype)
        log_p = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)  # (N,)
        log_z = torch.empty_like(log_p)  # (N,) log of the softmax's denominator
        columns = _columns(weight)
        for rows in _chunks(hidden, weight):
            logits = _matmul_wide(hidden[rows], columns)  # (chunk, V)
            log_z[rows] = logits.logsumexp(dim=-1)
            log_p[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - log_z[rows]
        ctx.save_for_backward(hidden, weight, targets, log_z)
        return log_p

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, targets, log_z = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=log_z.dtype, device=weight.device)
        columns = _columns(weight)
        for rows in _chunks(hidden, weight):
            p = _matmul_wide(hidden[rows], columns).sub_(log_z[rows, None]).exp_()  # (chunk, V)
            grad_logits = p.mul_(-grad[rows, None])
            grad_logits.scatter_add_(-1, targets[rows, None], grad[rows, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def _columns(weight: Tensor) -> Tensor:
    """(C, V): the head's matrix as `_matmul_wide` wants it."""
    on_gpu = weight.is_cuda
    return weight.T if on_gpu else weight.to(torch.promote_types(torch.float32, weight.dtype)).T


def _matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in at least float32.

    A GPU multiplies bf16 and writes float32 at no extra cost; a CPU has no such kernel, so there
    the weight comes in float32 and the rows are widened too.
    """
    dtype = torch.promote_types(torch.float32, a.dtype)
    return torch.mm(a.to(b.dtype), b, **({"out_dtype": dtype} if b.dtype != dtype else {}))
