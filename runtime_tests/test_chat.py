"""Chat templates cut into texts: what the pieces make is what the template makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from keydiff_export.chat import cut_template
from keydiff_export.manifest import load_schema

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>Be kind.{% endif %}"
    "<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMING = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}<assistant>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TRIMMING
FORGETS_THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
SHOUTS = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"


@pytest.fixture
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


def cut(tokenizer: PreTrainedTokenizerBase, template: str) -> dict[str, Any]:
    tokenizer.chat_template = template
    pieces = cut_template(tokenizer)
    assert pieces is not None
    jsonschema.validate(pieces, load_schema("chat"))
    return pieces


def compose(pieces: dict[str, Any], texts: list[str], system: str = "") -> str:
    """What the app makes of a conversation; answers stand between questions."""
    keep = str.strip if pieces["trims"] else str
    opening = pieces["user"]["before"]
    if system:
        opening = pieces["system"]["before"] + keep(system) + pieces["system"]["after"]
    out = opening + keep(texts[0]) + pieces["user"]["after"]
    for answer, question in zip(texts[1::2], texts[2::2], strict=True):
        out += answer + pieces["follow_up"] + keep(question) + pieces["user"]["after"]
    return out


@pytest.mark.parametrize("template", [CHATML, TRIMMING])
def test_pieces_make_what_the_template_makes(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    pieces = cut(tokenizer, template)
    texts = ["  Two\n\nlines {{ braces }} ", "An answer.", "ü?", "Another", "\tlast"]
    roles = ("user", "assistant", "user", "assistant", "user")
    for system in ("", " Answer in rhyme.\n"):
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert compose(pieces, texts, system) == expected


def test_a_template_that_refuses_instructions_has_no_system_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = cut(tokenizer, NO_SYSTEM)
    assert pieces["system"] is None
    assert pieces["follow_up"] == "<end><user>"


def test_a_template_that_rewrites_history_takes_one_question(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = cut(tokenizer, FORGETS_THINKING)
    assert pieces["follow_up"] is None
    assert pieces["user"] == {"before": "<user>", "after": "<assistant><think>"}


def test_a_template_that_changes_the_question_is_not_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = SHOUTS
    assert cut_template(tokenizer) is None
    tokenizer.chat_template = None
    assert cut_template(tokenizer) is None
