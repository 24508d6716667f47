"""Runs `model.pte` and `inputs.pte` of the ExecuTorch QNN target; on x86-64 Linux the HTP emulator runs the delegate.

Meant for a child process with the SDK's libraries on its path (`runtime.isolated`): a mismatch between program and
libraries ends in a signal, not in an exception.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..npu_slots import new_npu_layers
from ..policies import Policy
from ..qnn_sdk import Soc
from ..shape import CacheShape
from .npu import METHODS, NpuRunner


class ExecuTorchEngine:
    """The methods of both programs; every output is copied, because the runtime reuses its memory."""

    def __init__(self, folder: Path, shape: CacheShape, policy: Policy) -> None:
        from executorch.extension.pybindings import portable_lib

        self._shape, self._policy = shape, policy
        self._programs = [portable_lib._load_program(str(folder / file)) for file in ("inputs.pte", "model.pte")]
        inputs, model = self._programs
        self._inputs = {method: inputs.load_method(f"{method}_inputs") for method in METHODS}
        self._steps = {method: model.load_method(method) for method in METHODS}

    def inputs(self, method: str, tokens: NDArray[np.int64], start: int, count: int) -> list[Any]:
        given = (torch.from_numpy(tokens), torch.tensor([start]), torch.tensor([count]))
        return [tensor.clone() for tensor in self._inputs[method].call(given)]

    def step(self, method: str, inputs: list[Any], state: list[Any]) -> list[Any]:
        return [tensor.clone() for tensor in self._steps[method].call((*inputs, *state))]

    def empty(self) -> list[Any]:
        return [tensor for layer in new_npu_layers(self._shape, self._policy) for tensor in layer.tensors().values()]


def make_runner(folder: Path, shape: CacheShape, policy: Policy, soc: Soc) -> NpuRunner:
    """A runner for an exported folder's `executorch-qnn`."""
    state = len(new_npu_layers(shape, policy)[0].tensors())
    return NpuRunner(ExecuTorchEngine(folder, shape, policy), shape, state)
