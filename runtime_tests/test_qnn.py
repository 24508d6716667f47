"""Tiny models on Qualcomm's HTP emulator by both roads: one delegate a method, parity, crashes, calibration."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import NPU_TARGETS as TARGETS
from conftest import export_npu, random_tokens
from torch import Tensor

import keydiff_export
from keydiff_export.cli import main
from keydiff_export.commands.run import open_runner
from keydiff_export.commands.validate import validate_folder
from keydiff_export.errors import UserError
from keydiff_export.inspection import inspect_folder
from keydiff_export.isolated import run_isolated
from keydiff_export.lowering.base import Phases
from keydiff_export.lowering.executorch_qnn import HEADROOM, _ranges, _widen
from keydiff_export.lowering.qnn import QnnJob, _progress, describe, refuse_breaks, split
from keydiff_export.manifest import OutputFolder
from keydiff_export.models import LoadedModel, load_model
from keydiff_export.npu_parity import npu_gates
from keydiff_export.parity import KeptSlots, compare_logits, run_reference
from keydiff_export.policies import SlotView
from keydiff_export.policies.keydiff import KeyDiff
from keydiff_export.qnn_sdk import SOCS, find_sdk, soc
from keydiff_export.reference import Reference
from keydiff_export.spec import ExportSpec, load_card
from keydiff_export.text import long_text

BUDGET, BLOCK = 16, 8
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
CARDS = sorted((ROOT / "graphs").glob("*-npu*"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text that parity does not read, enough for a cache of 512 + 128."""
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(long_text()[2000:4400], encoding="utf-8")
    return file


# Every kind of step: while the cache fills, blocks, a partial one, generation, a second prompt.
LENGTHS = [3, 1, 2, 1] + [8] * 5 + [5] + [1] * 12 + [8, 3] + [1] * 3


def sqnr_to_reference(tiny: LoadedModel, folder: OutputFolder, lengths: list[int]) -> float:
    """Steps an artifact and the reference; kept sets must be equal but for near ties. Returns SQNR in dB."""
    runner = open_runner(folder, folder.artifacts[0])
    reference = Reference(tiny.model, folder.policy, BUDGET, BLOCK)
    tokens = random_tokens(sum(lengths), tiny.model.config.vocab_size)
    noise = signal = 0.0
    for length in lengths:
        block = tokens[reference.seen : reference.seen + length]
        found, expected = runner.step(block), reference.step(block).numpy()
        noise, signal = noise + float(((found - expected) ** 2).sum()), signal + float((expected**2).sum())
        for layer, heads in enumerate(runner.snapshot().held):
            for head, theirs in enumerate(heads):
                ours = reference.held()[layer][head]
                if ours != theirs:
                    assert reference.score_gap(layer, head, ours - theirs, theirs - ours) < 2e-3
                    reference.follow(layer, head, theirs)
    runner.close()
    return float(10 * np.log10(signal / noise))


@pytest.mark.parametrize("target", TARGETS)
def test_float16_equals_the_reference_on_the_emulator(
    tiny: LoadedModel, npu_fp16: dict[str, OutputFolder], target: str
) -> None:
    assert sqnr_to_reference(tiny, npu_fp16[target], LENGTHS) > 40


@pytest.mark.parametrize(
    ("target", "policy"),
    [
        ("executorch-qnn", {"name": "sink", "sinks": 2, "recent": 0.2, "pinned": 3}),
        ("onnx-qnn", {"name": "knorm", "recent": 0.2, "pinned": 3}),
    ],
)
def test_other_policies_and_another_chip(
    tiny: LoadedModel, tiny_folder: Path, tmp_path: Path, target: str, policy: dict[str, Any]
) -> None:
    folder = export_npu(tiny_folder, tmp_path / "out", target, "fp16", policy, soc="SM8850")
    assert sqnr_to_reference(tiny, folder, LENGTHS) > 40


@pytest.mark.parametrize("target", TARGETS)
def test_validate_runs_the_artifact(tiny: LoadedModel, npu_fp16: dict[str, OutputFolder], target: str) -> None:
    import jsonschema

    from keydiff_export.manifest import load_schema

    assert npu_fp16[target].artifacts[0]["rotation"] is None
    report = validate_folder(npu_fp16[target], tiny)
    jsonschema.validate(json.loads(json.dumps(report)), load_schema("parity"))
    artifact = report["artifacts"][0]
    assert artifact["passed"], artifact["gates"]
    assert (artifact["prompt_tokens"], artifact["greedy_tokens"]) == (48, 32)
    assert artifact["kept_slots"]["sets_compared"] == 4 * (6 + 32)


