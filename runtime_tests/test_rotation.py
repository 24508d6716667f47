"""The rotation of the residual stream: equal in float, even in its channels, refused where it does not fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import build_model, random_tokens
from torch import Tensor

from keydiff_export.errors import UserError
from keydiff_export.lowering.rotation import _hadamard, obstacle, rotate_residual
from keydiff_export.models import ARCHITECTURES, LoadedModel, load_model
from keydiff_export.policies import make_policy
from keydiff_export.reference import Reference

EXTRA = {"qwen2": {"use_sliding_window": False}, "mistral": {"sliding_window": None}}
# A channel of the residual stream that holds hundreds of times what the others do, as massive activations do.
MASSIVE, CHANNEL = 100.0, 5


def with_massive_channel(loaded: LoadedModel) -> LoadedModel:
    """Norm weights that differ by channel, and a residual stream with one large channel, in place."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "norm" in name and weight.shape[0] == loaded.model.config.hidden_size:
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
                weight *= MASSIVE / math.sqrt(len(weight))
                weight[CHANNEL] = 0.01
        loaded.model.get_input_embeddings().weight[:, CHANNEL] = MASSIVE
    return loaded


def read(model: torch.nn.Module) -> tuple[Tensor, list[set[int]], float]:
    """Logits of some steps with eviction, what stayed, and the largest number in the residual stream."""
    largest = [0.0]

    def look(_: object, arguments: tuple[Tensor, ...]) -> None:
        largest[0] = max(largest[0], float(arguments[0].abs().max()))

    hooks = [layer.register_forward_pre_hook(look) for layer in model.model.layers]
    reference = Reference(model, make_policy("keydiff", recent=0.2), 16, 8)
    tokens = random_tokens(44, model.config.vocab_size)
    logits = [reference.step(tokens[at : at + 8]) for at in range(0, 40, 8)] + [
        reference.step([t]) for t in tokens[40:]
    ]
    for hook in hooks:
        hook.remove()
    return torch.stack(logits), [held for layer in reference.held() for held in layer], largest[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "olmo2"])
def test_a_rotated_model_is_the_same_model(architecture: str, tied: bool, tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model", architecture, tie_word_embeddings=tied, **EXTRA.get(architecture, {}))
    model = with_massive_channel(load_model(str(folder))).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotated = rotate_residual(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (logits, held, largest), (found, kept, after) = read(model), read(rotated)
    assert float((found - logits).abs().max()) < 1e-4 * float(logits.abs().max())
    assert kept == held
    # Spread evenly over 64 channels it is an eighth, on top of what the others hold.
    assert after < largest / 5


def test_a_model_with_norms_behind_its_layers_is_refused(tmp_path: Path) -> None:
    loaded = load_model(str(build_model(tmp_path / "model", "olmo2")))
    reason = obstacle(loaded.model)
    assert reason is not None
    assert "olmo2 normalises behind its layers" in reason
    with pytest.raises(UserError, match="cannot be rotated: olmo2"):
        rotate_residual(loaded.model)


def test_a_width_without_a_matrix_is_refused(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.model.config, "hidden_size", 100)
    assert obstacle(tiny.model) == "no Hadamard matrix for a width of 100"


@pytest.mark.parametrize("order", [1, 2, 4, 12, 64, 96, 576])
def test_hadamard_matrices(order: int) -> None:
    matrix = _hadamard(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


# Of SmolLM2 135M, Qwen2.5 0.5B, SmolLM2 360M, Qwen2.5 1.5B, Llama-3.2 1B and 3B, Qwen2.5 7B, Llama-3.1 8B, Qwen2.5 14B.
@pytest.mark.parametrize("width", [576, 896, 960, 1536, 2048, 3072, 3584, 4096, 5120])
def test_widths_of_real_models_have_a_matrix(tiny: LoadedModel, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.model.config, "hidden_size", width)
    assert obstacle(tiny.model) is None
