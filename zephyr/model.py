"""Mistral, in one sitting: config, norm, rotary, attention, MLP, block, model.

    T tokens   N targets   H heads   K key/value heads   D head width   C model width   V vocabulary

There is no batch axis. A model reads one flat stream of T tokens that holds many sequences end to
end; a `Pack` (packing.py) says where each begins, which position each token has in its sequence,
and which rows predict which targets. Parameters bear Hugging Face's names, so that loading is
copying.

    logits = model(tokens)    one sequence (T,) -> (T, V): the call to read first
    logps = model(pack)       a pack -> (N,) log p(target): the call that trains

Llama 2 and SmolLM2 have this shape too (no window; tied embeddings), and load just as well.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zephyr import attention, head
from zephyr.packing import Pack


@dataclass(frozen=True)
class Config:
    """The sizes of a model, by Hugging Face's names. The defaults are Mistral-7B-v0.1's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768
    sliding_window: int | None = 4096  # keys that a query sees, itself included; None: all
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    @property
    def n_parameters(self) -> int:
        """7,241,732,096 for Mistral-7B."""
        q = self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        layer = self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size + 2)
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size
        return self.num_hidden_layers * layer + self.hidden_size * (tables + 1)


class RMSNorm(nn.Module):
    """x / rms(x), times a learnt weight (Zhang and Sennrich 2019). Normalises in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles by which queries and keys turn (Su et al. 2021).

    Pair j of a head's D / 2 pairs turns by position * theta^(-2j / D). Positions (T,) become angles
    in float32: bf16 has 8 bits and could not tell position 257 from 258. Returns two (T, 1, D / 2).
    """
    dtype = torch.promote_types(torch.float32, dtype)
    steps = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype)
    frequencies = 1.0 / config.rope_theta ** (steps / config.head_dim)  # (D / 2,)
    angles = positions[:, None].to(dtype) * frequencies  # (T, D / 2)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[j], x[j + D/2]) of every head: (T, heads, D) -> the same.

    The pairs are half a head apart, as in all Hugging Face weights; Mistral's own files pair
    neighbours, and were permuted when they were converted.
    """
    a, b = x.chunk(2, dim=-1)  # (T, heads, D / 2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads share K key/value heads."""

    def __init__(self, config: Config, attend: attention.Attend):
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        n_q, n_kv = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, n_q * head_dim, bias=False)
        self.k_proj = nn.Linear(width, n_kv * head_dim, bias=False)
        self.v_proj = nn.Linear(width, n_kv * head_dim, bias=False)
        self.o_proj = nn.Linear(n_q * head_dim, width, bias=False)
        self.head_dim, self.window, self.attend = head_dim, config.sliding_window, attend

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pack: Pack) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if pack.kv_index is not None:  # a later branch sees the shared prefix once more
            k, v = k.index_select(0, pack.kv_index), v.index_select(0, pack.kv_index)
        out = self.attend(
            q, k, v, pack.cu_q, pack.cu_k, pack.max_q, pack.max_k, self.window
        )  # (T, H, D)
        return self.o_proj(out.flatten(-2))  # (T, C)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy and adds to the stream."""

    def __init__(self, config: Config, attend: attention.Attend):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, attend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pack: Pack) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, pack)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm: a pack -> (T, C)."""

    def __init__(self, config: Config, attend: attention.Attend):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, attend) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, pack: Pack) -> Tensor:
        x = self.embed_tokens(pack.tokens)  # (T, C)
        cos, sin = rotary(pack.positions, self.config, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, pack)
        return self.norm(x)


class Mistral(nn.Module):
    """The language model: `Decoder` and the head that turns its rows into log-probabilities.

    Args:
        config: the sizes.
        attend: one of the back ends of attention.py.

    Every use goes through `forward`: under FSDP2 no other method sees whole parameters.
    """

    def __init__(self, config: Config, attend: attention.Attend = attention.sdpa):
        super().__init__()
        self.config = config
        self.model = Decoder(config, attend)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one parameter, if the config says so; `to_empty` parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, pack: Pack | Tensor) -> Tensor:
        """(T,) token ids of one sequence -> (T, V) logits; a `Pack` -> (N,) log p(target).

        Log-probabilities are float32 whatever the model's dtype (float64 in a float64 model).
        """
        if isinstance(pack, Tensor):
            return self.lm_head(self.model(Pack.from_tokens(pack)))  # (T, V)
        rows = self.model(pack).index_select(0, pack.rows)  # (N, C)
        return head.log_probs(rows, self.lm_head.weight, pack.targets)  # (N,)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Mistral":
        """Random weights as Mistral starts: normal(0, initializer_range), norms at 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(
                    values.normal_(0, self.config.initializer_range, generator=generator)
                )
        return self
