"""ONNX for ONNX Runtime's QNN provider: `prefill.onnx` and `decode.onnx` for the NPU, `*_inputs.onnx` for the CPU."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from ..npu_slots import StepInputs
from ..runtime.npu import METHODS, NpuRunner, TorchEngine
from ..runtime.onnx_qnn import PROVIDER, qnn_options, qnn_session
from .base import Lowered
from .onnx_cpu import DATA_FILE, NEXT, quiet_exporter, write_models
from .qnn import (
    PHONE,
    Halves,
    QnnJob,
    QnnTarget,
    child_phases,
    describe,
    host_examples,
    refuse_breaks,
    split,
    tick,
    write_ranges,
)

# The first opset with RMSNormalization.
OPSET = 23


class OnnxQnn(QnnTarget):
    """Qualcomm's NPU through ONNX Runtime."""

    name = "onnx-qnn"
    runtime = "onnx-qnn"
    quants = ("fp16", "16a8w")
    # Once a method: ONNX Runtime calibrates one model at a time.
    readings = len(METHODS)
    summary = "ONNX for ONNX Runtime's QNN provider, Qualcomm's NPU"

    def _function(self) -> Callable[[QnnJob], Lowered]:
        return lower_job


def lower_job(job: QnnJob) -> Lowered:
    """Lowers a job in this process, which must have the SDK's libraries on its path."""
    phases = child_phases()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with phases.phase("onnx-qnn: trace"):
            halves = split(job)
            models = _export_steps(halves)
            hosts = _export_hosts(halves)
        files = [f"{name}.onnx" for name in (*models, *hosts)] + [DATA_FILE]
        if job.runs:
            with phases.phase("onnx-qnn: calibrate"):
                models, ranges = _quantise(job, halves, models)
            files.append(write_ranges(job.folder, ranges, job.runs))
        with phases.phase("onnx-qnn: write and check"):
            write_models({**models, **hosts}, job.folder)
            for method in METHODS:
                _check_partitions(job, method)
        if job.compile:
            with phases.phase("onnx-qnn: compile for a phone"):
                files += _compile(job)
    return Lowered(files, describe(halves, halves.step.model.config.vocab_size), None)


def _export_steps(halves: Halves) -> dict[str, ir.Model]:
    names = [*StepInputs._fields, *halves.state]
    outputs = ["logits", *(name + NEXT for name in halves.state)]
    return {m: _export(halves.step, example, names, outputs) for m, example in halves.examples.items()}


def _export_hosts(halves: Halves) -> dict[str, ir.Model]:
    return {
        f"{method}_inputs": _export(
            host, host_examples(halves.lengths[method]), ["tokens", "start", "count"], list(StepInputs._fields)
        )
        for method, host in halves.hosts.items()
    }


def _export(module: nn.Module, example: tuple[Tensor, ...], inputs: list[str], outputs: list[str]) -> ir.Model:
    with torch.no_grad(), quiet_exporter():
        program = torch.onnx.export(
            module, example, dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs, verbose=False
        )
    assert program is not None
    return program.model


class _Recorder(TorchEngine):
    """The float graph, keeping what went into its last step."""

    method: str
    tensors: list[Tensor]

    def step(self, method: str, inputs: list[Any], state: list[Any]) -> list[Any]:
        self.method, self.tensors = method, [*inputs, *state]
        return super().step(method, inputs, state)


class _Feeds:
    """Calibration feeds of one method in ONNX Runtime's reader interface, computed step by step as they are read."""

    def __init__(self, job: QnnJob, halves: Halves, method: str) -> None:
        self._feeds = self._stream(job, halves, method)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next step's inputs by name, None at the end."""
        return next(self._feeds, None)

    def _stream(self, job: QnnJob, halves: Halves, method: str) -> Iterator[dict[str, np.ndarray]]:
        names = [*StepInputs._fields, *halves.state]
        engine = _Recorder(halves.hosts, dict.fromkeys(METHODS, halves.step), job.shape, job.policy)
        runner = NpuRunner(engine, job.shape, len(halves.step.names))
        for run in job.runs:
            runner.reset()
            for step in run:
                runner.step(step)
                tick(len(step))
                if engine.method == method:
                    yield {name: tensor.numpy() for name, tensor in zip(names, engine.tensors, strict=True)}


def _quantise(
    job: QnnJob, halves: Halves, models: dict[str, ir.Model]
) -> tuple[dict[str, ir.Model], dict[str, dict[str, list[float]]]]:
    """Wraps both methods in QDQ nodes with 16-bit activations and 8-bit weights; also returns the ranges."""
    from onnxruntime.quantization import QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    quantised, ranges = {}, {}
    with tempfile.TemporaryDirectory(dir=job.folder) as scratch:
        for method, model in models.items():
            folder = Path(scratch) / method
            folder.mkdir()
            before, after = folder / "float.onnx", folder / "qdq.onnx"
            write_models({"float": model}, folder)
            config = get_qnn_qdq_config(
                before,
                _Feeds(job, halves, method),
                activation_type=QuantType.QUInt16,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
            with quiet_exporter():
                quantize(before, after, config)
            quantised[method] = ir.from_proto(onnx.load(after))
            ranges[method] = dict(_ranges(quantised[method]))
    return quantised, ranges


def _ranges(model: ir.Model) -> Iterator[tuple[str, list[float]]]:
    """(tensor, [min, max]) of every quantised activation, from its scale and zero point."""
    for node in model.graph:
        if node.op_type != "QuantizeLinear":
            continue
        scale, zero = (node.inputs[i].const_value.numpy() for i in (1, 2))
        if scale.size == 1:
            levels = np.iinfo(zero.dtype)
            low, high = ((float(edge) - float(zero)) * float(scale) for edge in (levels.min, levels.max))
            yield node.inputs[0].name, [low, high]


def _check_partitions(job: QnnJob, method: str) -> None:
    """Applies the one-delegate rule to a written model, by loading it with fallback to the CPU allowed."""
    session = qnn_session(job.folder / f"{method}.onnx", job.soc, fallback=True)
    parts = session.get_provider_graph_assignment_info()
    npu = sum(part.ep_name == PROVIDER for part in parts)
    outside = {
        node.op_type: "ONNX Runtime's QNN provider does not take it"
        for part in parts
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
    }
    refuse_breaks("onnx-qnn", npu, outside)


def _compile(job: QnnJob) -> list[str]:
    """Writes EPContext models: both methods in one context binary that holds the weights once."""
    folder = job.folder / PHONE
    folder.mkdir()
    for method in METHODS:
        options = qnn_options(job.soc, fallback=False)
        options.add_session_config_entry("ep.share_ep_contexts", "1")
        if method == METHODS[-1]:
            options.add_session_config_entry("ep.stop_share_ep_contexts", "1")
        compiler = ort.ModelCompiler(options, str(job.folder / f"{method}.onnx"), embed_compiled_data_into_model=False)
        compiler.compile_to_file(str(folder / f"{method}.onnx"))
    return [f"{PHONE}/{file.name}" for file in sorted(folder.iterdir())]
