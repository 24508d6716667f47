"""Runs the ONNX models of the QNN target; on x86-64 Linux the provider executes on the HTP emulator.

Meant for a child process with the SDK's libraries on its path (`runtime.isolated`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..npu_slots import new_npu_layers
from ..policies import Policy
from ..qnn_sdk import Soc
from ..shape import CacheShape
from .npu import METHODS, NpuRunner

PROVIDER = "QNN"


def qnn_options(soc: Soc, fallback: bool) -> ort.SessionOptions:
    """Session options for the QNN provider; without `fallback` a node that it does not take is an error."""
    import onnxruntime_qnn

    if not any(device.ep_name == PROVIDER for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "0" if fallback else "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    backend = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "htp_arch": str(soc.arch),
        "soc_model": str(soc.model),
        # By default the rounding of a quantised graph's inputs and outputs is left to the CPU.
        "offload_graph_io_quantization": "0",
    }
    options.add_provider_for_devices(devices, backend)
    return options


def qnn_session(file: Path, soc: Soc, fallback: bool = False) -> ort.InferenceSession:
    """A session on the NPU."""
    return ort.InferenceSession(str(file), qnn_options(soc, fallback))


class OnnxQnnEngine:
    """Four sessions: the CPU's share on the CPU provider, the NPU's without any fallback."""

    def __init__(self, folder: Path, shape: CacheShape, policy: Policy, soc: Soc) -> None:
        self._shape, self._policy = shape, policy
        # With the provider named: once the QNN provider is registered, ONNX Runtime would choose it here too.
        self._inputs = {
            method: ort.InferenceSession(str(folder / f"{method}_inputs.onnx"), providers=["CPUExecutionProvider"])
            for method in METHODS
        }
        self._steps = {method: qnn_session(folder / f"{method}.onnx", soc) for method in METHODS}
        self._names = {method: [i.name for i in session.get_inputs()] for method, session in self._steps.items()}

    def inputs(self, method: str, tokens: NDArray[np.int64], start: int, count: int) -> list[Any]:
        given = {"tokens": tokens, "start": np.array([start]), "count": np.array([count])}
        wanted = {i.name for i in self._inputs[method].get_inputs()}
        return list(self._inputs[method].run(None, {n: v for n, v in given.items() if n in wanted}))

    def step(self, method: str, inputs: list[Any], state: list[Any]) -> list[Any]:
        return list(self._steps[method].run(None, dict(zip(self._names[method], [*inputs, *state], strict=True))))

    def empty(self) -> list[Any]:
        layers = new_npu_layers(self._shape, self._policy)
        return [tensor.numpy() for layer in layers for tensor in layer.tensors().values()]


def make_runner(folder: Path, shape: CacheShape, policy: Policy, soc: Soc) -> NpuRunner:
    """A runner for an exported folder's `onnx-qnn`."""
    state = len(new_npu_layers(shape, policy)[0].tensors())
    return NpuRunner(OnnxQnnEngine(folder, shape, policy, soc), shape, state)
