"""The model against transformers (float32, real and random weights), against chapter 0 (float64),
and its sizes against the published count of parameters.

transformers runs its plain "eager" attention, so that it shares no kernel with ours.
"""

import json
import math
from dataclasses import asdict, replace

import pytest
import reference
import tokenizers
import torch
from transformers import AutoModelForCausalLM, MistralConfig

import zephyr
from zephyr.model import Config, Mistral, rotary
from zephyr.packing import Group, Pack

HF_ABSOLUTE = 1e-4  # log-probs of two float32 programs; 30 layers measure 3e-5, three 4e-6
HF_LOGITS = 1e-5  # the same for logits, relative to the largest; three layers measure 1e-6
FLOAT64 = 1e-10  # two float64 programs that sum in another order measure 3e-15
LENGTH = 24  # of a random text: longer than the windows here
SMALL = Config(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # not hidden_size / heads, on purpose
    rms_norm_eps=1e-3,
    rope_theta=500.0,
    max_position_embeddings=256,
    sliding_window=5,
)


def error(a, b):
    return float((a - b).abs().max() / b.abs().max())


def pack_of(texts):
    """All texts in one pack; every token but a text's first is a target."""
    masks = [[False] + [True] * (len(text) - 1) for text in texts]
    return Pack.from_groups([Group([], [t], [m]) for t, m in zip(texts, masks, strict=True)])


def random_texts(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL.vocab_size, (n, LENGTH), generator=generator).tolist()


def log_probs_of(logits, text):
    """(T, V) logits of a whole text -> (T - 1,) log-probs of its tokens but the first."""
    return logits[:-1].log_softmax(-1).gather(-1, torch.tensor(text[1:])[:, None]).squeeze(-1)


def randomise(model, std):
    """Weights large enough that attention is far from uniform, norms away from 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))


def twins(config):
    """A random model in transformers, and ours with the same weights, float32."""
    sizes = asdict(config)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    hf_config = MistralConfig(**sizes, rope_parameters=rope)
    theirs = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").eval()
    randomise(theirs, 0.2)
    ours = Mistral(config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def oracle_twin(config, dtype=torch.float64):
    """Ours with chapter 0's random weights, and those weights."""
    weights = reference.random_weights(asdict(config), seed=3)
    weights = {name: w if w.ndim == 1 else 4 * w for name, w in weights.items()}  # attention peaks
    state = {"lm_head.weight": weights["model.embed_tokens.weight"]} | weights
    model = Mistral(config).to(dtype)
    model.load_state_dict(state)
    return model, weights


@torch.no_grad()
def test_smollm2_gives_the_log_probs_of_transformers_on_real_texts(shared, smollm2):
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    lines = (shared / "real" / "sft_dev.jsonl").read_text().splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    ids = [tokenizer.encode("\n".join(m["content"] for m in messages)).ids for messages in rows]
    texts = [text[:200] for text in ids if len(text) >= 180][:8]
    assert len(texts) == 8
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2, attn_implementation="eager", dtype=torch.float32
    )
    ours = zephyr.load_model(smollm2)
    all_logits = [theirs(torch.tensor([text])).logits[0] for text in texts]
    expected = torch.cat([log_probs_of(*pair) for pair in zip(all_logits, texts, strict=True)])
    logps = ours(pack_of(texts))
    assert logps.shape == expected.shape
    assert (logps - expected).abs().max() <= HF_ABSOLUTE
    assert logps.mean() > -3  # a model that reads English, not noise that two programs agree on
    assert error(ours(torch.tensor(texts[0])), all_logits[0]) <= HF_LOGITS


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kv_heads", "window"), [(4, 5), (2, 5), (1, 3), (2, 1), (2, None)])
@torch.no_grad()
def test_a_random_mistral_gives_the_numbers_of_transformers(kv_heads, window, tied):
    sizes = {"num_key_value_heads": kv_heads, "sliding_window": window}
    ours, theirs = twins(replace(SMALL, tie_word_embeddings=tied, **sizes))
    texts = random_texts(3, seed=2)
    all_logits = theirs(torch.tensor(texts)).logits
    expected = [log_probs_of(*pair) for pair in zip(all_logits, texts, strict=True)]
    assert (ours(pack_of(texts)) - torch.cat(expected)).abs().max() <= HF_ABSOLUTE
    for text, logits in zip(texts, all_logits, strict=True):
        assert error(ours(torch.tensor(text)), logits) <= HF_LOGITS