def test_both_roads_compute_the_same(npu_fp16: dict[str, OutputFolder]) -> None:
    runners = [open_runner(folder, folder.artifacts[0]) for folder in npu_fp16.values()]
    tokens = random_tokens(40, 260)
    for length in (8, 8, 8, 1, 1):
        first, second = (runner.step(tokens[:length]) for runner in runners)
        np.testing.assert_allclose(first, second, atol=1e-3)
        assert runners[0].snapshot().held == runners[1].snapshot().held
    for runner in runners:
        runner.close()


@pytest.mark.parametrize("target", TARGETS)
def test_one_delegate_a_method(npu_fp16: dict[str, OutputFolder], target: str) -> None:
    methods = inspect_folder(npu_fp16[target])["artifacts"][0]["methods"]
    for method in ("prefill", "decode"):
        assert sum(methods[method]["delegates"].values()) == 1
        assert methods[method]["kernels_outside_delegates"] == {}
        assert methods[f"{method}_inputs"]["delegates"] == {}
        assert "why_outside" not in methods[method]
        assert methods[f"{method}_inputs"]["kernels_outside_delegates"]
        assert methods[f"{method}_inputs"]["why_outside"].startswith("by design")


@pytest.mark.parametrize("target", TARGETS)
def test_a_phone_loads_the_weights_once(npu_fp16: dict[str, OutputFolder], target: str) -> None:
    sizes = {file["path"]: file["bytes"] for file in npu_fp16[target].artifacts[0]["files"]}
    shared = sum(size for path, size in sizes.items() if "/phone/" in path)
    apart = sizes["executorch-qnn/model.pte"] if target == "executorch-qnn" else 2 * 316_000
    assert shared < 0.7 * apart


def test_epcontext_models_are_one_node_for_the_chip(npu_fp16: dict[str, OutputFolder]) -> None:
    import onnx

    for method in ("prefill", "decode"):
        file = npu_fp16["onnx-qnn"].path / "onnx-qnn" / "phone" / f"{method}.onnx"
        nodes = onnx.load(file, load_external_data=False).graph.node
        assert [(node.domain, node.op_type) for node in nodes] == [("com.microsoft", "EPContext")]
        attributes = {a.name: a.s.decode() for a in nodes[0].attribute if a.s}
        assert attributes["ep_cache_context"] == "prefill_qnn.bin"


