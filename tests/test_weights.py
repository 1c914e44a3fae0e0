"""Model folders: what we write is read by transformers and by us, to the bit; what transformers 4
and 5 write is read by us; and whatever is not this model, or is damaged, is refused by name.

The published configs below are those of the Hub, their parameter counts those of the model cards.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
)

import zephyr
from zephyr import demo, weights
from zephyr.model import Config, Mistral
from zephyr.packing import Group, Pack

HF_ABSOLUTE = 1e-4  # log-probs of two float32 programs; this size measures 4e-6
# Wide random weights make attention matter; the window is shorter than TEXT.
CONFIG = replace(demo.TINY, initializer_range=0.2, sliding_window=16)
NAME = "model.layers.1.mlp.up_proj.weight"
TEXT = (
    "A checkpoint is a folder of tensors. It is written under another name and renamed when every "
    "rank is done, so what bears the name is whole, and can be read by any number of ranks."
)
MISTRAL_V1 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_V3 = MISTRAL_V1 | {
    "attention_dropout": 0.0,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
SMOLLM2 = LLAMA_2 | {
    "attention_bias": False,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder of ours: untied, windowed, float32."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    samples = Path(__file__).parent.parent / "data" / "samples"
    demo.build_tiny(folder, sorted(samples.glob("*.jsonl")), CONFIG)
    return folder


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of `tiny` to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def random_model(seed=1, **changes):
    return Mistral(replace(CONFIG, **changes)).init_weights(seed)


def same_weights(a, b):
    """Whether two models have the same parameters, to the bit."""
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def write_config(folder, raw):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def change_config(folder, **changes):
    write_config(folder, json.loads((folder / "config.json").read_text()) | changes)


def change_tensors(folder, remove=(), **add):
    """Rewrite a folder's one file of weights; in a name in `add`, __ stands for a point."""
    path = folder / "model.safetensors"
    tensors = {name: x for name, x in load_file(path).items() if name not in remove}
    added = {name.replace("__", "."): x for name, x in add.items()}
    save_file(tensors | added, path, metadata={"format": "pt"})


def hf_model(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )


@torch.no_grad()
def hf_log_probs(model, ids):
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)


@torch.no_grad()
def log_probs(model, ids):
    return model(Pack.from_groups([Group([], [ids], [[False] + [True] * (len(ids) - 1)])]))


# Round trips.


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_back_to_the_bit(tiny, tmp_path, tied):
    model = random_model(tie_word_embeddings=tied)
    zephyr.save_model(model, zephyr.load_tokenizer(tiny), tmp_path)
    again = zephyr.load_model(tmp_path)
    assert again.config == model.config
    assert same_weights(again, model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_loading_converts_to_the_dtype_asked_for(tiny):
    stored = load_file(tiny / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        loaded = dict(zephyr.load_model(tiny, dtype=dtype).named_parameters())
        assert {parameter.dtype for parameter in loaded.values()} == {dtype}
        assert all(torch.equal(loaded[name], stored[name].to(dtype)) for name in stored)


def test_saving_in_bf16_rounds_once_and_says_so(tiny, tmp_path):
    model = random_model()
    zephyr.save_model(model, zephyr.load_tokenizer(tiny), tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter.to(torch.bfloat16))
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [16, None])
def test_transformers_reads_an_exported_folder_and_we_read_what_it_writes(
    tiny, tmp_path, window, tied
):
    model = random_model(sliding_window=window, tie_word_embeddings=tied)
    zephyr.save_model(model, zephyr.load_tokenizer(tiny), tmp_path / "ours")
    theirs, tokenizer = (
        hf_model(tmp_path / "ours"),
        AutoTokenizer.from_pretrained(tmp_path / "ours"),
    )
    ids = tokenizer(TEXT).input_ids
    assert ids == zephyr.load_tokenizer(tmp_path / "ours").encode(TEXT)
    assert len(ids) > 3 * CONFIG.sliding_window
    expected = hf_log_probs(theirs, ids)
    assert (log_probs(model, ids) - expected).abs().max() <= HF_ABSOLUTE
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert zephyr.load_tokenizer(tmp_path / "theirs").encode(TEXT) == ids
    again = zephyr.load_model(tmp_path / "theirs")
    assert again.config == model.config
    assert same_weights(again, model)


def test_a_big_model_is_saved_in_shards_with_an_index(tiny, tmp_path, monkeypatch):
    model, limit = random_model(), 100_000  # the embedding alone is larger: a shard of its own
    monkeypatch.setattr(weights, "SHARD_BYTES", limit)
    zephyr.save_model(model, zephyr.load_tokenizer(tiny), tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / weights.INDEX).read_text())
    names = {name for name, _ in model.named_parameters()}
    assert index["weight_map"].keys() == names
    assert index["metadata"]["total_size"] == 4 * model.config.n_parameters
    for file in files:
        tensors = load_file(tmp_path / file)
        assert set(tensors) == {n for n, shard in index["weight_map"].items() if shard == file}
        assert len(tensors) == 1 or sum(4 * x.numel() for x in tensors.values()) <= limit
    assert same_weights(zephyr.load_model(tmp_path), model)
    assert same_weights(hf_model(tmp_path), model)


