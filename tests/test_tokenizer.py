"""Our tokenizer, held against ids written down by hand and against four other programs: the
`tokenizers` library on the same file, `sentencepiece` on the other, transformers' own loading of
both real tokenizers (Mistral-7B's and SmolLM2's), and transformers on the folders that we save."""

import json
import random
import shutil
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from zephyr import chat, demo, load_tokenizer
from zephyr.tokenizer import CHAT_TEMPLATE, Tokenizer

SAMPLES = Path(__file__).resolve().parent.parent / "data" / "samples"

# A conversation in Zephyr's format and what Mistral's tokenizer makes of it: role marks are plain
# text of several pieces, and the text after each eos begins with a lone space mark, 28705.
GOLDEN_TEXT = "<|system|>\n</s>\n<|user|>\nHello!</s>\n<|assistant|>\nBonjour!</s>\n"
# fmt: off
GOLDEN_IDS = [
    1,
    523, 28766, 6574, 28766, 28767, 13, 2,  # <|system|>
    28705, 13, 28789, 28766, 1838, 28766, 28767, 13, 16230, 28808, 2,  # <|user|> Hello!
    28705, 13, 28789, 28766, 489, 11143, 28766, 28767, 13, 28244, 18777, 28808, 2,  # Bonjour!
    28705, 13,
]
# fmt: on

PIECES = [  # what is glued together into hostile texts
    *("", "a", " ", "  ", "       ", "\t", "\t\t", "\n", "\n\n\n", "\r\n", " \n ", "\x00", "\x01"),
    *("\x1b[31m", "\x7f", "\u200b", "\u200d", "\ufeff", "\ufffd", "\u2028", "\u00a0", "\u3000"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "<0xFF>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<", "/s>", "<<s>>", "</", "s>", "<|", "|>", "<|assistant|>\n", "<|user|>\n", "[INST]"),
    *("\u00e9", "e\u0301", "\u00df", "\ufb01", "\uff21", "\u01c5", "\u4e2d\u6587"),
    *("\u65e5\u672c\u8a9e", "\ud55c\uad6d\uc5b4", "\u05e9\u05dc\u05d5\u05dd", "\u202e\u202c"),
    *("\u0645\u0631\u062d\u0628\u0627", "\u0928\u092e\u0938\u094d\u0924\u0947", "\U0001f600"),
    *("\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308"),
    *("\U0010ffff", "\U000e0001", "\U00012000", "\u2581", "\u0120", "\u010a"),
    *(
        "def f(x):\n\treturn x  # ok\n",
        "1234567890",
        "0.5e-7",
        "{'a': [1, 2]}",
        "https://a.b/c?d=e",
    ),
]


@pytest.fixture(scope="module")
def texts(shared):
    """1,000 texts: pieces alone, glued pieces, and real messages, some cut at an odd place."""
    rng = random.Random(0)
    real = []
    for path in sorted((shared / "real").glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in islice(file, 100):
                real += [text for text in strings(json.loads(line)) if text]
    real = [text[len(text) % 7 :][:500] for text in rng.sample(real, 400)]
    glued = ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(600 - len(PIECES))]
    return PIECES + real + glued


def strings(value):
    """All strings in a JSON value."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in strings(part)]


@pytest.fixture(scope="module")
def mistral(mistral_tokenizer):
    return load_tokenizer(mistral_tokenizer)


@pytest.fixture(scope="module")
def mistral_model(mistral_tokenizer, tmp_path_factory):
    """The same tokenizer from a folder that holds nothing but tokenizer.model."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copyfile(mistral_tokenizer / "tokenizer.model", folder / "tokenizer.model")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def smol(smollm2):
    return load_tokenizer(smollm2)


def folder_of(tmp_path, **files):
    """A folder with these files; a dict is written as JSON. `tokenizer_json` -> tokenizer.json."""
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else content
        data = text.encode() if isinstance(text, str) else text
        stem, _, suffix = name.rpartition("_")
        (tmp_path / f"{stem}.{suffix}").write_bytes(data)
    return tmp_path


