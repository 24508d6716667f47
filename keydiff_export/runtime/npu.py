"""Steps an NPU graph: inputs from the CPU's share, state in, logits and state out. The same loop for every engine."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..npu_slots import STATE, HostStep, new_npu_layers
from ..policies import Policy
from ..shape import CacheShape
from .base import Logits, Runner, Snapshot, make_snapshot, padded

METHODS = ("prefill", "decode")


class Engine(Protocol):
    """Runs the two halves of a step; arrays are whatever the engine's runtime takes."""

    def inputs(self, method: str, tokens: NDArray[np.int64], start: int, count: int) -> list[Any]:
        """The CPU's share: tokens [1, T] -> the tensors of `StepInputs`."""

    def step(self, method: str, inputs: list[Any], state: list[Any]) -> list[Any]:
        """The NPU's share: logits [1, V] and the state after the step."""

    def empty(self) -> list[Any]:
        """The state of empty caches."""


class NpuRunner(Runner):
    """A runner over an engine, holding the state between steps.

    Args:
        engine: loaded graphs.
        shape: static sizes.
        state_size: state tensors a layer.
    """

    def __init__(self, engine: Engine, shape: CacheShape, state_size: int) -> None:
        super().__init__(shape.budget, shape.block)
        self.engine, self.state_size = engine, state_size
        self.state = engine.empty()

    def reset(self) -> None:
        super().reset()
        self.state = self.engine.empty()

    def _prefill(self, tokens: list[int]) -> Logits:
        return self._step("prefill", padded(tokens, self.block), len(tokens))

    def _decode(self, token: int) -> Logits:
        return self._step("decode", np.array([[token]]), 1)

    def _step(self, method: str, tokens: NDArray[np.int64], count: int) -> Logits:
        inputs = self.engine.inputs(method, tokens, self.seen, count)
        logits, *self.state = self.engine.step(method, inputs, self.state)
        return np.array(logits, dtype=np.float32)[0]

    def snapshot(self) -> Snapshot:
        layers: list[dict[str, Any]] = []
        for first in range(0, len(self.state), self.state_size):
            # Names beyond the state that the policy keeps simply find nothing.
            layers.append(dict(zip(STATE, map(np.array, self.state[first : first + self.state_size]), strict=False)))
        positions = np.concatenate([layer["positions"] for layer in layers])
        return make_snapshot(positions, layers, self.held)


class TorchEngine:
    """The two halves in eager PyTorch: for calibration, and for tests of the graph before any lowering.

    Args:
        hosts: `HostStep` of either method.
        steps: `NpuStep`, or what it was traced or prepared to, of either method.
        shape, policy: of the cache.
    """

    def __init__(
        self, hosts: dict[str, HostStep], steps: dict[str, nn.Module], shape: CacheShape, policy: Policy
    ) -> None:
        self.hosts, self.steps, self.shape, self.policy = hosts, steps, shape, policy

    def inputs(self, method: str, tokens: NDArray[np.int64], start: int, count: int) -> list[Any]:
        with torch.no_grad():
            return list(self.hosts[method](torch.from_numpy(tokens), torch.tensor([start]), torch.tensor([count])))

    def step(self, method: str, inputs: list[Any], state: list[Any]) -> list[Any]:
        with torch.no_grad():
            return list(self.steps[method](*inputs, *state))

    def empty(self) -> list[Any]:
        return [tensor for layer in new_npu_layers(self.shape, self.policy) for tensor in layer.tensors().values()]
