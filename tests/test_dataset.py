"""Rows -> counted examples, held against: the same rows in another file format; prefixes and
masks derived from the tokenizers library's encoding of the whole text; and truncation, dropping
and concatenation written a second time, token by token, from their description."""

import json
import random
from collections import Counter
from itertools import islice, takewhile

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr import chat, demo, hub, load_tokenizer
from zephyr.dataset import concatenate, load_dialogues, load_pairs, read_rows, report, truncate

BOS, EOS = 1, 2
LONG = 10**6  # a max_length that cuts nothing
random_cases = settings(database=None, derandomize=True, deadline=None, max_examples=250)


def talk(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": talk(prompt, chosen), "rejected": talk(prompt, rejected)}


def located(rows):
    return [(f"row {number}", row) for number, row in enumerate(rows)]


def speller(bos):
    """A stand-in for `chat.encode` in which a character is a token, so lengths are at hand: a turn
    is its role's mark (3 or 4), its characters, and eos; a generation prompt is the mark alone."""

    def encode(messages, generation_prompt=False):
        ids, mask = ([BOS], [False]) if bos else ([], [])
        for message in messages:
            learnt = message["role"] == "assistant"
            ids += [3 + learnt, *map(ord, message["content"]), EOS]
            mask += [False] + [learnt] * (len(message["content"]) + 1)
        return ids + [4] * generation_prompt, mask + [False] * generation_prompt

    return encode


def plain(groups):
    """Groups as plain lists, which can be compared."""
    return [
        (
            [int(i) for i in group.prefix],
            [[int(i) for i in branch] for branch in group.branches],
            [[bool(m) for m in mask] for mask in group.masks],
        )
        for group in groups
    ]


def n_dropped(counts):
    return sum(n for what, n in counts.items() if what.startswith("dropped"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(tokenizer, encode) of a small byte-level BPE, for tests that need no real data."""
    folder = tmp_path_factory.mktemp("tiny")
    demo.train_tokenizer(folder, [], 300)
    tokenizer = load_tokenizer(folder)
    return tokenizer, chat.encoder(tokenizer, "zephyr")


# ---- files ----


def h4_rows(n, seed=0):
    """Rows with the columns of HuggingFaceH4/ultrafeedback_binarized."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        prompt = f"Question {number}: {'why ' * rng.randint(1, 20)}\u2026?"
        good, bad = (f"{word} \U0001f600\n{rng.random()}" for word in ("Because", "Dunno"))
        rows.append(
            {
                **{"prompt": prompt, "prompt_id": f"{rng.getrandbits(256):064x}"},
                **{"chosen": talk(prompt, good), "rejected": talk(prompt, bad)},
                **{"messages": talk(prompt, good), "score_chosen": 8.5, "score_rejected": 3.0},
            }
        )
    return rows


def write_jsonl(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def write_parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    message = pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())])
    messages = [(name, pyarrow.list_(message)) for name in ("chosen", "rejected", "messages")]
    texts = [(name, pyarrow.string()) for name in ("prompt", "prompt_id")]
    scores = [(name, pyarrow.float64()) for name in ("score_chosen", "score_rejected")]
    schema = pyarrow.schema([f for f in texts + messages + scores if f[0] in rows[0]])
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    pyarrow.parquet.write_table(table, path, **options)
    return path


def both(name, tiny):
    """The file or split read as pairs and as dialogues."""
    source, encode = hub.resolve(str(name), "dataset"), tiny[1]
    pairs = load_pairs(read_rows(source), encode, Counter(), LONG, LONG, BOS)
    return plain(pairs), plain(load_dialogues(read_rows(source), encode, Counter(), LONG, "all"))


def test_jsonl_and_parquet_of_the_same_rows_give_the_same_examples(tmp_path, tiny):
    rows = h4_rows(300)  # the reader takes 256 at a time
    data = tmp_path / "hub" / "data"
    shard = "train_prefs-{:05d}-of-00002.parquet"
    write_parquet(data / shard.format(1), rows[270:])
    write_parquet(data / shard.format(0), rows[:270], row_group_size=100)
    for other in ("test_prefs", "train_sft"):  # splits that must not be read along
        write_parquet(data / f"{other}-00000-of-00001.parquet", h4_rows(3, seed=1))
    (data / "train_prefs.txt").write_text("no data")
    jsonl = write_jsonl(tmp_path / "rows.jsonl", rows)
    pairs, dialogues = both(jsonl, tiny)
    assert len(pairs) == len(dialogues) == 300
    assert both(f"{tmp_path / 'hub'}:train_prefs", tiny) == (pairs, dialogues)
    assert both(f"{tmp_path / 'hub'}:test_prefs", tiny)[0] != pairs
    everything = both(tmp_path / "hub", tiny)[0]  # no split: all files, by name
    assert everything[3:303] == pairs
    assert len(everything) == 306


def test_the_library_s_encoding_of_each_row_is_what_is_read(tmp_path, tiny):
    tokenizer, _ = tiny
    library = tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    rows = h4_rows(20)
    pairs, dialogues = both(write_jsonl(tmp_path / "rows.jsonl", rows), tiny)
    for row, (prefix, branches, _), ([first], [rest], _) in zip(rows, pairs, dialogues):
        chosen, rejected = (
            library.encode(chat.render(row[name])).ids for name in ("chosen", "rejected")
        )
        assert [prefix + branch for branch in branches] == [chosen, rejected]
        assert [first, *rest] == chosen


def test_blank_lines_and_line_ends_of_other_systems_are_no_rows(tmp_path, tiny):
    rows = h4_rows(3)
    lines = [json.dumps(row).encode() for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + b"\r\n\r\n".join(lines) + b"\r\n  \n")
    assert both(path, tiny) == both(write_jsonl(tmp_path / "plain.jsonl", rows), tiny)
    assert [where for where, _ in read_rows(hub.Source(path))] == [
        f"{path}:{number}" for number in (2, 4, 6)
    ]


# ---- errors ----

GOOD = pair("one", "two", "three")


def break_row(**changes):
    """A row like GOOD; a column set to None is left out."""
    return {name: value for name, value in (GOOD | changes).items() if value is not None}


def read_pairs(name, tiny):
    rows = read_rows(hub.resolve(str(name), "dataset"))
    return load_pairs(rows, tiny[1], Counter(), 1024, 512, BOS)


BAD_ROWS = {
    "no chosen": (break_row(chosen=None), "no column 'chosen'"),
    "no rejected": (break_row(rejected=None), "no column 'rejected'"),
    "unknown role": (
        break_row(chosen=[{"role": "human", "content": "one"}, *talk("", "two")[1:]]),
        "unknown role 'human'",
    ),
    "roles that do not alternate": (
        break_row(rejected=talk("one", "two")[::-1]),
        "do not alternate",
    ),
    "different prompts": (break_row(rejected=talk("One", "three")), "different prompts"),
    "another system turn": (
        break_row(chosen=[{"role": "system", "content": "x"}, *talk("one", "two")]),
        "different prompts",
    ),
    "no answer": (break_row(chosen=talk("one")), "end with an assistant message"),
    "no messages": (break_row(rejected=[]), "not empty"),
    "a content of no text": (
        break_row(chosen=[*talk("one"), {"role": "assistant", "content": None}]),
        "message 1 is not",
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_file(name, suffix, tmp_path, tiny):
    row, why = BAD_ROWS[name]
    rows = [GOOD, row] if suffix == "jsonl" or len(row) == 3 else [row]
    path = tmp_path / f"rows.{suffix}"
    {"jsonl": write_jsonl, "parquet": write_parquet}[suffix](path, rows)
    with pytest.raises(ValueError) as error:
        read_pairs(path, tiny)
    where = f"{path}:{len(rows)}" if suffix == "jsonl" else f"{path} row {len(rows)}"
    assert str(error.value).startswith(f"{where}: ")
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"prompt": "a"', "not JSON"),
        (b"plain words", "not JSON"),
        (b'{"prompt": "caf\xe9"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["chosen", "rejected"]', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"chosen": "two", "rejected": "three"}', "must be a list"),
        # Half of a surrogate pair is JSON, but no tokenizer takes it.
        (json.dumps(pair("\ud83d", "two", "three")).encode(), ""),
        (json.dumps(pair("one", "two", "three \udc80")).encode(), ""),
    ],
    ids=[
        *("cut", "words", "latin-1", "deep", "a list", "null", "text for messages"),
        *("half a character in a prompt", "half a character in an answer"),
    ],
)
def test_a_bad_line_is_named_with_its_file(line, why, tmp_path, tiny):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError) as error:
        read_pairs(path, tiny)
    assert str(error.value).startswith(f"{path}:3: ")
    assert why in str(error.value)


