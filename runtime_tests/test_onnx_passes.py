"""Rewrites of ONNX graphs: the same numbers by fewer nodes; and what may not be rewritten stays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import random_tokens
from onnx import TensorProto, helper, numpy_helper

import keydiff_export
from keydiff_export.inspection import inspect_folder
from keydiff_export.lowering.onnx_fusions import fused, fused_rotation
from keydiff_export.lowering.onnx_passes import optimize
from keydiff_export.models import LoadedModel, load_model
from keydiff_export.spec import ExportSpec

Node = tuple[str, list[str], list[str], dict[str, Any]]
RNG = np.random.default_rng(0)


def model(inputs: dict[str, list[int]], nodes: list[Node], outputs: dict[str, list[int]], **constants: np.ndarray):
    """A model of float32 inputs and outputs; "ms." before an operator is ONNX Runtime's own domain."""
    made = [
        helper.make_node(name.removeprefix("ms."), i, o, domain="com.microsoft" if name.startswith("ms.") else "", **a)
        for name, i, o, a in nodes
    ]
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in part.items()]
        for part in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(made, "graph", *values, tensors)
    # ONNX's shape inference does not know this operator of ONNX Runtime's, which leaves the shape as it is.
    for node in (node for node in made if node.op_type == "SimplifiedLayerNormalization"):
        graph.value_info.append(
            helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, next(iter(inputs.values())))
        )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    # The rewrites are judged, not ONNX Runtime's own.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def optimized(proto: onnx.ModelProto) -> Counter[str]:
    """Operators once it is rewritten, which must give the same outputs for random inputs."""
    rewritten = ir.serde.deserialize_model(proto)
    optimize(rewritten)
    after = ir.serde.serialize_model(rewritten)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    feeds = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for found, expected in zip(run(after, feeds), run(proto, feeds), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=2e-6)
    return Counter(node.op_type for node in after.graph.node)


def shape(*sizes: int) -> np.ndarray:
    return np.array(sizes, dtype=np.int64)


def test_a_chain_that_leaves_the_order_is_dropped() -> None:
    """Heads in front and back again; with one token turning the axes changes nothing either."""
    chain: list[Node] = [
        ("Relu", ["x"], ["a"], {}),
        ("Reshape", ["a", "heads"], ["b"], {}),
        ("Transpose", ["b"], ["c"], {"perm": [0, 2, 1, 3]}),
        ("Transpose", ["c"], ["d"], {"perm": [0, 2, 1, 3]}),
        ("Gather", ["d", "zero"], ["e"], {"axis": 0}),
        ("Reshape", ["e", "flat"], ["f"], {}),
        ("Neg", ["f"], ["y"], {}),
    ]
    constants = {"heads": shape(1, 3, 2, 4), "flat": shape(1, 3, 8), "zero": np.array(0)}
    proto = model({"x": [1, 3, 8]}, chain, {"y": [1, 3, 8]}, **constants)
    assert optimized(proto) == {"Relu": 1, "Neg": 1}


def test_a_chain_that_ends_in_another_shape_is_one_reshape() -> None:
    chain: list[Node] = [
        ("Relu", ["x"], ["a"], {}),
        ("Reshape", ["a", "heads"], ["b"], {}),
        ("Transpose", ["b"], ["c"], {"perm": [0, 2, 1, 3]}),
        ("Squeeze", ["c", "zero"], ["d"], {}),
        ("Neg", ["d"], ["y"], {}),
    ]
    proto = model({"x": [1, 1, 8]}, chain, {"y": [2, 1, 4]}, heads=shape(1, 1, 2, 4), zero=shape(0))
    assert optimized(proto) == {"Relu": 1, "Reshape": 1, "Neg": 1}


def test_a_turn_and_a_choice_stay() -> None:
    turn: list[Node] = [("Transpose", ["x"], ["a"], {"perm": [1, 0]}), ("Neg", ["a"], ["y"], {})]
    assert optimized(model({"x": [3, 4]}, turn, {"y": [4, 3]})) == {"Transpose": 1, "Neg": 1}
    choice: list[Node] = [("Gather", ["x", "one"], ["a"], {"axis": 0}), ("Neg", ["a"], ["y"], {})]
    proto = model({"x": [3, 4]}, choice, {"y": [4]}, one=np.array(1))
    assert optimized(proto) == {"Gather": 1, "Neg": 1}


