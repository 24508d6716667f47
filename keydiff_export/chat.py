"""A chat template cut into plain texts, so that a phone needs no Jinja: `chat.json` in an exported folder."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

CHAT = "chat.json"
# Words that no template contains, with inner blanks and a line break as real questions have.
_QUESTION, _ANSWER, _NEXT, _SYSTEM = (f"kd {word}\nkd" for word in ("question", "answer", "next", "system"))


def cut_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The texts around questions, answers and instructions, proven by composing conversations from them.

    Returns:
        What `schemas/chat.schema.json` describes, or None when there is no template or it does more than to put texts
        around a question. `follow_up` and `system` alone are None when only that part cannot be cut.
    """
    if tokenizer.chat_template is None:
        return None

    def render(*texts: str, roles: tuple[str, ...] = ("user", "assistant", "user", "assistant", "user")) -> str | None:
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        try:
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except TemplateError:
            return None

    user = _around(render(_QUESTION), _QUESTION)
    if user is None:
        return None
    before, after = user
    blank = render(f" {_QUESTION} ")
    trims = blank == before + _QUESTION + after
    if not trims and blank != f"{before} {_QUESTION} {after}":
        return None
    opening = before + _QUESTION + after + _ANSWER
    second = _around(render(_QUESTION, _ANSWER, _NEXT), _NEXT)
    follow_up = None
    if second is not None and second == (opening + second[0][len(opening) :], after):
        follow_up = second[0][len(opening) :]
        third = render(_QUESTION, _ANSWER, _NEXT, _ANSWER, _QUESTION)
        if third != opening + follow_up + _NEXT + after + _ANSWER + follow_up + _QUESTION + after:
            follow_up = None
    system = _around(render(_SYSTEM, _QUESTION, roles=("system", "user")), _SYSTEM)
    if system is not None:
        inner = _around(system[1], _QUESTION)
        system = (system[0], inner[0]) if inner is not None and inner[1] == after else None
    return {
        "user": {"before": before, "after": after},
        "follow_up": follow_up,
        "system": None if system is None else {"before": system[0], "after": system[1]},
        "trims": trims,
    }


def _around(text: str | None, part: str) -> tuple[str, str] | None:
    """What stands before and after a part that occurs once."""
    if text is None or text.count(part) != 1:
        return None
    before, _, after = text.partition(part)
    return before, after
