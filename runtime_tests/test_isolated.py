"""A child process that crashes is an exception here, with its signal."""

from __future__ import annotations

import ctypes
import os

import pytest

from keydiff_export.errors import UserError
from keydiff_export.isolated import CrashError, Isolated, run_isolated, tell


class Counter:
    def __init__(self, start: int) -> None:
        self.value = start

    def add(self, number: int) -> int:
        print("this goes to the log, not among the answers")
        self.value += number
        return self.value

    def crash(self) -> None:
        os.write(2, b"about to read address 0\n")
        ctypes.string_at(0)

    def refuse(self) -> None:
        raise UserError("not like this")

    def leave(self) -> None:
        os._exit(7)


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} {two}")


def raise_unpicklable() -> None:
    raise UnpicklableError(1, 2)


def count_aloud(last: int) -> int:
    for number in range(last):
        tell(("number", number))
    return last


def test_state_lives_in_the_child() -> None:
    with Isolated(Counter, 3) as child:
        assert child.call("add", 4) == 7
        assert child.call("add", 1) == 8
        with pytest.raises(UserError, match="not like this"):
            child.call("refuse")
        assert child.call("add", 1) == 9
        with pytest.raises(CrashError) as crash:
            child.call("crash")
    assert crash.value.cause == "crashed with SIGSEGV"
    assert "about to read address 0" in crash.value.log


def test_an_exit_is_a_crash_too() -> None:
    with Isolated(Counter, 0) as child, pytest.raises(CrashError, match="ended with exit code 7"):
        child.call("leave")


def test_environment_errors_and_notes() -> None:
    assert run_isolated(os.getenv, "KEYDIFF_TEST", environment={"KEYDIFF_TEST": "set"}) == "set"
    with pytest.raises(RuntimeError, match="UnpicklableError: 1 2"):
        run_isolated(raise_unpicklable)
    notes: list[object] = []
    assert run_isolated(count_aloud, 3, listener=notes.append) == 3
    assert notes == [("number", 0), ("number", 1), ("number", 2)]
