"""What a lowering target is, and what it says of the artifact it made."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..models import LoadedModel
from ..policies import Policy
from ..quantize import Activation
from ..shape import CacheShape
from ..spec import ExportSpec


@dataclass
class Phases:
    """Names and seconds of an export's phases, reported as they end."""

    report: Callable[[str, float], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block and reports it under `name`."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)
        self.report(name, self.seconds[name])


@dataclass
class Lowered:
    """What a lowering wrote.

    Attributes:
        files: names relative to the output folder.
        methods: per method its inputs and outputs: name, dtype, shape.
        planned_memory_bytes: activations and state that the runtime plans ahead, or None where it does not say.
    """

    files: list[str]
    methods: dict[str, dict[str, list[dict[str, Any]]]]
    planned_memory_bytes: int | None


class Target(ABC):
    """One way to lower the static graphs. Adding a target is one file with a subclass and one line of registration.

    Attributes:
        stock_runner: whether to add what the runtime's own LLM runner calls, where it has one.
    """

    name: ClassVar[str]
    runtime: ClassVar[str]
    quants: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    stock_runner: bool = False

    @abstractmethod
    def activation(self, quant: str) -> Activation:
        """How this target's kernels round activations under a quantisation."""

    def prepare(self, spec: ExportSpec, loaded: LoadedModel) -> None:  # noqa: B027
        """Told of an export before `lower`; targets with options of their own read them here.

        Raises:
            UserError: an option or a policy that the target does not take.
        """

    def extra(self, spec: ExportSpec) -> dict[str, Any]:
        """More that the manifest says of an artifact of this target."""
        return {}

    @abstractmethod
    def lower(
        self, model: nn.Module, quant: str, shape: CacheShape, policy: Policy, folder: Path, phases: Phases
    ) -> Lowered:
        """Writes the artifact of a quantised model into `folder`."""
