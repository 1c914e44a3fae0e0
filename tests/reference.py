"""Chapter 0: all that this project computes, said as slowly and as plainly as possible.

Zephyr is Mistral (`logits`), fine-tuned first on dialogues (`sft_loss`), then on pairs of a better
and a worse answer (`dpo_loss`), each time by Adam (`adamw`). Read from the top: a function stands
before the pieces it is made of. One sequence, one head, one query at a time, in float64: this is
slow on purpose, to be checked by eye, and every fast part of the project is tested against it.
`weights` is a dict, Hugging Face name -> float64 tensor, and `config` the dict in config.json.
Shapes: T tokens, H heads, K key/value heads, D head width, C model width, V vocabulary, P pairs.
"""

import math

import torch
from torch.nn.functional import logsigmoid


def logits(weights, config, tokens):
    """One sequence of T token ids -> (T, V): row i scores every candidate for token i + 1."""
    epsilon = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][torch.as_tensor(tokens)]  # (T, C)
    for layer in range(config["num_hidden_layers"]):
        own = f"model.layers.{layer}."
        # Both halves of a block read a normalised copy of x and add to x, never replace it.
        normed = rms_norm(x, weights[own + "input_layernorm.weight"], epsilon)
        x = x + attention(weights, config, own + "self_attn.", normed)
        normed = rms_norm(x, weights[own + "post_attention_layernorm.weight"], epsilon)
        gate = normed @ weights[own + "mlp.gate_proj.weight"].T  # (T, intermediate)
        up = normed @ weights[own + "mlp.up_proj.weight"].T  # (T, intermediate)
        silu = gate * torch.sigmoid(gate)
        x = x + (silu * up) @ weights[own + "mlp.down_proj.weight"].T  # (T, C)
    x = rms_norm(x, weights["model.norm.weight"], epsilon)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return x @ weights[head].T  # (T, V); matrices are stored (out, in), hence every .T


def rms_norm(x, weight, epsilon):
    """Bring each row to a root mean square of 1, then scale each column by its learnt weight."""
    return x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + epsilon) * weight


def attention(weights, config, own, x):
    """Query i sees the last W keys up to its own; query head h uses key/value head h // (H / K)."""
    width, window = config["head_dim"], config["sliding_window"] or len(x)  # None: all keys
    queries = (x @ weights[own + "q_proj.weight"].T).split(width, dim=1)  # H times (T, D)
    keys = (x @ weights[own + "k_proj.weight"].T).split(width, dim=1)  # K times (T, D)
    values = (x @ weights[own + "v_proj.weight"].T).split(width, dim=1)  # K times (T, D)
    outputs = []
    for head in range(config["num_attention_heads"]):
        shared = head // (config["num_attention_heads"] // config["num_key_value_heads"])
        query, key = rotate(queries[head], config), rotate(keys[shared], config)  # (T, D) each
        rows = []
        for i in range(len(x)):
            seen = slice(max(0, i - window + 1), i + 1)
            weight = torch.softmax(key[seen] @ query[i] / math.sqrt(width), dim=0)  # (keys seen,)
            rows.append(weight @ values[shared][seen])  # (D,)
        outputs.append(torch.stack(rows))  # (T, D)
    return torch.cat(outputs, dim=1) @ weights[own + "o_proj.weight"].T  # (T, C)


def rotate(x, config):
    """Rotary positions: turn the pair (x[i, j], x[i, j + D/2]) by the angle i * theta^(-2j / D)."""
    half = config["head_dim"] // 2
    speeds = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)  # (D/2,)
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), speeds)  # (T, D/2)
    a, b, cosine, sine = x[:, :half], x[:, half:], torch.cos(angles), torch.sin(angles)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=1)  # (T, D)


def log_probs(weights, config, tokens, mask):
    """log p(token i | the tokens before it), in order, for each target: each i with mask[i]."""
    assert not mask[0], "nothing stands before the first token, so nothing predicts it"
    table = torch.log_softmax(logits(weights, config, tokens), dim=1)  # (T, V)
    targets = [i for i in range(len(tokens)) if mask[i]]
    return table[[i - 1 for i in targets], [int(tokens[i]) for i in targets]]  # (targets,)


def sft_loss(weights, config, batch):
    """Mean negative log-likelihood per target of a batch of (tokens, mask), padded as is usual."""
    longest = max(len(tokens) for tokens, _ in batch)
    total, count = 0.0, 0
    for tokens, mask in batch:
        # Any id can pad: no token sees what is to its right, and the mask makes no target of it.
        padding = longest - len(tokens)
        padded, padded_mask = list(tokens) + [0] * padding, list(mask) + [False] * padding
        row = log_probs(weights, config, padded, padded_mask)  # (targets,)
        total, count = total - row.sum(), count + len(row)
    return total / count  # divided once: a mean of row means would let short rows count for more


def dpo_loss(weights, reference_weights, config, pairs, beta, label_smoothing=0.0):
    """(prompt, chosen, rejected) ids -> mean loss, chosen rewards (P,), rejected rewards (P,)."""
    losses, rewards = [], []
    for prompt, chosen, rejected in pairs:
        pair = []
        for answer in (chosen, rejected):
            tokens, mask = prompt + answer, [False] * len(prompt) + [True] * len(answer)
            policy = log_probs(weights, config, tokens, mask).sum()
            reference = log_probs(reference_weights, config, tokens, mask).sum().detach()
            pair.append(beta * (policy - reference))  # reward = beta log(pi(y|x) / pi_ref(y|x))
        margin = pair[0] - pair[1]
        # Rafailov et al. 2023, eq. 7: loss = -log sigma(reward of chosen - reward of rejected).
        # Conservative DPO: with probability label_smoothing the pair is labelled the wrong way.
        right, wrong = -logsigmoid(margin), -logsigmoid(-margin)
        losses.append((1 - label_smoothing) * right + label_smoothing * wrong)
        rewards.append(torch.stack(pair).detach())  # (2,)
    return torch.stack(losses).mean(), *torch.stack(rewards, dim=1)  # (), (P,), (P,)


def adamw(
    weights, gradients, state, step, learning_rate, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=None
):
    """AdamW, no decay; `step` is 1, 2, ..., `state` {} at 1 -> new weights, unclipped norm."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
    new_weights = {}
    for name, weight in weights.items():
        g = gradients[name] * scale
        m, v = state.get(name, (0.0, 0.0))  # running means of g and of g * g
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        state[name] = (m, v)
        # Both began at 0, which pulls them down at first; these divisions undo exactly that.
        mean, square = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
        new_weights[name] = weight.detach() - learning_rate * mean / (torch.sqrt(square) + eps)
    return new_weights, norm


def random_weights(config, seed):
    """Small seeded weights; norms near 1 but not 1, so that leaving one out shows."""
    model, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    block = {"input_layernorm": (model,), "post_attention_layernorm": (model,)}
    block |= {"self_attn.q_proj": (query, model), "self_attn.o_proj": (model, query)}
    block |= {"self_attn.k_proj": (kv, model), "self_attn.v_proj": (kv, model)}
    block |= {"mlp.gate_proj": (inner, model), "mlp.up_proj": (inner, model)}
    block |= {"mlp.down_proj": (model, inner)}
    shapes = {"model.embed_tokens": (config["vocab_size"], model), "model.norm": (model,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head": shapes["model.embed_tokens"]}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        noise = 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[name + ".weight"] = 1 + noise if len(shape) == 1 else noise
    return weights
