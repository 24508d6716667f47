"""Rotates a model's residual stream, offline in its weights, so that 16-bit integers can hold it.

A few channels of the residual stream carry numbers a thousand times those of the others ("massive activations"), and
an integer scale a tensor has to span them. Multiplied by an orthogonal matrix Q whose entries all have the same size,
each of D channels gets 1/sqrt(D) of such a number. RMSNorm does not see Q once its weight, which acts a channel, is
folded into the linear layers behind it; the layers before and behind the stream take Q into their weights (the first
rotation of QuaRot and SpinQuant). In float the model is the same and its graph as well; queries, keys, values and
scores are not touched at all. docs/qnn.md has what it changes in 16 bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import UserError


def rotate_residual(model: nn.Module) -> nn.Module:
    """A copy of a causal LM whose residual stream is x Q in place of x; head and embedding are no longer tied.

    Args:
        model: a Hugging Face class with float32 weights; not changed.

    Raises:
        UserError: the model cannot be rotated, with the reason of `obstacle`.
    """
    reason = obstacle(model)
    if reason is not None:
        raise UserError(f"the residual stream cannot be rotated: {reason}")
    model = copy.deepcopy(model)
    rotation = _hadamard(model.config.hidden_size) / math.sqrt(model.config.hidden_size)
    # New parameters and no writes into old ones: embedding and head may share one.
    for norm, linears in _readers(model):
        scale = norm.weight.to(torch.float64)
        for linear in linears:
            linear.weight = _frozen((linear.weight.to(torch.float64) * scale) @ rotation)
        norm.weight = _frozen(torch.ones_like(scale))
    for linear in _writers(model):
        linear.weight = _frozen(rotation.T @ linear.weight.to(torch.float64))
        if linear.bias is not None:
            linear.bias = _frozen(linear.bias.to(torch.float64) @ rotation)
    embedding = model.get_input_embeddings()
    embedding.weight = _frozen(embedding.weight.to(torch.float64) @ rotation)
    return model


def obstacle(model: nn.Module) -> str | None:
    """Why a model's residual stream cannot be rotated, None where it can."""
    for layer in model.model.layers:
        if not hasattr(layer, "input_layernorm"):
            return f"{model.config.model_type} normalises behind its layers, where a weight a channel cannot be folded"
    width = model.config.hidden_size
    return None if _has_hadamard(width) else f"no Hadamard matrix for a width of {width}"


def _readers(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Linear]]]:
    """(norm, linear layers that read its output), all over the model."""
    for layer in model.model.layers:
        writers = _layer_writers(layer)
        for norm, block in ((layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)):
            yield norm, [part for part in block.children() if isinstance(part, nn.Linear) and part not in writers]
    yield model.model.norm, [model.get_output_embeddings()]


def _writers(model: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers whose output is added to the residual stream."""
    for layer in model.model.layers:
        yield from _layer_writers(layer)


def _layer_writers(layer: nn.Module) -> list[nn.Linear]:
    return [layer.self_attn.o_proj, layer.mlp.down_proj]


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.to(torch.float32), requires_grad=False)


def _has_hadamard(order: int) -> bool:
    return order in (1, 2) or _is_paley(order) or (order % 4 == 0 and _has_hadamard(order // 2))


def _hadamard(order: int) -> Tensor:
    """A Hadamard matrix [n, n] float64, entries 1 and -1, rows orthogonal: doubled (Sylvester) from one of Paley's."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_paley(order):
        return _paley(order)
    half = _hadamard(order // 2)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _is_paley(order: int) -> bool:
    prime = order - 1
    return order % 4 == 0 and all(prime % n for n in range(2, math.isqrt(prime) + 1))


def _paley(order: int) -> Tensor:
    """Paley's first construction from a prime q = order - 1 that leaves 3 when divided by 4."""
    prime = order - 1
    squares = {n * n % prime for n in range(1, prime)}
    character = torch.tensor([0, *(1 if n in squares else -1 for n in range(1, prime))], dtype=torch.float64)
    row = torch.arange(prime)
    skew = torch.zeros(order, order, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[(row.unsqueeze(1) - row) % prime]
    return skew + torch.eye(order, dtype=torch.float64)
