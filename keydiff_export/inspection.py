"""What the program files themselves say: methods, slots, memory plan, operators, delegation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .errors import UserError
from .manifest import OutputFolder
from .npu_inspection import inspect_npu

STATE_NAMES = ("keys", "values", "scales", "positions", "state", "total")


def inspect_folder(folder: OutputFolder) -> dict[str, Any]:
    """Facts of every artifact and the proof that memory does not depend on the prompt.

    For each artifact: per method its operators, delegates and state; `slots`, the slots that the program's own cache
    tensors have; `dynamic_tensors`, tensors whose size can change from call to call (those of `forward` do, up to a
    block); `unbounded_tensors`, those of them that no bound holds (none may); and `constant_memory`, which is true when
    the slots are N + B everywhere (N in the state of an NPU's graph) and every tensor is bounded, so that all memory is
    planned ahead.
    """
    shape = folder.shape
    artifacts = []
    for artifact in folder.artifacts:
        place, on_npu = folder.path / artifact["target"], artifact["runtime"].endswith("-qnn")
        methods = inspect_program(place, artifact["runtime"])
        if on_npu:
            methods = inspect_npu(place, artifact, methods)
        slots = sorted({s for m in methods.values() for s in m["slots"]})
        dynamic, unbounded = (
            sum(m[kind] for m in methods.values()) for kind in ("dynamic_tensors", "unbounded_tensors")
        )
        artifacts.append(
            {
                "target": artifact["target"],
                "quant": artifact["quant"],
                "bytes": sum(f["bytes"] for f in artifact["files"]),
                "cache_bytes": artifact["cache_bytes"],
                "planned_memory_bytes": artifact["planned_memory_bytes"],
                "slots": slots,
                "dynamic_tensors": dynamic,
                "unbounded_tensors": unbounded,
                # An NPU's graph owns no state: it is given N slots and joins them with the new rows inside.
                "constant_memory": slots == [shape.budget if on_npu else shape.slots] and unbounded == 0,
                "methods": methods,
            }
        )
    return {
        "name": folder.manifest["name"],
        "model": folder.manifest["model"],
        "policy": folder.manifest["policy"],
        "cache": folder.manifest["cache"],
        "artifacts": artifacts,
    }


def inspect_program(place: Path, runtime: str) -> dict[str, Any]:
    """Per method of the program in a folder: inputs, operators, delegates, state, planned memory.

    Raises:
        UserError: not a readable program.
    """
    return _inspect_pte(place) if runtime.startswith("executorch") else _inspect_onnx(place)


def _inspect_pte(place: Path) -> dict[str, Any]:
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall, Tensor, TensorShapeDynamism

    methods: dict[str, Any] = {}
    plans = []
    for file in sorted(place.glob("*.pte")):
        try:
            plans += deserialize_pte_binary(file.read_bytes()).program.execution_plan
        except Exception as error:  # the flatbuffer reader raises whatever the bytes lead it to
            raise UserError(f"{file} is not a readable ExecuTorch program: export it again") from error
    for plan in plans:
        calls = [i.instr_args for chain in plan.chains for i in chain.instructions]
        if not calls:
            continue
        tensors = [v.val for v in plan.values if isinstance(v.val, Tensor)]
        state: dict[str, list[int]] = {}
        for tensor in tensors:
            name = tensor.extra_tensor_info.fully_qualified_name if tensor.extra_tensor_info is not None else ""
            # Views of a buffer carry its name too; the buffer itself has the most dimensions.
            if name.rsplit("_", 1)[0] in STATE_NAMES and len(tensor.sizes) > len(state.get(name, [])):
                state[name] = list(tensor.sizes)
        names = [f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators]
        kernels = Counter(names[c.op_index] for c in calls if isinstance(c, KernelCall))
        methods[plan.name] = {
            "inputs": [list(plan.values[i].val.sizes) for i in plan.inputs if isinstance(plan.values[i].val, Tensor)],
            "delegates": dict(
                Counter(plan.delegates[c.delegate_index].id for c in calls if isinstance(c, DelegateCall))
            ),
            "kernels_outside_delegates": dict(kernels.most_common()),
            "planned_memory_bytes": sum(plan.non_const_buffer_sizes),
            "state": state,
            "slots": sorted({sizes[1] for name, sizes in state.items() if name.startswith(("keys", "values"))}),
            "dynamic_tensors": sum(t.shape_dynamism != TensorShapeDynamism.STATIC for t in tensors),
            "unbounded_tensors": sum(t.shape_dynamism == TensorShapeDynamism.DYNAMIC_UNBOUND for t in tensors),
        }
    return methods


def _inspect_onnx(place: Path) -> dict[str, Any]:
    import onnx

    methods: dict[str, Any] = {}
    for file in sorted(place.glob("*.onnx")):
        try:
            graph = onnx.load(file, load_external_data=False).graph
        except Exception as error:  # protobuf raises its own family
            raise UserError(f"{file} is not a readable ONNX model: export it again") from error
        values = [*graph.input, *graph.output]
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        outputs = {v.name for v in graph.output}
        state = {n: s for n, s in shapes.items() if f"{n}_next" in outputs}
        unknown = sum(0 in s for s in shapes.values())
        kernels = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.node)
        methods[file.stem] = {
            "inputs": [shapes[v.name] for v in graph.input if v.name not in state],
            "delegates": {},
            "kernels_outside_delegates": dict(kernels.most_common()),
            "planned_memory_bytes": None,
            "state": state,
            "slots": sorted({s[-2] for n, s in state.items() if n.startswith(("keys", "values"))}),
            "dynamic_tensors": unknown,
            "unbounded_tensors": unknown,
        }
    return methods
