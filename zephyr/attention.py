"""The one door to the attention kernels: causal, sliding-window, grouped-query attention over
segments.

    T tokens   S segments   H heads   K key/value heads   D head width

All sequences of a pack lie end to end in one stream. Segment s asks with the queries
`cu_q[s] : cu_q[s+1]` and sees the keys `cu_k[s] : cu_k[s+1]`, nothing else. A segment may have more
keys than queries (a shared prefix); its last query then stands at its last key, so that with n_q
queries and n_k keys, query i sees the keys j with

    i + (n_k - n_q) - window < j <= i + (n_k - n_q)

("bottom-right" alignment, as flash-attn >= 2.1 has it). `window` counts the token itself, as
Mistral's `sliding_window` does: the kernels take the number of keys to the left, which is one less.

Three back ends share one signature; `choose` picks one when a model is built.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[..., Tensor]


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    window: int | None,
) -> Tensor:
    """The flash-attn package (2.x). CUDA, bf16 or fp16. Shapes as in `sdpa`."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        causal=True,
        window_size=(window - 1 if window else -1, 0),
    )


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    window: int | None,
) -> Tensor:
    """torch.nn.attention.varlen: the flash kernels inside PyTorch. CUDA, bf16 or fp16.

    Shapes as in `sdpa`. torch 2.11 has no `enable_gqa` and takes fewer key heads as they are; from
    2.12 on the flag is there and required.
    """
    from torch.nn.attention.varlen import varlen_attn

    gqa = {} if torch.__version__.startswith("2.11") else {"enable_gqa": q.shape[1] != k.shape[1]}
    return varlen_attn(
        query=q,
        key=k,
        value=v,
        cu_seq_q=cu_q,
        cu_seq_k=cu_k,
        max_q=max_q,
        max_k=max_k,
        window_size=(window - 1 if window else -1, 0),
        **gqa,
    )


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    window: int | None,
) -> Tensor:
    """A loop of scaled_dot_product_attention calls, one a segment: any device, any float dtype.

    Args:
        q: (T, H, D) queries, rotated.
        k, v: (T_k, K, D) keys and values; H is a multiple of K.
        cu_q, cu_k: (S + 1,) int32, cumulative lengths of the segments in q and in k.
        max_q, max_k: the longest segment (for the kernels that launch by it; not needed here).
        window: how many keys a query sees, itself included; None for all before it.

    Returns: (T, H, D), in q's dtype.
    """
    q_ends, k_ends = cu_q.tolist(), cu_k.tolist()
    segments = zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)
    return torch.cat([_attend_one(q[a:b], k[c:d], v[c:d], window) for a, b, c, d in segments])


def _attend_one(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, heads, length, D)
    n_q, n_k = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if n_q == n_k and (window is None or n_k <= window):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    else:  # is_causal aligns at the top left: the mask is written out instead
        mask = visible(n_q, n_k, window, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    return out.squeeze(0).transpose(0, 1)  # (n_q, H, D)


def visible(n_q: int, n_k: int, window: int | None, device: torch.device | str = "cpu") -> Tensor:
    """(n_q, n_k) bool: which keys each query of a segment sees."""
    query_position = torch.arange(n_k - n_q, n_k, device=device)[:, None]
    key_position = torch.arange(n_k, device=device)
    mask = key_position <= query_position
    return mask if window is None else mask & (key_position > query_position - window)


BACKENDS: dict[str, Attend] = {"flash": flash, "torch": varlen, "sdpa": sdpa}


def choose(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The back end's name for `name` in auto, flash, torch, sdpa.

    `auto` takes the flash-attn package where it is installed, else PyTorch's own flash kernels, and
    the SDPA loop where neither can run: on a CPU, or in float32. Raises ValueError where a back end
    asked for by name cannot run.
    """
    fits = torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        return "sdpa" if not fits else "flash" if has_flash_attn() else "torch"
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r} is unknown: choose auto, {', '.join(BACKENDS)}")
    if name != "sdpa" and not fits:
        raise ValueError(
            f"attention {name!r} needs a CUDA device and bf16, this is {device} in {dtype}: "
            "use --attention auto"
        )
    if name == "flash" and not has_flash_attn():
        raise ValueError(
            "attention 'flash' needs the flash-attn package (pip install zephyr[flash]): "
            "install it, or use --attention torch"
        )
    return name


def has_flash_attn() -> bool:
    """Whether the flash-attn package is installed."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return False
    return True
