"""ExecuTorch with the QNN delegate: `model.pte` (one delegate a method) and `inputs.pte` (the CPU's share)."""

from __future__ import annotations

import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
from torch.export import ExportedProgram, export
from torch.fx import GraphModule, Node

from ..calibration import calibrate
from ..runtime.npu import NpuRunner, TorchEngine
from .base import Lowered
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

FILE, INPUTS = "model.pte", "inputs.pte"
# How far a tensor may leave what calibration saw of it before it is clipped. Clipping costs more than the resolution
# that this takes: with rotation and 16-bit activations of the whole demo model, six first blocks were at 30.1 dB in the
# mean with 1, at 32.7 with 1.25, 35.2 with 1.5 and 32.4 with 2 (rounded in PyTorch, weights in float32).
HEADROOM = 1.5
_PARTITIONER_LOG = "executorch.backends.qualcomm.partition.qnn_partitioner"


class ExecuTorchQnn(QnnTarget):
    """Qualcomm's NPU through ExecuTorch."""

    name = "executorch-qnn"
    runtime = "executorch-qnn"
    quants = ("fp16", "16a8w", "16a4w")
    summary = "ExecuTorch .pte for Qualcomm's NPU, QNN delegate"

    def _function(self) -> Callable[[QnnJob], Lowered]:
        return lower_job


