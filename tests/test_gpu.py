"""On a CUDA device: the kernels against a float64 oracle, a training step against the CPU's.

Skipped where there is no GPU. Needs torch, numpy, safetensors, tokenizers and pytest, nothing else.
bf16 has 8 bits, so one rounding is off by up to 2^-9 = 0.2%; attention's output and gradients round
several times, and 2% of the largest entry is what a correct kernel stays well under.
"""

import math

import pytest
import reference
import torch

from zephyr import attention, head
from zephyr.losses import branch_sums, dpo_loss
from zephyr.model import Config, Mistral
from zephyr.packing import Group, Pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BF16_TOLERANCE = 0.02
BACKENDS = ["torch", "sdpa"] + ["flash"] * attention.has_flash_attn()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).abs().max() / b.abs().max()).item()


def oracle(q, k, v, cu_q, cu_k, window):
    """Attention over segments in float64, every mask written out."""
    outputs, group = [], q.shape[1] // k.shape[1]
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        mask = attention.visible(b - a, d - c, window, q.device)
        keys = k[c:d].repeat_interleave(group, dim=1)
        values = v[c:d].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 2, 7, 100, 4096])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "lens_q", "lens_k"),
    [
        (32, 8, 128, [300, 1, 129], [300, 1, 129]),  # packed sequences
        (32, 8, 128, [257, 120, 64], [257, 320, 164]),  # shared prefixes: fewer queries than keys
        (9, 3, 64, [65, 3], [65, 300]),
        (4, 4, 32, [17, 40], [17, 40]),
    ],
)
def test_kernels_against_float64(backend, window, heads, kv_heads, width, lens_q, lens_k):
    torch.manual_seed(0)
    cu_q = [0, *torch.tensor(lens_q).cumsum(0).tolist()]
    cu_k = [0, *torch.tensor(lens_k).cumsum(0).tolist()]
    shapes = [(cu_q[-1], heads, width), (cu_k[-1], kv_heads, width), (cu_k[-1], kv_heads, width)]
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
    grad = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    narrow = [x.clone().requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    ends = [torch.tensor(cu, dtype=torch.int32, device="cuda") for cu in (cu_q, cu_k)]
    out = attention.BACKENDS[backend](*narrow, *ends, max(lens_q), max(lens_k), window)
    expected = oracle(*wide, cu_q, cu_k, window)
    assert error(out, expected) < BF16_TOLERANCE
    out.backward(grad)
    expected.backward(grad.double())
    for got, right in zip(narrow, wide):
        assert error(got.grad, right.grad) < BF16_TOLERANCE


@pytest.mark.parametrize("n_targets", [0, 1, 1000])
def test_the_head_accumulates_in_float32(n_targets):
    torch.manual_seed(0)
    hidden = torch.randn(n_targets, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(32000, 512, device="cuda", dtype=torch.bfloat16) / 8
    targets = torch.randint(32000, (n_targets,), device="cuda")
    narrow = [x.clone().requires_grad_() for x in (hidden, weight)]
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    got, right = head.log_probs(*narrow, targets), head.log_probs_naive(*wide, targets)
    assert got.dtype == torch.float32
    got.sum().backward()
    right.sum().backward()
    if n_targets:
        assert error(got, right) < 1e-5  # bf16 logits would be off by 1e-3
        assert error(narrow[0].grad, wide[0].grad) < BF16_TOLERANCE
        assert error(narrow[1].grad, wide[1].grad) < BF16_TOLERANCE
    else:
        assert not narrow[1].grad.any()


TINY = Config(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=9,
)


def groups(seed: int) -> list[Group]:
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(97, (n,), generator=generator).tolist()

    sizes = [(11, 7, 20), (1, 5, 3), (30, 2, 25)]
    return [Group(ids(p), [ids(a), ids(b)], [[True] * a, [True] * b]) for p, a, b in sizes]


def dpo_gradients(model: Mistral, pack: Pack) -> dict[str, torch.Tensor]:
    sums = branch_sums(model(pack), pack).view(-1, 2)
    losses, _, _ = dpo_loss(*sums.T, *torch.zeros_like(sums).T, beta=0.1)
    losses.mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["sdpa", *BACKENDS])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_dpo_gradient_is_the_oracles(backend, share_prefix):
    """float32 on the SDPA loop within 1e-5, bf16 on the kernels within the noise of bf16."""
    weights = reference.random_weights(vars(TINY), seed=0)
    dtype = torch.float32 if backend == "sdpa" else torch.bfloat16
    model = Mistral(TINY, attention.BACKENDS[backend]).to("cuda", dtype)
    model.load_state_dict(weights)
    gradients = dpo_gradients(model, Pack.from_groups(groups(0), share_prefix).to("cuda"))
    oracle_model = Mistral(TINY).double()
    oracle_model.load_state_dict(weights)
    expected = dpo_gradients(oracle_model, Pack.from_groups(groups(0), share_prefix=False))
    for name, grad in expected.items():
        assert error(gradients[name], grad) < (1e-5 if dtype == torch.float32 else 0.1), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_layer_of_the_7b(backend):
    """The real widths, a window that bites: log-probs in bf16 against float32 on the same
    device."""
    config = Config(num_hidden_layers=1, sliding_window=256)
    with torch.device("cuda"):
        model = Mistral(config, attention.BACKENDS[backend])
    model.init_weights(0)
    wide = Mistral(config).to("cuda")
    wide.load_state_dict(model.state_dict())
    ids = torch.randint(32000, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    pack = Pack.from_groups([Group(ids[:1], [ids[1:]], [[True] * 599])]).to("cuda")
    with torch.no_grad():
        difference = (model.bfloat16()(pack) - wide(pack)).abs().max().item()
    assert difference < 0.1  # nats, of about 10


def test_fsdp_trains_a_step_as_the_cpu_does(tmp_path):
    """One rank, float32: build, forward, backward and AdamW through parallel.py on the GPU."""
    from zephyr import distributed, optim, parallel
    from zephyr.weights import config_json, load_weights, save_weights

    model = Mistral(TINY).init_weights(0)
    import json

    (tmp_path / "config.json").write_text(json.dumps(config_json(TINY, torch.float32)))
    save_weights(model, tmp_path, torch.float32, write=True)
    world = distributed.start()
    try:
        sharded = parallel.build(TINY, world, "fp32")
        assert sharded.model.layers[0].self_attn.attend is attention.sdpa
        results = []
        for built, device in ((sharded, "cuda"), (model, "cpu")):
            load_weights(built, tmp_path)
            optimizer = optim.adamw(built)
            for _ in range(3):
                dpo_gradients(built, Pack.from_groups(groups(0)).to(device))
                norm = optim.update(optimizer, 1e-3, 1.0)
            results.append((norm, dict(built.named_parameters())))
        (gpu_norm, gpu), (cpu_norm, cpu) = results
        assert error(gpu_norm, cpu_norm) < 1e-4
        for name, parameter in cpu.items():
            assert error(gpu[name].full_tensor(), parameter) < 1e-3, name
    finally:
        torch.distributed.destroy_process_group()
