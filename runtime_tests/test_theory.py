"""The paper's claims about anchors and attention, on random vectors (arXiv 2504.15364, section 3)."""

from __future__ import annotations

import math

import pytest
import torch
from one_layer import EagerLayer, Rows
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from keydiff_export.policies import make_policy

SEEDS = range(40)


def draw(seed: int, count: int = 24, width: int = 6, drift: float = 1.0) -> Tensor:
    """[count, width] keys around a common direction, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(width, generator=generator)
    lengths = torch.rand(count, 1, generator=generator) * 3 + 0.3
    return (torch.randn(count, width, generator=generator) + drift * direction) * lengths


def scores(keys: Tensor, **options: object) -> Tensor:
    """Scores [n] of keys [n, d] as the reference computes them."""
    layer = EagerLayer(make_policy("keydiff", **options), budget=1, block=len(keys))
    layer.step(Rows(keys.unsqueeze(0), keys.unsqueeze(0), keys.unsqueeze(0)))
    found = layer.reference.layers[0].scores
    assert found is not None
    return found[0]


def kept(score: Tensor, budget: int = 8) -> set[int]:
    return set(score.topk(budget).indices.tolist())


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_pairwise_is_the_average_over_all_pairs(metric: str) -> None:
    """The S x S matrix, written out: similarity to every key, the key itself included."""
    keys = draw(0)
    similar = {
        "cosine": cosine_similarity(keys.unsqueeze(1), keys.unsqueeze(0), dim=-1),
        "dot": keys @ keys.T,
        "euclidean": -(torch.cdist(keys, keys, compute_mode="donot_use_mm_for_euclid_dist") ** 2),
    }[metric]
    difference = scores(keys, anchor="pairwise", metric=metric) + similar.mean(1)
    # A squared distance is known up to what all keys of a head have in common.
    torch.testing.assert_close(difference, difference.mean().expand(len(keys)), atol=1e-4, rtol=1e-5)
    if metric != "euclidean":
        torch.testing.assert_close(difference, torch.zeros(len(keys)), atol=1e-5, rtol=0)


def test_the_anchor_of_unit_keys_keeps_what_all_pairs_keep() -> None:
    """Eq. 5 to 6: the sum of a key's cosines to all others is its cosine to the mean of unit keys, times a constant."""
    for seed in SEEDS:
        keys = draw(seed)
        assert kept(scores(keys, anchor="pairwise")) == kept(scores(keys, anchor="normalized"))


def test_the_anchor_of_raw_keys_keeps_the_same_where_keys_are_of_one_length() -> None:
    """The paper's own form, the mean of raw keys, under its condition: keys of equal length."""
    for seed in SEEDS:
        keys = normalize(draw(seed), dim=-1) * 2.5
        assert kept(scores(keys)) == kept(scores(keys, anchor="pairwise"))


def test_without_that_condition_the_two_can_differ() -> None:
    differing = [seed for seed in SEEDS if kept(scores(draw(seed))) != kept(scores(draw(seed), anchor="pairwise"))]
    assert differing
    assert len(differing) < len(SEEDS)


def test_much_attention_means_a_large_cosine_to_the_query() -> None:
    """Lemma 3.1: a key that draws the share w of attention among n others has

        q . k >= log(w / (1 - w)) + log n + q . mean(k_i),

    because the mean of exponentials is at least the exponential of the mean. With |k| < M and |q| = 1, divided by M,
    this bounds cos(q, k) from below wherever the right side is positive.
    """
    bound_is_positive = 0
    for seed in SEEDS:
        keys, generator = draw(seed), torch.Generator().manual_seed(seed + 1000)
        query = normalize(torch.randn(keys.shape[1], generator=generator), dim=0)
        special = 3 * query + 0.3 * torch.randn(keys.shape[1], generator=generator)
        others = (keys @ query).double()
        share = torch.cat([others, (special @ query).double().reshape(1)]).softmax(0)[-1]
        lower = math.log(share / (1 - share)) + math.log(len(keys)) + others.mean().item()
        assert special @ query >= lower - 1e-5
        longest = max(keys.norm(dim=1).max().item(), special.norm().item())
        if lower > 0:
            bound_is_positive += 1
            assert cosine_similarity(special, query, dim=0) >= lower / longest - 1e-6
    assert bound_is_positive > len(SEEDS) // 4


def test_a_key_near_the_query_is_far_from_an_anchor_that_is_not() -> None:
    """Theorem 3.2: with a = cos(q, mean key) and b = cos(q, k),

        cos(k, mean key) <= 1 + a b - a^2 / 2 - b^2 / 2.

    So where queries point away from the mean key (a < 0, which models show), a key that draws attention (b > 0) is
    below 1 - (b - a)^2 / 2: KeyDiff gives it a high score.
    """
    slack = []
    for seed in SEEDS:
        keys, generator = draw(seed), torch.Generator().manual_seed(seed + 2000)
        anchor, query = keys.mean(0), torch.randn(keys.shape[1], generator=generator)
        for key in keys:
            a, b = cosine_similarity(query, anchor, dim=0).item(), cosine_similarity(query, key, dim=0).item()
            bound = 1 + a * b - a * a / 2 - b * b / 2
            slack.append(bound - cosine_similarity(key, anchor, dim=0).item())
    assert min(slack) >= -1e-6
    assert min(slack) < 0.05, "the bound is nearly reached, so a smaller one would be false"


def test_the_bound_is_reached_in_the_plane() -> None:
    """Key and mean key mirrored at the query's normal: a = -b, and the bound is 1 - 2 b^2, their cosine exactly."""
    for angle in (0.1, 0.7, 1.2):
        key = torch.tensor([math.sin(angle), math.cos(angle)], dtype=torch.float64)
        anchor = torch.tensor([-math.sin(angle), math.cos(angle)], dtype=torch.float64)
        b = math.sin(angle)
        assert cosine_similarity(key, anchor, dim=0).item() == pytest.approx(1 - 2 * b * b, abs=1e-12)
