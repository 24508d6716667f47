"""Tiny models through both lowerings and both runtimes: parity step by step, quantisation, memory, damaged files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_tokens

import keydiff_export
from keydiff_export.commands.run import open_runner
from keydiff_export.commands.validate import validate_folder
from keydiff_export.errors import UserError
from keydiff_export.inspection import inspect_folder
from keydiff_export.lowering import get_target
from keydiff_export.manifest import OutputFolder
from keydiff_export.models import LoadedModel
from keydiff_export.parity import (
    FLOAT_TIE,
    LOGITS_LIMIT,
    KeptSlots,
    Trace,
    compare_logits,
    fill_gate,
    gates,
    run_reference,
)
from keydiff_export.policies import make_policy
from keydiff_export.quantize import quantize, twin
from keydiff_export.reference import Reference
from keydiff_export.spec import ExportSpec

BUDGET, BLOCK = 16, 8
TARGETS = ("executorch-xnnpack", "onnx-cpu")


def export_tiny(
    model: Path, output: Path, quant: str, targets: tuple[str, ...] = TARGETS, recent: float = 0.2
) -> OutputFolder:
    spec = ExportSpec(
        str(model),
        BUDGET,
        BLOCK,
        {"name": "keydiff", "recent": recent},
        quant=quant,
        targets=targets,
        stock_runner=False,
        name="tiny",
    )
    return keydiff_export.export(spec, output, validate=False)


# Schemes that round activations.
ROUNDED = ("8da4w", "8da4w-head4", "int8")


@pytest.fixture(scope="session")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, OutputFolder]:
    root = tmp_path_factory.mktemp("exported")
    folders = {quant: export_tiny(tiny_folder, root / quant, quant) for quant in ("none", *ROUNDED)}
    folders["int4"] = export_tiny(tiny_folder, root / "int4", "int4", ("onnx-cpu",))
    return folders


CASES = [(quant, target) for quant in ("none", *ROUNDED) for target in TARGETS] + [("int4", "onnx-cpu")]


def twin_reference(loaded: LoadedModel, folder: OutputFolder, artifact: dict[str, Any]) -> Reference:
    model = loaded.model
    if artifact["quant"] != "none":
        activation = get_target(artifact["target"]).activation(artifact["quant"])
        model = twin(quantize(model, artifact["quant"]), activation)
    return Reference(model, folder.policy, BUDGET, BLOCK)


def pick(folder: OutputFolder, target: str) -> dict[str, Any]:
    return next(a for a in folder.artifacts if a["target"] == target)


@pytest.mark.parametrize(("quant", "target"), [case for case in CASES if case[0] in ("none", "int4")])
def test_an_artifact_equals_its_reference(
    tiny: LoadedModel, exported: dict[str, OutputFolder], quant: str, target: str
) -> None:
    """First blocks, a partial tail, generation, a second prompt after generation, generation again."""
    folder = exported[quant]
    artifact = pick(folder, target)
    runner, reference = open_runner(folder, artifact), twin_reference(tiny, folder, artifact)
    tokens = random_tokens(300, tiny.model.config.vocab_size)
    for length in [8] * 6 + [5] + [1] * 20 + [8, 3, 8] + [1] * 5:
        block = tokens[reference.seen : reference.seen + length]
        found, expected = runner.step(block), reference.step(block).numpy()
        assert np.abs(found - expected).max() < 1e-4, f"after {reference.seen} tokens"
        assert runner.snapshot().held == reference.held(), f"after {reference.seen} tokens"


@pytest.mark.parametrize(("quant", "target"), [case for case in CASES if case[0] in ROUNDED])
def test_rounded_activations_stay_near_their_reference(
    tiny: LoadedModel, exported: dict[str, OutputFolder], quant: str, target: str
) -> None:
    """Rounding edges add up through the layers, so this is a coarse check; test_quantize.py has the tight one."""
    folder = exported[quant]
    artifact = pick(folder, target)
    reference, runner = twin_reference(tiny, folder, artifact), open_runner(folder, artifact)
    prompt = random_tokens(150, tiny.model.config.vocab_size)
    ours, theirs, kept = run_reference(reference, prompt, 20, runner, lambda tokens: None)
    assert theirs is not None
    sqnr = compare_logits(ours, theirs)["sqnr_db"]
    assert sqnr is None or sqnr > 25
    assert kept.jaccard / kept.compared > 0.99


LOWERED: list[dict[str, Any]] = [
    {"name": "sink"},
    {"name": "tova"},
    {"name": "h2o", "pinned": 2},
    {"name": "snapkv", "window": 4, "kernel": 3},
    {"name": "knorm"},
    {"name": "random"},
    {"name": "full"},
    {"name": "keydiff", "pinned": 3, "recent": 0.25},
    {"name": "keydiff", "anchor": "normalized"},
    {"name": "keydiff", "anchor": "median", "metric": "euclidean"},
    {"name": "keydiff", "anchor": "pairwise", "metric": "dot"},
    {"name": "keydiff", "anchor": "ema"},
]


@pytest.mark.parametrize("policy", LOWERED, ids=lambda policy: "-".join(str(value) for value in policy.values()))
def test_every_policy_survives_both_lowerings(
    tiny: LoadedModel, tiny_folder: Path, tmp_path: Path, policy: dict[str, Any]
) -> None:
    spec = ExportSpec(str(tiny_folder), BUDGET, BLOCK, policy, targets=TARGETS, stock_runner=False)
    folder = keydiff_export.export(spec, tmp_path / "out", validate=False)
    prompt = random_tokens(11 if policy["name"] == "full" else 77, tiny.model.config.vocab_size)
    for artifact in folder.artifacts:
        reference = Reference(tiny.model, folder.policy, BUDGET, BLOCK)
        ours, theirs, kept = run_reference(reference, prompt, 5, open_runner(folder, artifact), lambda tokens: None)
        assert theirs is not None
        against = compare_logits(ours, theirs)
        checks = gates(True, against, against, kept, None)
        assert all(check["passed"] for check in checks), checks


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_not_moved_before_attention_has_read_them(
    tiny: LoadedModel, tiny_folder: Path, tmp_path: Path, target: str
) -> None:
    """Sink scores need neither keys nor attention: nothing but the graph's own order keeps the moves behind them."""
    spec = ExportSpec(str(tiny_folder), BUDGET, BLOCK, {"name": "sink"}, targets=(target,), stock_runner=False)
    folder = keydiff_export.export(spec, tmp_path / "sink", validate=False)
    runner, reference = open_runner(folder, folder.artifacts[0]), Reference(tiny.model, folder.policy, BUDGET, BLOCK)
    tokens = random_tokens(64, tiny.model.config.vocab_size)
    for first in range(0, 64, 8):
        block = tokens[first : first + 8]
        assert np.abs(runner.step(block) - reference.step(block).numpy()).max() < 1e-4, f"block at {first}"


