"""Conversations as text: the chat template that travels with a checkpoint, rendered as transformers renders it.

A template is a program of somebody else. It runs in jinja2's sandbox, which gives it neither files nor attributes of Python's objects,
and whatever it cannot do is one sentence.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cairn.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
LONGEST = 2**20
"""Characters of a template; those of published models have less than a hundredth of that."""

Message = Mapping[str, Any]
"""One message of a conversation: `role` and `content`."""


class ChatTemplate:
    """A template, compiled: messages in, the text that the model reads out."""

    def __init__(self, text: str, where: object = "the chat template") -> None:
        """Raises `InputError` for a template with a syntax error."""
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """`{% generation %}` marks what the model is trained on; it says nothing about the text."""

            tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        self.where = where
        if len(text) > LONGEST:
            raise InputError(f"{where} has {len(text)} characters; a chat template has at most {LONGEST}.")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
        environment.filters["tojson"] = _as_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda pattern: datetime.datetime.now().strftime(pattern)}
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{where} has a syntax error in line {error.lineno}: {_one_line(error)}") from None
        except RecursionError:
            raise InputError(f"{where} is nested too deep.") from None

    def render(self, messages: Sequence[Message], tokens: Mapping[str, str] | None = None, *, answer: bool = True) -> str:
        """The text of a conversation, with the beginning of the next `answer`; `tokens` are the special tokens by their names.

        Raises `InputError` for messages without role and content, and where the template refuses them or fails.
        """
        checked(messages)
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=answer, tools=None, documents=None, **(tokens or {}))
        except InputError as error:
            raise InputError(f"{self.where} refuses this conversation: {error}") from None
        except RecursionError:
            raise InputError(f"{self.where} cannot be rendered: it calls itself without end.") from None
        except Exception as error:  # it is a program of somebody else: whatever it does wrong is the answer
            raise InputError(f"{self.where} cannot be rendered: {_one_line(error)}") from None


def checked(messages: Sequence[Message]) -> None:
    """Raise `InputError` unless every message has a role and a text."""
    if not messages:
        raise InputError("A conversation has at least one message.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InputError(f"Message {number} is no mapping with 'role' and 'content', both of them text.")
        if message["role"] not in ROLES:
            raise InputError(f"Message {number} has the role '{message['role'][:40]}'; there is {', '.join(ROLES)}.")


def special_variables(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names, as templates know them."""
    found = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            found[key] = token
    return found


def _as_json(value: Any, indent: int | None = None, **more: Any) -> str:
    """JSON as transformers writes it: signs as they are, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(sentence: str) -> None:
    raise InputError(str(sentence)[:300])


def _one_line(error: BaseException) -> str:
    return f"{' '.join(str(error).split())[:300].rstrip('.') or type(error).__name__}."
