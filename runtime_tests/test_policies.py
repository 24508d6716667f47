"""Score functions against numbers worked out by hand, and the registry's refusals."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
from one_layer import EagerLayer, Rows

from keydiff_export.errors import UserError
from keydiff_export.policies import POLICIES, Policy, SlotView, make_policy, parse_policy, policy_class, policy_names


def keydiff_scores(keys: list[list[float]], **options: object) -> list[float]:
    layer = EagerLayer(make_policy("keydiff", **options), budget=1, block=len(keys))
    rows = torch.tensor([keys])
    layer.step(Rows(rows, rows, rows))
    scores = layer.reference.layers[0].scores
    assert scores is not None
    return scores[0].tolist()


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


def test_a_zero_key_gives_a_finite_score() -> None:
    assert all(math.isfinite(score) for score in keydiff_scores([[0.0, 0.0], [1.0, 0.0]]))


def test_the_median_anchor_takes_the_lower_middle_of_each_coordinate() -> None:
    # Coordinates (1, 2, 9, 4) and (0, 8, 1, 2): lower medians 2 and 1; dots 2, 12, 19, 10.
    keys = [[1.0, 0.0], [2.0, 8.0], [9.0, 1.0], [4.0, 2.0]]
    assert keydiff_scores(keys, anchor="median", metric="dot") == pytest.approx([-2, -12, -19, -10])


def test_a_moving_sum_keeps_what_left_the_cache() -> None:
    # N = 1: (0, 2) leaves, for its dot with (1, 2) is the larger. The sum then is 0.75 (1, 2) + (3, 0) = (3.75, 1.5).
    layer = EagerLayer(make_policy("keydiff", anchor="ema", metric="dot", ema_alpha=0.25), budget=1, block=2)
    for keys in ([[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0]]):
        rows = torch.tensor([keys])
        layer.step(Rows(rows, rows, rows))
    assert layer.reference.layers[0].scores[0].tolist() == pytest.approx([-3.75, -11.25])


def test_euclidean_keeps_the_far_keys() -> None:
    # Mean (1, 0): squared distances 1, 1, 4, 4, less the 1 of |mean|^2.
    keys = [[0.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [3.0, 0.0]]
    assert keydiff_scores(keys, metric="euclidean") == pytest.approx([0, 0, 3, 3], abs=1e-6)


def uniform_attention(policy: Policy, steps: list[int], budget: int) -> EagerLayer:
    """Zero keys and queries, so that every query spreads its attention evenly over what it sees."""
    layer = EagerLayer(policy, budget, max(steps))
    for length in steps:
        layer.step(Rows(torch.zeros(1, length, 2), torch.zeros(1, length, 2), torch.zeros(1, length, 2)))
    return layer


def test_h2o_adds_up_the_attention_of_all_queries() -> None:
    layer = uniform_attention(make_policy("h2o"), [2, 1], budget=3)
    # Token 0: 1 + 1/2 + 1/3, token 1: 1/2 + 1/3, token 2: 1/3.
    assert layer.reference.layers[0].state[0].tolist() == pytest.approx([11 / 6, 5 / 6, 1 / 3])


def test_tova_looks_through_the_last_query_only() -> None:
    layer = uniform_attention(make_policy("tova"), [4], budget=3)
    assert layer.reference.layers[0].scores[0].tolist() == pytest.approx([0.25] * 4)


def test_snapkv_pools_over_neighbours_before_the_window() -> None:
    # Six tokens, the last two observe: sums 1/5 + 1/6 for tokens 0 .. 3. Pooled over three, the ends see fewer.
    layer = uniform_attention(make_policy("snapkv", window=2, kernel=3), [6], budget=5)
    one = 1 / 5 + 1 / 6
    scores = layer.reference.layers[0].scores[0].tolist()
    assert scores[:4] == pytest.approx([2 * one / 3, one, one, 2 * one / 3])
    assert scores[4:] == [math.inf, math.inf]


def test_attention_is_averaged_over_the_query_heads_of_a_kv_head() -> None:
    """One query head stares at token 0, the other at token 1; the KV head's average is even."""
    keys = torch.tensor([[[10.0, 0.0], [0.0, 10.0], [0.0, 0.0]]])
    queries = torch.tensor([[[0.0, 0.0]] * 2 + [[10.0, 0.0]], [[0.0, 0.0]] * 2 + [[0.0, 10.0]]])
    layer = EagerLayer(make_policy("tova"), budget=2, block=3)
    layer.step(Rows(queries, keys, keys))
    assert layer.reference.layers[0].scores[0].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-6)