def test_products_of_one_input_become_one() -> None:
    sizes = {"K": 32, "bits": 8, "block_size": 32, "accuracy_level": 1}
    rows = {"q": 6, "k": 2, "v": 2}
    constants = {f"{n}_weight": RNG.integers(0, 256, (r, 1, 32), dtype=np.uint8) for n, r in rows.items()}
    constants |= {f"{n}_scale": RNG.random((r, 1), dtype=np.float32) / 100 for n, r in rows.items()}
    products: list[Node] = [
        ("ms.MatMulNBits", ["x", f"{n}_weight", f"{n}_scale"], [f"{n}_out"], {**sizes, "N": r}) for n, r in rows.items()
    ]
    # One that reads something else, and one of other attributes.
    other: list[Node] = [
        ("Relu", ["x"], ["r"], {}),
        ("ms.MatMulNBits", ["r", "k_weight", "k_scale"], ["r_out"], {**sizes, "N": 2}),
    ]
    outputs = {f"{n}_out": [1, 3, r] for n, r in rows.items()} | {"r_out": [1, 3, 2]}
    proto = model({"x": [1, 3, 32]}, products + other, outputs, **constants)
    assert optimized(proto) == {"MatMulNBits": 2, "Split": 1, "Relu": 1}


def test_a_residual_and_its_norm_become_one() -> None:
    norm = {"axis": -1, "epsilon": 1e-5, "stash_type": 1}
    nodes: list[Node] = [
        ("Add", ["x", "skip"], ["sum"], {}),
        ("SimplifiedLayerNormalization", ["sum", "weight"], ["normed"], norm),
        ("Neg", ["sum"], ["y"], {}),
        ("Relu", ["normed"], ["z"], {}),
    ]
    sizes = {"x": [1, 3, 8], "skip": [1, 3, 8]}
    proto = model(sizes, nodes, {"y": [1, 3, 8], "z": [1, 3, 8]}, weight=RNG.random(8, dtype=np.float32))
    assert optimized(proto) == {"SkipSimplifiedLayerNormalization": 1, "Neg": 1, "Relu": 1}


def test_a_norm_alone_is_exact_and_by_the_same_operator() -> None:
    norm = {"axis": -1, "epsilon": 1e-5, "stash_type": 1}
    nodes: list[Node] = [
        ("Relu", ["x"], ["a"], {}),
        ("SimplifiedLayerNormalization", ["a", "weight"], ["b"], norm),
        ("Neg", ["b"], ["y"], {}),
        ("Neg", ["a"], ["z"], {}),
    ]
    proto = model({"x": [1, 3, 8]}, nodes, {"y": [1, 3, 8], "z": [1, 3, 8]}, weight=RNG.random(8, dtype=np.float32))
    assert optimized(proto) == {"Relu": 1, "Mul": 1, "SkipSimplifiedLayerNormalization": 1, "Neg": 2}


def test_norms_of_heads_stay() -> None:
    """The operator with a residual takes three axes at most."""
    norm = {"axis": -1, "epsilon": 1e-5, "stash_type": 1}
    nodes: list[Node] = [("SimplifiedLayerNormalization", ["x", "weight"], ["a"], norm), ("Neg", ["a"], ["y"], {})]
    proto = model({"x": [1, 3, 2, 8]}, nodes, {"y": [1, 3, 2, 8]}, weight=RNG.random(8, dtype=np.float32))
    assert optimized(proto) == {"SimplifiedLayerNormalization": 1, "Neg": 1}


@pytest.mark.parametrize("zeros", [False, True])
def test_a_vector_at_unit_length_is_one_operator(zeros: bool) -> None:
    nodes: list[Node] = [
        ("Mul", ["x", "factor"], ["a"], {}),
        ("Mul", ["a", "a"], ["b"], {}),
        ("ReduceSum", ["b", "last"], ["c"], {"keepdims": 1}),
        ("Max", ["c", "least"], ["d"], {}),
        ("Sqrt", ["d"], ["e"], {}),
        ("Reciprocal", ["e"], ["f"], {}),
        ("Mul", ["a", "f"], ["y"], {}),
    ]
    constants = {"last": shape(-1), "least": np.float32(1e-24), "factor": np.float32(0 if zeros else 1)}
    proto = model({"x": [2, 8]}, nodes, {"y": [2, 8]}, **{k: np.asarray(v) for k, v in constants.items()})
    assert optimized(proto) == {"Mul": 1, "LpNormalization": 1}


def test_rows_of_layers_are_reshaped_together() -> None:
    nodes: list[Node] = [
        *((operator, ["x"], [operator], {}) for operator in ("Relu", "Neg")),
        *(("Reshape", [operator, "heads"], [f"{operator}_rows"], {}) for operator in ("Relu", "Neg")),
        ("Concat", ["Relu_rows", "Neg_rows"], ["both"], {"axis": 0}),
        ("Abs", ["both"], ["y"], {}),
    ]
    proto = model({"x": [1, 1, 8]}, nodes, {"y": [4, 1, 4]}, heads=shape(2, 1, 4))
    assert optimized(proto) == {"Relu": 1, "Neg": 1, "Concat": 1, "Reshape": 1, "Abs": 1}


