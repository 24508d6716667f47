"""Peers for the tests of the bench, in a file of their own because child processes import it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from keydiff_export.measure import Prompt, Session


class Echo:
    """Answers at once with a number of tokens; all that are asked for by default."""

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens

    def read(self, prompt: Prompt, count: int, emit: Callable[[], None]) -> None:
        for _ in range(count if self.tokens is None else self.tokens):
            emit()


def open_echo(threads: int, context: int) -> Callable[[], Session]:
    assert (threads, context) == (1, 256)
    return Echo


def open_brief(threads: int, context: int) -> Callable[[], Session]:
    return lambda: Echo(tokens=1)


def open_broken(threads: int, context: int) -> Callable[[], Session]:
    raise OSError("no such kernel")


def linger(seconds: float) -> None:
    time.sleep(seconds)


def open_crashing(threads: int, context: int) -> Callable[[], Session]:
    os.abort()
