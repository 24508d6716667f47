"""Score functions against numbers worked out by hand, and the registry's refusals."""

from __future__ import annotations

import math

import pytest
import torch

from keydiff_export.errors import UserError
from keydiff_export.policies import POLICIES, SlotView, make_policy
from keydiff_export.slots import TorchOps


def keydiff_scores(keys: list[list[float]], valid: list[float] | None = None) -> list[float]:
    policy = make_policy("keydiff")
    tensor = torch.tensor([keys])
    positions = torch.arange(len(keys)).unsqueeze(0)
    view = SlotView(tensor, positions, torch.tensor(valid or [1.0] * len(keys)), policy.slot_state(tensor))
    anchor = policy.anchor(view)
    assert anchor is not None
    dots = TorchOps().dot(tensor, anchor)
    return policy.score(SlotView(tensor, positions, view.valid, view.state, dots))[0].tolist()


def test_keydiff_is_minus_the_cosine_to_the_mean_of_raw_keys() -> None:
    # Mean of (3,0), (0,1), (0,1) is (1, 2/3); cosines 1/n and (2/3)/n with n = sqrt(1 + 4/9).
    norm = math.sqrt(1 + 4 / 9)
    expected = [-1 / norm, -(2 / 3) / norm, -(2 / 3) / norm]
    assert keydiff_scores([[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]) == pytest.approx(expected, abs=1e-6)


def test_keydiff_ignores_a_keys_length_but_not_in_the_mean() -> None:
    # Doubling a key leaves its own direction alone and turns the mean towards it.
    short, long = keydiff_scores([[1.0, 0.0], [0.0, 1.0]]), keydiff_scores([[2.0, 0.0], [0.0, 1.0]])
    assert short == pytest.approx([-math.sqrt(0.5)] * 2, abs=1e-6)
    assert long == pytest.approx([-2 / math.sqrt(5), -1 / math.sqrt(5)], abs=1e-6)


def test_an_opposite_key_scores_highest() -> None:
    scores = keydiff_scores([[1.0, 0.1], [1.0, -0.1], [1.0, 0.0], [-1.0, 0.0]])
    assert scores.index(max(scores)) == 3
    assert scores[3] == pytest.approx(1.0, abs=1e-6)


def test_empty_slots_do_not_move_the_anchor() -> None:
    alone = keydiff_scores([[3.0, 0.0], [0.0, 1.0]])
    beside_garbage = keydiff_scores([[3.0, 0.0], [0.0, 1.0], [50.0, -70.0]], [1.0, 1.0, 0.0])
    assert beside_garbage[:2] == pytest.approx(alone, abs=1e-6)


def test_a_zero_key_gives_a_finite_score() -> None:
    assert all(math.isfinite(score) for score in keydiff_scores([[0.0, 0.0], [1.0, 0.0]]))


def view_of(positions: list[int], state: list[float] | None = None, heads: int = 1) -> SlotView:
    rows = torch.tensor([positions]).expand(heads, -1)
    numbers = None if state is None else torch.tensor([state])
    return SlotView(torch.zeros(heads, len(positions), 2), rows, torch.ones(len(positions)), numbers)


def test_sink_keeps_the_first_tokens_and_then_the_newest() -> None:
    order = make_policy("sink").score(view_of([9, 0, 40, 3, 4, 17]))[0].argsort(descending=True, stable=True)
    assert [[9, 0, 40, 3, 4, 17][i] for i in order] == [0, 3, 40, 17, 9, 4]


def test_knorm_prefers_short_keys() -> None:
    policy = make_policy("knorm")
    keys = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    state = policy.slot_state(keys)
    assert state is not None
    assert state[0].tolist() == pytest.approx([5.0, 1.0])
    assert policy.score(view_of([0, 1], state[0].tolist()))[0].tolist() == pytest.approx([-5.0, -1.0])


def test_random_lots_are_fixed_even_and_independent() -> None:
    lots = make_policy("random").score(view_of(list(range(20_000)), heads=2))
    assert torch.equal(lots, make_policy("random").score(view_of(list(range(20_000)), heads=2)))
    assert not torch.equal(lots, make_policy("random", seed=1).score(view_of(list(range(20_000)), heads=2)))
    assert lots.max() < 2**24
    share = lots / 2**24
    assert share.mean(1).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert abs(torch.corrcoef(share)[0, 1].item()) < 0.03
    neighbours = torch.stack([share[0, :-1], share[0, 1:]])
    assert abs(torch.corrcoef(neighbours)[0, 1].item()) < 0.03


@pytest.mark.parametrize(("recent", "budget", "expected"), [(0.2, 512, 102), (0.7, 10, 7), (0.0, 9, 0), (1.0, 9, 9)])
def test_recent_window_is_the_floor_of_its_share(recent: float, budget: int, expected: int) -> None:
    assert make_policy("keydiff", recent=recent).recent_tokens(budget) == expected


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("nothing", {}, "unknown policy 'nothing'"),
        ("keydiff", {"window": 3}, "has no parameter 'window'"),
        ("keydiff", {"recent": 1.5}, "recent must be between 0 and 1"),
        ("keydiff", {"recent": "much"}, "policy keydiff"),
        ("sink", {"sinks": -1}, "sinks must be a whole number"),
    ],
)
def test_bad_policies_are_refused(name: str, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_policy(name, **parameters)


def test_every_policy_is_registered_under_its_name_and_documented() -> None:
    for name, policy in POLICIES.items():
        assert policy.name == name
        assert policy.__doc__
        assert make_policy(name).parameters()["name"] == name
