"""What is left out while tracing is missed by nobody: artifacts with and without it are the same files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from keydiff_export.lowering import Phases, executorch_xnnpack, get_target, onnx_cpu
from keydiff_export.models import LoadedModel
from keydiff_export.policies import make_policy
from keydiff_export.quantize import quantize


@pytest.mark.parametrize("module", [executorch_xnnpack, onnx_cpu], ids=["executorch-xnnpack", "onnx-cpu"])
def test_artifacts_are_the_same_files(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, request: pytest.FixtureRequest
) -> None:
    target = get_target(request.node.callspec.id)
    model, shape = quantize(tiny.model, "8da4w"), tiny.cache_shape(16, 8)
    entered: list[bool] = []

    @contextlib.contextmanager
    def slow() -> Iterator[None]:
        entered.append(True)
        yield

    def files(name: str) -> dict[str, bytes]:
        folder = tmp_path / name
        folder.mkdir()
        target.lower(model, "8da4w", shape, make_policy("keydiff"), folder, Phases(lambda phase, seconds: None))
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    fast = files("fast")
    monkeypatch.setattr(module, "fast_tracing", slow)
    assert files("slow") == fast
    assert entered
