"""Chat templates: the model's own Jinja program that turns a conversation into a prompt.

Rendered as Hugging Face's ``apply_chat_template`` does: sandboxed and immutable, ``trim_blocks``, ``lstrip_blocks``,
loop controls, ``{% generation %}``, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now``.

A template is a program from a model file. The sandbox keeps it from Python's insides and the output is bounded here;
its running time and what it allocates on the way are not, so it is rendered in a child process under a deadline.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dwarfstar_engine.errors import RequestError

MAX_TEMPLATE_CHARS = 1 << 20  # the longest known have some 20 000
MAX_PROMPT_CHARS = 16 << 20  # more characters than any context has tokens, times the longest usual token
MAX_TOLD_CHARS = 500  # of a template's own message shown to the client
CACHED_TEMPLATES = 4  # a process serves one model; a test a few

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a model without a template whose vocabulary has <|im_start|>."""


class Refused(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class GenerationBlock(Extension):
    """``{% generation %}…{% endgeneration %}`` marks an assistant's words for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    now: datetime.datetime,
    chatml: bool = False,
) -> str:
    """The prompt of ``messages``, ending where an assistant's turn begins.

    template: Jinja source; if blank, ChatML is used when ``chatml`` says that the vocabulary has <|im_start|>.
    now: what ``strftime_now`` tells. Raises RequestError if the template refuses the messages or cannot be used.
    """
    if not template.strip():
        if not chatml:
            raise RequestError(
                "this model has no chat template: use /v1/completions and write the prompt yourself",
                code="no_chat_template",
            )
        template = CHATML
    try:
        pieces = _compiled(template).generate(
            messages=[dict(message) for message in messages],
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=True,
            tools=None,
            documents=None,
            strftime_now=now.strftime,
        )
        parts, room = [], MAX_PROMPT_CHARS
        for piece in pieces:
            room -= len(piece)
            if room < 0:
                raise _failed(f"it wrote more than {MAX_PROMPT_CHARS} characters")
            parts.append(piece)
        return "".join(parts)
    except RequestError:
        raise
    except Refused as error:
        said = f"the model's chat template refuses these messages: {_told(error)}"
        raise RequestError(said, param="messages", code="chat_template_refused") from None
    except Exception as error:  # a foreign program may fail in any way, RecursionError and MemoryError included
        raise _failed(_told(error)) from None


@functools.lru_cache(maxsize=CACHED_TEMPLATES)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise _failed(f"it is longer than {MAX_TEMPLATE_CHARS} characters")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> NoReturn:
    raise Refused(str(message))


def _failed(why: str) -> RequestError:
    return RequestError(
        f"the model's chat template cannot be used: {why}; use /v1/completions and write the prompt yourself",
        code="chat_template_failed",
    )


def _told(error: Exception) -> str:
    told = " ".join(str(error).split())[:MAX_TOLD_CHARS] or type(error).__name__
    return told if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {told}"
