"""What holds for every policy, any budget, any block and any way of cutting a text into steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import EagerLayer, StaticLayer, random_rows

from keydiff_export.models import LoadedModel
from keydiff_export.policies import POLICIES, Policy, make_policy
from keydiff_export.policies.keydiff import ANCHORS, METRICS
from keydiff_export.reference import Reference

LENGTH = 40


@st.composite
def policies(draw: st.DrawFn, budget: int) -> Policy:
    """Any policy that evicts, with any options that fit the budget."""
    name = draw(st.sampled_from([n for n, p in POLICIES.items() if p.evicts]))
    pinned = draw(st.integers(0, budget // 2))
    options: dict[str, Any] = {"pinned": pinned, "recent": draw(st.sampled_from([0.0, 0.25, 0.5]))}
    if name == "keydiff":
        options["anchor"] = draw(st.sampled_from(ANCHORS))
        options["metric"] = draw(
            st.sampled_from([m for m in METRICS if (options["anchor"], m) != ("ema", "euclidean")])
        )
    if name == "snapkv":
        options |= {"window": draw(st.integers(1, 6)), "kernel": draw(st.sampled_from([1, 3, 7]))}
    if name == "sink":
        options["sinks"] = draw(st.integers(0, 4))
    return make_policy(name, **options)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Policy, int, int, list[int], int]:
    """(policy, N, B, lengths of the steps, seed of the tensors)."""
    budget = draw(st.integers(2, 12))
    block = draw(st.integers(2, budget))
    steps = draw(st.lists(st.integers(1, block), min_size=3, max_size=10))
    return draw(policies(budget)), budget, block, steps, draw(st.integers(0, 2**16))


quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(cases())
def test_the_budget_order_and_protected_tokens_hold_after_every_step(
    case: tuple[Policy, int, int, list[int], int],
) -> None:
    policy, budget, block, steps, seed = case
    rows = random_rows(sum(steps), seed=seed)
    layer, seen = EagerLayer(policy, budget, block), 0
    for length in steps:
        layer.step(rows.part(seen, seen + length))
        seen += length
        always = set(range(min(policy.pinned, seen))) | set(range(max(0, seen - policy.recent_tokens(budget)), seen))
        for positions in layer.held():
            assert len(positions) == min(seen, budget)
            assert all(a < b for a, b in pairwise(positions))
            assert positions[0] >= 0
            assert positions[-1] < seen
            assert always <= set(positions)


@quick
@given(cases())
def test_the_static_cache_equals_the_reference_whatever_stands_in_empty_slots_and_padding(
    case: tuple[Policy, int, int, list[int], int],
) -> None:
    policy, budget, block, steps, seed = case
    rows, padding = random_rows(sum(steps), seed=seed), random_rows(block, seed=seed + 1)
    eager, clean, littered = (
        EagerLayer(policy, budget, block),
        StaticLayer(policy, budget, block),
        StaticLayer(policy, budget, block),
    )
    seen = 0
    for length in steps:
        part = rows.part(seen, seen + length)
        seen += length
        expected, plain, dirty = eager.step(part), clean.step(part), littered.step(part, padding)
        torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(plain, dirty)
        assert clean.held() == littered.held()
        assert [sorted(held) for held in clean.held()] == eager.held()
        littered.litter(seed)


@quick
@given(cases())
def test_permuting_heads_permutes_the_result(case: tuple[Policy, int, int, list[int], int]) -> None:
    policy, budget, block, steps, seed = case
    if policy.name == "random":  # its lots are drawn a head
        return
    rows = random_rows(sum(steps), groups=1, heads=3, seed=seed)
    order = [2, 0, 1]
    layer, permuted, seen = EagerLayer(policy, budget, block), EagerLayer(policy, budget, block), 0
    for length in steps:
        part = rows.part(seen, seen + length)
        seen += length
        other = type(part)(part.queries[order], part.keys[order], part.values[order])
        torch.testing.assert_close(permuted.step(other), layer.step(part)[order], atol=1e-6, rtol=1e-6)
        assert permuted.held() == [layer.held()[head] for head in order]


@quick
@given(cases())
def test_one_block_of_the_whole_text_is_one_shot_eviction(case: tuple[Policy, int, int, list[int], int]) -> None:
    """All tokens in one step: full causal attention once, all scored once, the N best stay."""
    policy, budget, _, _, seed = case
    rows = random_rows(LENGTH, seed=seed)
    layer = EagerLayer(policy, budget, LENGTH)
    output = layer.step(rows)
    full = torch.nn.functional.scaled_dot_product_attention(
        rows.queries.unsqueeze(0), rows.keys.unsqueeze(0), rows.values.unsqueeze(0), is_causal=True, scale=0.5,
        enable_gqa=True,
    )  # fmt: skip
    torch.testing.assert_close(output, full[0], atol=1e-5, rtol=1e-5)
    scores = layer.reference.layers[0].scores
    assert scores is not None
    for head, positions in enumerate(layer.held()):
        ranked = sorted(range(LENGTH), key=lambda position: (-scores[head, position].item(), position))
        assert positions == sorted(ranked[:budget])


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "full"])
def test_a_budget_that_holds_the_prompt_is_the_full_cache_bit_for_bit(tiny: LoadedModel, name: str) -> None:
    tokens = random_tokens(30, tiny.model.config.vocab_size)
    roomy = Reference(tiny.model, make_policy(name), budget=30, block=8)
    full = Reference(tiny.model, make_policy("full"), budget=30, block=8)
    for begin, end in ((0, 8), (8, 16), (16, 21), *((i, i + 1) for i in range(21, 30))):
        assert torch.equal(roomy.step(tokens[begin:end]), full.step(tokens[begin:end]))
    assert roomy.held() == full.held()
