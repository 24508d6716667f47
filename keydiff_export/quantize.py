"""Weight quantisation, once for all targets, through torchao.

    quant        body weights          activations       head                  embedding
    8da4w        int4 in groups of 32  int8 at run time  int8 a row            int8 a row
    8da4w-head4  int4 in groups of 32  int8 at run time  int4 in groups of 32  int8 a row
    int8         int8 a row            int8 at run time  int8 a row            int8 a row
    int4         int4 in groups of 32  float32           int8 a row            int8 a row

Run-time rounding of activations follows the runtime's kernel: ExecuTorch's a token, ONNX Runtime's a group of 32.
`twin` is the eager model with the same weights and the same rounding.
"""

from __future__ import annotations

import copy
import logging
from typing import Literal

import torch
from torch import Tensor, nn

# Importing torchao makes torch complain of torchao's own registrations, which a user can do nothing about.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)

GROUP = 32
# NPUs round activations too, with scales from a calibration text; the target's own tools do it (`lowering/qnn.py`).
NPU_QUANTS = ("fp16", "16a8w", "16a4w")
# Measured by scripts/score_bits.py; docs/qnn.md has the figures.
REFUSED_QUANTS = {
    "8a8w": "8-bit activations lose the kept set: a step of 8 bits over the scores' range is 0.016, the scores on "
    "either side of the cut lie about 0.001 apart, and 16 bits for the scores alone do not help, because the keys come "
    "from 8-bit activations; choose 16a8w"
}
QUANTS = ("none", "8da4w", "8da4w-head4", "int4", "int8", *NPU_QUANTS)
Activation = Literal["float", "int8_per_token", "int8_per_group"]


def quantize(model: nn.Module, quant: str) -> nn.Module:
    """Returns the model with torchao's quantised weights and int8 embedding, or itself for "none" and NPU schemes."""
    if quant == "none" or quant in NPU_QUANTS:
        return model
    model = copy.deepcopy(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    model.set_input_embeddings(QuantizedEmbedding(embedding))
    rows, groups = (torch.int8, PerAxis(0), None), (torch.int4, PerGroup(GROUP), torch.bfloat16)
    of_head = groups if quant == "8da4w-head4" else rows
    of_body = rows if quant == "int8" else groups
    for module, (dtype, granularity, scale) in ((head, of_head), (model, of_body)):
        # XNNPACK stores the scales of 4-bit groups in bfloat16; rounded here, all targets have the same weights.
        if quant == "int4":
            config = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, scale_dtype=scale)
        else:
            config = Int8DynamicActivationIntxWeightConfig(
                weight_dtype=dtype, weight_granularity=granularity, weight_scale_dtype=scale
            )
        quantize_(module, config, lambda child, _: isinstance(child, nn.Linear) and not hasattr(child.weight, "qdata"))
    return model


def twin(model: nn.Module, activation: Activation) -> nn.Module:
    """A copy of a quantised model whose linear layers are `QuantizedLinear` with the given activation rounding."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and hasattr(child.weight, "qdata"):
                setattr(module, name, QuantizedLinear(child, activation))
    return model


class QuantizedEmbedding(nn.Module):
    """An embedding with int8 rows and one float scale a row: ids [...] int64 -> [..., D] float32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        table = nn.Embedding(*embedding.weight.shape, _weight=embedding.weight.detach().clone())
        config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
        quantize_(table, config, lambda module, _: isinstance(module, nn.Embedding))
        self.register_buffer("rows", table.weight.qdata)
        self.register_buffer("scale", table.weight.scale.reshape(-1, 1))

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.rows)
        return rows.to(torch.float32) * nn.functional.embedding(ids, self.scale)


class QuantizedLinear(nn.Module):
    """A linear layer with integer weights, scaled a group of 32 or a row: x [..., K] float32 -> [..., N] float32.

    Run eagerly it rounds activations as the runtime's kernel does and multiplies with the dequantised weight; traced
    for ONNX it becomes ONNX Runtime's MatMulNBits.
    """

    def __init__(self, linear: nn.Linear, activation: Activation) -> None:
        super().__init__()
        weight = linear.weight
        self.activation = activation
        self.bits = 4 if weight.target_dtype == torch.int4 else 8
        self.register_buffer("weight", weight.dequantize().to(torch.float32))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        rows, width = self.weight.shape
        groups = width // GROUP
        # MatMulNBits takes unsigned levels, two 4-bit levels a byte, and a scale a group.
        levels = (weight.qdata.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8).reshape(rows, groups, GROUP)
        self.register_buffer("packed", levels[..., 0::2] | (levels[..., 1::2] << 4) if self.bits == 4 else levels)
        self.register_buffer(
            "scale", weight.scale.to(torch.float32).reshape(rows, -1).expand(rows, groups).contiguous()
        )

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return self._onnx(x)
        if self.activation == "int8_per_token":
            x = round_per_token(x)
        elif self.activation == "int8_per_group":
            x = round_per_group(x)
        return nn.functional.linear(x, self.weight, self.bias)

    def _onnx(self, x: Tensor) -> Tensor:
        rows, width = self.weight.shape
        attributes = {
            "K": width,
            "N": rows,
            "bits": self.bits,
            "block_size": GROUP,
            "accuracy_level": 1 if self.activation == "float" else 4,
        }
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [x, self.packed, self.scale],
            attributes,
            dtype=torch.float32,
            shape=[*x.shape[:-1], rows],
        )
        return y if self.bias is None else y + self.bias


def round_per_token(x: Tensor) -> Tensor:
    """Rounds each row to 8 bits between its own minimum and maximum (both made to include 0), as XNNPACK's qd8 does."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255.0).clamp_min(torch.finfo(torch.float32).eps)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return (((x * (1.0 / scale)).round() + zero).clamp(-128, 127) - zero) * scale


def round_per_group(x: Tensor) -> Tensor:
    """Rounds each group of 32 to 8 bits symmetric around 0, as ONNX Runtime's MatMulNBits does at accuracy level 4."""
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 127.0
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return ((groups * inverse).round() * scale).reshape(x.shape)
