"""Stock fused operators of ONNX Runtime in place of what Hugging Face's classes spell out, for `onnx-cpu`.

A decode step of the demo model was 2,600 nodes of which most took longer to be called than to compute. Each operator
here computes what the nodes that it replaces compute; parity proves it for every artifact. The model that is exported
is a copy whose modules are exchanged; its weights are not copied.

    replaced                       nodes   by
    RMSNorm                            7   SimplifiedLayerNormalization (with the residual before it, ONNX Runtime
                                           makes SkipSimplifiedLayerNormalization of it when it loads)
    SiLU                               2   QuickGelu with alpha 1
    rotation of queries or keys       10   RotaryEmbedding
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

Rotation = Callable[..., tuple[Tensor, Tensor]]


class FusedNorm(nn.Module):
    """RMSNorm of x [..., D] as one operator."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        attributes: dict[str, Any] = {"axis": -1, "epsilon": self.epsilon, "stash_type": 1}
        inputs = [x, self.weight]
        return symbolic("::SimplifiedLayerNormalization", inputs, attributes, dtype=x.dtype, shape=list(x.shape))


class FusedSilu(nn.Module):
    """x * sigmoid(x) of x [...] as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        return symbolic("com.microsoft::QuickGelu", [x], {"alpha": 1.0}, dtype=x.dtype, shape=list(x.shape))


def fused(model: nn.Module) -> nn.Module:
    """A copy of a Hugging Face model, over the same weights, that traces norms and SiLU into one operator each."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            kind = type(child).__name__
            if kind.endswith("RMSNorm"):
                setattr(parent, name, FusedNorm(child))
            elif isinstance(child, nn.SiLU) or kind == "SiLUActivation":
                setattr(parent, name, FusedSilu())
    return model


@contextlib.contextmanager
def fused_rotation(model: nn.Module) -> Iterator[None]:
    """Inside, the model's `apply_rotary_pos_emb` traces into one operator for queries and one for keys.

    It is a function of the model's module, so it is exchanged there. One that does not rotate halves stays as it is.
    """
    module = sys.modules[type(model).__module__]
    original: Rotation | None = getattr(module, "apply_rotary_pos_emb", None)
    if original is None or not _rotates_halves(original):
        yield
        return

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if cos.shape[-1] != q.shape[-1]:
            return original(q, k, cos, sin, *rest, **named)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    setattr(module, "apply_rotary_pos_emb", rotate)  # noqa: B010
    try:
        yield
    finally:
        setattr(module, "apply_rotary_pos_emb", original)  # noqa: B010


def _rotates_halves(rotation: Rotation) -> bool:
    """Whether it is the rotation that the operator computes, by a try on random numbers [1, 1, 2, 4]."""
    numbers = torch.rand(4, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    x, (cos, sin) = numbers[:1], (part[..., :2].repeat(1, 1, 2) for part in numbers[1:3])
    halves = torch.cat([-x[..., 2:], x[..., :2]], -1)
    return torch.allclose(rotation(x, x, cos, sin)[0], x * cos + halves * sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, H, T, d] rotated by the angles of cos and sin [1, T, d], the two halves of which are equal."""
    _, heads, length, width = x.shape
    half = width // 2
    # Row i of the tables is the angle of token i of the step, so its place in them is i and not its position.
    places = torch.arange(length).unsqueeze(0)
    flat = x.transpose(1, 2).reshape(1, length, heads * width)
    inputs = [flat, places, cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()]
    attributes: dict[str, Any] = {"num_heads": heads, "rotary_embedding_dim": width}
    turned = symbolic("com.microsoft::RotaryEmbedding", inputs, attributes, dtype=x.dtype, shape=list(flat.shape))
    return turned.reshape(1, length, heads, width).transpose(1, 2)
