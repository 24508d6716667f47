"""Rewrites of a traced ONNX graph for ONNX Runtime's CPU provider, where calling a node costs as much as many compute.

    pass              what it does
    drop_layout       operators that only change a shape and leave the numbers in order: none, or one Reshape
    fuse_rotation     queries, keys and values of a single token as one input of GroupQueryAttention, which rotates them
    join_reshapes     a Concat along the first axis of what was reshaped alike: of what it was before, then one Reshape
    merge_products    MatMulNBits of one input (queries, keys and values; gate and up) as one, then a Split
    fuse_residuals    an addition and the norm behind it as SkipSimplifiedLayerNormalization
    fuse_unit_length  x / |x|, six nodes, as LpNormalization
    add_negated       x - (-y) as x + y

None changes a number, but the two that fuse in the last bit; parity is checked behind them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Gather")
_MICROSOFT = "com.microsoft"
# Heads that GroupQueryAttention rotates are as wide as a multiple of this.
_ROTATED_WIDTH = 16
# Caches are far larger than what a step computes; following their numbers one by one would take a trace's time.
_LARGEST = 1 << 18


def optimize(model: ir.Model) -> None:
    """Runs all passes on a traced model, in place."""
    graph = model.graph
    merge_products(graph)
    fuse_unit_length(graph)
    drop_layout(graph)
    fuse_rotation(graph)
    # What reads a row that is now taken out of the cache may stand before it.
    TopologicalSortPass()(model)
    drop_layout(graph)
    join_reshapes(graph)
    add_negated(graph)
    fuse_residuals(graph)
    model.opset_imports.setdefault(_MICROSOFT, 1)
    TopologicalSortPass()(model)
    RemoveUnusedNodesPass()(model)


def drop_layout(graph: ir.Graph) -> None:
    """Replaces chains of layout operators that leave the numbers in order by their source, or by one Reshape of it."""
    sources: dict[ir.Value, tuple[ir.Value, np.ndarray]] = {}
    for node in list(graph):
        value = node.outputs[0]
        if node.op_type not in _LAYOUT or node.domain or not _follows(node):
            continue
        data = node.inputs[0]
        assert data is not None
        source, order = sources.get(data) or (data, np.arange(_size(data), dtype=np.int32).reshape(_shape(data)))
        order = _moved(node, order)
        sources[value] = (source, order)
        if value.is_graph_output() or not np.array_equal(order.ravel(), np.arange(order.size)):
            continue
        if list(order.shape) == _shape(source):
            ir.convenience.replace_all_uses_with(value, source)
        elif data is not source or node.op_type != "Reshape":
            reshaped = _inserted(graph, node, "Reshape", [source, _constant(graph, np.array(order.shape))], {})
            _take_over(value, reshaped)
            sources[reshaped] = (source, order)


def _follows(node: ir.Node) -> bool:
    """Whether the node moves numbers in a way known now."""
    data, value = node.inputs[0], node.outputs[0]
    if data is None or data.shape is None or value.shape is None or data.const_value is not None:
        return False
    if not (data.shape.is_static() and value.shape.is_static()) or _size(data) > _LARGEST:
        return False
    if node.op_type != "Gather":
        return True
    index, axis = node.inputs[1], _attribute(node, "axis", 0)
    numbers = None if index is None else ir.convenience.get_const_tensor(index)
    return numbers is not None and numbers.size == 1 and _shape(data)[axis] == 1 and numbers.numpy().ravel()[0] == 0


def _moved(node: ir.Node, order: np.ndarray) -> np.ndarray:
    if node.op_type == "Transpose":
        return order.transpose(_attribute(node, "perm", list(range(order.ndim))[::-1]))
    return order.reshape(_shape(node.outputs[0]))


def fuse_rotation(graph: ir.Graph) -> None:
    """Of a single token: queries, keys and values as one input of GroupQueryAttention, which rotates by itself.

    What else needs the token's rotated key or its value takes it out of the cache, where the operator has put it.
    """
    for attention in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        query, key, value, keys, values, last, total = attention.inputs[:7]
        rotations = [None if part is None else part.producer() for part in (query, key)]
        parts = [_behind(part, "RotaryEmbedding") for part in (query, key)] + [value]
        split = None if value is None else value.producer()
        if split is None or split.op_type != "Split" or list(split.outputs) != parts or _shape(query)[:2] != [1, 1]:
            continue
        if _shape(keys)[3] % _ROTATED_WIDTH:
            continue
        assert rotations[0] is not None
        assert rotations[1] is not None
        angles = list(rotations[0].inputs[1:])
        if list(rotations[1].inputs[1:]) != angles:
            continue
        # The operator looks the angles up by position_ids, which are 0, in tables as long as the cache.
        place, *tables = angles
        length = _constant(graph, np.array([_shape(keys)[2], 1]))
        cos, sin = (_once(graph, attention, "Expand", [table, length]) for table in tables)
        attributes = {name: attribute.value for name, attribute in attention.attributes.items()}
        fused = ir.node(
            "GroupQueryAttention",
            [split.inputs[0], None, None, keys, values, last, total, cos, sin, place],
            {**attributes, "do_rotary": 1},
            domain=_MICROSOFT,
            num_outputs=3,
        )
        graph.insert_before(attention, fused)
        for old, new in zip(attention.outputs, fused.outputs, strict=True):
            _take_over(old, new)
        graph.remove(attention, safe=True)
        for own, cache in ((key, fused.outputs[1]), (value, fused.outputs[2])):
            if own is not None and own.uses():
                _take_over(own, _own_row(graph, fused, cache, last, _shape(own)))


def _own_row(graph: ir.Graph, before: ir.Node, cache: ir.Value, last: ir.Value | None, shape: list[int]) -> ir.Value:
    """The row of every head of a cache [1, H, S, d] in slot `last` (int32 [1]), reshaped."""
    heads = _shape(cache)[1]
    pairs = _constant(graph, np.array([[0, head] for head in range(heads)]))
    slot = _once(graph, before, "Cast", [last], to=int(ir.DataType.INT64))
    column = _once(graph, before, "Expand", [slot, _constant(graph, np.array([heads, 1]))])
    address = _once(graph, before, "Concat", [pairs, column], axis=1)
    after = ir.node("GatherND", [cache, address], {})
    after.outputs[0].name = f"{cache.name}_own"
    after.outputs[0].dtype, after.outputs[0].shape = cache.dtype, ir.Shape([heads, _shape(cache)[3]])
    reshaped = ir.node("Reshape", [after.outputs[0], _constant(graph, np.array(shape))], {})
    reshaped.outputs[0].name = f"{cache.name}_own_row"
    graph.insert_after(before, [after, reshaped])
    return reshaped.outputs[0]


def _once(
    graph: ir.Graph, before: ir.Node, operator: str, inputs: list[ir.Value | None], **attributes: Any
) -> ir.Value:
    """Output of an operator, made before a node unless the graph has one of the same inputs."""
    for use in () if inputs[0] is None else inputs[0].uses():
        if use.node.op_type == operator and list(use.node.inputs) == inputs:
            return use.node.outputs[0]
    made = _inserted(graph, before, operator, inputs, attributes)
    assert inputs[0] is not None
    made.name = f"{inputs[0].name}_{operator}"
    return made


def join_reshapes(graph: ir.Graph) -> None:
    """Reshapes once behind a Concat along the first axis in place of once before it in each of its inputs."""
    for node in [node for node in graph if node.op_type == "Concat"]:
        joined = node.outputs[0]
        sources = [_behind(value, "Reshape") for value in node.inputs]
        shapes = [_shape(source) for source in sources]
        if _attribute(node, "axis", 0) != 0 or not shapes[0] or shapes != [shapes[0]] * len(shapes):
            continue
        if any(value is None or value.shape is None or not value.shape.is_static() for value in (*sources, joined)):
            continue
        whole = _inserted(graph, node, "Concat", sources, {"axis": 0})
        assert sources[0] is not None
        whole.dtype, whole.shape = sources[0].dtype, ir.Shape([len(shapes) * shapes[0][0], *shapes[0][1:]])
        shape = _constant(graph, np.array(_shape(joined)))
        _take_over(joined, _inserted(graph, node, "Reshape", [whole, shape], {}))


def merge_products(graph: ir.Graph) -> None:
    """One MatMulNBits for all that multiply the same input, so that it is rounded to 8 bits and handed out once."""
    siblings: dict[tuple[Any, ...], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMulNBits" and len(node.inputs) == 3:
            sizes = tuple(_attribute(node, name, 0) for name in ("K", "bits", "block_size", "accuracy_level"))
            siblings[(node.inputs[0], *sizes)].append(node)
    for (data, *_), nodes in siblings.items():
        if len(nodes) == 1:
            continue
        rows = [_attribute(node, "N", 0) for node in nodes]
        weights = [_joined(graph, [node.inputs[place] for node in nodes]) for place in (1, 2)]
        attributes = {name: attribute.value for name, attribute in nodes[0].attributes.items()}
        product = _inserted(
            graph, nodes[0], "MatMulNBits", [data, *weights], {**attributes, "N": sum(rows)}, domain=_MICROSOFT
        )
        outputs = [node.outputs[0] for node in nodes]
        product.dtype, product.shape = outputs[0].dtype, ir.Shape([*_shape(outputs[0])[:-1], sum(rows)])
        split = ir.node("Split", [product, _constant(graph, np.array(rows))], {"axis": -1}, num_outputs=len(nodes))
        graph.insert_before(nodes[0], split)
        for own, part in zip(outputs, split.outputs, strict=True):
            _take_over(own, part)
        graph.remove(nodes, safe=True)


def fuse_residuals(graph: ir.Graph) -> None:
    """Sum and norm of it by one operator, which gives both.

    A norm without a residual gets its input in two halves, which add up exactly. The operator for a norm alone rounds
    differently in ONNX Runtime 1.29 and 1.31, and 8-bit activations make a step of a last bit.
    """
    for norm in [node for node in graph if node.op_type == "SimplifiedLayerNormalization"]:
        data, weight = norm.inputs
        assert data is not None
        if len(_shape(data)) != 3:
            continue
        add = data.producer()
        if add is not None and add.op_type == "Add" and [_shape(part) for part in add.inputs] == [_shape(data)] * 2:
            parts = list(add.inputs)
        else:
            half = _inserted(graph, norm, "Mul", [data, _number(graph, 0.5)], {})
            half.dtype, half.shape = data.dtype, data.shape
            parts = [half, half]
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*parts, weight],
            {"epsilon": _attribute(norm, "epsilon", 0.0)},
            domain=_MICROSOFT,
            num_outputs=4,
        )
        graph.insert_before(norm, fused)
        normed, _, _, total = fused.outputs
        _take_over(norm.outputs[0], normed)
        if parts[0] is parts[1]:
            total.name = ""
        else:
            _take_over(data, total)
        for unused in fused.outputs[1:3]:
            unused.name = ""


def fuse_unit_length(graph: ir.Graph) -> None:
    """x * (1 / sqrt(max(sum(x * x), tiny))) by one operator, which gives zeros for zeros as well."""
    for scaled in [node for node in graph if node.op_type == "Mul"]:
        data, chain = scaled.inputs[0], scaled.inputs[1]
        for operator in ("Reciprocal", "Sqrt", ("Clip", "Max"), "ReduceSum"):
            chain = _behind(chain, operator)
        square = None if chain is None else chain.producer()
        if data is None or square is None or square.op_type != "Mul" or list(square.inputs) != [data, data]:
            continue
        unit = _inserted(graph, scaled, "LpNormalization", [data], {"axis": -1, "p": 2})
        _take_over(scaled.outputs[0], unit)


def add_negated(graph: ir.Graph) -> None:
    """A sum in place of the difference to a negative, as a policy's score is of what is good about a token."""
    for node in [node for node in graph if node.op_type == "Sub"]:
        own = _behind(node.inputs[1], "Neg")
        if own is not None:
            _take_over(node.outputs[0], _inserted(graph, node, "Add", [node.inputs[0], own], {}))