def test_a_bad_dialogue_is_named_with_its_file(tmp_path, tiny):
    for row, why in (
        ({"text": "a"}, "no column 'messages' (there are: text)"),
        ({"messages": talk("a", "b")[1:]}, "do not alternate"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "unknown role 'bot'"),
    ):
        path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk("a", "b")}, row])
        with pytest.raises(ValueError) as error:
            load_dialogues(read_rows(hub.Source(path)), tiny[1], Counter(), 99, "all")
        assert str(error.value).startswith(f"{path}:2: ")
        assert why in str(error.value)


def test_a_missing_file_is_named(tmp_path, tiny):
    for name in (f"{tmp_path}/rows.jsonl", f"{tmp_path}/none:train_prefs"):
        with pytest.raises(FileNotFoundError) as error:
            read_pairs(name, tiny)
        assert name in str(error.value)
    for name in ("rows.jsonl", "rows.parquet"):  # gone after it was found
        with pytest.raises(FileNotFoundError, match=name):
            list(read_rows(hub.Source(tmp_path / name)))


def test_a_folder_without_files_of_the_split_is_named(tmp_path, tiny):
    write_parquet(tmp_path / "data" / "train_sft-00000-of-00001.parquet", h4_rows(1))
    with pytest.raises(FileNotFoundError, match="test_prefs") as error:
        read_pairs(f"{tmp_path}:test_prefs", tiny)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("suffix", ["csv", "txt", "arrow"])
