"""The static graph in plain PyTorch against the reference: every branch of the slot cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_tokens

from keydiff_export.graph import StaticGraph
from keydiff_export.lowering.executorch_ops import ExecuTorchOps
from keydiff_export.lowering.onnx_ops import OnnxOps
from keydiff_export.models import LoadedModel
from keydiff_export.policies import make_policy
from keydiff_export.policies.keydiff import ANCHORS, METRICS
from keydiff_export.reference import Reference
from keydiff_export.runtime.base import Logits, Runner, Snapshot, make_snapshot, padded
from keydiff_export.slot_ops import TorchOps, leaving_order
from keydiff_export.slots import new_slots


class GraphRunner(Runner):
    """Steps a static graph eagerly; `padding` fills the unused end of a block."""

    def __init__(
        self, loaded: LoadedModel, policy: str, recent: float, budget: int, block: int, **parameters: object
    ) -> None:
        super().__init__(budget, block)
        chosen = make_policy(policy, recent=recent, **parameters)
        self.graph = StaticGraph(loaded.model, loaded.cache_shape(budget, block), chosen, TorchOps())
        self.slots = new_slots(self.graph.shape, self.graph.policy, self.graph.ops)
        self.padding = 0

    def _prefill(self, tokens: list[int]) -> Logits:
        row = torch.from_numpy(padded(tokens, self.block))
        row[0, len(tokens) :] = self.padding
        with torch.no_grad():
            logits = self.graph.prefill(row, torch.tensor([self.seen]), torch.tensor([len(tokens)]), self.slots)
        return logits[0].numpy()

    def _decode(self, token: int) -> Logits:
        with torch.no_grad():
            return self.graph.decode(torch.tensor([[token]]), torch.tensor([self.seen]), self.slots)[0].numpy()

    def snapshot(self) -> Snapshot:
        parts = self.slots.layered()
        layers = [{name: part[i].numpy() for name, part in parts.items()} for i in range(len(self.slots.keys))]
        return make_snapshot(self.slots.positions.numpy(), layers, self.held)


class ForwardRunner(GraphRunner):
    """Steps the one method `forward`, which takes blocks, tails and single tokens without padding."""

    def _prefill(self, tokens: list[int]) -> Logits:
        with torch.no_grad():
            return self.graph.forward(torch.tensor([tokens]), torch.tensor([self.seen]), self.slots)[0].numpy()

    def _decode(self, token: int) -> Logits:
        return self._prefill([token])


def compare(runner: Runner, reference: Reference, tokens: list[int], steps: list[int]) -> None:
    """Same tokens through both, step by step: logits and held sets."""
    for length in steps:
        block = tokens[reference.seen : reference.seen + length]
        found, expected = runner.step(block), reference.step(block)
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-5, rtol=1e-4)
        assert runner.snapshot().held == reference.held(), f"after {reference.seen} tokens"


def mixed_steps(block: int) -> list[int]:
    """First block, partial tail, long run, generation, a second prompt in the middle of it, generation again."""
    tail = max(1, block - 2)
    return [block] * 5 + [tail] + [1] * 30 + [block, tail, block] + [1] * 5


@pytest.mark.parametrize(("budget", "block"), [(16, 4), (7, 5), (5, 5), (1, 1), (20, 1), (64, 8)])
@pytest.mark.parametrize("policy", ["keydiff", "knorm", "snapkv", "full"])
def test_forward_equals_the_reference(tiny: LoadedModel, budget: int, block: int, policy: str) -> None:
    steps = mixed_steps(block)
    budget = sum(steps) if policy == "full" else budget
    runner = ForwardRunner(tiny, policy, 0.2 if policy != "full" else 0.0, budget, block)
    reference = Reference(tiny.model, runner.graph.policy, budget, block)
    compare(runner, reference, random_tokens(sum(steps), tiny.model.config.vocab_size), steps)


@pytest.mark.parametrize("recent", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("budget", "block"), [(16, 4), (7, 5), (5, 5), (1, 1), (20, 1), (64, 8)])
def test_the_static_graph_equals_the_reference(tiny: LoadedModel, budget: int, block: int, recent: float) -> None:
    runner = GraphRunner(tiny, "keydiff", recent, budget, block)
    reference = Reference(tiny.model, make_policy("keydiff", recent=recent), budget, block)
    compare(runner, reference, random_tokens(400, tiny.model.config.vocab_size), mixed_steps(block))


VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("sink", {}),
    ("tova", {}),
    ("h2o", {}),
    ("snapkv", {"window": 3, "kernel": 3}),
    ("snapkv", {}),
    ("knorm", {}),
    ("random", {}),
    ("keydiff", {"pinned": 3}),
    ("h2o", {"pinned": 2}),
    *(
        ("keydiff", {"anchor": anchor, "metric": metric})
        for anchor in ANCHORS
        for metric in METRICS
        if (anchor, metric) not in (("mean", "cosine"), ("ema", "euclidean"))
    ),
]


@pytest.mark.parametrize(("policy", "parameters"), VARIANTS, ids=lambda value: str(value))
@pytest.mark.parametrize("recent", [0.0, 0.3])
def test_every_policy_runs_in_the_static_graph(
    tiny: LoadedModel, policy: str, parameters: dict[str, object], recent: float
) -> None:
    runner = GraphRunner(tiny, policy, recent, 12, 5, **parameters)
    reference = Reference(tiny.model, make_policy(policy, recent=recent, **parameters), 12, 5)
    compare(runner, reference, random_tokens(400, tiny.model.config.vocab_size), mixed_steps(5))


@pytest.mark.parametrize("prompt", [7, 8, 9, 16, 17])
def test_every_way_of_filling_the_budget(tiny: LoadedModel, prompt: int) -> None:
    """Prompts that end below, at and past the budget of 8, then generation across the edge."""
    runner = GraphRunner(tiny, "keydiff", 0.0, 8, 4)
    reference = Reference(tiny.model, make_policy("keydiff"), 8, 4)
    blocks = [4] * (prompt // 4) + ([prompt % 4] if prompt % 4 else [])
    compare(runner, reference, random_tokens(60, tiny.model.config.vocab_size), blocks + [1] * 12)


def test_padding_is_invisible(tiny: LoadedModel) -> None:
    tokens = random_tokens(50, tiny.model.config.vocab_size)
    first, second = (GraphRunner(tiny, "keydiff", 0.3, 8, 6) for _ in range(2))
    second.padding = 77
    for begin, length in ((0, 6), (6, 2), (8, 6), (14, 3), (17, 5), (22, 1)):
        assert (first.step(tokens[begin : begin + length]) == second.step(tokens[begin : begin + length])).all()
    assert first.snapshot().held == second.snapshot().held


@pytest.mark.parametrize("policy", [{"name": "keydiff"}, {"name": "keydiff", "anchor": "ema"}, {"name": "h2o"}])
def test_reset_forgets_what_is_left_in_the_slots(tiny: LoadedModel, policy: dict[str, Any]) -> None:
    tokens = random_tokens(80, tiny.model.config.vocab_size)
    options = dict(policy)
    name = options.pop("name")
    fresh, used = (GraphRunner(tiny, name, 0.0, 8, 4, **options) for _ in range(2))
    for begin in range(40, 60, 4):
        used.step(tokens[begin : begin + 4])
    for token in tokens[60:75]:
        used.step([token])
    used.reset()
    for step in [tokens[0:4], tokens[4:8], tokens[8:11], *([t] for t in tokens[11:30])]:
        assert (fresh.step(step) == used.step(step)).all()


def test_the_full_policy_never_evicts(tiny: LoadedModel) -> None:
    runner = GraphRunner(tiny, "full", 0.0, 32, 8)
    reference = Reference(tiny.model, make_policy("full"), 32, 8)
    compare(runner, reference, random_tokens(40, tiny.model.config.vocab_size), [8, 8, 5, *[1] * 9])


def key_of(leaving: list[float], positions: list[int]) -> torch.Tensor:
    return leaving_order(torch.tensor([leaving]), torch.tensor([positions]))[0]


@pytest.mark.parametrize("score", [0.0, -0.0, 0.7, -0.7, 1e-30, -1e-30, 1.5e7])
def test_of_equal_scores_the_newer_leaves_first(score: float) -> None:
    positions = [7, 2_000_000, 3, 2_000_001]
    assert key_of([score] * 4, positions).argsort(descending=True).tolist() == [3, 1, 0, 2]
    for ops in (TorchOps(), OnnxOps(), ExecuTorchOps()):
        assert ops.last_of_largest(torch.full((1, 4), score), torch.tensor([positions])).tolist() == [3]


@pytest.mark.parametrize("ops", [TorchOps(), OnnxOps(), ExecuTorchOps()], ids=lambda ops: type(ops).__name__)
def test_the_first_token_can_leave(ops: Any) -> None:
    """Position 0, which a product with the position would not tell from a token that stays."""
    scores, positions = torch.tensor([[0.9, 0.2, 0.4], [0.9, 0.2, 0.9]]), torch.tensor([[0.0, 5.0, 2.0]] * 2)
    assert ops.last_of_largest(scores, positions).tolist() == [0, 2]


def test_the_tie_break_never_reorders_different_scores() -> None:
    for score in (0.5, -0.5, 1e-20, -3e-12):
        above = torch.nextafter(torch.tensor(score), torch.tensor(1.0)).item()
        key = key_of([above, score], [0, 60_000_000])
        assert key[0] > key[1], "the lower score leaves first, however old"


def test_a_step_takes_one_to_block_tokens(tiny: LoadedModel) -> None:
    runner = GraphRunner(tiny, "keydiff", 0.0, 8, 4)
    for count in (0, 5):
        with pytest.raises(ValueError, match="a step takes 1 to 4 tokens"):
            runner.step([5] * count)
