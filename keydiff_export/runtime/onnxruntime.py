"""Runs `prefill.onnx` and `decode.onnx` with ONNX Runtime, the caches bound once and written in place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .base import Logits, Runner, Snapshot, make_snapshot, padded

NEXT, APPENDED = "_next", "_appended"


class OnnxRuntimeRunner(Runner):
    """Steps two sessions over one set of cache buffers, each bound as input and as output of both.

    Args:
        folder: holds prefill.onnx, decode.onnx and their weights.
        budget, block: N and B of the graph.
        threads: CPU threads, all cores by default.
        profile: folder for ONNX Runtime's profiles, none by default.

    Raises:
        UserError: ONNX Runtime is missing or refuses a file.
    """

    def __init__(
        self, folder: Path, budget: int, block: int, threads: int | None = None, profile: Path | None = None
    ) -> None:
        super().__init__(budget, block)
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UserError("running ONNX needs the package onnxruntime: run `pip install onnxruntime`") from error
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._state: dict[str, Any] = {}
        self._inputs: dict[str, dict[str, Any]] = {}
        self._logits: dict[str, Any] = {}
        self._bindings: dict[str, tuple[Any, Any]] = {}
        for method in ("prefill", "decode"):
            file = folder / f"{method}.onnx"
            if profile is not None:
                options.enable_profiling, options.profile_file_prefix = True, str(profile / method)
            try:
                session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime raises a family of its own without a common public base
                raise UserError(f"{file} is not a model that ONNX Runtime can load: export it again") from error
            self._bind(ort, method, session)

    def _bind(self, ort: Any, method: str, session: Any) -> None:
        binding = session.io_binding()
        fed: dict[str, Any] = {}
        dtypes = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(double)": np.float64}
        for item in session.get_inputs():
            is_state = item.name + NEXT in {output.name for output in session.get_outputs()}
            if is_state and item.name in self._state:
                value = self._state[item.name]
            else:
                value = ort.OrtValue.ortvalue_from_numpy(np.zeros(item.shape, dtypes[item.type]))
                (self._state if is_state else fed)[item.name] = value
            binding.bind_ortvalue_input(item.name, value)
        for item in session.get_outputs():
            if item.name == "logits":
                self._logits[method] = ort.OrtValue.ortvalue_from_numpy(np.zeros(item.shape, np.float32))
                binding.bind_ortvalue_output(item.name, self._logits[method])
            else:
                name = item.name.removesuffix(NEXT).removesuffix(APPENDED)
                binding.bind_ortvalue_output(item.name, self._state[name])
        self._inputs[method] = fed
        self._bindings[method] = (session, binding)

    def _prefill(self, tokens: list[int]) -> Logits:
        count = np.array([len(tokens)], dtype=np.int64)
        return self._run("prefill", tokens=padded(tokens, self.block), count=count)

    def _decode(self, token: int) -> Logits:
        return self._run("decode", tokens=np.array([[token]], dtype=np.int64))

    def _run(self, method: str, **inputs: np.ndarray) -> Logits:
        inputs["start"] = np.array([self.seen], dtype=np.int64)
        for name, array in inputs.items():
            self._inputs[method][name].update_inplace(array)
        session, binding = self._bindings[method]
        session.run_with_iobinding(binding)
        return np.array(self._logits[method].numpy()[0])

    def end_profile(self) -> None:
        for session, _ in self._bindings.values():
            session.end_profiling()

    def snapshot(self) -> Snapshot:
        layers: list[dict[str, np.ndarray]] = []
        while f"positions_{len(layers)}" in self._state:
            number = len(layers)
            names = ("positions", "pending", "keys", "values")
            layers.append({name: self._state[f"{name}_{number}"].numpy().copy() for name in names})
        return make_snapshot(layers, self.seen, self.budget)
