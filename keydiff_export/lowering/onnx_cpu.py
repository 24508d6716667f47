"""ONNX for ONNX Runtime's CPU provider: a file a method over one weight file, caches as graph I/O."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..graph import StaticGraph
from ..policies import Policy
from ..quantize import Activation, twin
from ..shape import CacheShape
from ..slots import Slots, new_slots
from .base import Lowered, Phases, Target
from .onnx_fusions import fused, fused_rotation
from .onnx_ops import OnnxOps
from .onnx_passes import optimize
from .tracing import fast_tracing

DATA_FILE = "weights.data"
OPSET = 21
NEXT = "_next"
# What the first of a step's two writes to a cache leaves. It is an output, too, so that a runtime can bind it to the
# cache's own buffer and both writes happen in place; who does not bind it gets the same numbers by way of copies.
APPENDED = "_appended"
# Large tensors start on a page, so that a runtime can map them instead of reading them.
_PAGE = 4096
_INLINE_BYTES = 1024


class OnnxCpu(Target):
    """Phones' and desktops' CPUs through ONNX Runtime's stock operators."""

    name = "onnx-cpu"
    runtime = "onnxruntime"
    quants = ("none", "8da4w", "8da4w-head4", "int8", "int4")
    summary = "ONNX for ONNX Runtime's CPU provider"

    def activation(self, quant: str) -> Activation:
        return "float" if quant in ("none", "int4") else "int8_per_group"

    def lower(
        self, model: nn.Module, quant: str, shape: CacheShape, policy: Policy, folder: Path, phases: Phases
    ) -> Lowered:
        module = model if quant == "none" else twin(model, self.activation(quant))
        graph = StaticGraph(fused(module), shape, policy, OnnxOps())
        models: dict[str, ir.Model] = {}
        for method, examples in graph.methods(fill=True).items():
            with phases.phase(f"onnx-cpu: trace {method}"), quiet_exporter(), fast_tracing(), fused_rotation(module):
                models[method] = _export(graph, method, examples)
        with phases.phase("onnx-cpu: write"):
            write_models(models, folder)
        methods = {name: {"inputs": _io(m.graph.inputs), "outputs": _io(m.graph.outputs)} for name, m in models.items()}
        return Lowered([*(f"{name}.onnx" for name in models), DATA_FILE], methods, None)


class _Step(nn.Module):
    """A method with its state as inputs and outputs, flat, in the order of `Slots.tensors`."""

    def __init__(self, graph: StaticGraph, method: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.graph, self.model, self.method, self.names = graph, graph.model, method, names

    def forward(self, arguments: tuple[Tensor, ...], states: list[Tensor]) -> tuple[Tensor, ...]:
        ops = _RecordingOps()
        self.graph.ops = ops
        before = dict(zip(self.names, states, strict=True))
        slots = Slots.named(before, self.graph.shape.layers)
        logits = getattr(self.graph, self.method)(*arguments, slots)
        after = slots.tensors()
        appended = {name: ops.first(before[name], after[name]) for name in self.names}
        appended = {name: tensor for name, tensor in appended.items() if tensor is not None}
        self.appended = tuple(appended)
        return (logits, *after.values(), *appended.values())


class _RecordingOps(OnnxOps):
    """The slot operations, and what each write was to: of two in a row the first is an output, too."""

    def __init__(self) -> None:
        self.writes: list[tuple[Tensor, Tensor]] = []

    def write(self, slots: Tensor, address: Tensor, rows: Tensor) -> Tensor:
        written = super().write(slots, address, rows)
        self.writes.append((slots, written))
        return written

    def attend(self, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        output, keys, values = super().attend(*tensors)
        self.writes += [(tensors[3], keys), (tensors[4], values)]
        return output, keys, values

    def first(self, before: Tensor, after: Tensor) -> Tensor | None:
        """The tensor between a state before and after the step, where it was written twice."""
        between = next((source for source, written in self.writes if written is after), None)
        return between if any(source is before and written is between for source, written in self.writes) else None


def _export(graph: StaticGraph, method: str, examples: dict[str, Tensor]) -> ir.Model:
    named = new_slots(graph.shape, graph.policy, graph.ops).tensors()
    state_names, states = list(named), list(named.values())
    step = _Step(graph, method, tuple(state_names)).eval()
    with torch.no_grad():
        program = torch.onnx.export(
            step,
            (tuple(examples.values()), states),
            dynamo=True,
            opset_version=OPSET,
            input_names=[*examples, *state_names],
            output_names=["logits", *(name + NEXT for name in state_names)],
            verbose=False,
        )
    assert program is not None
    for name, value in zip(step.appended, program.model.graph.outputs[1 + len(state_names) :], strict=True):
        value.name = name + APPENDED
    optimize(program.model)
    return program.model


def write_models(models: dict[str, ir.Model], folder: Path) -> None:
    """Writes NAME.onnx for every model, tensors of equal content once, in one data file that all of them name."""
    places: dict[bytes, int] = {}
    with (folder / DATA_FILE).open("wb") as stream:
        for name, model in models.items():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _INLINE_BYTES:
                    continue
                content = tensor.tobytes()
                key = hashlib.sha256(content).digest()
                if key not in places:
                    places[key] = stream.seek(-(-stream.tell() // _PAGE) * _PAGE)
                    stream.write(content)
                value.const_value = ir.ExternalTensor(
                    DATA_FILE,
                    places[key],
                    len(content),
                    tensor.dtype,
                    shape=tensor.shape,
                    name=value.name,
                    base_dir=folder,
                )
            _drop_metadata(model)
            ir.save(model, folder / f"{name}.onnx")


def _drop_metadata(model: ir.Model) -> None:
    """What the exporter notes of its source, which is nothing to a runtime."""
    nodes = list(model.graph)
    values = [value for node in nodes for value in node.outputs]
    for part in (model, model.graph, *model.graph.inputs, *model.graph.initializers.values(), *nodes, *values):
        part.metadata_props.clear()


def _io(values: Any) -> list[dict[str, Any]]:
    return [{"name": v.name, "dtype": str(v.dtype.numpy()), "shape": [int(d) for d in v.shape]} for v in values]


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silences the exporter's notes, which a user can do nothing about."""
    for name in ("onnxscript", "torch.onnx._internal.exporter._registration"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
