"""Zephyr's chat format: messages -> text, and messages -> (ids, mask), born together.

    <|system|>
    </s>
    <|user|>
    Hello!</s>
    <|assistant|>
    Bonjour!</s>

The role marks are plain text to the tokenizer; only the eos that closes a turn is a control token.
A conversation that brings no system turn gets an empty one, as Zephyr's training and tests had it.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zephyr.tokenizer import CHAT_TEMPLATE as TEMPLATE
from zephyr.tokenizer import Tokenizer

Message = dict[str, str]


def check(messages: Any) -> None:
    """Raise ValueError unless messages are a conversation: an optional system turn, then user and
    assistant in turn, each {"role": str, "content": str}."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list that is not empty")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f'message {number} is not {{"role": text, "content": text}}')
        if not message["content"].isascii():
            message["content"].encode()  # half a surrogate pair is no text: UnicodeEncodeError
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(
                f"message {number} has the unknown role {message.get('role')!r}: "
                "it must be system, user or assistant"
            )
    turns = messages[messages[0]["role"] == "system" :]
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise ValueError(
                f"roles do not alternate: {message['role']} stands where {expected} belongs "
                f"(message {number + len(messages) - len(turns)})"
            )


def render(messages: list[Message], eos: str = "</s>", generation_prompt: bool = False) -> str:
    """The text of a conversation; with `generation_prompt`, up to where the assistant begins."""
    turns = _with_system(messages)
    text = "".join(f"<|{turn['role']}|>\n{turn['content']}{eos}\n" for turn in turns)
    return text + ("<|assistant|>\n" if generation_prompt else "")


def encode(
    tokenizer: Tokenizer,
    messages: list[Message],
    generation_prompt: bool = False,
    special_text: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids of `render(messages)`, and which of them are targets.

    mask[i] is true iff token i belongs to an assistant message's content or is the eos that closes
    it; never a role mark, the newline after eos, or bos. A token that holds the end of the role
    mark and the beginning of the content in one is a target.

    Control tokens in a message's content stay plain text. `special_text` makes them control tokens,
    as Hugging Face's tokenizers do, and so did the original training.

        "<s>" "<|user|>\\n" "Hi" "</s>" "\\n<|assistant|>\\n" "Hey" "</s>" "\\n"
          0         0        0      0             0             1      1      0
    """
    ids = tokenizer.encode("")
    mask = [False] * len(ids)
    start = ""  # a later turn's text starts with the newline after the eos of the one before
    for turn in _with_system(messages):
        header = f"{start}<|{turn['role']}|>\n"
        part = tokenizer.encode(header + turn["content"], False, special_text, not start)
        n_header = common_prefix(part, _header_ids(tokenizer, header, not start))
        learnt = turn["role"] == "assistant"
        ids += [*part, tokenizer.eos_id]
        mask += [False] * n_header + [learnt] * (len(part) - n_header + 1)
        start = "\n"
    end = tokenizer.encode("\n<|assistant|>\n" if generation_prompt else "\n", False, False, False)
    return ids + end, mask + [False] * len(end)


@lru_cache(maxsize=64)  # a format has six headers, and a data set a million turns
def _header_ids(tokenizer: Tokenizer, header: str, at_start: bool) -> list[int]:
    return tokenizer.encode(header, False, False, at_start)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with alike."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _with_system(messages: list[Message]) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": ""}, *messages]


def encoder(tokenizer: Tokenizer, template: str) -> Callable[..., tuple[list[int], list[bool]]]:
    """`encode` with its tokenizer bound: by Zephyr's template ("zephyr"), or by the model folder's
    own ("model"). The tokenizer will be saved with the template chosen."""
    if template == "model":
        return ModelTemplate(tokenizer).encode
    tokenizer.chat_template = TEMPLATE
    return partial(encode, tokenizer)


class ControlText(ValueError):
    """A message's content holds the text of a control token, and the template cannot tell them
    apart."""


class ModelTemplate:
    """The model folder's own chat template (`--template model`), in jinja2's sandbox.

    The mask is found from rendered prefixes: what the template adds to the conversation before an
    assistant turn, generation prompt included, when that turn is put in, is the turn. Targets are
    the tokens of its content and the control token that follows it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        self.template = environment.from_string(tokenizer.chat_template)

    def render(self, messages: list[Message], generation_prompt: bool = False) -> str:
        """The text of a conversation, by the template."""
        tokenizer = self.tokenizer
        return self.template.render(
            messages=messages,
            add_generation_prompt=generation_prompt,
            bos_token=tokenizer.bos,
            eos_token=tokenizer.eos,
        )

    def encode(
        self, messages: list[Message], generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """As `encode` of this page. Raises ControlText, and ValueError where the template does not
        build a conversation turn by turn."""
        for message in messages:
            if self.tokenizer.has_special_text(message["content"]):
                raise ControlText("the text of a control token in a message")
        text = self.render(messages, generation_prompt)
        spans = [
            self._learnt_span(messages[: number + 1], text)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        ids, mask, at = [], [], 0
        for part in self.tokenizer.split_special(text):
            new = self.tokenizer.encode(part, False, special_text=True, at_start=at == 0)
            edges = [False] * len(new)
            for start, end in spans:
                if at < end and start < at + len(part):
                    first, last = (
                        common_prefix(new, self._encode_up_to(part, edge - at, at == 0))
                        for edge in (start, end)
                    )
                    edges[first:last] = [True] * (last - first)
            ids, mask, at = ids + new, mask + edges, at + len(part)
        bos = [] if ids[:1] == [self.tokenizer.bos_id] else self.tokenizer.encode("")
        return bos + ids, [False] * len(bos) + mask  # many templates write bos themselves

    def _encode_up_to(self, part: str, edge: int, at_start: bool) -> list[int]:
        text = part[: max(0, edge)]
        return self.tokenizer.encode(text, False, special_text=True, at_start=at_start)

    def _learnt_span(self, messages: list[Message], text: str) -> tuple[int, int]:
        """Where in `text` the last message's content begins, and where the control token after it
        ends, or the content itself where none follows."""
        header = self.render(messages[:-1], generation_prompt=True)
        turn = self.render(messages)
        content = messages[-1]["content"]
        if content not in turn[len(header) :]:
            content = content.strip()  # as many templates do
        if not text.startswith(turn) or not turn.startswith(header):
            raise ValueError("the chat template does not build a conversation turn by turn")
        start = turn.find(content, len(header))
        if start < 0:
            raise ValueError("the chat template does not build a conversation turn by turn")
        end = start + len(content)
        closing = self.tokenizer.split_special(turn[end:].lstrip())[:1]
        if closing and self.tokenizer.has_special_text(closing[0]):
            end = turn.index(closing[0], end) + len(closing[0])
        return start, end


def _refuse(message: str) -> None:
    raise TemplateError(message)


def colour(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> str:
    """One example for the terminal: targets green, the rest grey, control tokens visible."""
    parts = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            parts.append(f"\033[{32 if mask[start] else 90}m{text}\033[0m")
            start = end
    return "".join(parts)
