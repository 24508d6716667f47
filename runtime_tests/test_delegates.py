"""What eviction costs a backend, and what other delegates of ExecuTorch make of the NPU graph, from real attempts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import keydiff_export
from keydiff_export.cli import main
from keydiff_export.commands.attempts import BACKENDS, Attempt, attempt
from keydiff_export.spec import ExportSpec


def test_delegation_prices_eviction(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ExportSpec(
        str(tiny_folder), 16, 8, {"name": "keydiff", "recent": 0.2}, targets=("executorch-xnnpack", "onnx-cpu")
    )
    keydiff_export.export(spec, tmp_path / "out", validate=False)
    assert main(["inspect", str(tmp_path / "out"), "--delegation", "--json"]) == 0
    targets = json.loads(capsys.readouterr().out)["targets"]
    for target in ("executorch-xnnpack", "onnx-cpu"):
        assert targets[target]["bytes"]["added"] > 0
        for method in ("prefill", "decode"):
            figures = targets[target]["methods"][method]
            assert figures["operators"]["added"] > 0
            for figure in figures.values():
                assert figure["added"] == figure["with"] - figure["without"]
    # Of a step, however many layers it has: one chooses the victims, one adds up what leaves.
    assert targets["executorch-xnnpack"]["methods"]["decode"]["delegates"]["added"] <= 3


@pytest.mark.parametrize("backend", ["coreml", "vulkan"])
def test_the_npu_graph_lowers_for_delegates_that_only_a_device_runs(backend: str) -> None:
    found = attempt(backend)
    assert found.verdict == "lowers here", found
    if backend == "coreml":
        assert found.detail.startswith("1 delegates, 0 operators on the CPU")


def test_the_npu_graph_runs_on_openvino_as_one_delegate() -> None:
    found = attempt("openvino")
    assert found.verdict == "runs here", found
    assert found.detail.startswith("1 delegates, 0 operators on the CPU")


@pytest.mark.parametrize(
    ("backend", "package"),
    [("mediatek", "mtk_converter"), ("arm-ethos-u", "tosa_serializer"), ("arm-vgf", "tosa_serializer")],
)
def test_an_attempt_names_the_package_that_is_missing(backend: str, package: str) -> None:
    assert backend in BACKENDS
    found = attempt(backend)
    if importlib.util.find_spec(package) is None:
        assert found == Attempt(backend, "needs", f"the Python package {package}")
    else:
        assert found.verdict in ("runs here", "lowers here"), found