@pytest.mark.parametrize("target", TARGETS)
def test_reset_starts_over(exported: dict[str, OutputFolder], target: str) -> None:
    folder = exported["none"]
    runner = open_runner(folder, pick(folder, target))
    tokens = random_tokens(60, folder.manifest["model"]["vocab_size"])
    steps = [tokens[0:8], tokens[8:16], tokens[16:24], tokens[24:29], *([t] for t in tokens[29:35])]
    first = [runner.step(step) for step in steps]
    runner.step(tokens[40:48])
    runner.reset()
    for step, expected in zip(steps, first, strict=True):
        np.testing.assert_array_equal(runner.step(step), expected)


@pytest.mark.parametrize("policy", ["keydiff", "tova"])
def test_filling_is_decoding_without_eviction(
    tiny: LoadedModel, tiny_folder: Path, tmp_path: Path, policy: str
) -> None:
    """An answer that was announced to fit is filled in; one that then goes on evicts as if it had always decoded."""
    spec = ExportSpec(str(tiny_folder), BUDGET, BLOCK, {"name": policy}, targets=("onnx-cpu",))
    folder = keydiff_export.export(spec, tmp_path / "out", validate=False)
    runner: Any = open_runner(folder, folder.artifacts[0])
    reference = Reference(tiny.model, folder.policy, BUDGET, BLOCK)
    used: list[str] = []
    run = runner._run
    runner._run = lambda method, **inputs: (used.append(method), run(method, **inputs))[1]
    tokens = random_tokens(40, tiny.model.config.vocab_size)
    runner.expect(BUDGET)
    for step in [tokens[:8], tokens[8:11], *([token] for token in tokens[11:30])]:
        assert np.abs(runner.step(step) - reference.step(step).numpy()).max() < 1e-4
        assert runner.snapshot().held == reference.held()
    assert used == ["prefill"] * 2 + ["fill"] * 5 + ["decode"] * 14
    assert fill_gate(runner, tokens)["passed"]
    assert used[-18:] == ["prefill", *["fill"] * 8, "prefill", *["decode"] * 8]
    runner.reset()
    runner.step(tokens[:1])
    assert used[-1] == "decode", "nothing was announced"