# ---- encoding ----


@pytest.mark.parametrize("source", ["mistral", "mistral_model"])
def test_mistral_encodes_the_golden_conversation(source, request):
    tokenizer = request.getfixturevalue(source)
    assert tokenizer.encode(GOLDEN_TEXT, special_text=True) == GOLDEN_IDS
    assert tokenizer.encode(GOLDEN_TEXT, bos=False, special_text=True) == GOLDEN_IDS[1:]
    assert tokenizer.encode("</s>", bos=False) == [1867, 28713, 28767]  # text, no eos
    assert tokenizer.encode("\n", bos=False) == [28705, 13]
    assert tokenizer.encode("", bos=False) == []
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos) == (1, 2, "</s>")
    assert (tokenizer.vocab_size, tokenizer.adds_bos) == (32000, True)


def test_both_back_ends_agree_on_a_thousand_texts(mistral, mistral_model, texts):
    assert len(texts) == 1000
    for text in texts:
        for special_text in (False, True):
            one = mistral.encode(text, special_text=special_text)
            assert one == mistral_model.encode(text, special_text=special_text), repr(text)
        assert mistral.decode(one) == mistral_model.decode(one), repr(text)
        assert mistral.has_special_text(text) == mistral_model.has_special_text(text)


@settings(database=None, derandomize=True, deadline=None, max_examples=100)
@given(text=st.text())
def test_both_back_ends_agree_on_any_text(mistral, mistral_model, text):
    assert mistral.encode(text) == mistral_model.encode(text)


@pytest.mark.parametrize("folder", ["mistral_tokenizer", "smollm2"])
def test_special_text_gives_what_tokenizers_and_transformers_give(folder, request, texts):
    path = request.getfixturevalue(folder)
    library = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    transformers = AutoTokenizer.from_pretrained(path)
    ours = load_tokenizer(path)
    theirs = transformers(texts).input_ids
    for text, expected in zip(texts, theirs):
        ids = ours.encode(text, special_text=True)
        assert ids == library.encode(text).ids, repr(text)
        assert ids == expected, repr(text)


@pytest.mark.parametrize("source", ["mistral", "mistral_model", "smol"])
def test_text_never_becomes_a_control_token(source, request, texts):
    tokenizer = request.getfixturevalue(source)
    controls = set(range(17)) if source == "smol" else {0, 1, 2}  # <|endoftext|> ..., <unk> ...
    seen = set()
    for text in texts:
        assert not controls & set(tokenizer.encode(text, bos=False)), repr(text)
        assert not controls & set(tokenizer.encode(text, bos=False, at_start=False)), repr(text)
        seen |= controls & set(tokenizer.encode(text, bos=False, special_text=True))
    assert len(seen) >= 3  # the texts do hold the marks of control tokens


@pytest.mark.parametrize("source", ["mistral", "mistral_model", "smol"])
def test_decoding_gives_the_text_back(source, request, texts):
    tokenizer = request.getfixturevalue(source)
    for text in texts:
        # SentencePiece writes a space as U+2581, so it cannot tell the two apart.
        expected = text if source == "smol" else text.replace("\u2581", " ")
        assert tokenizer.decode(tokenizer.encode(text)) == expected, repr(text)


@pytest.mark.parametrize("source", ["mistral", "mistral_model", "smol"])
def test_decoding_hides_or_shows_control_tokens(source, request):
    tokenizer = request.getfixturevalue(source)
    ids = [*tokenizer.encode("One"), tokenizer.eos_id, *tokenizer.encode("two", bos=False)]
    assert tokenizer.eos not in tokenizer.decode(ids)
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown.count(tokenizer.eos) == 1
    assert shown.index("One") < shown.index(tokenizer.eos) < shown.index("two")
    assert tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False) == tokenizer.eos


# ---- bos ----


