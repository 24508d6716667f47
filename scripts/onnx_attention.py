"""Attention of one token in ONNX Runtime, with and without the products that KeyDiff scores with, several ways in turn.

Usage: onnx_attention.py [--layers 30] [--slots 1152] [--held 1025] [--repeats 30]

Shapes of SmolLM2-135M. Every layer has caches of its own, so that together they do not fit a processor's cache.
Processor time of one thread, a step of all layers; medians, and the median of paired ratios to fused attention alone.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper

HEADS, GROUPS, WIDTH = 3, 3, 64
MICROSOFT = "com.microsoft"
WAYS = {
    "fused": "GroupQueryAttention alone",
    "keys-left": "and [S, d] keys times the probe",
    "keys-right": "and the probe times the keys transposed",
    "query": "instead the probe as one more query, its logits an output",
    "parts": "instead product, softmax, product over all slots, the probe as one more query",
}


def layer(way: str, number: int, slots: int) -> tuple[list[NodeProto], dict[str, list[int]], list[str], list[str]]:
    """Nodes of one layer; inputs with shapes; outputs that are written in place; other outputs."""
    groups = GROUPS + (way in ("query", "parts"))
    name = {part: f"{part}_{number}" for part in ("q", "k", "v", "keys", "values", "probe", "out", "dots")}
    cache = [1, HEADS, slots, WIDTH]
    if way == "parts":
        inputs = {name["q"]: [1, HEADS, groups, WIDTH], name["keys"]: cache, name["values"]: cache}
        nodes = [
            helper.make_node(
                "FusedMatMul", [name["q"], name["keys"]], [name["dots"]], domain=MICROSOFT, transB=1, alpha=0.125
            ),
            helper.make_node("Softmax", [name["dots"]], [f"weights_{number}"], axis=-1),
            helper.make_node("MatMul", [f"weights_{number}", name["values"]], [name["out"]]),
        ]
        return nodes, inputs, [], [name["out"]]
    inputs = {
        name["q"]: [1, 1, HEADS * groups * WIDTH],
        **{name[part]: [1, 1, HEADS * WIDTH] for part in ("k", "v")},
        **{name[part]: cache for part in ("keys", "values")},
    }
    written = [f"{name[part]}_next" for part in ("keys", "values")]
    extra = [name["dots"]] if way == "query" else []
    nodes = [
        helper.make_node(
            "GroupQueryAttention",
            [*inputs, "last", "total"],
            [name["out"], *written, *extra],
            domain=MICROSOFT,
            num_heads=HEADS * groups,
            kv_num_heads=HEADS,
            **({"qk_output": 1} if way == "query" else {}),
        )
    ]
    if way in ("keys-left", "keys-right"):
        left = way == "keys-left"
        inputs[name["probe"]] = [1, HEADS, *((WIDTH, 1) if left else (1, WIDTH))]
        pair = [written[0], name["probe"]] if left else [name["probe"], written[0]]
        nodes.append(helper.make_node("FusedMatMul", pair, [name["dots"]], domain=MICROSOFT, transB=int(not left)))
        extra = [name["dots"]]
    return nodes, inputs, written, [name["out"], *extra]


def build(way: str, layers: int, slots: int) -> ModelProto:
    """All layers as one model, the held tokens' number an input."""
    parts = [layer(way, number, slots) for number in range(layers)]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for part in parts
        for name, shape in part[1].items()
    ]
    if way != "parts":
        inputs += [helper.make_tensor_value_info(name, TensorProto.INT32, [1]) for name in ("last", "total")]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for part in parts for name in (*part[2], *part[3])
    ]
    graph = helper.make_graph([node for part in parts for node in part[0]], way, inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def opened(way: str, layers: int, slots: int, held: int) -> tuple[ort.InferenceSession, ort.IOBinding]:
    """A session with everything bound, caches in place."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(build(way, layers, slots).SerializeToString(), options)
    binding, random = session.io_binding(), np.random.default_rng(0)
    fixed = {"last": held - 1, "total": held}
    values = {}
    for item in session.get_inputs():
        array = (
            np.array([fixed[item.name]], np.int32)
            if item.name in fixed
            else random.standard_normal(item.shape).astype(np.float32)
        )
        values[item.name] = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(item.name, values[item.name])
    for item in session.get_outputs():
        if item.name.endswith("_next"):
            binding.bind_ortvalue_output(item.name, values[item.name.removesuffix("_next")])
        else:
            binding.bind_output(item.name)
    return session, binding


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--slots", type=int, default=1152)
    parser.add_argument("--held", type=int, default=1025)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    every = {way: opened(way, options.layers, options.slots, options.held) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(options.repeats + 3):
        for way, (session, binding) in every.items():
            began = time.process_time()
            session.run_with_iobinding(binding)
            if turn >= 3:
                times[way].append((time.process_time() - began) * 1e3)
    print("| attention of one token | ms | over fused |\n|---|---|---|")
    for way, meaning in WAYS.items():
        ratio = statistics.median(a / b for a, b in zip(times[way], times["fused"], strict=True))
        print(f"| {meaning} | {statistics.median(times[way]):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
