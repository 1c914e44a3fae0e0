"""Text <-> token ids: tokenizer.json through `tokenizers`, tokenizer.model through `sentencepiece`.

Ordinary text never yields a control token here: "</s>" in a user's message becomes the four or so
pieces of its characters, not the id that ends a turn. Only the chat format places control ids
(chat.py), and a caller who asks for it with `special_text=True`, which is what Hugging Face's
tokenizers do with all text.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from zephyr import hub

CHAT_TEMPLATE = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ '<|system|>\\n' + eos_token + '\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Zephyr's chat format for other programs, as Jinja; chat.py says the same in Python.

The published template, with the empty system turn that Zephyr was always trained with put first
where a conversation brings none.
"""

FILES = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer of a model folder or of `ID[@revision]` on the Hub."""
    return Tokenizer(hub.resolve(str(path)).path)


class Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    Attributes:
        bos_id, eos_id: ids; bos_id is None if there is no such token.
        eos: the text of the eos token.
        adds_bos: whether the tokenizer puts bos before a text (Mistral's does, SmolLM2's does not).
        vocab_size: one more than the largest id.
        chat_template: Jinja; the folder's own, else Zephyr's. What `save` writes.

    Raises FileNotFoundError if the folder has no tokenizer, ValueError if its files are damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self._read("tokenizer_config.json")
        special = self._read("special_tokens_map.json") | self.config
        if (self.folder / "tokenizer.json").is_file():
            self._backend: Any = _Json(self.folder / "tokenizer.json")
        elif (self.folder / "tokenizer.model").is_file():
            self._backend = _SentencePiece(self.folder / "tokenizer.model")
        else:
            raise FileNotFoundError(f"{folder}: no tokenizer.json and no tokenizer.model")
        self.bos = self._token(special, "bos_token") or "<s>"
        self.eos = self._token(special, "eos_token") or "</s>"
        self.bos_id = self._backend.id_of(self.bos)
        eos_id = self._backend.id_of(self.eos)
        if eos_id is None:
            raise ValueError(f"{folder}: the eos token {self.eos!r} is not in the vocabulary")
        self.eos_id: int = eos_id
        self.adds_bos = self.config.get("add_bos_token")
        if self.adds_bos is None:
            self.adds_bos = self._backend.adds(self.bos_id)
        if not isinstance(self.adds_bos, bool):
            path = self.folder / "tokenizer_config.json"
            raise ValueError(f"{path}: add_bos_token must be true or false")
        self.vocab_size: int = self._backend.vocab_size
        jinja = self.folder / "chat_template.jinja"  # where transformers 5 puts it
        own = hub.read_text(jinja) if jinja.is_file() else self.config.get("chat_template")
        self.chat_template = own if isinstance(own, str) else CHAT_TEMPLATE

    def encode(
        self, text: str, bos: bool = True, special_text: bool = False, at_start: bool = True
    ) -> list[int]:
        """Ids of a text.

        Args:
            bos: put bos before them, if the tokenizer adds one.
            special_text: the text of a control token ("</s>") in it becomes that token.
            at_start: false if the text goes on after a control token (a turn after eos).
        """
        ids = [self.bos_id] if bos and self.adds_bos and self.bos_id is not None else []
        for part in self.split_special(text) if special_text else [text]:
            if special_text and part in self._backend.specials:
                ids.append(self._backend.specials[part])
            else:
                ids += self._backend.encode(part, at_start)
            at_start = False
        return ids

    def split_special(self, text: str) -> list[str]:
        """A text cut into the texts of control tokens and what is between them."""
        return [part for part in re.split(self._backend.special_pattern, text) if part]

    def _read(self, name: str) -> dict:
        path = self.folder / name
        return hub.read_json(path) if path.is_file() else {}

    def _token(self, special: dict, name: str) -> str | None:
        token = special.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise ValueError(f"{self.folder / 'tokenizer_config.json'}: {name} must be text")
        return token

    def has_special_text(self, text: str) -> bool:
        """Whether the text of a control token stands in `text`."""
        return re.search(self._backend.special_pattern, text) is not None

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder, with `chat_template` and the eos token."""
        for name in FILES:
            if (self.folder / name).is_file() and self.folder.resolve() != Path(folder).resolve():
                shutil.copyfile(self.folder / name, Path(folder) / name)
        config = {
            "tokenizer_class": self._backend.hf_class,
            "clean_up_tokenization_spaces": False,
            **self.config,
            "eos_token": self.config.get("eos_token") or self.eos,
            "chat_template": self.chat_template,
        }
        (Path(folder) / "chat_template.jinja").unlink(missing_ok=True)  # it would come first
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / "tokenizer_config.json").write_text(text, encoding="utf-8")


class _Json:
    """tokenizer.json."""

    hf_class = "PreTrainedTokenizerFast"

    def __init__(self, path: Path):
        import tokenizers

        try:
            text = path.read_text(encoding="utf-8")
            self._first = tokenizers.Tokenizer.from_str(text)
            self._later = tokenizers.Tokenizer.from_str(_without_first_space(text))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from error
        self._around = self._first.encode("").ids  # what the post-processor puts around a text
        self._first.encode_special_tokens = self._later.encode_special_tokens = True
        added = self._first.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self.special_pattern = _pattern(self.specials)
        self.vocab_size = max(self._first.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, at_start: bool) -> list[int]:
        backend = self._first if at_start else self._later
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._first.decode(ids, skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int | None:
        return self._first.token_to_id(token)

    def adds(self, bos_id: int | None) -> bool:
        return bos_id is not None and self._around[:1] == [bos_id]


class _SentencePiece:
    """tokenizer.model. Every text between control tokens gets SentencePiece's leading space, as in
    Hugging Face's conversion of Llama's and Mistral's tokenizers."""

    hf_class = "LlamaTokenizer"

    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise ValueError(f"{path}: not a SentencePiece model ({error})") from error
        self.vocab_size = self._model.vocab_size()
        controls = [
            i
            for i in range(self.vocab_size)
            if self._model.is_control(i) or self._model.is_unknown(i)
        ]
        self.specials = {self._model.id_to_piece(i): i for i in controls}
        self.special_pattern = _pattern(self.specials)

    def encode(self, text: str, at_start: bool) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        controls = {i: piece for piece, i in self.specials.items()}
        if skip_special_tokens:
            return self._model.decode([i for i in ids if i not in controls])
        parts, run = [], []
        for i in ids:
            if i in controls:
                parts += [self._model.decode(run), controls[i]]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self._model.decode(run)])

    def adds(self, bos_id: int | None) -> bool:
        return bos_id is not None  # the default of Hugging Face's class for such files

    def id_of(self, token: str) -> int | None:
        i = self._model.piece_to_id(token)
        return i if self._model.id_to_piece(i) == token else None


def _without_first_space(text: str) -> str:
    """A tokenizer.json for text that is not at the start.

    Where the leading space belongs to the first piece alone (Metaspace with prepend_scheme
    "first"), text after a control token must not get it; all other tokenizers treat both alike.
    """
    spec = json.loads(text)
    pre = spec.get("pre_tokenizer") or {}
    for part in [pre, *pre.get("pretokenizers", [])]:
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    return json.dumps(spec)


def _pattern(specials: dict[str, int]) -> str:
    longest_first = sorted((s for s in specials if s), key=len, reverse=True)
    return "(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else r"((?!))"