def test_bos_is_added_iff_the_tokenizer_adds_one(mistral, mistral_model, smol):
    for tokenizer in (mistral, mistral_model):
        assert tokenizer.encode("a") == [1, *tokenizer.encode("a", bos=False)]
    assert not smol.adds_bos
    assert smol.encode("a") == smol.encode("a", bos=False)
    assert len(smol.encode("a")) == 1


@pytest.mark.parametrize(
    ("folder", "file", "add_bos_token", "bos"),
    [
        ("mistral_tokenizer", "tokenizer.json", False, []),
        ("mistral_tokenizer", "tokenizer.model", False, []),
        ("mistral_tokenizer", "tokenizer.json", None, [1]),
        ("smollm2", "tokenizer.json", True, [1]),
        ("smollm2", "tokenizer.json", None, []),
    ],
)
def test_add_bos_token_overrides(folder, file, add_bos_token, bos, request, tmp_path):
    source = request.getfixturevalue(folder)
    shutil.copyfile(source / file, tmp_path / file)
    names = ("<|im_start|>", "<|im_end|>") if folder == "smollm2" else ("<s>", "</s>")
    config = {"bos_token": names[0], "eos_token": names[1], "add_bos_token": add_bos_token}
    tokenizer = Tokenizer(folder_of(tmp_path, tokenizer_config_json=config))
    assert tokenizer.encode("Hi") == bos + tokenizer.encode("Hi", bos=False)
    assert tokenizer.encode("") == bos


def words(prepend_scheme=None, nested=False):
    """A small BPE with <unk> <s> </s>; with Metaspace if a prepend_scheme is given."""
    small = tokenizers.Tokenizer(models.BPE())
    if prepend_scheme:
        small.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    if nested:
        parts = [small.pre_tokenizer, pre_tokenizers.Digits(individual_digits=True)]
        small.pre_tokenizer = pre_tokenizers.Sequence(parts)
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    text = "hello world, how are you? <|system|>\n<|user|>\n<|assistant|>\n"
    small.train_from_iterator([text, "so hello", "a world"] * 3, trainer)
    return small


def test_a_post_processor_that_adds_only_eos_adds_no_bos(tmp_path):
    small = words()
    small.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = Tokenizer(folder_of(tmp_path, tokenizer_json=small.to_str()))
    assert small.encode("hello").ids[0] != 1
    assert tokenizer.encode("hello")[0] != 1
    assert not tokenizer.adds_bos


@pytest.mark.parametrize("nested", [False, True], ids=["metaspace", "sequence"])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_leading_space_mark_stands_where_the_library_puts_it(scheme, nested, tmp_path):
    small = words(scheme, nested)
    tokenizer = Tokenizer(folder_of(tmp_path, tokenizer_json=small.to_str()))
    for text in (
        *("hello", "hello</s>world", " hello</s> world", "</s>hello", "<s>hello</s></s>so world"),
        *("", "</s>", "hello</s>", "<s></s> hello", "a world<s>"),
    ):
        assert tokenizer.encode(text, special_text=True) == small.encode(text).ids, text
    # A turn after eos, encoded on its own, is what the library makes of it in its place.
    for turn in ("hello", " world", "\nhello"):
        whole = small.encode(f"so</s>{turn}").ids
        assert tokenizer.encode(turn, at_start=False) == whole[whole.index(2) + 1 :]
    marks = {"first": "\u2581h", "always": "\u2581\u2581", "never": "hh"}  # at the start, later
    for at_start, mark in zip((True, False), marks[scheme]):
        first = small.id_to_token(tokenizer.encode("hello", at_start=at_start)[0])
        assert first.startswith(mark)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    assert chat.encode(tokenizer, messages)[0] == small.encode(chat.render(messages)).ids


# ---- damaged folders ----

SMALL = words().to_str()