def _behind(value: ir.Value | None, operator: str | tuple[str, ...]) -> ir.Value | None:
    """The first input of the operator that made the value, None when another one did."""
    node = None if value is None else value.producer()
    names = (operator,) if isinstance(operator, str) else operator
    return node.inputs[0] if node is not None and node.op_type in names else None


def _inserted(
    graph: ir.Graph, place: ir.Node, operator: str, inputs: Sequence[ir.Value | None], attributes: Any, domain: str = ""
) -> ir.Value:
    """Output of a new node before another."""
    node = ir.node(operator, inputs, attributes, domain=domain)
    # For a product that has no name to take over.
    node.outputs[0].name = f"{place.outputs[0].name}_{operator}"
    graph.insert_before(place, node)
    return node.outputs[0]


def _constant(graph: ir.Graph, numbers: np.ndarray) -> ir.Value:
    """An initializer of int64 numbers, one for all that ask for the same."""
    rows = "" if numbers.ndim == 1 else f"_in_{len(numbers)}"
    name = "numbers_" + "_".join(str(number) for number in numbers.ravel()) + rows
    if name not in graph.initializers:
        graph.register_initializer(_initializer(name, numbers.astype(np.int64)))
    return graph.initializers[name]


def _number(graph: ir.Graph, number: float) -> ir.Value:
    """An initializer of one float32 number."""
    name = f"number_{number}"
    if name not in graph.initializers:
        graph.register_initializer(_initializer(name, np.array(number, dtype=np.float32)))
    return graph.initializers[name]


def _joined(graph: ir.Graph, parts: Sequence[ir.Value | None]) -> ir.Value:
    """An initializer made of others, one below the other."""
    names, tensors = [], []
    for part in parts:
        assert part is not None
        tensor = ir.convenience.get_const_tensor(part)
        assert tensor is not None
        names.append(str(part.name))
        tensors.append(tensor.numpy())
    value = _initializer("+".join(names), np.concatenate(tensors))
    graph.register_initializer(value)
    return value


def _initializer(name: str, numbers: np.ndarray) -> ir.Value:
    tensor = ir.tensor(numbers, name=name)
    return ir.Value(name=name, shape=ir.Shape(numbers.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Whatever used the old value uses the new one, which has its name, type and shape; graph outputs as well."""
    new.dtype, new.shape = old.dtype, old.shape
    new.name, old.name = old.name, f"{old.name}_before"
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _shape(value: ir.Value | None) -> list[int]:
    if value is None or value.shape is None:
        return []
    return [int(size) for size in value.shape if isinstance(size, int)]


def _size(value: ir.Value) -> int:
    return int(np.prod(_shape(value)))


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default
