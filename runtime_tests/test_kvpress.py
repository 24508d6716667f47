"""Our score functions against kvpress's, on the same tensors; where definitions differ, the difference is the test."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_tokens
from one_layer import EagerLayer, Rows, random_rows
from torch import Tensor

from keydiff_export.models import LoadedModel
from keydiff_export.policies import make_policy

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import kvpress_gap
from kvpress_gap import kvpress_module

LENGTH, HEADS, GROUPS, WIDTH = 64, 3, 2, 8


@pytest.fixture(scope="module")
def rows() -> Rows:
    return random_rows(LENGTH, HEADS, GROUPS, WIDTH, seed=5)


@pytest.fixture(scope="module")
def attention(rows: Rows) -> Tensor:
    """[1, H * R, L, L] causal attention probabilities, scale 0.5, heads in Hugging Face's order."""
    keys = rows.keys.repeat_interleave(GROUPS, 0)
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return (rows.queries @ keys.mT * 0.5).masked_fill(future, -float("inf")).softmax(-1).unsqueeze(0)


def ours(rows: Rows, name: str, budget: int = 1, **options: object) -> tuple[Tensor, list[list[int]]]:
    """Scores [H, L] of one eviction over all rows, and the positions kept."""
    layer = EagerLayer(make_policy(name, **options), budget, LENGTH)
    layer.step(rows)
    scores = layer.reference.layers[0].scores
    assert scores is not None
    return scores, layer.held()


def theirs(press: object, rows: Rows, attention: Tensor | None = None) -> Tensor:
    """Scores [H, L] of a press."""
    config = SimpleNamespace(num_attention_heads=HEADS * GROUPS, num_key_value_heads=HEADS)
    module = SimpleNamespace(config=config, head_dim=WIDTH)
    hidden = torch.zeros(1, LENGTH, HEADS * GROUPS * WIDTH)
    keys, values = rows.keys.unsqueeze(0), rows.values.unsqueeze(0)
    return press.score(module, hidden, keys, values, attention, {})[0]


def test_keydiff_with_the_anchor_of_unit_keys(rows: Rows) -> None:
    expected = theirs(kvpress_module("keydiff_press").KeyDiffPress(), rows)
    torch.testing.assert_close(ours(rows, "keydiff", anchor="normalized")[0], expected, atol=1e-5, rtol=0)


def test_keydiff_with_the_anchor_of_raw_keys(rows: Rows) -> None:
    """The paper's default averages raw keys (Eq. 8), kvpress unit keys (Eq. 6): equal for keys of one length only."""
    press = kvpress_module("keydiff_press").KeyDiffPress()
    assert (ours(rows, "keydiff")[0] - theirs(press, rows)).abs().max() > 1e-3
    unit = torch.nn.functional.normalize(rows.keys, dim=-1)
    even = Rows(rows.queries, unit, rows.values)
    torch.testing.assert_close(ours(even, "keydiff")[0], theirs(press, even), atol=1e-5, rtol=0)


def test_knorm(rows: Rows) -> None:
    expected = theirs(kvpress_module("knorm_press").KnormPress(), rows)
    torch.testing.assert_close(ours(rows, "knorm")[0], expected, atol=1e-5, rtol=0)


def test_streaming_llm_keeps_the_same_tokens(rows: Rows) -> None:
    press = kvpress_module("streaming_llm_press").StreamingLLMPress(compression_ratio=0.5, n_sink=4)
    expected = theirs(press, rows).topk(32, dim=-1).indices.sort(dim=-1).values.tolist()
    assert ours(rows, "sink", budget=32)[1] == expected


def test_tova(rows: Rows, attention: Tensor) -> None:
    """kvpress averages over all heads and always keeps the last token; here every KV head has a row of its own.

    The contract averages over the query heads of a KV head, so that heads can keep different tokens; averaged over KV
    heads our rows are kvpress's.
    """
    expected = theirs(kvpress_module("tova_press").TOVAPress(), rows, attention)
    scores = ours(rows, "tova")[0]
    torch.testing.assert_close(scores.mean(0)[:-1], expected[0, :-1], atol=1e-5, rtol=0)
    assert (scores[0] - scores[1]).abs().max() > 1e-3
    one_head = Rows(rows.queries[:GROUPS], rows.keys[:1], rows.values[:1])
    single = attention[:, :GROUPS]
    torch.testing.assert_close(
        ours(one_head, "tova")[0][0, :-1],
        theirs(kvpress_module("tova_press").TOVAPress(), one_head, single)[0, :-1],
        atol=1e-5,
        rtol=0,
    )


def test_snapkv(rows: Rows, attention: Tensor) -> None:
    """kvpress averages the window's attention, we sum it (the paper's A.1): a factor of 32, the same for all tokens."""
    press = kvpress_module("snapkv_press").SnapKVPress(window_size=32, kernel_size=7)
    expected = theirs(press, rows, attention)
    scores = ours(rows, "snapkv", budget=40)[0]
    torch.testing.assert_close(scores[:, :32] / 32, expected[:, :32], atol=1e-5, rtol=0)
    assert scores[:, 32:].isinf().all()
    assert (expected[:, 32:] > expected[:, :32].max()).all()


def test_h2o(rows: Rows, attention: Tensor) -> None:
    """kvpress divides a column sum by the number of queries that could see the token; H2O accumulates plain sums."""
    expected = theirs(kvpress_module("observed_attention_press").ObservedAttentionPress(), rows, attention)
    could_see = torch.arange(LENGTH, 0, -1)
    torch.testing.assert_close(ours(rows, "h2o")[0] / could_see, expected, atol=1e-5, rtol=0)


def test_block_press_agrees_in_the_first_layer_and_not_after_it(tiny: LoadedModel) -> None:
    """Keys of the first layer do not depend on attention, so there both procedures see the same ones."""
    tokens = random_tokens(64, tiny.model.config.vocab_size)
    press = kvpress_gap.block_press(tiny.model, tokens, budget=16, block=8)
    paper = kvpress_gap.block_wise(tiny.model, tokens, budget=16, block=8, anchor="normalized")
    first, second = kvpress_gap.jaccard(press, paper)
    assert first == 1
    assert second < 1
    assert kvpress_gap.continuation_nll(press, tokens[:9]) != kvpress_gap.continuation_nll(paper, tokens[:9])