@pytest.mark.parametrize("limits", [(100_000, 10**9), (10**9, 100_000), (100_000, 300_000)])
def test_saving_over_an_older_model_leaves_nothing_of_it(tiny, tmp_path, monkeypatch, limits):
    """transformers prefers model.safetensors to an index, we the index: a file left over from the
    older layout would make one folder two models."""
    tokenizer = zephyr.load_tokenizer(tiny)
    for seed, limit in enumerate(limits):
        monkeypatch.setattr(weights, "SHARD_BYTES", limit)
        zephyr.save_model(random_model(seed), tokenizer, tmp_path)
    newest = random_model(seed=1)
    assert same_weights(zephyr.load_model(tmp_path), newest)
    assert same_weights(hf_model(tmp_path), newest)
    if (tmp_path / weights.INDEX).exists():
        index = json.loads((tmp_path / weights.INDEX).read_text())
        expected = set(index["weight_map"].values())
    else:
        expected = {"model.safetensors"}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == expected


# config.json.


@pytest.mark.parametrize(
    ("raw", "n_parameters"),
    [
        (MISTRAL_V1, 7_241_732_096),
        (MISTRAL_V3, 7_248_023_552),
        (LLAMA_2, 6_738_415_616),
        (SMOLLM2, 134_515_008),
    ],
    ids=["Mistral-7B-v0.1", "Mistral-7B-v0.3", "Llama-2-7b", "SmolLM2-135M"],
)
def test_the_published_configs_are_read(tmp_path, raw, n_parameters):
    config = weights.read_config(write_config(tmp_path, raw))
    assert config.n_parameters == n_parameters
    for name, value in asdict(config).items():
        if name in raw:
            assert value == raw[name], name
    assert config.head_dim == raw["hidden_size"] // raw["num_attention_heads"]
    assert config.rope_theta == raw.get("rope_theta", 10000.0)
    assert config.sliding_window == raw.get("sliding_window")


def test_mistral_v1_is_the_default_config(tmp_path):
    assert weights.read_config(write_config(tmp_path, MISTRAL_V1)) == Config()


@pytest.mark.parametrize("raw", [MISTRAL_V1, MISTRAL_V3, LLAMA_2, SMOLLM2])
def test_the_spelling_of_transformers_5_means_the_same(tmp_path, raw):
    """transformers itself turns the old spelling into the new one."""
    old = write_config(tmp_path / "old", raw)
    AutoConfig.from_pretrained(old).save_pretrained(tmp_path / "new")
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= new.keys()
    assert not {"rope_theta", "torch_dtype"} & new.keys()
    assert weights.read_config(tmp_path / "new") == weights.read_config(old)


@pytest.mark.parametrize("model_type", ["mistral", "llama"])
def test_keys_left_out_mean_what_they_mean_to_transformers(tmp_path, model_type):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 16, "max_position_embeddings": 128}
    write_config(tmp_path, {"model_type": model_type} | sizes)
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = asdict(weights.read_config(tmp_path))
    assert ours.pop("rope_theta") == theirs.rope_parameters["rope_theta"]
    assert ours == {name: getattr(theirs, name, None) for name in ours}


@pytest.mark.parametrize("config_class", [MistralConfig, LlamaConfig])
def test_a_head_width_of_its_own_is_read(tmp_path, config_class):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config_class(hidden_size=96, **heads).save_pretrained(tmp_path)
    assert weights.read_config(tmp_path).head_dim == 32


