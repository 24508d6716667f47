"""ExecuTorch with the XNNPACK delegate: one .pte, `prefill`, `decode`, `forward`, `snapshot` over one shared cache."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torchao.utils import unwrap_tensor_subclass

from ..graph import StaticGraph
from ..policies import Policy
from ..quantize import Activation
from ..runtime.base import LAYERED
from ..shape import CacheShape
from ..slots import Slots, new_slots
from .base import Lowered, Phases, Target
from .executorch_ops import ExecuTorchOps
from .rewrites import (
    drop_provenance,
    half_rotations_to_linear,
    rank_changes_to_reshapes,
    reductions_to_linear,
    run_time_sizes_to_inferred,
    wide_joins_to_trees,
)
from .tracing import fast_tracing
from .xnnpack_partition import SegmentPartitioner

FILE = "model.pte"
FORWARD = "forward"
# ExecuTorch's own LLM runner would generate with a method named `decode`, over another cache than that of `forward`. So
# beside `forward` it has another name.
DECODE_BESIDE_FORWARD = "decode_one"


class ExecuTorchXnnpack(Target):
    """Phones' CPUs through XNNPACK and its KleidiAI kernels."""

    name = "executorch-xnnpack"
    runtime = "executorch"
    quants = ("none", "8da4w", "8da4w-head4", "int8")
    summary = "ExecuTorch .pte for CPUs, XNNPACK delegate"

    def activation(self, quant: str) -> Activation:
        return "float" if quant == "none" else "int8_per_token"

    def lower(
        self, model: nn.Module, quant: str, shape: CacheShape, policy: Policy, folder: Path, phases: Phases
    ) -> Lowered:
        if quant != "none":
            # Plain integer tensors in place of torchao's subclass: the rewrites below read the graph's constants.
            model = unwrap_tensor_subclass(copy.deepcopy(model))
        graph = StaticGraph(model, shape, policy, ExecuTorchOps())
        logging.getLogger("executorch").setLevel(logging.ERROR)
        with warnings.catch_warnings(), fast_tracing():
            warnings.simplefilter("ignore")
            with phases.phase("executorch-xnnpack: trace"):
                # It evicts at every token; where k tokens leave at once it would keep others.
                stock_runner = self.stock_runner and shape.evict_every == 1
                programs = _trace(graph, stock_runner)
                for program in programs.values():
                    reductions_to_linear(program)
                    half_rotations_to_linear(program)
                    rank_changes_to_reshapes(program)
                    wide_joins_to_trees(program)
                    drop_provenance(program)
            with phases.phase("executorch-xnnpack: lower"):
                edge = to_edge_transform_and_lower(
                    programs,
                    transform_passes={FORWARD: [run_time_sizes_to_inferred]} if FORWARD in programs else None,
                    partitioner={name: [SegmentPartitioner()] for name in programs},
                    compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
                    constant_methods=_metadata(model, shape),
                )
            with phases.phase("executorch-xnnpack: emit"):
                lowered = edge.to_executorch(
                    ExecutorchBackendConfig(
                        memory_planning_pass=_Planning(share_mutable_buffers=True),
                        emit_mutable_buffer_names=True,
                    )
                )
                with (folder / FILE).open("wb") as stream:
                    lowered.write_to_file(stream)
        plans = lowered.executorch_program.execution_plan
        planned = max(sum(plan.non_const_buffer_sizes) for plan in plans)
        inputs = {_name(name, stock_runner): list(examples) for name, examples in graph.methods().items()}
        inputs[FORWARD] = ["tokens", "start"]
        methods = {
            name: {"inputs": _inputs(program, inputs.get(name, [])), "outputs": _outputs(program)}
            for name, program in programs.items()
        }
        return Lowered([FILE], methods, planned)


class _Planning(MemoryPlanningPass):
    """Plans all outputs but those of `snapshot`, the method without inputs: whoever calls it brings memory for them.

    Methods share one arena, as large as the largest needs it; with a copy of the cache in it, every process would hold
    the cache twice, and only parity checks ever look at the copy.
    """

    def run(self, graph_module: GraphModule, graph_signature: ExportGraphSignature | None = None) -> PassResult:
        self.alloc_graph_output = graph_signature is None or bool(graph_signature.user_inputs)
        return super().run(graph_module, graph_signature)


