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
from functools import partial
from typing import Any

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
        n_header = common_prefix(part, tokenizer.encode(header, False, False, not start))
        learnt = turn["role"] == "assistant"
        ids += [*part, tokenizer.eos_id]
        mask += [False] * n_header + [learnt] * (len(part) - n_header + 1)
        start = "\n"
    end = tokenizer.encode("\n<|assistant|>\n" if generation_prompt else "\n", False, False, False)
    return ids + end, mask + [False] * len(end)


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


class ModelTemplate:
    """The model folder's own chat template (`--template model`), in jinja2's sandbox.

    The mask is found from rendered prefixes: what the template adds to the conversation before an
    assistant turn, generation prompt included, when that turn is put in, is the turn. Targets are
    its tokens up to the end of its content and one control token that follows.
    """

    def __init__(self, tokenizer: Tokenizer):
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.template = environment.from_string(tokenizer.chat_template)

    def render(self, messages: list[Message], generation_prompt: bool = False) -> str:
        """The text of a conversation, by the template."""
        tokenizer = self.tokenizer
        bos = "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id], False)
        return self.template.render(
            messages=messages,
            add_generation_prompt=generation_prompt,
            bos_token=bos,
            eos_token=tokenizer.eos,
        )

    def encode(
        self, messages: list[Message], generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """As `encode` of this page. Raises ValueError where content holds the text of a control
        token, or the template does not build a conversation turn by turn."""
        for message in messages:
            if self.tokenizer.has_special_text(message["content"]):
                raise ValueError("the text of a control token stands in a message's content")
        ids, mask = self._encode(self.render(messages, generation_prompt)), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            header = self.render(messages[:number], generation_prompt=True)
            turn = self.render(messages[: number + 1])
            if not turn.startswith(header) or message["content"].strip() not in turn[len(header) :]:
                raise ValueError("the chat template does not build a conversation turn by turn")
            body_end = turn.rindex(message["content"].strip()) + len(message["content"].strip())
            start = common_prefix(self._encode(header), ids)
            end = common_prefix(self._encode(turn[:body_end]), ids)
            mask += [False] * (start - len(mask)) + [True] * (end - start + 1)
        return ids, mask + [False] * (len(ids) - len(mask))

    def _encode(self, text: str) -> list[int]:
        tokenizer = self.tokenizer
        ids = tokenizer.encode(text, bos=False, special_text=True)
        has_bos = bool(ids) and ids[0] == tokenizer.bos_id  # many templates write it themselves
        return ids if has_bos else tokenizer.encode("") + ids


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