def test_the_first_of_several_eos_ids_is_taken(tmp_path):
    write_config(tmp_path, MISTRAL_V1 | {"eos_token_id": [7, 2]})
    assert weights.read_config(tmp_path).eos_token_id == 7


@pytest.mark.parametrize("window", [16, None])
@pytest.mark.parametrize("tied", [False, True])
def test_a_written_config_has_the_old_spelling_and_is_read_back_by_all(tmp_path, window, tied):
    config = replace(
        CONFIG, sliding_window=window, tie_word_embeddings=tied, rope_theta=5e4, rms_norm_eps=1e-3
    )
    write_config(tmp_path, weights.config_json(config, torch.bfloat16))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["rope_theta"] == 5e4
    assert raw["torch_dtype"] == "bfloat16"
    assert weights.read_config(tmp_path) == config
    theirs = AutoConfig.from_pretrained(tmp_path)
    expected = asdict(config)
    assert theirs.rope_parameters["rope_theta"] == expected.pop("rope_theta")
    assert theirs.dtype == torch.bfloat16
    assert {name: getattr(theirs, name, None) for name in expected} == expected


REFUSED = {
    "rope scaling, oldest spelling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "linear",
    ),
    "rope scaling, transformers 4": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling.*llama3",
    ),
    "rope scaling, transformers 5": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
        "rope_.*yarn",
    ),
    "rope scaling, transformers 5, the old key empty": (
        {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        "rope_.*yarn",
    ),
    "rope scaling, both spellings at odds": (  # transformers obeys rope_scaling
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "rope_scaling.*linear",
    ),
    "partial rotary": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "attention biases": ({"attention_bias": True}, "attention_bias = true"),
    "MLP biases": ({"mlp_bias": True}, "mlp_bias = true"),
    "another activation": ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
    "another model": ({"model_type": "qwen2"}, 'model_type = "qwen2"'),
    "no model type": ({"model_type": None}, "model_type = null"),
    "quantization": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config.*gptq",
    ),
    "layers of several kinds": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types",
    ),
    "a size missing": ({"hidden_size": None}, "hidden_size must be a positive number, found None"),
    "a size that is text": ({"vocab_size": "32000"}, "vocab_size must be .* found '32000'"),
    "heads that do not divide": ({"num_key_value_heads": 7}, "32 heads.*num_key_value_heads"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_this_model_is_refused_by_name(tmp_path, changes, message):
    write_config(tmp_path, MISTRAL_V1 | changes)
    with pytest.raises(ValueError, match=message) as caught:
        weights.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "rope_type", [{"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}]
)
def test_rope_that_is_not_scaled_is_accepted_in_all_spellings(tmp_path, rope_type):
    write_config(tmp_path, MISTRAL_V1 | rope_type)
    assert weights.read_config(tmp_path) == Config()


@pytest.mark.parametrize("text", ['{"model_type": "mis', "[]", ""])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"config.json: not JSON|config.json: expected a JSON object"
    ):
        weights.read_config(tmp_path)


def test_a_folder_without_config_or_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file"):
        zephyr.load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        zephyr.load_model(folder)


# Tensors.


def test_a_missing_tensor_is_named(folder):
    change_tensors(folder, remove={NAME})
    with pytest.raises(ValueError, match=rf"lack the tensor {NAME}$"):
        zephyr.load_model(folder)


def test_several_missing_tensors_are_counted(folder):
    change_tensors(folder, remove={NAME, "model.norm.weight", "lm_head.weight"})
    with pytest.raises(ValueError, match=r"lm_head.weight \(and 2 more\)"):
        zephyr.load_model(folder)


def test_an_unknown_tensor_is_named(folder):
    change_tensors(folder, model__layers__1__self_attn__q_proj__bias=torch.zeros(64))
    message = r"no tensor model.layers.1.self_attn.q_proj.bias$"
    with pytest.raises(ValueError, match=message):
        zephyr.load_model(folder)


def test_a_layer_too_many_in_the_file_is_refused(folder):
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"no tensor model.layers.1.*and 8 more"):
        zephyr.load_model(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    change_config(folder, intermediate_size=128)
    with pytest.raises(ValueError, match=r"mlp.*\(160, 64\), the config asks for \(128, 64\)"):
        zephyr.load_model(folder)


def test_a_tensor_with_more_columns_is_refused_though_its_rows_fit(folder):
    change_tensors(folder, remove={NAME}, **{NAME: torch.zeros(160, 65)})
    with pytest.raises(ValueError, match=rf"{NAME} has shape \(160, 65\)"):
        zephyr.load_model(folder)


def test_rotary_frequencies_that_old_files_store_are_ignored(folder, tiny):
    name = "model__layers__{}__self_attn__rotary_emb__inv_freq"
    change_tensors(folder, **{name.format(i): torch.ones(8) for i in range(2)})
    assert same_weights(zephyr.load_model(folder), zephyr.load_model(tiny))


def test_a_tied_model_may_store_its_head_a_second_time(tiny, tmp_path):
    model = random_model(tie_word_embeddings=True)
    zephyr.save_model(model, zephyr.load_tokenizer(tiny), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    change_tensors(tmp_path, lm_head__weight=model.lm_head.weight.detach().clone())
    assert same_weights(zephyr.load_model(tmp_path), model)


# Files.


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_named(folder, kept):
    """Cut to nothing, inside the length, the header or the data, or by its last byte."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged or truncated"):
        zephyr.load_model(folder)


def write_index(folder, file):
    """Give a folder an index that says model.norm.weight is in `file`, the rest where it is."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": file}
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def outside(folder):
    """A good file beside the folder that holds the final norm."""
    path = folder.parent / "outside.safetensors"
    save_file({"model.norm.weight": torch.ones(64)}, path)
    change_tensors(folder, remove={"model.norm.weight"})
    return path


@pytest.mark.parametrize("kind", ["up", "absolute", "below", "link"])
def test_an_index_that_points_out_of_the_folder_is_refused(folder, kind):
    path = outside(folder)
    (folder / "below").mkdir()
    shutil.copy(path, folder / "below" / "x.safetensors")
    (folder / "link.safetensors").symlink_to(path)
    names = {"up": "../outside.safetensors", "absolute": str(path)}
    names |= {"below": "below/x.safetensors", "link": "link.safetensors"}
    write_index(folder, file=names[kind])
    with pytest.raises(ValueError, match="is not a file of this folder") as caught:
        zephyr.load_model(folder)
    assert names[kind] in str(caught.value)
    assert weights.INDEX in str(caught.value)


def test_the_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    """huggingface_hub's cache: snapshots/REVISION/name is a link to blobs/HASH."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.parent.mkdir()
    write_index(folder, file="model.safetensors")
    folder.rename(snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "1234")
    (snapshot / "model.safetensors").symlink_to(blobs / "1234")
    assert zephyr.load_model(snapshot).config == CONFIG


def test_a_shard_that_is_not_there_is_named(folder):
    write_index(folder, file="model-00002-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors: no such file"):
        zephyr.load_model(folder)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', "[", '{"weight_map": {}}'])
def test_an_index_that_is_none_is_named(folder, text):
    (folder / weights.INDEX).write_text(text)
    with pytest.raises(ValueError) as caught:
        zephyr.load_model(folder)
    assert weights.INDEX in str(caught.value) or "lack the tensor" in str(caught.value)


# Does it fit?


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tiny):
    weights.check_fits(tiny, CONFIG, vocab_size=512, max_length=64)
    weights.check_fits(tiny, CONFIG, vocab_size=500, max_length=64)  # a padded embedding
    with pytest.raises(ValueError, match=r"tiny: the tokenizer has 513 ids.* 512 "):
        weights.check_fits(tiny, CONFIG, vocab_size=513, max_length=64)


def test_a_max_length_over_the_models_positions_is_refused(tiny):
    weights.check_fits(tiny, CONFIG, vocab_size=512, max_length=1024)
    with pytest.raises(ValueError, match=r"--max-length 1025.*max_position_embeddings 1024"):
        weights.check_fits(tiny, CONFIG, vocab_size=512, max_length=1025)


def test_weights_that_are_not_the_configs_are_found_before_any_work(folder):
    fits = {"vocab_size": 512, "max_length": 64}
    with pytest.raises(ValueError, match=r"mlp.*\(160, 64\), the config asks for \(128, 64\)"):
        weights.check_fits(folder, replace(CONFIG, intermediate_size=128), **fits)
    change_tensors(folder, remove={NAME})
    with pytest.raises(ValueError, match=rf"lack the tensor {NAME}$"):
        weights.check_fits(folder, CONFIG, **fits)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file"):
        weights.check_fits(folder, CONFIG, **fits)