@pytest.mark.parametrize(("axis", "joined"), [(1, [2, 2, 4]), (2, [2, 1, 8])])
def test_rows_joined_along_another_axis_are_reshaped_before(axis: int, joined: list[int]) -> None:
    nodes: list[Node] = [
        *((operator, ["x"], [operator], {}) for operator in ("Relu", "Neg")),
        *(("Reshape", [operator, "heads"], [f"{operator}_rows"], {}) for operator in ("Relu", "Neg")),
        ("Concat", ["Relu_rows", "Neg_rows"], ["both"], {"axis": axis}),
        ("Abs", ["both"], ["y"], {}),
    ]
    proto = model({"x": [1, 1, 8]}, nodes, {"y": joined}, heads=shape(2, 1, 4))
    assert optimized(proto) == {"Relu": 1, "Neg": 1, "Concat": 1, "Reshape": 2, "Abs": 1}


def test_rows_of_other_shapes_are_reshaped_before() -> None:
    nodes: list[Node] = [
        ("Relu", ["x"], ["a"], {}),
        ("Neg", ["z"], ["b"], {}),
        *(("Reshape", [part, "rows"], [f"{part}_rows"], {}) for part in ("a", "b")),
        ("Concat", ["a_rows", "b_rows"], ["both"], {"axis": 0}),
        ("Abs", ["both"], ["y"], {}),
    ]
    proto = model({"x": [1, 8], "z": [2, 4]}, nodes, {"y": [8, 2]}, rows=shape(4, 2))
    assert optimized(proto) == {"Relu": 1, "Neg": 1, "Concat": 1, "Reshape": 2, "Abs": 1}


def test_a_difference_to_a_negative_is_a_sum() -> None:
    nodes: list[Node] = [("Neg", ["x"], ["a"], {}), ("Sub", ["z", "a"], ["y"], {})]
    assert optimized(model({"x": [3, 4], "z": [4]}, nodes, {"y": [3, 4]})) == {"Add": 1}
    other: list[Node] = [("Neg", ["x"], ["a"], {}), ("Sub", ["a", "z"], ["y"], {})]
    assert optimized(model({"x": [3, 4], "z": [4]}, other, {"y": [3, 4]})) == {"Neg": 1, "Sub": 1}