def test_a_fill_that_differs_is_seen(exported: dict[str, OutputFolder]) -> None:
    folder = exported["none"]
    runner: Any = open_runner(folder, pick(folder, "onnx-cpu"))
    assert runner.fills
    tokens, run = random_tokens(BUDGET, 100), runner._run
    runner._run = lambda method, **inputs: run("decode" if method == "fill" else method, **inputs)
    assert fill_gate(runner, tokens)["passed"]
    runner._run = lambda method, **inputs: run(method, **inputs) + np.float32(1e-6 * (method == "fill"))
    check = fill_gate(runner, tokens)
    assert not check["passed"]
    assert check["value"] > 0
    # Logits alike and another cache.
    runner._run, runner.snapshot = run, lambda snapshot=runner.snapshot: replace(snapshot(), keys=np.array(runner.fits))
    assert not fill_gate(runner, tokens)["passed"]


@pytest.mark.parametrize("target", TARGETS)
def test_equal_tokens_at_random_lengths(tiny: LoadedModel, exported: dict[str, OutputFolder], target: str) -> None:
    folder = exported["none"]
    runner, reference = open_runner(folder, pick(folder, target)), twin_reference(tiny, folder, pick(folder, target))
    lengths = np.random.default_rng(3).integers(1, BLOCK + 1, 60).tolist()
    tokens = random_tokens(sum(lengths), tiny.model.config.vocab_size, seed=3)
    for length in lengths:
        block = tokens[reference.seen : reference.seen + length]
        found, expected = runner.step(block), reference.step(block).numpy()
        assert np.abs(found - expected).max() < 1e-4
        assert runner.snapshot().held == reference.held()


def test_validate_passes_and_its_report_has_the_published_shape(
    tiny: LoadedModel, exported: dict[str, OutputFolder]
) -> None:
    import jsonschema

    from keydiff_export.manifest import load_schema

    report = validate_folder(exported["none"], tiny, prompt_tokens=100, greedy_tokens=10)
    jsonschema.validate(json.loads(json.dumps(report)), load_schema("parity"))
    for artifact in report["artifacts"]:
        assert artifact["passed"], artifact["gates"]
        kept = artifact["kept_slots"]
        assert kept["sets_equal"] == kept["sets_compared"] == 4 * (13 + 10)
        assert kept["by_layer_and_head"] == [[1.0, 1.0], [1.0, 1.0]]
        assert kept["by_step"] == [1.0] * 23


def test_parity_fails_an_artifact_that_keeps_other_tokens(tiny: LoadedModel, tiny_folder: Path, tmp_path: Path) -> None:
    """An artifact that keeps twice the recent window must not pass as the one without."""
    folder = export_tiny(tiny_folder, tmp_path / "wrong", "none", ("onnx-cpu",), recent=0.8)
    runner = open_runner(folder, folder.artifacts[0])
    reference = Reference(tiny.model, make_policy("keydiff"), BUDGET, BLOCK)
    prompt = random_tokens(64, tiny.model.config.vocab_size)
    ours, theirs, kept = run_reference(reference, prompt, 4, runner, lambda tokens: None)
    assert theirs is not None
    against = compare_logits(ours, theirs)
    checks = {check["name"]: check["passed"] for check in gates(True, against, against, kept, None)}
    assert not checks["kept sets equal, ties apart (largest score gap)"]
    assert max(d["score_gap"] for d in kept.disagreements) > FLOAT_TIE
    assert {"only_reference", "only_artifact", "layer", "head", "step"} <= kept.disagreements[0].keys()


def test_gates_reject_logits_off_by_more_than_the_limit() -> None:
    logits = np.zeros((2, 4), np.float32)
    logits[:, 1] = 1
    expected, found = Trace(logits, [1, 1]), Trace(logits + np.float32([0, 0, 0, 2 * LOGITS_LIMIT]), [1, 1])
    against = compare_logits(expected, found)
    assert against["logits_max_abs"] == pytest.approx(2 * LOGITS_LIMIT, rel=1e-3)
    failed = [check["name"] for check in gates(True, against, against, KeptSlots(), None) if not check["passed"]]
    assert failed == ["logits max abs"]