def test_a_file_of_another_kind_is_named(suffix, tmp_path, tiny):
    path = tmp_path / f"rows.{suffix}"
    path.write_text("prompt,chosen,rejected\n")
    with pytest.raises(ValueError, match=r"must be \.jsonl or \.parquet") as error:
        read_pairs(path, tiny)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("damage", ["empty", "cut", "words", "pages", "text"])
def test_a_damaged_parquet_file_is_named(damage, tmp_path, tiny):
    path = tmp_path / "rows.parquet"
    compression = "none" if damage == "text" else "snappy"
    write_parquet(path, h4_rows(300), compression=compression, use_dictionary=False)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[:-100],
            "words": b"version https://git-lfs.github.com/spec/v1\n",
            "pages": whole[:200] + b"\xff" * (middle - 200) + whole[middle:],
            "text": whole.replace(b"Because", b"B\xffcause"),  # no UTF-8
        }[damage]
    )
    with pytest.raises(ValueError) as error:
        read_pairs(path, tiny)
    assert str(error.value).startswith(str(path))


def test_a_report_counts_and_refuses_an_empty_set():
    rows = located([GOOD, pair("p", "same", "same"), pair("p", " ", "b"), pair("p", "a", "b")])
    counts = Counter()
    groups = load_pairs(rows, speller(True), counts, LONG, LONG, BOS)
    text = report("train", groups, counts)
    n_tokens = sum(group.length() for group in groups)
    assert text.splitlines()[0] == f"train: 4 rows, 2 examples, {n_tokens} tokens"
    assert text.splitlines()[1:] == [
        "         1 dropped: an empty answer",
        "         1 dropped: equal answers",
        "         2 kept",
    ]
    counts = Counter()
    groups = load_pairs(rows[1:3], speller(True), counts, LONG, LONG, BOS)
    with pytest.raises(ValueError, match="eval: no rows are left") as error:
        report("eval", groups, counts)
    assert "1 dropped: equal answers" in str(error.value)


