"""Runs `prefill.onnx`, `decode.onnx` and `fill.onnx` with ONNX Runtime, the caches bound once and written in place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .base import LAYERED, Logits, Runner, Snapshot, make_snapshot, padded

NEXT, APPENDED = "_next", "_appended"
DTYPES = {
    "tensor(int64)": np.int64,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}


class OnnxRuntimeRunner(Runner):
    """Steps a session a method over one set of cache buffers, each bound as input and as output of all.

    Args:
        folder: holds an .onnx file a method and their weights.
        budget, block: N and B of the graph.
        threads: CPU threads, all cores by default.
        evict_every: k of the graph.
        resident: keep the sessions of all methods. Without it only the method in use is loaded, which holds the weights
            once in memory and costs a load (under a second for a small model) at every change of method.
        profile: folder for ONNX Runtime's profiles, none by default.

    Raises:
        UserError: ONNX Runtime is missing or refuses a file.
    """

    def __init__(
        self,
        folder: Path,
        budget: int,
        block: int,
        threads: int | None = None,
        evict_every: int = 1,
        resident: bool = True,
        profile: Path | None = None,
    ) -> None:
        super().__init__(budget, block, evict_every)
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UserError("running ONNX needs the package onnxruntime: run `pip install onnxruntime`") from error
        self._ort, self._folder, self._resident, self._profile = ort, folder, resident, profile
        self._options = ort.SessionOptions()
        self._options.log_severity_level = 3
        # The default order puts eviction behind the last layer, and every layer's logits wait for it: 98 MB more.
        self._options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        if threads is not None:
            self._options.intra_op_num_threads = threads
        self.fills = evict_every == 1 and (folder / "fill.onnx").is_file()
        self._state: dict[str, Any] = {}
        self._inputs: dict[str, dict[str, Any]] = {}
        self._logits: dict[str, Any] = {}
        self._bindings: dict[str, tuple[Any, Any]] = {}
        for method in self.methods if resident else self.methods[:1]:
            self._load(method)

    def _load(self, method: str) -> None:
        if not self._resident:
            self._bindings.clear()
        if self._profile is not None:
            self._options.enable_profiling, self._options.profile_file_prefix = True, str(self._profile / method)
        # Memory planned ahead saves a token up to a twelfth of its time. A block's plan would be one more piece in the
        # arena, rounded up to a power of two: 115 MB for the demo model.
        self._options.enable_mem_pattern = method != "prefill"
        file = self._folder / f"{method}.onnx"
        try:
            session = self._ort.InferenceSession(str(file), self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a family of its own without a common public base
            raise UserError(f"{file} is not a model that ONNX Runtime can load: export it again") from error
        self._bind(self._ort, method, session)

    def _bind(self, ort: Any, method: str, session: Any) -> None:
        binding = session.io_binding()
        fed: dict[str, Any] = {}
        for item in session.get_inputs():
            is_state = item.name + NEXT in {output.name for output in session.get_outputs()}
            if is_state and item.name in self._state:
                value = self._state[item.name]
            else:
                zeros = np.zeros(item.shape, DTYPES[item.type])
                # Written, so that a cache has all of its memory from the start and a longer prompt takes no more.
                zeros.fill(0)
                value = ort.OrtValue.ortvalue_from_numpy(zeros)
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
        staged = {"staged": np.array([self.staged], dtype=np.int64)} if self.evict_every > 1 else {}
        method = "fill" if self.fills and self.fits and self.seen < self.budget else self._single
        return self._run(method, tokens=np.array([[token]], dtype=np.int64), **staged)

    def _run(self, method: str, **inputs: np.ndarray) -> Logits:
        if method not in self._bindings:
            self._load(method)
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
        while f"keys_{len(layers)}" in self._state:
            tensors = {name: self._state.get(f"{name}_{len(layers)}") for name in LAYERED}
            layers.append({name: t.numpy()[0].copy() for name, t in tensors.items() if t is not None})
        return make_snapshot(self._state["positions"].numpy().copy(), layers, self.held)
