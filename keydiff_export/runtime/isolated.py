"""A runner in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..isolated import Isolated
from .base import Logits, Runner, Snapshot


class IsolatedRunner(Runner):
    """Passes every step on to a runner that lives in a child process.

    Args:
        factory: a module-level function that makes the runner, with `arguments`, over there.
        arguments: pickled along.
        budget, block: N and B.
        environment: variables that the child needs.

    Raises:
        CrashError: the child died, here or in any later call.
    """

    def __init__(
        self, factory: Callable[..., Runner], *arguments: Any, budget: int, block: int, environment: Mapping[str, str]
    ) -> None:
        super().__init__(budget, block)
        self._child = Isolated(factory, *arguments, environment=environment)

    def reset(self) -> None:
        super().reset()
        self._child.call("reset")

    def _prefill(self, tokens: list[int]) -> Logits:
        return self._child.call("step", tokens)

    def _decode(self, token: int) -> Logits:
        return self._child.call("step", [token])

    def snapshot(self) -> Snapshot:
        return self._child.call("snapshot")

    def close(self) -> None:
        """Ends the child."""
        self._child.close()