def test_a_crash_is_a_failed_check_with_its_signal(
    tiny: LoadedModel, npu_fp16: dict[str, OutputFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keydiff_export.runtime.qnn._load", _crash)
    report = validate_folder(npu_fp16["executorch-qnn"], tiny)
    artifact = report["artifacts"][0]
    assert not artifact["passed"]
    assert artifact["gates"][0]["name"] == "runs without a crash (crashed with SIGSEGV)"
    assert artifact["kept_slots"] is None


def _crash(*arguments: object) -> None:
    import ctypes

    ctypes.string_at(0)


@dataclass(frozen=True)
class Breaking(KeyDiff):
    """Scores by way of an operator that no NPU takes."""

    name: ClassVar[str] = "keydiff"

    def score(self, view: SlotView) -> Tensor:
        return torch.erf(super().score(view))


@pytest.mark.parametrize(("target", "operator"), [("executorch-qnn", "aten.erf.default"), ("onnx-qnn", "Erf")])
def test_a_graph_that_breaks_is_refused_by_operator(
    tiny: LoadedModel, tmp_path: Path, target: str, operator: str
) -> None:
    torch.save(tiny.model, tmp_path / "model.pt")
    shape = tiny.cache_shape(BUDGET, BLOCK)
    job = QnnJob(tmp_path / "model.pt", "fp16", shape, Breaking(), soc("SM8650"), False, [], tmp_path)
    with pytest.raises(UserError, match=r"breaks into .* partitions; left on the CPU: ") as refused:
        run_isolated(_lower, target, job, environment=find_sdk().environment())
    assert operator in str(refused.value)


def _lower(target: str, job: QnnJob) -> None:
    from importlib import import_module

    import_module(f"keydiff_export.lowering.{target.replace('-', '_')}").lower_job(job)


def test_the_one_delegate_rule() -> None:
    refuse_breaks("t", 1, {})
    with pytest.raises(UserError, match=r"t: the graph breaks into 2 partitions; left on the CPU: a\.b \(why\)"):
        refuse_breaks("t", 2, {"a.b": "why"})


class Bar:
    """A progress bar that remembers."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total: int, **options: Any) -> None:
        self.total, self.read, self.closed = total, 0, False
        self.made.append(self)

    def update(self, tokens: int) -> None:
        self.read += tokens

    def close(self) -> None:
        self.closed = True


def test_the_calibration_bar_is_there_only_while_tokens_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keydiff_export.lowering.qnn.tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    reported = []

    def report(phase: str, seconds: float) -> None:
        assert all(bar.closed for bar in Bar.made), "a phase is printed into the bar's line"
        reported.append(phase)

    with _progress("t", 5, Phases(report)) as listen:
        listen(("phase", "trace", 1.0))
        assert Bar.made == []
        listen(("tokens", 4))
        listen(("tokens", 1))
        listen(("phase", "calibrate", 1.0))
    assert reported == ["trace", "calibrate"]
    assert [(bar.read, bar.total) for bar in Bar.made] == [(5, 5)]


@pytest.mark.parametrize(("target", "quant", "least"), [("executorch-qnn", "16a8w", 15), ("onnx-qnn", "16a8w", 15)])
def test_quantised_graphs_stay_near_float32(
    tiny: LoadedModel,
    tiny_folder: Path,
    tmp_path: Path,
    text: Path,
    target: str,
    quant: str,
    least: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("keydiff_export.lowering.qnn.tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    # As large as the demo model's cache: of 16-bit scores in a matrix the emulator orders the first row alone, but only
    # where rows are long (`NpuSlotCache._gather_best`); 256 are still right.
    spec = ExportSpec(
        str(tiny_folder), 512, 128, quant=quant, targets=(target,), calibration=str(text), sqnr_floor=least
    )
    folder = keydiff_export.export(spec, tmp_path / "out", validate=False)
    assert folder.artifacts[0]["rotation"] == "hadamard"
    report = validate_folder(folder, tiny)["artifacts"][0]
    assert report["passed"], report["gates"]
    assert report["kept_slots"]["mean_jaccard"] > 0.97
    assert [bar.read for bar in Bar.made] == [bar.total for bar in Bar.made] != []
    ranges = json.loads((folder.path / target / "calibration.json").read_text())["ranges"]
    assert set(ranges) == {"prefill", "decode"}
    assert all(low <= high for method in ranges.values() for low, high in method.values())
    report = inspect_folder(folder)["artifacts"][0]["methods"]
    assert [sum(report[method]["delegates"].values()) for method in ("prefill", "decode")] == [1, 1]


def test_ranges_get_headroom_once() -> None:
    from torchao.quantization.pt2e import MinMaxObserver

    class Observed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.observer = MinMaxObserver()

        def forward(self, x: Tensor) -> Tensor:
            return self.observer(self.observer(x) + 1)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
            return True

    module = Observed()
    graph = torch.fx.GraphModule(module, Tracer().trace(module))
    graph(torch.tensor([-2.0, 5.0]))
    _widen(graph)
    assert dict(_ranges(graph)) == {"x": [-2 * HEADROOM, 6 * HEADROOM], "add": [-2 * HEADROOM, 6 * HEADROOM]}


def test_weights_of_4_bits_are_all_that_16a4w_loses(
    tiny: LoadedModel, tiny_folder: Path, tmp_path: Path, text: Path
) -> None:
    """Beside a float32 model whose linear weights are rounded to 4 bits a row; float32 itself is 5 dB away."""
    folder = export_npu(tiny_folder, tmp_path / "out", "executorch-qnn", "16a4w", calibration=str(text), soc="SM8750")
    assert folder.artifacts[0]["rotation"] == "none: 4-bit weights lose more by it"
    model = copy.deepcopy(tiny.model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 7
            module.weight = torch.nn.Parameter((module.weight.detach() / scale).round() * scale)
    runner, prompt = open_runner(folder, folder.artifacts[0]), tiny.tokenizer(long_text())["input_ids"][:48]
    ours, theirs, kept = run_reference(
        Reference(model, folder.policy, BUDGET, BLOCK), prompt, 32, runner, lambda tokens: None
    )
    runner.close()
    assert theirs is not None
    assert (compare_logits(ours, theirs)["sqnr_db"] or 0) > 25
    assert kept.jaccard / kept.compared > 0.99


@pytest.mark.real_model
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_has_its_locked_signature(card: Path, demo_model: str, tmp_path: Path) -> None:
    """Without lowering, which scripts/test_qnn_long.sh does."""
    from lock_card import signature

    spec = load_card(card)
    loaded = load_model(demo_model)
    torch.save(loaded.model, tmp_path / "model.pt")
    shape = loaded.cache_shape(spec.budget, spec.block)
    job = QnnJob(tmp_path / "model.pt", spec.quant, shape, spec.make_policy(), soc(spec.soc), False, [], tmp_path)
    methods = describe(split(job), loaded.model.config.vocab_size)
    artifacts = [{"target": target, "methods": methods} for target in spec.targets]
    locked = json.loads((card / "signature.json").read_text())
    assert signature({"artifacts": artifacts, "cache": {"layers": shape.layers}}) == locked


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_an_npu_cards_results_are_within_its_floors(card: Path) -> None:
    spec, results = load_card(card), json.loads((card / "results.json").read_text())
    assert set(results["targets"]) == set(spec.targets)
    for entry in results["targets"].values():
        assert (entry["quant"], entry["greedy_tokens"]) == (spec.quant, 32)
        assert entry["prompt_tokens"] > spec.budget + spec.block
        if spec.quant == "fp16":
            assert entry["reference"]["token_agreement"] == 1
            continue
        floors = {
            "sqnr_floor_db": spec.sqnr_floor,
            "jaccard_floor": spec.jaccard_floor,
            "token_floor": spec.token_floor,
        }
        assert None not in floors.values()
        kept = KeptSlots(compared=1, jaccard=entry["kept_slots"]["mean_jaccard"])
        assert all(gate["passed"] for gate in npu_gates(spec.quant, entry["reference"], kept, floors))


def test_doctor_names_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["qnn"]["ready"]
    assert all(target["ready"] for target in report["targets"].values())
    monkeypatch.setattr("keydiff_export.qnn_sdk.package_version", lambda: None)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "pip install 'keydiff-export[qnn]'" in said
    assert "AI Stack licence" in said
    monkeypatch.setattr("keydiff_export.qnn_sdk.package_version", lambda: "2.7.0")
    with pytest.raises(UserError, match=r"onnxruntime-qnn==2\.5\.0, found 2\.7\.0"):
        find_sdk()


def test_an_sdk_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = find_sdk().libraries
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=r"has no lib/x86_64-linux-clang/libQnnHtp\.so"):
        find_sdk()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / host.name).symlink_to(host)
    sdk = find_sdk()
    assert sdk.root == tmp_path
    assert sdk.environment()["LD_LIBRARY_PATH"].startswith(str(tmp_path))


def test_unknown_chips_and_policies_are_refused_before_any_work(tiny_folder: Path, tmp_path: Path) -> None:
    assert set(SOCS) == {"SM8650", "SM8750", "SM8850"}
    with pytest.raises(UserError, match="unknown SoC 'SM1'"):
        export_npu(tiny_folder, tmp_path / "a", "executorch-qnn", "fp16", soc="SM1")
    spec = ExportSpec(str(tiny_folder), BUDGET, BLOCK, {"name": "tova"}, quant="fp16", targets=("onnx-qnn",))
    with pytest.raises(UserError, match="policy tova cannot be ordered"):
        keydiff_export.export(spec, tmp_path / "b", validate=False)
    for option in ({"cache_dtype": "int8"}, {"evict_every": 4}):
        with pytest.raises(UserError, match="takes neither --cache-dtype nor --evict-every"):
            export_npu(tiny_folder, tmp_path / "c", "onnx-qnn", "fp16", **option)
    with pytest.raises(UserError, match="8-bit activations lose the kept set"):
        ExportSpec(str(tiny_folder), BUDGET, BLOCK, quant="8a8w", targets=("executorch-qnn",))
    assert list(tmp_path.iterdir()) == []


def test_the_cli_exports_validates_and_runs(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["export", "--model", str(tiny_folder), "--budget", "16", "--block", "8", "--policy", "sink"]
    assert main([*command, "--quant", "fp16", "--soc", "SM8750", "--target", "onnx-qnn", "-o", str(out)]) == 0
    assert json.loads((out / "manifest.json").read_text())["artifacts"][0]["soc"] == "SM8750"
    capsys.readouterr()
    assert main(["run", str(out), "--prompt", "x" * 60, "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 62
    assert main(["inspect", str(out)]) == 0
    assert "memory constant" in capsys.readouterr().out
