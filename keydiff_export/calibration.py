"""Calibration for quantised NPU graphs: a text read as the artifact will read it, block by block with eviction.

Ranges seen on a full text in one pass would miss what eviction makes: anchors over survivors, caches half empty, single
tokens over a full cache. So the float graph is stepped exactly as the artifact will be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .generation import encode_prompt
from .runtime.npu import NpuRunner
from .text import long_text

# Tokens of the text that go through `decode`, which has ranges of its own and is slow. On a tiny model with 8-bit
# weights 24 of them left it 10 dB short of what the weights alone cost, 256 left 0.4 dB.
_SINGLE = 256
# Blocks that open a cache, from all over the text. The largest activations belong to the first token of a prompt and
# depend on which one it is.
_STARTS = 16


def enough(budget: int, block: int) -> int:
    """Tokens to calibrate with: several full caches, and many blocks of a small one."""
    return max(4 * (budget + block), 32 * block) + _SINGLE


def read_texts(place: Path | None) -> str:
    """The calibration text: a UTF-8 file, all .txt and .md files of a folder in order of name, or the built-in text.

    Raises:
        UserError: nothing there, not UTF-8, or a folder without text.
    """
    if place is None:
        return long_text()
    files = sorted(f for f in place.rglob("*") if f.suffix in (".txt", ".md")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"calibration folder {place} has no .txt or .md file")
    try:
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except OSError as error:
        raise UserError(f"cannot read calibration text {place}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"calibration text in {place} is not UTF-8 (byte {error.start}): convert it") from error


def openings(tokenizer: PreTrainedTokenizerBase, text: str, block: int) -> list[list[int]]:
    """First blocks of prompts out of the middle of a text, as they are and in the chat template.

    No piece of a tokenised text begins with the tokens that the tokenizer and the template put in front.
    """
    middle = text[len(text) // 2 :][: 16 * block]
    forms = [True] if tokenizer.chat_template is None else [True, False]
    return [encode_prompt(tokenizer, middle, raw)[:block] for raw in forms]


def calibration_runs(
    tokens: list[int], budget: int, block: int, first: Sequence[list[int]] = ()
) -> list[list[list[int]]]:
    """Cuts a text into runs from an empty cache, each a list of steps.

    The first runs stay below the budget (single tokens into an empty cache, a short block, and a block and a single
    token for each opening), the last reads all in blocks, a partial one among them, and single tokens: every kind of
    step meets every kind of cache.

    Args:
        first: openings beside those that are cut from the text, each at most a block.

    Raises:
        UserError: too few tokens for the cache to evict.
    """
    needed = 2 * (budget + block) + _SINGLE
    if len(tokens) < needed:
        raise UserError(
            f"calibration text has {len(tokens)} tokens, a cache of {budget} + {block} needs {needed}: give more"
        )
    short = [tokens[: block // 2 + 1], *([t] for t in tokens[block : block + 3])]
    body, tail = tokens[:-_SINGLE], tokens[-_SINGLE:]
    cut = (len(body) // 2) // block * block + max(block // 2, 1)
    blocks = [half[i : i + block] for half in (body[:cut], body[cut:]) for i in range(0, len(half), block)]
    half = len(tail) // 2
    steps = [*blocks[:-1], *([t] for t in tail[:half]), blocks[-1], *([t] for t in tail[half:])]
    pieces = [tokens[at : at + block] for at in range(0, len(tokens) - block, (len(tokens) - block) // _STARTS)]
    starts = [run for piece in (*first, *pieces[:_STARTS]) for run in ([piece], [piece[:1]])]
    return [[[t] for t in tokens[:4]], short, *starts, steps]


def calibrate(runner: NpuRunner, runs: list[list[list[int]]], tick: Callable[[int], None]) -> None:
    """Steps a runner whose graphs observe through all runs; `tick` is told the tokens of each step."""
    for run in runs:
        runner.reset()
        for step in run:
            runner.step(step)
            tick(len(step))
