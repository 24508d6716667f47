"""Runs the eager reference behind the same interface."""

from __future__ import annotations

import numpy as np
import torch

from ..policies import Policy
from ..reference import Reference
from ..shape import CacheShape
from .base import Logits, Runner, Snapshot, make_snapshot


class EagerRunner(Runner):
    """Steps a `Reference` in PyTorch; needs the original model."""

    def __init__(self, model: torch.nn.Module, policy: Policy, shape: CacheShape) -> None:
        super().__init__(shape.budget, shape.block, shape.evict_every)
        self.reference = Reference(model, policy, shape.budget, shape.block, shape.dtype, shape.evict_every)

    def reset(self) -> None:
        super().reset()
        self.reference.reset()

    def _prefill(self, tokens: list[int]) -> Logits:
        return np.asarray(self.reference.step(tokens).numpy(), dtype=np.float32)

    def _decode(self, token: int) -> Logits:
        return self._prefill([token])

    def snapshot(self) -> Snapshot:
        held = [self.reference.layers[number] for number in sorted(self.reference.layers)]
        positions = np.concatenate([layer.positions.numpy() for layer in held])
        layers = [{"keys": layer.keys.numpy(), "values": layer.values.numpy()} for layer in held]
        return make_snapshot(positions, layers, positions.shape[1])
