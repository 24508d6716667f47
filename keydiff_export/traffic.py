"""Bytes that one decode step has to read: every weight of a matrix product once, and the whole slot cache once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

BITS = {"none": 32, "int8": 8, "8da4w": 4, "8da4w-head4": 4, "int4": 4}
HEAD_BITS = {"none": 32, "8da4w-head4": 4}
GROUP = 32


def weight_bytes(model_folder: Path, quant: str, runtime: str) -> int:
    """Weights and scales of all linear layers as a runtime stores them, and the float32 rest without the embedding.

    Quantised heads are int8 unless the scheme says otherwise. MatMulNBits of ONNX Runtime has a float32 scale a group
    of 32, XNNPACK a bfloat16 scale a group of 4-bit weights and a float32 scale a row of int8 weights.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    head = model.get_output_embeddings()
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bits = HEAD_BITS.get(quant, 8) if module is head else BITS[quant]
            total += module.weight.numel() * bits // 8 + _scale_bytes(module, bits, runtime)
            total += 0 if module.bias is None else module.bias.numel() * 4
        elif not isinstance(module, nn.Embedding):
            total += sum(p.numel() * 4 for p in module.parameters(recurse=False))
    return total


def _scale_bytes(linear: nn.Linear, bits: int, runtime: str) -> int:
    if bits == 32:
        return 0
    groups = linear.weight.numel() // GROUP
    if runtime == "onnxruntime":
        return 4 * groups
    return 2 * groups if bits == 4 else 4 * linear.out_features