class _Method(nn.Module):
    """A method of the program: the model and every layer's slots as buffers, the same names in all methods."""

    def __init__(self, graph: StaticGraph) -> None:
        super().__init__()
        self.graph = graph
        self.model = graph.model
        for name, tensor in new_slots(graph.shape, graph.policy, graph.ops).tensors().items():
            self.register_buffer(name, tensor)

    def slots(self) -> Slots:
        """The slots of all layers, backed by the buffers."""
        return Slots.named(dict(self.named_buffers(recurse=False)), self.graph.shape.layers)


class _Step(_Method):
    def __init__(self, graph: StaticGraph, name: str) -> None:
        super().__init__(graph)
        self.step = getattr(graph, name)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.step(*inputs, self.slots())


class _Snapshot(_Method):
    """Copies the state out, for parity checks: positions of all layers, then keys, values (and scales) of each.

    A slice, because a plain clone is optimised away and a buffer itself cannot be an output.
    """

    def __init__(self, graph: StaticGraph) -> None:
        super().__init__(graph)
        self.model = nn.Identity()

    def forward(self) -> list[Tensor]:
        last = self.graph.shape.budget + self.graph.shape.evict_every
        slots = self.slots()
        parts = [tensor for layer in zip(*slots.layered().values(), strict=True) for tensor in layer]
        return [tensor[:, :last] for tensor in (slots.positions, *parts)]


def _trace(graph: StaticGraph, stock_runner: bool) -> dict[str, ExportedProgram]:
    with torch.no_grad():
        programs = {
            _name(name, stock_runner): export(_Step(graph, name), tuple(inputs.values()), strict=False)
            for name, inputs in graph.methods().items()
        }
        if stock_runner:
            inputs = graph.methods()["prefill"]
            length = Dim("length", min=1, max=graph.shape.block)
            programs[FORWARD] = export(
                _Step(graph, FORWARD),
                (inputs["tokens"], inputs["start"]),
                dynamic_shapes=(({1: length}, None),),
                strict=False,
            )
        return {**programs, "snapshot": export(_Snapshot(graph), (), strict=False)}


def _name(method: str, stock_runner: bool) -> str:
    """What a method of the graph is called in the program."""
    return DECODE_BESIDE_FORWARD if stock_runner and method == "decode" else method


def _metadata(model: nn.Module, shape: CacheShape) -> dict[str, Any]:
    """Constant methods, under the names that ExecuTorch's LLM runners read."""
    return {
        "get_vocab_size": model.config.vocab_size,
        "get_max_seq_len": shape.block,
        "get_max_context_len": model.config.max_position_embeddings,
        "get_n_layers": shape.layers,
        "get_eos_ids": model.generation_config.eos_token_id,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _inputs(program: ExportedProgram, names: list[str]) -> list[dict[str, Any]]:
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = zip(names, program.graph_signature.user_inputs, strict=True)
    return [_describe(name, nodes[place].meta["val"], program) for name, place in inputs]


def _outputs(program: ExportedProgram) -> list[dict[str, Any]]:
    nodes = {node.name: node for node in program.graph.nodes}
    outputs = [nodes[str(name)].meta["val"] for name in program.graph_signature.user_outputs]
    if len(outputs) == 1:
        return [_describe("logits", outputs[0], program)]
    parts = LAYERED if outputs[1].dtype is torch.int8 else LAYERED[:-1]
    names = ["positions", *(f"{parts[i % len(parts)]}_{i // len(parts)}" for i in range(len(outputs) - 1))]
    return [_describe(name, value, program) for name, value in zip(names, outputs, strict=True)]


def _describe(name: str, value: Tensor, program: ExportedProgram) -> dict[str, Any]:
    """Name, dtype and shape; a size that changes from call to call is given by its upper bound."""
    limits = program.range_constraints
    shape = [size if isinstance(size, int) else int(limits[size.node.expr].upper) for size in value.shape]
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
