"""The NPU graph in eager PyTorch: the same contract as the reference, before any lowering."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import build_model, random_tokens

from keydiff_export.calibration import calibrate, calibration_runs, enough, openings, read_texts
from keydiff_export.errors import UserError
from keydiff_export.models import LoadedModel, load_model
from keydiff_export.npu_parity import npu_gates
from keydiff_export.npu_slots import FusedNorm, HostStep, NpuStep, check_policy, fuse_norms
from keydiff_export.parity import FLOAT_TIE, KeptSlots, run_reference
from keydiff_export.policies import Policy, SlotView, make_policy
from keydiff_export.policies.sink import Sink
from keydiff_export.reference import Reference
from keydiff_export.runtime.base import Snapshot
from keydiff_export.runtime.npu import NpuRunner, TorchEngine

BUDGET, BLOCK = 16, 8
LENGTHS = {
    "blocks, a partial tail, generation, a second prompt": [8] * 6 + [5] + [1] * 20 + [8, 3, 8] + [1] * 5,
    "single tokens into an empty cache": [1] * 40,
    "short blocks while it fills": [3, 2, 1, 4, 3, 1, 1, 8, 2, 1, 7],
}


def npu_runner(loaded: LoadedModel, policy: Policy) -> NpuRunner:
    shape = loaded.cache_shape(BUDGET, BLOCK)
    model = copy.deepcopy(loaded.model)
    hosts = {m: HostStep(model, shape, policy, length) for m, length in (("prefill", BLOCK), ("decode", 1))}
    step = NpuStep(model, shape, policy).eval()
    return NpuRunner(TorchEngine(hosts, {"prefill": step, "decode": step}, shape, policy), shape, len(step.names))


def follows(loaded: LoadedModel, name: str, lengths: list[int], **parameters: object) -> None:
    policy = make_policy(name, **parameters)
    runner, reference = npu_runner(loaded, policy), Reference(loaded.model, policy, BUDGET, BLOCK)
    tokens = random_tokens(sum(lengths), loaded.model.config.vocab_size)
    for length in lengths:
        block = tokens[reference.seen : reference.seen + length]
        found, expected = runner.step(block), reference.step(block).numpy()
        assert np.abs(found - expected).max() < 1e-4, f"after {reference.seen} tokens"
        settle_ties(reference, runner.snapshot().held)
        assert runner.snapshot().held == reference.held(), f"after {reference.seen} tokens"


def settle_ties(reference: Reference, held: list[list[set[int]]]) -> None:
    """Lets the reference follow a choice between equal scores: the same token twice has keys of the same length."""
    for layer, heads in enumerate(reference.held()):
        for head, ours in enumerate(heads):
            lost, gained = ours - held[layer][head], held[layer][head] - ours
            if lost and reference.score_gap(layer, head, lost, gained) < FLOAT_TIE:
                reference.follow(layer, head, held[layer][head])


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize(
    ("policy", "parameters"),
    [
        ("keydiff", {}),
        ("keydiff", {"recent": 0.4}),
        ("keydiff", {"recent": 0.2, "pinned": 3}),
        ("knorm", {"recent": 0.2}),
        ("sink", {}),
        ("sink", {"sinks": 2, "recent": 0.2, "pinned": 5}),
    ],
)
def test_the_npu_graph_equals_the_reference(
    tiny: LoadedModel, policy: str, parameters: dict[str, object], case: str
) -> None:
    follows(tiny, policy, LENGTHS[case], **parameters)


def test_an_artifact_that_holds_none_of_our_tokens_is_reported(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("keydiff")
    runner = npu_runner(tiny, policy)
    look = runner.snapshot

    def elsewhere() -> Snapshot:
        found = look()
        slots = [[{p + 1000: slot for p, slot in head.items()} for head in layer] for layer in found.slots]
        return Snapshot([[set(head) for head in layer] for layer in slots], found.keys, found.values, slots)

    monkeypatch.setattr(runner, "snapshot", elsewhere)
    reference = Reference(tiny.model, policy, BUDGET, BLOCK)
    _, _, kept = run_reference(reference, random_tokens(32, 260), 0, runner, lambda tokens: None)
    report = kept.to_dict()
    assert (report["mean_jaccard"], report["sets_equal"]) == (0, 0)
    assert {d["score_gap"] for d in report["disagreements"]} == {1e30}


@pytest.mark.parametrize(("jaccard", "floor", "passed"), [(0.95, None, True), (0.5, None, False), (0.5, 0.4, True)])
def test_kept_sets_have_a_floor_without_a_card(jaccard: float, floor: float | None, passed: bool) -> None:
    against = {"token_agreement": 0.0, "sqnr_db": -2.5}
    gates = npu_gates("16a8w", against, KeptSlots(compared=4, jaccard=4 * jaccard), {"jaccard_floor": floor})
    assert [gate["passed"] for gate in gates] == [True, passed, True]


def test_without_eviction_a_token_stays_where_its_position_is(tiny: LoadedModel) -> None:
    follows(tiny, "full", [5, 1, 1, 6, 1, 2])


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "granite", "mistral", "phi3", "olmo2", "smollm3"])
def test_every_architecture(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    extra = {"qwen2": {"use_sliding_window": False}, "mistral": {"sliding_window": None}}.get(architecture, {})
    loaded = load_model(str(build_model(tmp_path_factory.mktemp("npu") / architecture, architecture, **extra)))
    follows(loaded, "keydiff", [8, 8, 8, 3, 1, 1, 1], recent=0.2)


def test_reset_starts_over(tiny: LoadedModel) -> None:
    runner = npu_runner(tiny, make_policy("keydiff"))
    tokens = random_tokens(60, tiny.model.config.vocab_size)
    first = [runner.step(tokens[i : i + 8]) for i in range(0, 32, 8)]
    runner.reset()
    for i, expected in zip(range(0, 32, 8), first, strict=True):
        np.testing.assert_array_equal(runner.step(tokens[i : i + 8]), expected)


def test_padding_reaches_nothing(tiny: LoadedModel) -> None:
    """A block's unused rows may hold any token: neither logits nor caches change."""
    runners = [npu_runner(tiny, make_policy("keydiff")) for _ in range(2)]
    tokens = random_tokens(29, tiny.model.config.vocab_size)
    for padding, runner in enumerate(runners):
        for first in (0, 8, 16):
            runner.step(tokens[first : first + 8])
        block = np.full((1, BLOCK), 7 + 50 * padding)
        block[0, :5] = tokens[24:29]
        runner.logits = runner._step("prefill", block, 5)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(runners[0].logits, runners[1].logits)  # type: ignore[attr-defined]
    for ours, theirs in zip(runners[0].state, runners[1].state, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_fused_norms_equal_the_models_own(tiny: LoadedModel) -> None:
    model = copy.deepcopy(tiny.model)
    original = model.model.layers[0].input_layernorm
    x = torch.randn(1, 3, 64) * 1000
    expected = original(x)
    fuse_norms(model)
    fused = model.model.layers[0].input_layernorm
    assert isinstance(fused, FusedNorm)
    torch.testing.assert_close(fused(x), expected)


class HalfSink(Sink):
    """Scores rounded as an NPU rounds them."""

    def score(self, view: SlotView) -> torch.Tensor:
        return super().score(view).to(torch.float16).to(torch.float32)


def test_sinks_are_ordered_in_16_bits_beyond_their_whole_numbers(tiny: LoadedModel) -> None:
    """float16 tells 2,047 and 2,048 apart, but not 2,048 and 2,049."""
    runner = npu_runner(tiny, HalfSink())
    runner.seen = 2030
    for positions in runner.state[2 :: runner.state_size]:
        positions[:] = torch.tensor([*range(4), *range(runner.seen - 12, runner.seen)])
    tokens = random_tokens(100, tiny.model.config.vocab_size)
    for length in [8] * 3 + [5] + [1] * 5 + [8] * 2:
        runner.step(tokens[:length])
        expected = {*range(4), *range(runner.seen - BUDGET + 4, runner.seen)}
        assert runner.snapshot().held == [[expected] * 2] * 2, f"after {runner.seen} tokens"


def refused(reason: str, name: str, quantised: bool = False, block: int = BLOCK, **parameters: object) -> None:
    with pytest.raises(UserError, match=reason):
        check_policy(make_policy(name, **parameters), BUDGET, block, quantised)


def test_policies_that_16_bits_cannot_order_are_refused() -> None:
    for name in ("random", "tova", "h2o", "snapkv"):
        refused(f"policy {name} cannot be ordered by an NPU's 16-bit scores .*: choose full, keydiff, knorm", name)
    for name in ("knorm", "sink"):
        check_policy(make_policy(name), BUDGET, BLOCK, quantised=False)
        refused("choose full, keydiff, or a CPU", name, quantised=True)
    refused("anchor=mean and metric=cosine, not anchor=median and metric=cosine", "keydiff", anchor="median")
    refused("not anchor=mean and metric=dot", "keydiff", metric="dot")
    refused("at most 13 sinks and 1984 slots .*, got 14 and 24", "sink", sinks=14, recent=0.2)
    refused("at most 16 sinks and 1984 slots .*, got 4 and 2000", "sink", block=1984)


def test_calibration_meets_every_kind_of_cache() -> None:
    tokens = list(range(enough(BUDGET, BLOCK)))
    runs = calibration_runs(tokens, BUDGET, BLOCK)
    assert runs == calibration_runs(tokens, BUDGET, BLOCK)
    held = {"empty": set(), "filling": set(), "full": set()}  # type: ignore[var-annotated]
    for run in runs:
        seen = 0
        for step in run:
            cache = "empty" if seen == 0 else "filling" if seen < BUDGET else "full"
            held[cache].add("decode" if len(step) == 1 else "partial" if len(step) < BLOCK else "block")
            seen += len(step)
    assert held["empty"] == {"decode", "partial", "block"}
    assert held["filling"] >= {"decode", "block"}
    assert held["full"] == {"decode", "partial", "block"}
    read = [token for step in runs[-1] for token in step]
    assert sorted(read) == tokens


def test_calibration_opens_caches_with_many_first_tokens(tiny: LoadedModel) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(900))
    first = openings(tiny.tokenizer, text, BLOCK)
    begin, user = tiny.tokenizer("i")["input_ids"][0], tiny.tokenizer.convert_tokens_to_ids("<user>")
    assert [(len(piece), piece[0]) for piece in first] == [(BLOCK, begin), (BLOCK, user)]
    runs = calibration_runs(list(range(enough(BUDGET, BLOCK))), BUDGET, BLOCK, first)
    prefill = {run[0][0] for run in runs if len(run[0]) == BLOCK}
    decode = {run[0][0] for run in runs if len(run[0]) == 1}
    assert len(prefill) >= 16
    assert {begin, user} <= prefill <= decode


def test_calibration_text_that_is_too_short_or_unreadable(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    with pytest.raises(UserError, match="has 10 tokens"):
        calibration_runs(list(range(10)), BUDGET, BLOCK)
    with pytest.raises(UserError, match=r"has no \.txt"):
        read_texts(folder)
    (folder / "b.txt").write_text("two")
    (folder / "a.md").write_text("one")
    assert read_texts(folder) == "one\n\ntwo"
    (folder / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_texts(folder)
    with pytest.raises(UserError, match="cannot read calibration text"):
        read_texts(folder / "missing.txt")


def test_calibration_steps_the_runner_from_a_fresh_cache_each_run(tiny: LoadedModel) -> None:
    runner, read = npu_runner(tiny, make_policy("keydiff")), []
    calibrate(runner, [[[5, 6, 7], [8]], [[9], [10]]], read.append)
    assert read == [3, 1, 1, 1]
    assert runner.seen == 2