def test_gates_hold_a_quantised_artifact_to_the_cards_floor() -> None:
    good = {"logits_max_abs": 0.1, "kl": 0.0, "sqnr_db": 30.0, "token_agreement": 1.0}
    kept = KeptSlots(compared=1, jaccard=1.0)
    assert all(check["passed"] for check in gates(False, good, {**good, "sqnr_db": 7.0}, kept, 6.0))
    assert not all(check["passed"] for check in gates(False, good, {**good, "sqnr_db": 5.0}, kept, 6.0))


def test_inspect_proves_constant_memory_from_the_programs(exported: dict[str, OutputFolder]) -> None:
    report = inspect_folder(exported["8da4w"])
    for artifact in report["artifacts"]:
        assert artifact["slots"] == [BUDGET + BLOCK]
        assert artifact["dynamic_tensors"] == artifact["unbounded_tensors"] == 0
        assert artifact["constant_memory"]
    program = report["artifacts"][0]["methods"]
    assert program["decode"]["inputs"] == [[1, 1], [1]]
    assert program["prefill"]["inputs"] == [[1, BLOCK], [1], [1]]
    outside = program["decode"]["kernels_outside_delegates"]
    # Keys and values of two layers; positions and the number a slot of all layers at once.
    assert outside["llama::update_cache_with_indices.out"] == 2 * 2 + 2
    products = ("linear", "addmm", "aten::mm", "bmm", "softmax")
    assert not any(product in name for name in outside for product in products)


def test_delegates_are_few(exported: dict[str, OutputFolder]) -> None:
    """Nothing is written between the layers of a decode step, so its delegates are as many as `_runs` makes of it.

    Beside them the position's angles, the choice of the victim and the key that leaves. A prefill step writes to a
    cache before every attention, which ends a delegate each time.
    """
    methods = inspect_folder(exported["none"])["artifacts"][0]["methods"]
    layers = 2
    assert methods["decode"]["delegates"]["XnnpackBackend"] <= layers + 4
    assert methods["prefill"]["delegates"]["XnnpackBackend"] <= layers + 4


def test_onnx_methods_share_one_weight_file(tiny: LoadedModel, exported: dict[str, OutputFolder]) -> None:
    folder = exported["none"]
    files = {f["path"]: f["bytes"] for f in pick(folder, "onnx-cpu")["files"]}
    methods = ("prefill", "decode", "fill")
    assert set(files) == {*(f"onnx-cpu/{method}.onnx" for method in methods), "onnx-cpu/weights.data"}
    weights = sum(p.numel() * 4 for p in tiny.model.parameters())
    assert files["onnx-cpu/weights.data"] < 1.6 * weights


def test_caches_are_written_in_place(exported: dict[str, OutputFolder]) -> None:
    """ONNX Runtime leaves the state in the buffers that were bound; no step moves it."""
    folder = exported["none"]
    runner: Any = open_runner(folder, pick(folder, "onnx-cpu"))
    places = {name: value.data_ptr() for name, value in runner._state.items()}
    runner.step(random_tokens(8, 100))
    runner.step([5])
    assert {name: value.data_ptr() for name, value in runner._state.items()} == places
    assert np.abs(runner._state["keys_0"].numpy()[0, :, :9]).sum() > 0


@pytest.mark.parametrize(("target", "file"), [("executorch-xnnpack", "model.pte"), ("onnx-cpu", "decode.onnx")])
def test_a_truncated_artifact_is_refused(
    exported: dict[str, OutputFolder], tmp_path: Path, target: str, file: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported["none"].path, copy)
    artifact = copy / target / file
    artifact.write_bytes(artifact.read_bytes()[: artifact.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{file} does not match its checksum"):
        keydiff_export.load(copy)


def test_a_garbled_onnx_file_is_one_line(exported: dict[str, OutputFolder], tmp_path: Path) -> None:
    folder = exported["none"]
    copy = tmp_path / "copy"
    shutil.copytree(folder.path, copy)
    (copy / "onnx-cpu" / "prefill.onnx").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"prefill\.onnx is not a model that ONNX Runtime can load"):
        open_runner(OutputFolder(copy, folder.manifest), pick(folder, "onnx-cpu"))


def test_a_quantised_model_rounds_as_its_kernel_does(tiny: LoadedModel) -> None:
    """torchao's own emulation of 8da4w and our twin are the same function."""
    model = quantize(tiny.model, "8da4w")
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    theirs = model.model.layers[0].self_attn.q_proj
    ours = twin(model, "int8_per_token").model.layers[0].self_attn.q_proj
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