def lower_job(job: QnnJob) -> Lowered:
    """Lowers a job in this process, which must have the SDK's libraries on its path."""
    phases = child_phases()
    logging.getLogger("executorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with phases.phase("executorch-qnn: trace"):
            halves = split(job)
            graphs = _trace(halves)
        files = []
        if job.runs:
            with phases.phase("executorch-qnn: calibrate"):
                graphs, ranges = _quantise(job, halves, graphs)
            files.append(write_ranges(job.folder, ranges, job.runs))
        with phases.phase("executorch-qnn: lower"):
            _write(_lower(job, halves, graphs, share=False), job.folder / FILE)
        if job.compile:
            with phases.phase("executorch-qnn: compile for a phone"):
                (job.folder / PHONE).mkdir()
                _write(_lower(job, halves, graphs, share=True), job.folder / PHONE / FILE)
            files.append(f"{PHONE}/{FILE}")
        with phases.phase("executorch-qnn: inputs"):
            _write(_lower_inputs(halves), job.folder / INPUTS)
    methods = describe(halves, halves.step.model.config.vocab_size)
    return Lowered([FILE, INPUTS, *files], methods, None)


def _trace(halves: Halves) -> dict[str, GraphModule]:
    with torch.no_grad():
        return {m: export(halves.step, example, strict=False).module() for m, example in halves.examples.items()}


def _quantise(
    job: QnnJob, halves: Halves, graphs: dict[str, GraphModule]
) -> tuple[dict[str, GraphModule], dict[str, dict[str, list[float]]]]:
    """Inserts observers, streams the calibration text through both methods, converts; also returns the ranges."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with torch.no_grad():
        prepared = {method: prepare_pt2e(graph, _quantizer(job)) for method, graph in graphs.items()}
        engine = TorchEngine(halves.hosts, prepared, job.shape, job.policy)
        calibrate(NpuRunner(engine, job.shape, len(halves.step.names)), job.runs, tick)
        for graph in prepared.values():
            _widen(graph)
        ranges = {method: dict(_ranges(graph)) for method, graph in prepared.items()}
        return {method: convert_pt2e(graph) for method, graph in prepared.items()}, ranges


def _quantizer(job: QnnJob) -> Any:
    from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer, QuantDtype
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from torchao.quantization.pt2e import MinMaxObserver

    quantizer = QnnQuantizer(soc_model=QcomChipset[job.soc.name])
    # Plain minimum and maximum: the default moving average forgets early extremes, and what it clips is lost.
    quantizer.set_default_quant_config(
        QuantDtype[f"use_{job.quant}"], is_linear_per_channel=True, act_observer=MinMaxObserver
    )
    return quantizer


def _observers(graph: GraphModule) -> Iterator[tuple[Node, Any]]:
    """(tensor, observer) of every activation; several tensors may share an observer."""
    for node in graph.graph.nodes:
        observer = graph.get_submodule(node.target) if node.op == "call_module" else None
        low = getattr(observer, "min_val", None)
        if low is not None and low.numel() == 1 and node.args[0].op != "get_attr":
            yield node.args[0], observer


def _widen(graph: GraphModule) -> None:
    """Gives every activation's range its headroom."""
    for observer in {id(observer): observer for _, observer in _observers(graph)}.values():
        observer.min_val *= HEADROOM
        observer.max_val *= HEADROOM


def _ranges(graph: GraphModule) -> Iterator[tuple[str, list[float]]]:
    """(tensor, [min, max]) of every activation."""
    for node, observer in _observers(graph):
        yield node.name, [float(observer.min_val), float(observer.max_val)]


def _lower(job: QnnJob, halves: Halves, graphs: dict[str, GraphModule], share: bool) -> EdgeProgramManager:
    """Lowers both methods into one context binary.

    `share` gives them one copy of the weights. Phones can load that; the emulator cannot ("Shared weights buffer isn't
    supported on this platform").
    """
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import (
        generate_htp_compiler_spec,
        generate_qnn_executorch_compiler_spec,
        to_edge_transform_and_lower_to_qnn,
    )

    backend = generate_htp_compiler_spec(use_fp16=job.quant == "fp16", use_weight_sharing=share)
    spec = generate_qnn_executorch_compiler_spec(QcomChipset[job.soc.name], backend)
    with _one_delegate():
        return to_edge_transform_and_lower_to_qnn(dict(graphs), dict(halves.examples), spec)


@contextmanager
def _one_delegate() -> Iterator[None]:
    """Applies the one-delegate rule where partitions are drawn: a later failure would not say which operator it was."""
    from executorch.backends.qualcomm.partition.qnn_partitioner import QnnPartitioner

    draw = QnnPartitioner.generate_partitions

    def checked(self: Any, program: ExportedProgram) -> list[Any]:
        partitions = draw(self, program)
        taken = {node for partition in partitions for node in partition.nodes}
        nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
        outside = {_name(n.target): "" for n in nodes if n not in taken}
        refuse_breaks("executorch-qnn", len(partitions), {n: reasons.get(n, "unknown") for n in outside})
        return partitions

    with _rejections() as reasons, mock.patch.object(QnnPartitioner, "generate_partitions", checked):
        yield


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target))


@contextmanager
def _rejections() -> Iterator[dict[str, str]]:
    """Collects the partitioner's verdicts from its log: operator -> why it was not taken."""
    reasons: dict[str, str] = {}
    words = {"False": "QNN's validation rejects its shapes or types"}

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = re.fullmatch(r"\[\w+\] (\S+) \| (False|No node visitor.*|Skipped.*)", record.getMessage())
            if found:
                reasons[found[1]] = words.get(found[2], "ExecuTorch has no QNN builder for it")

    log, listener = logging.getLogger(_PARTITIONER_LOG), Listener()
    log.addHandler(listener)
    # Kept from the child's own log, which is only read after a crash.
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield reasons
    finally:
        log.removeHandler(listener)


def _lower_inputs(halves: Halves) -> EdgeProgramManager:
    """The CPU's share on ExecuTorch's portable kernels: a table look-up and a few numbers."""
    with torch.no_grad():
        programs = {
            f"{method}_inputs": export(host, host_examples(halves.lengths[method]), strict=False)
            for method, host in halves.hosts.items()
        }
    return to_edge_transform_and_lower(programs)


def _write(edge: EdgeProgramManager, file: Path) -> None:
    with file.open("wb") as stream:
        edge.to_executorch().write_to_file(stream)
