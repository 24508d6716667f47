"""Which other delegates of the ExecuTorch wheel take the NPU graph: each is tried, in a process of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..attention import ATTENTION_NAME
from ..isolated import CrashError, run_isolated
from ..npu_slots import HostStep, NpuStep, new_npu_layers
from ..policies import make_policy
from ..shape import CacheShape

# A step deep enough to hold everything a model's graph holds.
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
_SHAPE = CacheShape(layers=1, kv_heads=2, head_dim=16, budget=16, block=8)


def _openvino() -> list[Any]:
    from executorch.backends.openvino.partitioner import OpenvinoPartitioner
    from executorch.exir.backend.backend_details import CompileSpec

    return [OpenvinoPartitioner([CompileSpec("device", b"CPU")])]


def _vulkan() -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner()]


def _coreml() -> list[Any]:
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    return [CoreMLPartitioner()]


def _mediatek() -> list[Any]:
    from executorch.backends.mediatek.partitioner import NeuropilotPartitioner
    from executorch.exir.backend.backend_details import CompileSpec

    return [NeuropilotPartitioner([CompileSpec("platform-config", b"mt6989")])]


def _ethos() -> list[Any]:
    from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner

    return [EthosUPartitioner(EthosUCompileSpec("ethos-u85-256"))]


def _vgf() -> list[Any]:
    from executorch.backends.arm.vgf import VgfCompileSpec, VgfPartitioner

    return [VgfPartitioner(VgfCompileSpec())]


BACKENDS: dict[str, Callable[[], list[Any]]] = {
    "openvino": _openvino,
    "vulkan": _vulkan,
    "coreml": _coreml,
    "mediatek": _mediatek,
    "arm-ethos-u": _ethos,
    "arm-vgf": _vgf,
}


@dataclass(frozen=True)
class Attempt:
    """What came of one backend.

    Attributes:
        backend: its name.
        verdict: "runs here", "lowers here" or "needs".
        detail: delegates and operators left on the CPU, or what stopped it.
    """

    backend: str
    verdict: str
    detail: str


def attempt(backend: str) -> Attempt:
    """Lowers a decode step of a tiny model for a backend and runs it; a crash is an answer too."""
    try:
        verdict, detail = run_isolated(_try, backend)
    except CrashError as error:
        return Attempt(backend, "needs", f"another build: the attempt {error.cause}")
    return Attempt(backend, verdict, detail)


def _try(backend: str) -> tuple[str, str]:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    step, arguments = _step()
    try:
        partitioner = BACKENDS[backend]()
    except ImportError as error:
        return "needs", f"the Python package {error.name}" if error.name else _first_line(error)
    except Exception as error:
        return "needs", _first_line(error)
    try:
        program, outside, delegates = _lower(step, arguments, partitioner)
    except Exception as error:
        return "needs", f"more than it takes: {_first_line(error)}"
    taken = f"{delegates} delegates, {outside} operators on the CPU"
    if delegates == 0:
        return "needs", "other operators: it takes none of this graph"
    try:
        found = _run(program, arguments)
    except Exception as error:
        return "lowers here", f"{taken}; running needs a device or runtime: {_first_line(error)}"
    expected = step(*arguments)[0]
    worst = float((found[0] - expected).abs().max())
    return ("runs here" if worst < 1e-2 else "lowers here"), f"{taken}; logits differ by {worst:.1e}"


def _step() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **_SIZES)).eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION_NAME)
    policy = make_policy("keydiff", recent=0.2)
    inputs = HostStep(model, _SHAPE, policy, 1)(*(torch.ones(s, dtype=torch.int64) for s in ((1, 1), (1,), (1,))))
    state = [tensor for layer in new_npu_layers(_SHAPE, policy) for tensor in layer.tensors().values()]
    return NpuStep(model, _SHAPE, policy).eval(), (*inputs, *state)


def _lower(
    step: torch.nn.Module, arguments: tuple[torch.Tensor, ...], partitioner: list[Any]
) -> tuple[bytes, int, int]:
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    traced = torch.export.export(step, arguments, strict=False)
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    edge = to_edge_transform_and_lower(traced, partitioner=partitioner, compile_config=config)
    nodes = [n for n in edge.exported_program().graph.nodes if n.op == "call_function"]
    delegates = sum("call_delegate" in str(n.target) for n in nodes)
    outside = sum("getitem" not in str(n.target) for n in nodes) - delegates
    return edge.to_executorch().buffer, outside, delegates


def _run(program: bytes, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    from executorch.extension.pybindings import portable_lib

    return portable_lib._load_for_executorch_from_buffer(program).forward(list(arguments))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:160]
