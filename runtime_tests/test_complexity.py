"""Counts on paper against what torch's FLOP counter sees, and against the state that policies keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from one_layer import StaticLayer, random_rows
from torch.utils.flop_counter import FlopCounterMode

from keydiff_export.bench import policy_needs, policy_state_bytes
from keydiff_export.complexity import (
    ASYMPTOTIC,
    KEYDIFF,
    Needs,
    Step,
    added_flops,
    attention_bytes,
    attention_flops,
    product_flops,
    scoring_flops,
    selection_comparisons,
    state_bytes,
)
from keydiff_export.policies import POLICIES, make_policy
from keydiff_export.policies.keydiff import KeyDiff
from keydiff_export.reference import Reference
from keydiff_export.shape import CacheShape

HEADS, GROUPS, WIDTH, BUDGET, BLOCK = 2, 3, 8, 48, 16
POLICIES_TESTED = [
    *({"name": name} for name in POLICIES),
    {"name": "keydiff", "anchor": "normalized"},
    {"name": "keydiff", "anchor": "median", "metric": "euclidean"},
    {"name": "keydiff", "anchor": "ema"},
    {"name": "snapkv", "window": 4},
]


def step(length: int) -> Step:
    return Step(HEADS, GROUPS, WIDTH, BUDGET + BLOCK, length)


@pytest.mark.parametrize("length", [1, BLOCK])
@pytest.mark.parametrize("parameters", POLICIES_TESTED, ids=lambda p: "-".join(str(value) for value in p.values()))
def test_products_are_those_that_torch_counts(parameters: dict[str, object], length: int) -> None:
    policy = make_policy(**parameters)  # type: ignore[arg-type]
    layer = StaticLayer(policy, BUDGET, BLOCK, HEADS, WIDTH)
    rows = random_rows(length, HEADS, GROUPS, WIDTH)
    with FlopCounterMode(display=False) as counter:
        layer.step(rows)
    assert counter.get_total_flops() == product_flops(policy_needs(policy), step(length))


def test_the_reference_scores_keydiff_with_one_product() -> None:
    """As defined: of a step's products, the keys times the anchor are what eviction adds."""
    counted = {}
    for policy in (make_policy("full"), make_policy("keydiff")):
        reference = Reference(torch.nn.Identity(), policy, BUDGET, BLOCK)
        rows = random_rows(BLOCK, HEADS, GROUPS, WIDTH)
        with FlopCounterMode(display=False) as counter:
            reference.attend(0, rows.queries, rows.keys, rows.values, 0.5)
        counted[policy.name] = counter.get_total_flops()
    assert counted["full"] == 4 * HEADS * GROUPS * BLOCK * BLOCK * WIDTH
    assert counted["keydiff"] - counted["full"] == 2 * HEADS * BLOCK * WIDTH


@pytest.mark.parametrize("parameters", POLICIES_TESTED, ids=lambda p: "-".join(str(value) for value in p.values()))
def test_state_is_what_the_caches_hold(parameters: dict[str, object]) -> None:
    policy = make_policy(**parameters)  # type: ignore[arg-type]
    shape = CacheShape(1, HEADS, WIDTH, BUDGET, BLOCK)
    assert state_bytes(policy_needs(policy), HEADS, shape.slots, WIDTH) == policy_state_bytes(shape, policy)


def test_keydiffs_needs_are_those_of_its_class() -> None:
    assert policy_needs(KeyDiff()) == KEYDIFF


def test_every_policy_has_a_definition() -> None:
    assert set(ASYMPTOTIC) == set(POLICIES)
    for name in POLICIES:
        assert scoring_flops(name, step(BLOCK)) >= 0


def growth(name: str, **change: int) -> float:
    """Ratio of a policy's scoring FLOPs when one size doubles."""
    before = Step(heads=8, groups=4, width=128, slots=4096, length=128)
    return scoring_flops(name, replace(before, **change)) / scoring_flops(name, before)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_counts_grow_as_the_asymptotic_form_says(name: str) -> None:
    form = ASYMPTOTIC[name]
    assert growth(name, slots=8192) == pytest.approx(2, rel=0.01)
    assert growth(name, width=256) == pytest.approx(2 if " d)" in form else 1, rel=0.05)
    assert growth(name, groups=8) == pytest.approx(2 if "R " in form else 1, rel=0.01)
    assert growth(name, length=256) == pytest.approx(2 if "(T " in form else 1, rel=0.01)


def test_keydiff_is_cheaper_than_every_policy_that_reads_attention() -> None:
    """As defined for a block, with grouped queries; TOVA's one row a query head is the nearest."""
    block = Step(heads=8, groups=4, width=128, slots=8192, length=128)
    keydiff = scoring_flops("keydiff", block)
    assert keydiff < scoring_flops("tova", block) < scoring_flops("snapkv", block) < scoring_flops("h2o", block)


def test_a_small_case_by_hand() -> None:
    tiny = Step(heads=1, groups=1, width=2, slots=3, length=1)
    assert attention_flops(tiny) == 3 * (8 + 1 + 5)
    assert attention_bytes(tiny) == 2 * 4 * 3 * 2
    assert scoring_flops("keydiff", tiny) == 6 + 16 + 12 + 12
    assert added_flops(Needs(probe=True), tiny) == 2 * 2 * (3 + 1) + 2 * 2 * 3
    assert added_flops(Needs(probe=True), replace(tiny, length=8)) == 2 * 2 * 3
    assert selection_comparisons(tiny) == 3
    assert selection_comparisons(replace(tiny, length=8)) == 9
