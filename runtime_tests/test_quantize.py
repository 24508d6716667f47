"""One quantised layer through each runtime against its eager twin: here nothing amplifies, so it must agree."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.extension.pybindings import portable_lib
from torch import nn
from torchao.utils import unwrap_tensor_subclass

from keydiff_export.lowering.xnnpack_partition import SegmentPartitioner
from keydiff_export.models import LoadedModel
from keydiff_export.quantize import quantize, twin

LAYERS = ("model.layers.0.self_attn.q_proj", "lm_head")


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    noise = ((found.astype(np.float64) - expected) ** 2).sum()
    return float("inf") if noise == 0 else float(10 * np.log10((expected.astype(np.float64) ** 2).sum() / noise))


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(1, 24, 64, generator=generator)
    return rows * torch.rand(1, 24, 1, generator=generator) * 3


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("quant", ["8da4w", "8da4w-head4", "int8"])
def test_a_layer_in_xnnpack_equals_its_twin(tiny: LoadedModel, x: torch.Tensor, quant: str, layer: str) -> None:
    model = quantize(tiny.model, quant)
    module = nn.Sequential(copy.deepcopy(model.get_submodule(layer)))
    unwrap_tensor_subclass(module)
    edge = to_edge_transform_and_lower(
        torch.export.export(module, (x,)),
        partitioner=[SegmentPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    # The runtime reads the buffer in place, so it must outlive the program.
    buffer = edge.to_executorch().buffer
    program: Any = portable_lib._load_for_executorch_from_buffer(buffer)
    found = program.forward((x,))[0].numpy()
    assert sqnr(twin(model, "int8_per_token").get_submodule(layer)(x).numpy(), found) > 100


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("quant", "activation"),
    [
        ("8da4w", "int8_per_group"),
        ("8da4w-head4", "int8_per_group"),
        ("int8", "int8_per_group"),
        ("int4", "float"),
    ],
)
def test_a_layer_in_onnx_runtime_equals_its_twin(
    tiny: LoadedModel, x: torch.Tensor, quant: str, activation: Any, layer: str
) -> None:
    module = nn.Sequential(twin(quantize(tiny.model, quant), activation).get_submodule(layer)).eval()
    program = torch.onnx.export(module, (x,), dynamo=True, opset_version=21, verbose=False)
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert sqnr(module(x).numpy(), found) > 100


@pytest.mark.parametrize(("quant", "head", "body"), [("8da4w", 8, 4), ("8da4w-head4", 4, 4), ("int8", 8, 8)])
def test_bits_of_head_and_body(tiny: LoadedModel, quant: str, head: int, body: int) -> None:
    model = twin(quantize(tiny.model, quant), "int8_per_token")
    assert [model.get_submodule(layer).bits for layer in LAYERS] == [body, head]