# ---- the prompt boundary ----


@pytest.fixture(scope="module", params=["mistral_tokenizer", "smollm2"])
def real(request):
    """(encode, the library's encoding of a rendered conversation, eos) of a real tokenizer"""
    folder = request.getfixturevalue(request.param)
    tokenizer = load_tokenizer(folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def whole(messages, prompt=False):
        return library.encode(chat.render(messages, tokenizer.eos, prompt)).ids

    return chat.encoder(tokenizer, "zephyr"), whole, request.param


def hold_to_the_boundary(rows, real):
    """Load pairs and check each against the longest common beginning. Returns by how many tokens
    each prefix falls short of its prompt."""
    encode, whole, _ = real
    counts = Counter()
    groups = plain(load_pairs(located(rows), encode, counts, LONG, LONG, None))
    assert counts == Counter({"read": len(rows), "kept": len(rows)})
    short = []
    for row, (prefix, branches, masks) in zip(rows, groups, strict=True):
        prompt = whole(row["chosen"][:-1], True)
        sequences = [whole(row["chosen"]), whole(row["rejected"])]
        alike = takewhile(lambda ids: len(set(ids)) == 1, zip(prompt, *sequences))
        assert prefix == [ids[0] for ids in alike]
        assert [prefix + branch for branch in branches] == sequences
        assert masks == [[True] * len(branch) for branch in branches]
        short.append(len(prompt) - len(prefix))
    return short


def test_the_prefix_of_real_pairs_is_what_prompt_and_conversations_share(real, shared):
    with (shared / "real" / "pref_dev.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 0, 600, 3)]
    assert len(rows) == 200
    assert not any(hold_to_the_boundary(rows, real))  # the prompt is a prefix in all of these


def test_an_answer_that_merges_with_the_prompt_moves_the_boundary(real, shared):
    """SmolLM2's byte-level BPE makes one token of the newline after <|assistant|> and one that
    begins an answer; Mistral's keeps them apart."""
    with (shared / "real" / "pref_dev.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if '"content": "\\n\\n' in line]
    rows = [row for row in rows if row["chosen"][-1]["content"].startswith("\n\n")]
    assert rows  # a real pair
    rows += [pair("Hi", "\n\nHo", "Ho"), pair("Hi", "Ho", "  Ho"), pair("Hi", "\n\nA", "\n\nB")]
    short = hold_to_the_boundary(rows, real)
    assert all(short) if real[2] == "smollm2" else not any(short)


def test_what_two_answers_share_is_not_part_of_the_prefix():
    [group] = load_pairs(
        located([pair("p", "same end", "same END")]), speller(True), Counter(), LONG, LONG, BOS
    )
    assert plain([group])[0][0] == [BOS, 3, ord("p"), EOS, 4]


def test_several_turns_are_all_prompt_but_the_last():
    turns = talk("a", "b", "c")
    row = {"chosen": turns + talk("", "d")[1:], "rejected": turns + talk("", "e")[1:]}
    [group] = load_pairs(located([row]), speller(False), Counter(), LONG, LONG, BOS)
    prefix, branches, masks = plain([group])[0]
    assert prefix == [3, ord("a"), EOS, 4, ord("b"), EOS, 3, ord("c"), EOS, 4]
    assert branches == [[ord("d"), EOS], [ord("e"), EOS]]
    assert masks == [[True, True]] * 2


# ---- truncation ----


def expected_pair(prompt, chosen, rejected, max_length, max_prompt_length):
    """The rules again: (prefix, answers) of what is kept, or None; and why."""
    reasons = []
    if len(prompt) + max(len(chosen), len(rejected)) > max_length:
        if len(prompt) > max_prompt_length:
            reasons.append("cut: the prompt")
            has_bos = prompt[0] == BOS
            while len(prompt) > max_prompt_length:  # the oldest token goes, bos stays
                del prompt[1 if has_bos else 0]
        room = max_length - len(prompt)
        if len(chosen) > room or len(rejected) > room:
            reasons.append("cut: an answer")
            chosen, rejected = chosen[: max(room, 0)], rejected[: max(room, 0)]
    if not chosen or not rejected:
        return None, [*reasons, "dropped: the prompt leaves no room"]
    if chosen == rejected:
        return None, [*reasons, "dropped: equal answers"]
    return (prompt, [chosen, rejected]), [*reasons, "kept"]


contents = st.text(alphabet="ab ", max_size=25)


@random_cases
@given(
    rows=st.lists(st.tuples(contents, contents, contents), min_size=1, max_size=8),
    max_length=st.integers(4, 45),
    max_prompt_length=st.integers(1, 25),
    bos=st.booleans(),
)
def test_truncation_of_pairs_follows_its_rules(rows, max_length, max_prompt_length, bos):
    expected, reasons = [], Counter(read=len(rows))
    for prompt, chosen, rejected in rows:
        if chosen.strip() == "" or rejected.strip() == "":
            reasons["dropped: an empty answer"] += 1
            continue
        kept, why = expected_pair(
            [BOS] * bos + [3, *map(ord, prompt), EOS, 4],
            *([*map(ord, answer), EOS] for answer in (chosen, rejected)),
            *(max_length, max_prompt_length),
        )
        reasons.update(why)
        if kept:
            expected.append((*kept, [[True] * len(branch) for branch in kept[1]]))
    counts = Counter()
    located_rows = located([pair(*row) for row in rows])
    groups = load_pairs(
        located_rows, speller(bos), counts, max_length, max_prompt_length, BOS if bos else None
    )
    assert plain(groups) == expected
    assert counts == reasons
    assert counts["kept"] + n_dropped(counts) == counts["read"] == len(rows)
    for prefix, branches, _ in expected:
        assert len(prefix) + max(map(len, branches)) <= max_length


def test_each_step_of_truncation_on_a_pair_counted_by_hand():
    """max_length 12, max_prompt_length 6, a prompt of bos and 9 tokens."""
    prompt = [BOS, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    for answers, left, reasons in (
        ([[7, 2], [8, 2]], (prompt, [[7, 2], [8, 2]]), {}),  # 12 tokens: fits
        (
            [[7, 7, 2], [8, 2]],
            ([BOS, 14, 15, 16, 17, 18], [[7, 7, 2], [8, 2]]),
            {"cut: the prompt": 1},
        ),
        (
            [[7] * 6 + [2], [8, 2]],
            ([BOS, 14, 15, 16, 17, 18], [[7] * 6, [8, 2]]),  # room for 6: eos goes
            {"cut: the prompt": 1, "cut: an answer": 1},
        ),
    ):
        counts = Counter()
        assert truncate(prompt, answers, counts, 12, 6, BOS) == left
        assert counts == Counter(reasons)
    counts = Counter()
    short = truncate([BOS, 10], [[7] * 12 + [2], [8] * 10 + [2]], counts, 12, 6, BOS)
    assert short == ([BOS, 10], [[7] * 10, [8] * 10])  # a short prompt leaves all its room
    assert counts == Counter({"cut: an answer": 1})
    no_bos = truncate(prompt[1:], [[7] * 4, [8]], Counter(), 12, 6, None)
    assert no_bos == ([13, 14, 15, 16, 17, 18], [[7] * 4, [8]])


def test_empty_and_equal_answers_are_dropped_and_counted():
    rows = [
        *(pair("p", "", "b"), pair("p", "a", ""), pair("p", "", ""), pair("p", " \n", "b")),
        *(pair("p", "a", "a"), pair("p", "same beginning one", "same beginning two")),
        *(pair("p" * 40, "a", "b"), pair("p", "a", "b")),
    ]
    counts = Counter()
    groups = load_pairs(located(rows), speller(True), counts, 5 + 10, 40, BOS)
    assert len(groups) == 1
    assert counts == Counter(
        {
            "read": 8,
            "kept": 1,
            "dropped: an empty answer": 4,
            "dropped: equal answers": 2,  # one of them only after the cut
            "dropped: the prompt leaves no room": 1,
            "cut: the prompt": 1,
            "cut: an answer": 2,
        }
    )


# ---- dialogues ----


@pytest.mark.parametrize(
    ("loss_on", "max_length", "ids", "learnt"),
    [
        ("assistant", 99, "^uHi$aHo!$", "_____Ho!$"),
        ("all", 99, "^uHi$aHo!$", "uHi$aHo!$"),
        ("assistant", 8, "^uHi$aHo", "_____Ho"),
        ("all", 8, "^uHi$aHo", "uHi$aHo"),
        ("assistant", 6, None, None),  # nothing of the answer is left
        ("all", 2, "^u", "u"),
        ("all", 1, None, None),
        ("assistant", None, "^uHi$aHo!$", "_____Ho!$"),
    ],
)
def test_a_dialogue_is_cut_and_masked_as_by_hand(loss_on, max_length, ids, learnt):
    """^ bos, $ eos, u and a the role marks; `learnt` is the first token's successors."""
    names = {"^": BOS, "$": EOS, "u": 3, "a": 4}
    counts = Counter()
    row = {"messages": talk("Hi", "Ho!")}
    groups = load_dialogues(located([row]), speller(True), counts, max_length, loss_on)
    cut = {"cut at max_length": 1} if max_length in (8, 6, 2, 1) else {}
    if ids is None:
        assert groups == []
        assert counts["kept"] == 0
        assert n_dropped(counts) == counts["read"] == 1
        return
    tokens = [names.get(character, ord(character)) for character in ids]
    mask = [character != "_" for character in learnt]
    assert plain(groups) == [(tokens[:1], [tokens[1:]], [mask])]
    assert counts == Counter({"read": 1, "kept": 1, **cut})


@random_cases
@given(
    rows=st.lists(st.lists(contents, min_size=1, max_size=5), min_size=1, max_size=6),
    max_length=st.integers(1, 60),
    loss_on=st.sampled_from(["all", "assistant"]),
    bos=st.booleans(),
)
def test_dialogues_are_cut_at_max_length_and_dropped_when_nothing_is_left(
    rows, max_length, loss_on, bos
):
    expected, n_cut = [], 0
    for row in rows:
        tokens = [(BOS, loss_on == "all")] * bos
        for message in talk(*row):
            is_learnt = loss_on == "all" or message["role"] == "assistant"
            tokens.append((4 if message["role"] == "assistant" else 3, loss_on == "all"))
            tokens += [(ord(character), is_learnt) for character in message["content"]]
            tokens.append((EOS, is_learnt))
        n_cut += len(tokens) > max_length
        ids, mask = zip(*tokens[:max_length])
        if any(mask[1:]):  # nothing predicts the first token
            expected.append(([ids[0]], [list(ids[1:])], [list(mask[1:])]))
    counts = Counter()
    messages = located([{"messages": talk(*row)} for row in rows])
    groups = load_dialogues(messages, speller(bos), counts, max_length, loss_on)
    assert plain(groups) == expected
    assert counts["cut at max_length"] == n_cut
    assert (counts["read"], counts["kept"]) == (len(rows), len(expected))
    assert counts["kept"] + n_dropped(counts) == counts["read"]


# ---- concatenate ----


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
@pytest.mark.parametrize("max_length", [7, 64, 100])
def test_concatenated_dialogues_are_one_stream_cut_into_chunks(loss_on, max_length, tiny):
    tokenizer, encode = tiny
    rng = random.Random(max_length)
    rows = [{"messages": talk(*("why " * rng.randint(1, 9) for _ in range(4)))} for _ in range(30)]
    order = rng.sample(range(30), 30)
    dialogues = load_dialogues(located(rows), encode, Counter(), None, loss_on)
    chunks = concatenate(dialogues, order, tokenizer.eos_id, loss_on, max_length)

    stream = []  # bos, the text, an extra eos; dialogue after dialogue
    for i in order:
        ids = tokenizer.encode(chat.render(rows[i]["messages"]), special_text=True)
        mask = [True] * len(ids) if loss_on == "all" else encode(rows[i]["messages"])[1]
        stream += [*zip(ids, mask), (tokenizer.eos_id, loss_on == "all")]
    assert stream[0][0] == tokenizer.bos_id
    expected = []
    while len(stream) >= max_length:  # what is left at the end is dropped
        ids, mask = zip(*stream[:max_length])
        expected.append(([ids[0]], [list(ids[1:])], [list(mask[1:])]))
        stream = stream[max_length:]

    assert plain(chunks) == expected
    assert 0 < len(stream) < max_length
    assert len(expected) > 20
    assert all(group.length() == max_length for group in chunks)


def test_too_little_to_fill_a_chunk_gives_none():
    dialogues = load_dialogues(
        located([{"messages": talk("Hi", "Ho")}]), speller(True), Counter(), None, "all"
    )
    assert len(concatenate(dialogues, [0], EOS, "all", 10)) == 1  # 9 tokens and the extra eos
    assert concatenate(dialogues, [0], EOS, "all", 11) == []
    assert concatenate([], [], EOS, "all", 11) == []


def test_real_rows_are_kept_or_dropped_and_counted(real, shared):
    encode = real[0]
    folder = shared / "real"
    for name in ("pref_dev", "sft_train"):
        rows = list(islice(read_rows(hub.Source(folder / f"{name}.jsonl")), 150))
        counts = Counter()
        if name == "pref_dev":
            groups = load_pairs(rows, encode, counts, 300, 100, BOS)
            assert counts["cut: the prompt"] > 0 < counts["cut: an answer"]
        else:
            groups = load_dialogues(rows, encode, counts, 100, "assistant")
            assert counts["cut at max_length"] > 0 < n_dropped(counts)
        assert counts["read"] == len(rows) == counts["kept"] + n_dropped(counts)
        assert len(groups) == counts["kept"] > 0
        n_longest = max(len(group.sequence(k)[0]) for group in groups for k in (0, -1))
        assert n_longest <= (300 if name == "pref_dev" else 100)


def test_a_models_template_drops_and_counts_control_text(smollm2):
    """It renders text, in which a user's "<|im_end|>" could not be told from the format's own."""
    encode = chat.encoder(load_tokenizer(smollm2), "model")
    even, odd = talk("Hi", "Hey"), talk("Hi", "Say <|im_end|>")
    counts = Counter()
    rows = [("a:1", {"messages": even}), ("a:2", {"messages": odd})]
    assert len(load_dialogues(rows, encode, counts, 100, "assistant")) == 1
    pairs = [("b:1", {"chosen": even, "rejected": odd})]
    assert load_pairs(pairs, encode, counts, 100, 50, None) == []
    assert counts["dropped: the text of a control token in a message"] == 2
    assert (counts["read"], counts["kept"]) == (3, 1)
