"""The eager reference against Hugging Face's own attention and against a worked example."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import build_model, random_tokens
from transformers import AutoModelForCausalLM

from keydiff_export.errors import UserError
from keydiff_export.models import ARCHITECTURES, LoadedModel, load_model
from keydiff_export.policies import make_policy
from keydiff_export.reference import Reference

EXTRA = {"granite": {}, "qwen2": {"use_sliding_window": False}, "mistral": {"sliding_window": None}}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_budget_above_the_prompt_equals_the_unmodified_model(architecture: str, tmp_path: Path) -> None:
    folder = build_model(tmp_path / architecture, architecture, **EXTRA.get(architecture, {}))
    loaded = load_model(str(folder))
    reference = Reference(loaded.model, make_policy("keydiff"), budget=64, block=8)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = random_tokens(45, loaded.model.config.vocab_size)
    with torch.no_grad():
        expected = plain(torch.tensor([tokens])).logits[0]
    for first in range(0, 40, 8):
        logits = reference.step(tokens[first : first + 8])
        torch.testing.assert_close(logits, expected[first + 7], atol=2e-5, rtol=1e-5)
    for position in range(40, 45):
        torch.testing.assert_close(
            reference.step(tokens[position : position + 1]), expected[position], atol=2e-5, rtol=1e-5
        )


def feed(reference: Reference, keys: list[list[float]]) -> set[int]:
    """Gives one layer with one head some keys, as a model would, and returns the positions held."""
    tensor = torch.tensor([keys])
    reference.attend(0, tensor, tensor, tensor, 1.0)
    reference.seen += len(keys)
    return reference.held()[0][0]


def bare(budget: int, block: int, recent: float = 0.0) -> Reference:
    return Reference(torch.nn.Identity(), make_policy("keydiff", recent=recent), budget, block)


def test_keeps_the_keys_that_differ_most() -> None:
    # Three keys near (1, 0) and two that differ: of five the budget of three keeps the two and the oldest farthest one.
    reference = bare(budget=3, block=5)
    keys = [[1.0, 0.0], [1.0, 0.05], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]
    # mean (0.4, 0.21): cosines .885 .907 .465 .885 -.885, so positions 2 and 4 stay, and 0 wins its tie against 3.
    assert feed(reference, keys) == {0, 2, 4}


def test_equal_scores_keep_the_older_token() -> None:
    assert feed(bare(budget=2, block=4), [[1.0, 2.0]] * 4) == {0, 1}


def test_the_recent_window_stays_whatever_it_scores() -> None:
    # Identical keys: without a window the oldest stay; half the budget pins the two newest.
    assert feed(bare(budget=4, block=6, recent=0.5), [[1.0, 2.0]] * 6) == {0, 1, 4, 5}


def test_nothing_leaves_before_the_budget_is_full() -> None:
    reference = bare(budget=4, block=2)
    assert feed(reference, [[1.0, 0.0], [1.0, 0.0]]) == {0, 1}
    assert feed(reference, [[1.0, 0.0], [1.0, 0.0]]) == {0, 1, 2, 3}
    assert feed(reference, [[0.0, 1.0]]) == {0, 1, 2, 4}


def test_attention_comes_before_eviction(tiny: LoadedModel) -> None:
    # With N = B = 8, the second block attends to all of the first: logits equal the full cache's for 16 tokens.
    tokens = random_tokens(16, tiny.model.config.vocab_size)
    small = Reference(tiny.model, make_policy("keydiff"), budget=8, block=8)
    large = Reference(tiny.model, make_policy("full"), budget=64, block=8)
    for first in (0, 8):
        torch.testing.assert_close(small.step(tokens[first : first + 8]), large.step(tokens[first : first + 8]))
    assert all(len(held) == 8 for layer in small.held() for held in layer)


def test_following_another_choice_replaces_the_rows() -> None:
    reference = bare(budget=2, block=3)
    assert feed(reference, [[1.0, 0.0], [0.0, 1.0], [1.0, 0.01]]) == {0, 1}
    assert reference.score_gap(0, 0, {0}, {2}) > 0
    assert reference.score_gap(0, 0, {0}, {9}) == float("inf")
    reference.follow(0, 0, {1, 2})
    assert reference.held()[0][0] == {1, 2}
    assert torch.equal(reference.layers[0].keys[0], torch.tensor([[0.0, 1.0], [1.0, 0.01]]))


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "gpt2", "gpt_neox")
    with pytest.raises(UserError, match="gpt_neox, which is not supported"):
        load_model(str(folder))


def test_sliding_window_layers_are_refused(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "window", "mistral", sliding_window=8)
    with pytest.raises(UserError, match="sliding-window layers"):
        load_model(str(folder))