@pytest.mark.parametrize(
    "content",
    [b"", SMALL[:400].encode(), b"[]", b"{}", b"null", b"\xff\xfe" + SMALL.encode()],
    ids=["empty", "cut short", "list", "no model", "null", "no UTF-8"],
)
def test_a_damaged_tokenizer_json_is_named(content, tmp_path):
    path = folder_of(tmp_path, tokenizer_json=content) / "tokenizer.json"
    with pytest.raises(ValueError) as error:
        Tokenizer(tmp_path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("damage", ["empty", "cut short", "half", "a pointer", "noise"])
def test_a_damaged_tokenizer_model_is_named(damage, mistral_tokenizer, tmp_path):
    whole = (mistral_tokenizer / "tokenizer.model").read_bytes()
    content = {
        "empty": b"",
        "cut short": whole[:-10],
        "half": whole[: len(whole) // 2],
        "a pointer": b"version https://git-lfs.github.com/spec/v1\nsize 493443\n",
        "noise": random.Random(0).randbytes(3000),
    }[damage]
    path = folder_of(tmp_path, tokenizer_model=content) / "tokenizer.model"
    with pytest.raises(ValueError) as error:
        Tokenizer(tmp_path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff{}"),
        *(b'{"eos_token": 7}', b'{"bos_token": ["<s>"]}', b'{"eos_token": {"content": 7}}'),
        b'{"add_bos_token": "false"}',
    ],
)
def test_a_damaged_tokenizer_config_is_named(content, tmp_path):
    folder_of(tmp_path, tokenizer_json=SMALL, tokenizer_config_json=content)
    with pytest.raises(ValueError) as error:
        Tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "tokenizer_config.json"))


def test_a_damaged_special_tokens_map_is_named(tmp_path):
    folder_of(tmp_path, tokenizer_json=SMALL, special_tokens_map_json=b"{")
    with pytest.raises(ValueError) as error:
        Tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "special_tokens_map.json"))


def test_a_damaged_chat_template_is_named(tmp_path):
    folder_of(tmp_path, tokenizer_json=SMALL, chat_template_jinja=b"\xff{{ messages }}")
    with pytest.raises(ValueError) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path / "chat_template.jinja") in str(error.value)


def test_a_folder_without_a_tokenizer_is_no_such_file(tmp_path):
    folder_of(tmp_path, tokenizer_config_json={"eos_token": "</s>"})
    with pytest.raises(FileNotFoundError) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_eos_token_outside_the_vocabulary_is_named(tmp_path):
    config = {"eos_token": {"content": "<|end|>", "special": True}}
    folder_of(tmp_path, tokenizer_json=SMALL, tokenizer_config_json=config)
    with pytest.raises(ValueError, match=r"<\|end\|>") as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_names_of_bos_and_eos_come_from_the_config_then_the_map(tmp_path):
    tokens = {"bos_token": {"content": "</s>"}, "eos_token": "<unk>"}
    folder_of(tmp_path, tokenizer_json=SMALL, special_tokens_map_json=tokens)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos) == (2, 0, "<unk>")
    folder_of(tmp_path, tokenizer_config_json={"eos_token": "<s>"})
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos) == (2, 1, "<s>")


# ---- saved folders, read by transformers ----