def attention(width: int, length: int = 1, turned: str = "angles") -> onnx.ModelProto:
    """Four query and two KV heads behind a cache of three tokens; others read the rotated keys and the values, too."""
    sizes = {"q": 4 * width, "k": 2 * width, "v": 2 * width}
    heads = {"q": {"num_heads": 4}, "k": {"num_heads": 2}}
    nodes: list[Node] = [
        ("Relu", ["x"], ["packed"], {}),
        ("Split", ["packed", "sizes"], list(sizes), {"axis": -1}),
        *(
            ("ms.RotaryEmbedding", [part, "places", "cos", sin], [f"{part}_turned"], heads[part])
            for part, sin in (("q", "sin"), ("k", "sin" if turned == "angles" else "cos"))
        ),
        # Before the cache has the row that it will read.
        ("Reshape", ["k_turned", "rows"], ["k_rows"], {}),
        (
            "ms.GroupQueryAttention",
            ["q_turned", "k_turned", "v", "keys", "values", "last", "total"],
            ["out", "keys_next", "values_next"],
            {"num_heads": 4, "kv_num_heads": 2},
        ),
        ("Neg", ["k_rows"], ["key"], {}),
        ("Neg", ["v"], ["value"], {}),
    ]
    half, cache = [length, width // 2], [1, 2, 8, width]
    constants = {
        "sizes": shape(*sizes.values()),
        "rows": shape(2, length, width),
        "places": np.arange(length).reshape(1, length),
        "last": np.array([2 + length], dtype=np.int32),
        "total": np.array([3 + length], dtype=np.int32),
    }
    key, value = [2, length, width], [1, length, sizes["v"]]
    proto = model(
        {"x": [1, length, sum(sizes.values())], "cos": half, "sin": half, "keys": cache, "values": cache},
        nodes,
        {"out": [1, length, sizes["q"]], "keys_next": cache, "values_next": cache, "key": key, "value": value},
        **constants,
    )
    for part in ("q", "k"):
        turned_part = helper.make_tensor_value_info(f"{part}_turned", TensorProto.FLOAT, [1, length, sizes[part]])
        proto.graph.value_info.append(turned_part)
    return onnx.shape_inference.infer_shapes(proto)


def test_attention_rotates_a_token_by_itself() -> None:
    found = optimized(attention(32))
    assert found["RotaryEmbedding"] == found["Split"] == 0
    # The token's key and value out of the cache; slot, its column, and where they are, made once; two tables of angles.
    assert found["GatherND"] == 2
    assert (found["Cast"], found["Expand"], found["Concat"]) == (1, 3, 1)
    # Each from [2, 32] to the shape in which it is read, and not by way of the shape of a projection.
    assert found["Reshape"] == 2


@pytest.mark.parametrize(("width", "length", "turned"), [(24, 1, "angles"), (32, 2, "angles"), (32, 1, "otherwise")])
def test_other_rotations_stay(width: int, length: int, turned: str) -> None:
    """Heads that the operator does not take, a block, and queries turned by other angles than keys."""
    found = optimized(attention(width, length, turned))
    assert (found["RotaryEmbedding"], found["Split"], found["GatherND"]) == (2, 1, 0)


def test_an_artifact_has_fused_operators(tiny_folder: Path, tmp_path: Path) -> None:
    """One of each a layer or two; a policy that wants probabilities has attention spelled out."""
    counts = {}
    for policy in ("keydiff", "tova"):
        spec = ExportSpec(str(tiny_folder), 16, 8, {"name": policy}, targets=("onnx-cpu",), quant="int8")
        folder = keydiff_export.export(spec, tmp_path / policy, validate=False)
        methods = inspect_folder(folder)["artifacts"][0]["methods"]
        counts[policy] = {name: method["kernels_outside_delegates"] for name, method in methods.items()}
    for method in ("prefill", "decode", "fill"):
        found = counts["keydiff"][method]
        # Two layers: merged q, k, v and gate, up; two more products a layer; the head.
        assert found["com.microsoft::MatMulNBits"] == 2 * 4 + 1
        assert found.get("com.microsoft::RotaryEmbedding", 0) == (4 if method == "prefill" else 0)
        assert found["com.microsoft::GroupQueryAttention"] == 2
        assert found["com.microsoft::SkipSimplifiedLayerNormalization"] == 5
        assert found["com.microsoft::QuickGelu"] == 2
        assert "com.microsoft::GroupQueryAttention" not in counts["tova"][method]


def test_the_model_that_is_fused_is_a_copy(tiny: LoadedModel) -> None:
    before = [type(module) for module in tiny.model.modules()]
    copy = fused(tiny.model)
    assert [type(module) for module in tiny.model.modules()] == before
    kinds = {type(module).__name__ for module in copy.modules()}
    assert {"FusedNorm", "FusedSilu"} <= kinds
    assert not any(kind.endswith("RMSNorm") for kind in kinds)
    theirs = {name: tensor.data_ptr() for name, tensor in tiny.model.named_parameters()}
    assert {name: tensor.data_ptr() for name, tensor in copy.named_parameters()} == theirs


def test_a_rotation_is_exchanged_only_where_it_rotates_halves(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    module = sys.modules[type(tiny.model).__module__]
    original = module.apply_rotary_pos_emb
    with fused_rotation(tiny.model):
        assert module.apply_rotary_pos_emb is not original
    assert module.apply_rotary_pos_emb is original

    def pairs(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        turned = torch.stack([-q[..., 1::2], q[..., ::2]], -1).flatten(-2)
        return q * cos + turned * sin, k

    monkeypatch.setattr(module, "apply_rotary_pos_emb", pairs)
    with fused_rotation(tiny.model):
        assert module.apply_rotary_pos_emb is pairs


def test_partly_rotated_heads_are_exported(tiny_folder: Path, tmp_path: Path) -> None:
    """Phi-3 may rotate a part of a head, which stays spelled out and equal to the eager model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.for_model(
        "phi3",
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "model")
    spec = ExportSpec(str(tmp_path / "model"), 16, 8, {"name": "keydiff"}, targets=("onnx-cpu",))
    folder = keydiff_export.export(spec, tmp_path / "out", validate=False)
    from keydiff_export.commands.run import open_runner
    from keydiff_export.reference import Reference

    runner = open_runner(folder, folder.artifacts[0])
    reference = Reference(load_model(str(tmp_path / "model")).model, folder.policy, 16, 8)
    for length in (8, 8, 8, 5, 1, 1):
        block = random_tokens(60, 260)[reference.seen : reference.seen + length]
        assert np.abs(runner.step(block) - reference.step(block).numpy()).max() < 1e-4
        assert runner.snapshot().held == reference.held()