@pytest.mark.parametrize("change", [{"sliding_window": 6}, {"rope_theta": 510.0}])
@torch.no_grad()
def test_the_comparison_would_notice_a_window_or_a_theta_slightly_off(change):
    ours, _ = twins(SMALL)
    other = Mistral(replace(SMALL, **change))
    other.load_state_dict(ours.state_dict())
    pack = pack_of(random_texts(3, seed=2))
    assert (ours(pack) - other(pack)).abs().max() > 100 * HF_ABSOLUTE


def test_the_default_config_is_mistral_7b_to_the_parameter():
    with torch.device("meta"):
        model = Mistral(Config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_241_732_096
    assert Config().n_parameters == 7_241_732_096


@pytest.mark.parametrize("tied", [False, True])
def test_n_parameters_counts_tied_embeddings_once(tied):
    config = replace(SMALL, tie_word_embeddings=tied)
    counted = sum(parameter.numel() for parameter in Mistral(config).parameters())
    assert config.n_parameters == counted
    weights = reference.random_weights(asdict(config), seed=0)
    assert counted == sum(weight.numel() for weight in weights.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [1, 3, 7, None])
@torch.no_grad()
def test_float64_logits_and_log_probs_are_chapter_0s(window, tied):
    config = replace(SMALL, sliding_window=window, tie_word_embeddings=tied)
    model, weights = oracle_twin(config)
    texts = random_texts(2, seed=4)
    for text in texts:
        expected = reference.logits(weights, asdict(config), text)
        assert error(model(torch.tensor(text)), expected) <= FLOAT64
    mask = [False] + [True] * (LENGTH - 1)
    rows = [reference.log_probs(weights, asdict(config), text, mask) for text in texts]
    assert error(model(pack_of(texts)), torch.cat(rows)) <= FLOAT64


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
@torch.no_grad()
def test_log_probs_are_at_least_float32_whatever_the_models_dtype(dtype, expected):
    model, _ = oracle_twin(SMALL, dtype)
    logps = model(pack_of(random_texts(2, seed=4)))
    assert logps.dtype == expected
    # computed so finely, not widened at the end: coarser numbers would survive the way back
    coarser = torch.float32 if dtype == torch.float64 else torch.bfloat16
    assert (logps != logps.to(coarser).to(expected)).float().mean() > 0.9
    assert model(torch.tensor([1, 2, 3])).dtype == dtype


@torch.no_grad()
def test_a_bf16_model_is_as_near_to_chapter_0_as_bf16_allows():
    model, weights = oracle_twin(SMALL, torch.bfloat16)
    text = random_texts(1, seed=4)[0]
    mask = [False] + [True] * (LENGTH - 1)
    expected = reference.log_probs(weights, asdict(SMALL), text, mask)
    # bf16 rounds each number by up to 2^-9 of itself; three layers of that measure 6e-3
    assert error(model(pack_of([text])), expected) <= 2**-6


def test_bf16_does_not_blur_positions():
    """Pair 0 turns by one radian a position: cos(257) and cos(258) differ by far more than 1e-4,
    but bf16 has one number for both positions. float32 angles below 512 are right to 2^-15."""
    cos, sin = rotary(torch.tensor([0, 257, 258]), SMALL, torch.bfloat16)
    assert cos.shape == sin.shape == (3, 1, SMALL.head_dim // 2)
    for place, position in enumerate([0, 257, 258]):
        assert float(cos[place, 0, 0]) == pytest.approx(math.cos(position), abs=1e-4)
        assert float(sin[place, 0, 0]) == pytest.approx(math.sin(position), abs=1e-4)


@torch.no_grad()
def test_init_weights_depends_on_the_seed_alone_and_has_the_configs_spread():
    config = replace(SMALL, initializer_range=0.05)
    first, again, other = (Mistral(config).init_weights(seed) for seed in (5, 5, 6))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert not torch.equal(parameter, other.get_parameter(name))
            # the spread of 1,500 or more draws is right to 10% (five standard errors) or better
            assert float(parameter.std()) == pytest.approx(0.05, rel=0.1)
            assert abs(float(parameter.mean())) < 0.005  # four standard errors