def view_of(positions: list[int], state: list[float] | None = None, heads: int = 1) -> SlotView:
    rows = torch.tensor([positions]).expand(heads, -1)
    numbers = None if state is None else torch.tensor([state])
    keys, newest = torch.zeros(heads, len(positions), 2), torch.tensor([max(positions)])
    return SlotView(keys, rows, torch.ones(len(positions)), newest, torch.arange(len(keys)), numbers)


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
        ("keydiff", {"pinned": 1.5}, "pinned must be a whole number of at least 0, got 1.5"),
        (
            "keydiff",
            {"anchor": "middle"},
            "anchor must be one of mean, normalized, median, pairwise, ema, got 'middle'",
        ),
        ("keydiff", {"metric": "taxicab"}, "metric must be one of cosine, dot, euclidean"),
        ("keydiff", {"anchor": "ema", "metric": "euclidean"}, "choose metric cosine or dot"),
        ("keydiff", {"ema_alpha": 0.0}, "ema_alpha must be above 0"),
        ("snapkv", {"kernel": 4}, "kernel must be odd"),
        ("snapkv", {"window": 0}, "window must be a whole number of at least 1"),
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


def test_pinned_and_recent_tokens_must_fit_the_budget() -> None:
    make_policy("keydiff", pinned=6, recent=0.4).check_budget(10)
    with pytest.raises(ValueError, match="7 pinned and 4 recent tokens do not fit a budget of 10"):
        make_policy("keydiff", pinned=7, recent=0.4).check_budget(10)


def test_a_policy_and_its_options_on_one_line() -> None:
    assert parse_policy("sink") == {"name": "sink"}
    assert parse_policy("keydiff:anchor=ema, recent=0.2,pinned=4") == {
        "name": "keydiff", "anchor": "ema", "recent": 0.2, "pinned": 4,
    }  # fmt: skip
    with pytest.raises(UserError, match="'ema' is not key=value"):
        parse_policy("keydiff:ema")


def test_what_a_policy_does_not_ask_for_it_does_not_carry() -> None:
    needs = {name: policy().needs() for name, policy in POLICIES.items()}
    assert needs == {
        "keydiff": "a number a slot, the sum of the held keys",
        "sink": "nothing",
        "tova": "attention of the last 1",
        "h2o": "a number a slot, attention of every query",
        "snapkv": "attention of the last 32",
        "knorm": "a number a slot",
        "random": "nothing",
        "full": "nothing",
    }
    assert make_policy("keydiff", anchor="ema").needs() == "a number a slot, a moving sum of keys"
    assert make_policy("keydiff", metric="dot").needs() == "the sum of the held keys"


@pytest.fixture
def foreign_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that adds two policies, one of which cannot be imported."""
    (tmp_path / "shelf.py").write_text(
        "from keydiff_export.policies import Policy\n\n\n"
        "class Shelf(Policy):\n    name = 'shelf'\n\n"
        "    def score(self, view):\n        return -view.positions.float()\n",
        encoding="utf-8",
    )
    info = tmp_path / "shelf-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[keydiff_export.policies]\nshelf = shelf:Shelf\nlost = shelf:Lost\nrenamed = shelf:Shelf\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("foreign_package")
def test_another_package_can_add_a_policy() -> None:
    assert {"shelf", "lost", *POLICIES} <= set(policy_names())
    scores = make_policy("shelf").score(view_of([3, 1, 2]))
    assert scores.tolist() == [[-3.0, -1.0, -2.0]]
    with pytest.raises(UserError, match="policy 'lost' from shelf:Lost does not load"):
        policy_class("lost")
    with pytest.raises(UserError, match="shelf:Shelf is not a Policy of that name"):
        policy_class("renamed")
