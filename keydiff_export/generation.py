"""Prompt to answer with any runner: chat template, block prefill, sampling, end of sequence, figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UserError
from .machine import peak_rss_bytes
from .runtime.base import Logits, Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedy at temperature 0, else from the smallest set of mass `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, got {self.top_p}")

    def sampler(self) -> Callable[[Logits], int]:
        """A function from logits [V] to a token id, with its own random state."""
        if self.temperature == 0:
            return lambda logits: int(logits.argmax())
        generator = np.random.default_rng(self.seed)

        def draw(logits: Logits) -> int:
            scaled = logits.astype(np.float64) / self.temperature
            weights = np.exp(scaled - scaled.max())
            order = np.argsort(-weights, kind="stable")
            mass = np.cumsum(weights[order]) / weights.sum()
            nucleus = order[: int(np.searchsorted(mass, self.top_p)) + 1]
            return int(generator.choice(nucleus, p=weights[nucleus] / weights[nucleus].sum()))

        return draw


@dataclass
class Result:
    """What `run --json` prints. Times in seconds, memory in bytes.

    `decode_tokens_per_s` counts from the second token on: before it ONNX Runtime loads the method for one token, where
    it holds one at a time.
    """

    prompt_tokens: int
    token_ids: list[int]
    text: str
    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    peak_rss_bytes: int
    cache_slots: int
    evictions: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, raw: bool, system_prompt: str | None = None
) -> list[int]:
    """Token ids of a prompt, in the model's chat template and behind its system prompt unless `raw`.

    Raises:
        UserError: no tokens, or no chat template to apply.
    """
    if not text.strip():
        raise UserError("the prompt is empty: give some text with --prompt, --prompt-file or on standard input")
    if raw:
        ids = tokenizer(text)["input_ids"]
    elif tokenizer.chat_template is None:
        raise UserError("this model has no chat template: run with --raw")
    else:
        ids = _chat_ids(tokenizer, text, system_prompt)
    if not ids:
        raise UserError("the prompt has 0 tokens: give some text")
    return [int(i) for i in ids]


def system_prompt_tokens(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> int:
    """Number of first tokens that a chat with this system prompt always has, whatever the user says.

    Raises:
        UserError: no chat template, or one that leaves system prompts out.
    """
    if tokenizer.chat_template is None:
        raise UserError("a system prompt needs a chat template and this model has none: pin tokens with --pinned")
    one, other = (_chat_ids(tokenizer, text, system_prompt) for text in ("0", "x"))
    if one == _chat_ids(tokenizer, "0", None):
        raise UserError("this model's chat template leaves the system prompt out: pin tokens with --pinned")
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def _chat_ids(tokenizer: PreTrainedTokenizerBase, text: str, system_prompt: str | None) -> list[int]:
    messages = [{"role": "user", "content": text}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def check_context(tokens: int, limit: int, allow_beyond: bool) -> None:
    """Refuses positions that the model's RoPE was not trained for, unless asked to go on.

    Raises:
        UserError: more tokens than `limit`.
    """
    if tokens > limit and not allow_beyond:
        raise UserError(
            f"prompt and answer need {tokens} positions and the model was trained for {limit}: "
            "shorten the prompt or pass --allow-beyond-trained-context"
        )


def stream(
    runner: Runner,
    prompt: list[int],
    max_new_tokens: int,
    eos: set[int],
    sampling: Sampling,
    progress: Callable[[int, float, int], None] = lambda read, rate, held: None,
) -> Iterator[int]:
    """Reads a prompt in blocks and yields generated tokens until `eos` (not yielded) or `max_new_tokens`.

    Args:
        runner: reset before use.
        prompt: token ids, at least one.
        max_new_tokens: most tokens to generate.
        eos: ids that end the answer.
        sampling: how tokens are drawn.
        progress: told (tokens read, tokens/s, tokens held) after each block.
    """
    runner.reset()
    runner.expect(len(prompt) + max_new_tokens)
    choose = sampling.sampler()
    began = time.perf_counter()
    logits = None
    for first in range(0, len(prompt), runner.block):
        logits = runner.step(prompt[first : first + runner.block])
        progress(runner.seen, runner.seen / (time.perf_counter() - began), runner.held)
    assert logits is not None
    for number in range(max_new_tokens):
        token = choose(logits)
        if token in eos:
            return
        yield token
        if number + 1 < max_new_tokens:
            logits = runner.step([token])


def generate(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    max_new_tokens: int,
    eos: set[int],
    sampling: Sampling,
    progress: Callable[[int, float, int], None] = lambda read, rate, held: None,
    emit: Callable[[str], None] = lambda piece: None,
) -> Result:
    """Answers a prompt and measures it; `emit` receives the text piece by piece. Arguments as in `stream`."""
    tokens: list[int] = []
    shown = ""
    began = time.perf_counter()
    first = second = 0.0
    for token in stream(runner, prompt, max_new_tokens, eos, sampling, progress):
        now = time.perf_counter()
        first = first or now
        tokens.append(token)
        if len(tokens) == 2:
            second = now
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        # An unfinished multi-byte character decodes to the replacement sign; it is shown once it is whole.
        if not text.endswith("\ufffd"):
            emit(text[len(shown) :])
            shown = text
    ended = time.perf_counter()
    first = first or ended
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    emit(text[len(shown) :])
    decoded = len(tokens) - 2
    return Result(
        prompt_tokens=len(prompt),
        token_ids=tokens,
        text=text,
        ttft_s=round(first - began, 4),
        prefill_tokens_per_s=round(len(prompt) / max(first - began, 1e-9), 2),
        decode_tokens_per_s=round(decoded / (ended - second), 2) if decoded > 0 and ended > second else None,
        peak_rss_bytes=peak_rss_bytes(),
        cache_slots=runner.budget + runner.block,
        evictions=runner.seen - runner.held,
    )