@pytest.fixture(scope="module")
def real_conversations(shared):
    """300 real conversations: short ones, long ones, many turns."""
    with (shared / "real" / "sft_train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    several = [messages for messages in rows if len(messages) > 2]
    return several[:60] + rows[:: len(rows) // 240][:240]


@pytest.fixture(scope="module", params=["mistral", "smollm2", "tiny"])
def saved(request, tmp_path_factory):
    """(our tokenizer, chat.encode bound to it, transformers' tokenizer of the folder we saved)"""
    if request.param == "tiny":
        source = tmp_path_factory.mktemp("source")
        demo.build_tiny(source, [SAMPLES / "sft.jsonl"])
    else:
        name = {"mistral": "mistral_tokenizer"}.get(request.param, request.param)
        source = request.getfixturevalue(name)
    tokenizer = load_tokenizer(source)
    encode = chat.encoder(tokenizer, "zephyr")
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return tokenizer, encode, AutoTokenizer.from_pretrained(folder), folder


USER, SYSTEM = {"role": "user", "content": "Hi  there"}, {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": " \u00e9l\u00e8ve\n\n"}
SHAPES = [
    [USER, ANSWER],
    [SYSTEM, USER, ANSWER],
    [USER, ANSWER, USER, ANSWER],
    [SYSTEM, USER, ANSWER, USER],
    [{"role": "system", "content": ""}, USER],
    [USER, {"role": "assistant", "content": ""}],
]


def test_transformers_renders_the_saved_template_as_we_do(saved, real_conversations):
    tokenizer, _, transformers, _ = saved
    assert transformers.eos_token == tokenizer.eos
    for messages in SHAPES + real_conversations[:100]:
        for prompt in (False, True):
            assert transformers.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            ) == chat.render(messages, tokenizer.eos, prompt)


def test_transformers_gives_the_same_ids_for_real_conversations(saved, real_conversations):
    tokenizer, encode, transformers, _ = saved
    assert len(real_conversations) == 300
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    conversations = SHAPES + real_conversations
    texts = [chat.render(messages, tokenizer.eos) for messages in conversations]
    bare = transformers(texts, add_special_tokens=False).input_ids
    for messages, text, expected in zip(conversations, texts, bare):
        ids, _ = encode(messages)
        assert ids == bos + expected
        assert ids.count(tokenizer.bos_id) == len(bos)  # not twice
        if messages in SHAPES:
            assert ids == transformers(text).input_ids


def test_a_saved_folder_reads_back_as_the_same_tokenizer(saved, texts):
    tokenizer, _, _, folder = saved
    again = load_tokenizer(folder)
    assert again.chat_template == CHAT_TEMPLATE
    for name in ("bos_id", "eos_id", "eos", "adds_bos", "vocab_size"):
        assert getattr(again, name) == getattr(tokenizer, name)
    for text in texts[::10]:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, special_text=True) == tokenizer.encode(text, special_text=True)


def test_a_saved_sentencepiece_folder_reads_back_as_the_same_tokenizer(
    mistral_model, texts, tmp_path
):
    mistral_model.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.chat_template == CHAT_TEMPLATE
    for text in texts[::10]:
        assert again.encode(text, special_text=True) == (
            mistral_model.encode(text, special_text=True)
        )


def test_a_folder_saved_by_transformers_reads_as_the_same_tokenizer(
    mistral, mistral_tokenizer, texts, tmp_path
):
    transformers = AutoTokenizer.from_pretrained(mistral_tokenizer)
    transformers.chat_template = "{{ messages }}"
    transformers.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.chat_template == "{{ messages }}"
    for name in ("bos_id", "eos_id", "eos", "adds_bos", "vocab_size"):
        assert getattr(again, name) == getattr(mistral, name)
    for text in texts[::10]:
        assert again.encode(text) == mistral.encode(text)


@pytest.mark.parametrize("in_place", [False, True], ids=["elsewhere", "in place"])
def test_the_template_chosen_replaces_the_folder_s_own(in_place, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    folder_of(source, tokenizer_json=SMALL, chat_template_jinja="{{ 'an older template' }}")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "older still"}
    folder_of(source, tokenizer_config_json=config)
    tokenizer = load_tokenizer(source)
    assert tokenizer.chat_template == "{{ 'an older template' }}"
    chat.encoder(tokenizer, "zephyr")
    target = source if in_place else tmp_path
    tokenizer.save(target)
    assert load_tokenizer(target).chat_template == CHAT_TEMPLATE
    assert AutoTokenizer.from_pretrained(target).chat_template == CHAT_TEMPLATE


def test_the_eos_token_is_saved_where_the_config_has_none(tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": None}
    folder_of(tmp_path, tokenizer_json=SMALL, tokenizer_config_json=config)
    target = tmp_path / "saved"
    target.mkdir()
    load_tokenizer(tmp_path).save(target)
    transformers = AutoTokenizer.from_pretrained(target)
    assert transformers.eos_token == "</s>"
    assert transformers.apply_chat_template([USER], tokenize=False) == chat.render([USER])
