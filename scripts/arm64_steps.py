"""Steps exported artifacts and runs single layers; writes logits and held positions. It runs on x86 and under qemu.

Usage: python scripts/arm64_steps.py WORK MACHINE [OPERATOR.so]   WORK: see arm64_compare.py

OPERATOR.so takes the place of ExecuTorch's library of LLM operators on processors that cannot load it. Under qemu every
import costs, and transformers is not at hand: packages are entered beside their front doors.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray


def beside_front_door(name: str, folder: Path) -> None:
    """Makes `name` importable without running its __init__.py."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


EXECUTORCH = Path(importlib.import_module("executorch").__path__[0])
beside_front_door("keydiff_export", Path(__file__).parent.parent / "keydiff_export")
beside_front_door("executorch.exir", EXECUTORCH / "exir")
OPERATORS = "executorch.extension.llm.custom_ops"
beside_front_door(OPERATORS, EXECUTORCH)
beside_front_door(f"{OPERATORS}.custom_ops", EXECUTORCH)

from executorch.extension.pybindings import portable_lib  # noqa: E402

from keydiff_export.runtime.base import Runner  # noqa: E402
from keydiff_export.runtime.executorch import ExecuTorchRunner, ForwardRunner  # noqa: E402
from keydiff_export.runtime.onnxruntime import OnnxRuntimeRunner  # noqa: E402


def open_artifact(folder: Path, budget: int, block: int, engine: str) -> Runner:
    if engine == "onnx":
        return OnnxRuntimeRunner(folder / "onnx-cpu", budget, block, threads=1)
    runner = ForwardRunner if engine == "forward" else ExecuTorchRunner
    return runner(folder / "executorch-xnnpack" / "model.pte", budget, block, threads=1)


def step(runner: Runner, tokens: list[int], lengths: list[int]) -> dict[str, NDArray[Any]]:
    """Logits [steps, V], positions by slot [steps, L, H, N + 1] (-1: free), keys and values [steps, L, H, N + 1, d]."""
    rows: dict[str, list[NDArray[Any]]] = {"logits": [], "positions": [], "keys": [], "values": []}
    for length in lengths:
        rows["logits"].append(runner.step(tokens[runner.seen : runner.seen + length]))
        snapshot = runner.snapshot()
        positions = np.full(snapshot.keys.shape[:3], -1)
        for layer, heads in enumerate(snapshot.slots):
            for head, places in enumerate(heads):
                positions[layer, head, list(places.values())] = list(places)
        free = runner.budget + 1 - positions.shape[2]
        rows["positions"].append(np.pad(positions, ((0, 0), (0, 0), (0, free)), constant_values=-1))
        for name, array in (("keys", snapshot.keys), ("values", snapshot.values)):
            rows[name].append(np.pad(array, ((0, 0), (0, 0), (0, free), (0, 0))))
    return {name: np.array(arrays) for name, arrays in rows.items()}


def run_layer(file: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The output of a single layer in its runtime."""
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])
    program: Any = portable_lib._load_for_executorch(str(file))
    return np.array(program.forward((torch.from_numpy(x),))[0].numpy())


def main() -> None:
    work, machine = Path(sys.argv[1]), sys.argv[2]
    library = sys.argv[3] if len(sys.argv) > 3 else ""
    if library:
        ctypes.CDLL(library)
    else:
        torch.ops.load_library(EXECUTORCH / "extension/llm/custom_ops/libcustom_ops_aot_lib.so")
    plan = json.loads((work / "plan.json").read_text())
    for quant, engine in plan["artifacts"]:
        runner = open_artifact(work / quant, plan["budget"], plan["block"], engine)
        np.savez(work / f"{quant}-{engine}-{machine}.npz", **step(runner, plan["tokens"], plan["lengths"]))
    for name in plan["layers"]:
        np.save(work / f"{name}-{machine}.npy", run_layer(work / name, np.load(work / f"{name}-x.npy")))


if __name__ == "__main__":
    main()
