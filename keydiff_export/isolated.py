"""An object in a process of its own: native code that crashes there ends a check, not the command line.

The environment can differ too: LD_LIBRARY_PATH is only read when a process starts. Requests and answers are pickled
over two pipes; the child's own standard output goes to its log.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from .errors import UserError


class CrashError(Exception):
    """The child process ended without an answer.

    Attributes:
        cause: its signal (SIGSEGV) or exit code, in words.
        log: the end of what it printed.
    """

    def __init__(self, cause: str, log: str) -> None:
        super().__init__(f"{cause}: {log.strip().splitlines()[-1]}" if log.strip() else cause)
        self.cause, self.log = cause, log


class Isolated:
    """Makes an object with `factory(*arguments)` in a new process and calls its methods there.

    Args:
        factory: a module-level class or function; it and all arguments are pickled.
        arguments: positional arguments.
        environment: variables that differ from this process's.
        listener: receives what the child says with `tell` while it works.

    Raises:
        CrashError: the child died, here or in any later call.
        Exception: whatever the factory or a method raised, re-raised here.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        *arguments: Any,
        environment: Mapping[str, str] = {},
        listener: Callable[[Any], None] = lambda message: None,
    ) -> None:
        self._listener = listener
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        )
        try:
            self._ask((factory, arguments))
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method in the child and returns its result."""
        return self._ask((method, arguments))

    def _ask(self, request: tuple[Any, tuple[Any, ...]]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, request)
            kind, answer = pickle.load(self._process.stdout)
            while kind == "note":
                self._listener(answer)
                kind, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise CrashError(_describe(self._process.wait()), self.log()) from error
        if kind == "error":
            raise answer
        return answer

    def log(self) -> str:
        """What the child printed so far, its last 4,000 characters."""
        # The child writes at the file's shared offset, so it is read without moving that.
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 4000, max(0, size - 4000)).decode("utf-8", "replace")

    def close(self) -> None:
        """Ends the child."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.kill()
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def run_isolated(
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] = {},
    listener: Callable[[Any], None] = lambda message: None,
) -> Any:
    """Calls a module-level function once in a process of its own.

    Raises:
        CrashError: the child died.
        Exception: whatever the function raised.
    """
    with Isolated(_Once, environment=environment, listener=listener) as child:
        return child.call("run", function, arguments)


class _Once:
    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)


_answers: BinaryIO | None = None


def tell(message: Any) -> None:
    """Says something to the parent's listener; called anywhere else, nothing happens."""
    # The child runs this file as __main__, so its pipe lives there.
    stream = getattr(sys.modules["__main__"], "_answers", None)
    if stream is not None:
        _send(stream, ("note", message))


def _describe(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"crashed with {signal.Signals(-code).name}"
    except ValueError:
        return f"crashed with signal {-code}"


def _send(stream: BinaryIO | Any, message: Any) -> None:
    pickle.dump(message, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()


def _portable(error: Exception) -> Exception:
    """The error itself where it can be pickled, else its text; bad input stays a UserError."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        text = f"{type(error).__name__}: {error}"
        return UserError(text) if isinstance(error, UserError) else RuntimeError(text)
    return error


def _serve() -> None:
    """Reads requests until the pipe ends: first (factory, arguments), then (method, arguments)."""
    global _answers
    requests, _answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What native libraries print to standard output must not end up among the answers.
    os.dup2(2, 1)
    target: Any = None
    while True:
        try:
            subject, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            if target is None:
                target = subject(*arguments)
                result = None
            else:
                result = getattr(target, subject)(*arguments)
        except Exception as error:
            _send(_answers, ("error", _portable(error)))
        else:
            _send(_answers, ("result", result))


if __name__ == "__main__":
    _serve()
