"""A partitioner for XNNPACK that draws few, large delegates in linear time.

ExecuTorch's own partitioner merges candidate nodes pairwise, which is quadratic in the graph.
Ours numbers every node by how many times its inputs have left XNNPACK and come back; nodes of one number form one
delegate. An edge out of a delegate and back in always raises the number, so no cycle can arise.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, Node
from torch.fx.passes.infra.partitioner import Partition

# Runs one of XNNPACK's seventeen passes in place of all: the others rewrite convolutions, batch norms and layouts that
# a language model lacks, and each re-traces every delegate.
_ONLY_LINEAR_PASS = CompileSpec("dqlinear_partitioner", b"")


_MOST_NODES = 80


class _FrozenSignature(ExportGraphSignature):
    """A signature that builds its look-up tables once. Torch rebuilds them at every question, once a node and operand,

    which is quadratic in the graph; nothing changes the signature while a graph is being partitioned.
    """

    inputs_to_parameters = cached_property(ExportGraphSignature.inputs_to_parameters.fget)
    inputs_to_buffers = cached_property(ExportGraphSignature.inputs_to_buffers.fget)
    inputs_to_lifted_tensor_constants = cached_property(ExportGraphSignature.inputs_to_lifted_tensor_constants.fget)


class SegmentPartitioner(XnnpackPartitioner):
    """XNNPACK's own node configurations, grouped by segment between the operators that XNNPACK lacks."""

    def __init__(self) -> None:
        super().__init__(configs=ALL_PARTITIONER_CONFIGS)
        self.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [_ONLY_LINEAR_PASS])

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[OpOverload], Callable[[Node], bool] | None]:
        """Linear layers stay whole. Without a filter by node, ExecuTorch decomposes a program twice, not four times."""
        return [torch.ops.aten.linear.default], None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        signature = exported_program.graph_signature
        exported_program._graph_signature = _FrozenSignature(signature.input_specs, signature.output_specs)
        try:
            return super().partition(exported_program)
        finally:
            exported_program._graph_signature = signature

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        group_of: dict[Node, int] = {}
        for number, group in enumerate(self.get_matched_nodes_from_configs(ep)):
            if not any(_views_storage(node) for node in group):
                group_of.update(dict.fromkeys(group, number))
        for node in reversed(ep.graph.nodes):
            if node in group_of and _views_for_others(node, group_of):
                del group_of[node]
        level: dict[Node, int] = {}
        group_level: dict[int, int] = defaultdict(int)
        for node in ep.graph.nodes:
            inputs = node.all_input_nodes
            if node not in group_of:
                level[node] = max((level[i] for i in inputs), default=0)
                continue
            own = max((level[i] if i in group_of else level[i] + 1 for i in inputs), default=0)
            level[node] = own
            group_level[group_of[node]] = max(group_level[group_of[node]], own)
        _postpone(ep.graph, group_of, group_level)
        segments: dict[int, list[Node]] = defaultdict(list)
        for node, number in group_of.items():
            segments[group_level[number]].append(node)
        order = {node: place for place, node in enumerate(ep.graph.nodes)}
        ordered = [sorted(nodes, key=lambda node: order[node]) for _, nodes in sorted(segments.items())]
        runs = [run for nodes in ordered for run in _runs(nodes, group_of)]
        return [Partition(id=number, nodes=nodes) for number, nodes in enumerate(runs)]


def _runs(nodes: list[Node], group_of: dict[Node, int]) -> list[list[Node]]:
    """Cuts a long segment, its nodes in the graph's order, into runs of about `_MOST_NODES`; groups stay whole.

    A decode step of thirty layers as one delegate takes longer than in pieces of a layer or so, and with two threads
    its time jumps from token to token.
    """
    if len(nodes) < 2 * _MOST_NODES:
        return [nodes]
    run_of: dict[int, int] = {}
    for place, node in enumerate(nodes):
        run_of[group_of[node]] = max(run_of.get(group_of[node], 0), place // _MOST_NODES)
    inside = set(nodes)
    for node in nodes:
        before = [run_of[group_of[source]] for source in node.all_input_nodes if source in inside]
        run_of[group_of[node]] = max([run_of[group_of[node]], *before])
    runs: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        runs[run_of[group_of[node]]].append(node)
    return [runs[number] for number in sorted(runs)]


def _postpone(graph: Graph, group_of: dict[Node, int], group_level: dict[int, int]) -> None:
    """Moves every node that needs nothing of a delegate, and that only delegates read, into the first of those.

    Else a transposed view of a cache would be computed by the first delegate of all and handed on as a copy. What needs
    a delegate's result stays with it: moved, it could drag along something large that is then handed on in its place.
    """
    members: dict[int, list[Node]] = defaultdict(list)
    for node, number in group_of.items():
        members[number].append(node)
    for node in reversed(graph.nodes):
        if node not in group_of or node is not members[group_of[node]][-1]:
            continue
        number = group_of[node]
        own = set(members[number])
        sources = {source for member in own for source in member.all_input_nodes} - own
        readers = {user for member in own for user in member.users} - own
        if readers and all(user in group_of for user in readers) and not any(source in group_of for source in sources):
            group_level[number] = min(group_level[group_of[user]] for user in readers)


def _views_storage(node: Node) -> bool:
    """True for a view of a cache or of an input: free outside a delegate, a copy of the whole cache inside."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    return "view_copy" in str(node.target) and source is not None and not _computed(source)


def _views_for_others(node: Node, group_of: dict[Node, int]) -> bool:
    """True for a view between two operators outside delegates: free there, and in a delegate of its own a copy."""
    return "view_copy" in str(node.target) and not any(n in group_of for n in (*node.all_input_nodes, *node.users))


def _computed(node: Node) -> bool:
    if node.op != "call_function":
        return False
    mutated = node.target is operator.getitem and "auto_functionalized" in str(node.args[0])
    return not mutated
