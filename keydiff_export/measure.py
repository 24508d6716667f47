"""One measurement: something that answers prompts is opened, warmed up, and read one prompt with a clock beside it.

It runs in a child process (`child.py`), so that its peak memory is that of one artifact and one prompt.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from .child import resolve
from .errors import UserError
from .generation import Sampling, stream
from .machine import Usage, anonymous_bytes, copy_bandwidth, peak_rss_bytes, rss_bytes
from .runtime import open_artifact
from .runtime.base import Runner

WARM_UP_TOKENS, WARM_UP_ANSWER = 32, 4
_LIBRARIES = {"executorch": "executorch.extension.llm.custom_ops.custom_ops", "onnxruntime": "onnxruntime"}


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, and as text for runtimes that bring their own tokenizer."""

    ids: list[int]
    text: str


class Session(Protocol):
    """A loaded model that answers greedily, whatever it is and whoever made it."""

    def read(self, prompt: Prompt, count: int, emit: Callable[[], None]) -> None:
        """Forgets what was read before, reads a prompt, and calls `emit` as each of `count` tokens is there."""


# An opener imports its runtime and returns what loads the model: importing is no part of load time or base memory.
# Arguments: its own, and `threads` and `context` (tokens to make room for).
Opener = Callable[..., Callable[[], Session]]


class ArtifactSession:
    """An exported artifact, read as `keydiff-export run` reads it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def read(self, prompt: Prompt, count: int, emit: Callable[[], None]) -> None:
        for _ in stream(self._runner, prompt.ids, count, set(), Sampling()):
            emit()


def open_exported(
    place: str, runtime: str, budget: int, block: int, evict_every: int, threads: int, context: int
) -> Callable[[], Session]:
    """Opener of an artifact, loaded as `run` loads it; it has the same room for every context."""
    if runtime in _LIBRARIES:
        importlib.import_module(_LIBRARIES[runtime])
    return lambda: ArtifactSession(
        open_artifact(Path(place), runtime, budget, block, threads, evict_every, resident=False)
    )


def measure(
    opener: str, arguments: dict[str, Any], ids: list[int], text: str, count: int, threads: int, context: int
) -> dict[str, Any]:
    """Figures of one prompt.

    Args:
        opener: `module:function` of an `Opener`.
        arguments: its own arguments.
        ids, text: the prompt, twice.
        count: tokens to generate, at least 2.
        threads: CPU threads.
        context: tokens to make room for.

    Returns:
        load_s, until two prompts of 32 tokens are answered, since some load only then; ttft_s, from the prompt to its
        first token, all being loaded; prefill_tokens_per_s; decode_ms, a list with the time of each token after the
        first; peak_rss_bytes, and base_rss_bytes of it before loading; anonymous_rss_bytes, the most without pages of
        mapped files at the end of the prompt and of the answer; copy_bytes_per_s of the machine just after;
        shares of the machine that others took and that were stolen.

    Raises:
        UserError: it cannot be loaded, or ends its answer before there is a second token.
    """
    load = resolve(opener)(**arguments, threads=threads, context=context)
    base = rss_bytes()
    before = Usage.now()
    began = time.perf_counter()
    session: Session = load()
    few = min(WARM_UP_TOKENS, len(ids))
    # The second answer ends with its first token: a session that holds one method at a time has the first one's again.
    for answer in (WARM_UP_ANSWER, 1):
        session.read(Prompt(ids[:few], text[: 4 * few]), answer, lambda: None)
    times = [time.perf_counter()]
    anonymous: list[int | None] = []

    def emit() -> None:
        times.append(time.perf_counter())
        # Once: looking takes a while, and a median of the tokens' times does not mind one of them.
        if len(times) == 2:
            anonymous.append(anonymous_bytes())

    session.read(Prompt(ids, text), count, emit)
    anonymous.append(anonymous_bytes())
    if len(times) < 3:
        raise UserError(f"it ended its answer after {len(times) - 1} tokens")
    peak, shares = peak_rss_bytes(), Usage.now().shares_since(before)
    ttft = times[1] - times[0]
    return {
        "load_s": times[0] - began,
        "ttft_s": ttft,
        "prefill_tokens_per_s": len(ids) / ttft,
        "decode_ms": [round((b - a) * 1e3, 4) for a, b in pairwise(times[1:])],
        "peak_rss_bytes": peak,
        "base_rss_bytes": base,
        "anonymous_rss_bytes": max((found for found in anonymous if found is not None), default=None),
        "copy_bytes_per_s": copy_bandwidth(threads),
        **shares,
    }
