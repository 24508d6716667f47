"""Graph rewrites for single backends, each with its reason. They act on an exported program and keep its numbers."""

from __future__ import annotations

import torch
from executorch.backends.transforms.utils import create_constant_placeholder
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

aten = torch.ops.aten


def reductions_to_linear(program: ExportedProgram) -> None:
    """Writes sums and means over the last axis (RMSNorm, key norms) as a product with a constant column.

    XNNPACK reduces only 4-D images. Left alone, every norm would end the delegate before it and start another, three
    a layer; as a product it stays inside, so that one delegate reaches from one attention to the next.
    """
    graph = program.graph
    weights: dict[tuple[int, float], Node] = {}
    for node in list(graph.nodes):
        if node.target not in (aten.mean.dim, aten.sum.dim_IntList) or not _over_last_axis(node):
            continue
        width = node.args[0].meta["val"].shape[-1]
        value = 1.0 / width if node.target is aten.mean.dim else 1.0
        if (width, value) not in weights:
            name = f"reduce_{len(weights)}"
            with graph.inserting_before(next(iter(graph.nodes))):
                weights[width, value] = create_constant_placeholder(
                    program, graph, name, InputKind.PARAMETER, torch.full((1, width), value)
                )
        with graph.inserting_before(node):
            product = graph.call_function(aten.linear.default, (node.args[0], weights[width, value]))
            product.meta = dict(node.meta)
            if not _keeps_axis(node):
                product.meta["val"] = node.meta["val"].unsqueeze(-1)
                flat = graph.call_function(aten.view.default, (product, _sizes(node.meta["val"])))
                flat.meta = dict(node.meta)
                product = flat
        _replace(program, node, product)
    program.graph_module.recompile()


def _sizes(value: torch.Tensor) -> list[int]:
    """Sizes for a reshape, -1 for the one that is only known at run time."""
    return [size if isinstance(size, int) else -1 for size in value.shape]


def _replace(program: ExportedProgram, old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    program.graph_signature.replace_all_uses(old.name, new.name)
    program.graph.erase_node(old)


def _over_last_axis(node: Node) -> bool:
    source, axes = node.args[0], node.args[1]
    assert isinstance(source, Node)
    assert isinstance(axes, list)
    value = source.meta["val"]
    return value.dtype == torch.float32 and len(axes) == 1 and axes[0] in (-1, value.dim() - 1)


def _keeps_axis(node: Node) -> bool:
    return len(node.args) > 2 and bool(node.args[2])


_RANK_CHANGES = (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int)


def rank_changes_to_reshapes(program: ExportedProgram) -> None:
    """Writes every change of rank that keeps all numbers as a reshape.

    XNNPACK takes reshapes but refuses squeeze, select and an unsqueeze off the last axis, and each refusal ends a
    delegate.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.target not in _RANK_CHANGES:
            continue
        source, value = node.args[0].meta["val"], node.meta["val"]
        if source.numel() != value.numel():
            continue
        with graph.inserting_before(node):
            view = graph.call_function(aten.reshape.default, (node.args[0], _sizes(value)))
        view.meta = dict(node.meta)
        _replace(program, node, view)
    program.graph_module.recompile()


def wide_joins_to_trees(program: ExportedProgram) -> None:
    """Joins more than five float tensors five at a time: XNNPACK takes no more, and a refusal ends a delegate."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is not aten.cat.default or node.meta["val"].dtype != torch.float32:
            continue
        parts, axis = list(node.args[0]), node.args[1] if len(node.args) > 1 else 0
        if len(parts) <= _MOST_JOINED:
            continue
        with graph.inserting_before(node):
            while len(parts) > _MOST_JOINED:
                parts = [_join(graph, parts[i : i + _MOST_JOINED], axis) for i in range(0, len(parts), _MOST_JOINED)]
        node.args = (parts, axis)
    program.graph_module.recompile()


_MOST_JOINED = 5


def _join(graph: Graph, parts: list[Node], axis: int) -> Node:
    if len(parts) == 1:
        return parts[0]
    joined = graph.call_function(aten.cat.default, (parts, axis))
    joined.meta = {"val": torch.cat([part.meta["val"] for part in parts], axis)}
    return joined


def half_rotations_to_linear(program: ExportedProgram) -> None:
    """Writes the rotation (x1, x2) -> (-x2, x1) of rotary embeddings as a product with a constant matrix.

    XNNPACK does not slice tensors whose sizes change, and each slice ends a delegate. A row of the product has one term
    that is not zero, so the numbers are the same.
    """
    graph = program.graph
    matrices: dict[int, Node] = {}
    for node in list(graph.nodes):
        source = _rotated(node)
        if source is None:
            continue
        width = source.meta["val"].shape[-1]
        if width not in matrices:
            half, one = width // 2, torch.eye(width // 2)
            matrix = torch.zeros(width, width)
            matrix[:half, half:], matrix[half:, :half] = -one, one
            with graph.inserting_before(next(iter(graph.nodes))):
                matrices[width] = create_constant_placeholder(
                    program, graph, f"rotate_{width}", InputKind.PARAMETER, matrix
                )
        with graph.inserting_before(node):
            product = graph.call_function(aten.linear.default, (source, matrices[width]))
        product.meta = dict(node.meta)
        _replace(program, node, product)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _rotated(node: Node) -> Node | None:
    """x of cat([-x2, x1]) over the last axis of a run-time sized x = (x1, x2), else None."""
    if node.target is not aten.cat.default or len(node.args[0]) != 2:
        return None
    negated, first = node.args[0]
    if negated.target is not aten.neg.default:
        return None
    second = negated.args[0]
    halves = (aten.slice.Tensor, first.target, second.target)
    if len(set(halves)) != 1 or first.args[0] is not second.args[0]:
        return None
    source = first.args[0]
    value = source.meta["val"]
    axis, half = value.dim() - 1, value.shape[-1] // 2
    is_rotation = (
        value.dtype == torch.float32
        and -1 in _sizes(value)
        and node.args[1] in (-1, axis)
        and [part.args[1] % value.dim() for part in (first, second)] == [axis, axis]
        and first.args[2:4] == (0, half)
        and second.args[2] == half
        and first.meta["val"].shape[-1] == second.meta["val"].shape[-1] == half
    )
    return source if is_rotation else None


def run_time_sizes_to_inferred(module: GraphModule) -> PassResult:
    """Writes a size that is only known at run time as -1 in reshapes (edge dialect): XNNPACK refuses a symbol."""
    for node in module.graph.nodes:
        if "view_copy" in str(node.target):
            sizes = _sizes(node.meta["val"])
            if sizes.count(-1) == 1:
                node.args = (node.args[0], sizes)
    module.graph.eliminate_dead_code()
    module.recompile()
    return PassResult(module, True)


def drop_provenance(program: ExportedProgram) -> None:
    """Removes stack traces and provenance records, which every later pass would copy node by node."""
    for node in program.graph.nodes:
        for key in ("from_node", "stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
