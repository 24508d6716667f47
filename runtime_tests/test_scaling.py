"""The fits and the bookkeeping of scripts/scaling.py. Its timings are printed, never tested."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import scaling

from keydiff_export.bench import LayerShape

SLOTS = [384.0, 640.0, 1152.0, 2176.0, 4224.0, 8320.0]


def test_a_line_is_found() -> None:
    line = scaling.fit_line(SLOTS, [0.5 + 2e-4 * s for s in SLOTS])
    assert line["slope"] == pytest.approx(2e-4)
    assert line["constant"] == pytest.approx(0.5)
    assert line["r2"] == pytest.approx(1)
    assert line["curvature"] == pytest.approx(0, abs=1e-9)


def test_quadratic_cost_would_show() -> None:
    line = scaling.fit_line(SLOTS, [0.5 + 1e-7 * s * s for s in SLOTS])
    assert line["curvature"] > 0.9
    assert line["r2"] < 0.97


def test_the_terms_of_a_block_are_told_apart() -> None:
    sizes = [(n, 128) for n in (256, 1024, 8192)] + [(1024, b) for b in (32, 512)]
    features = [[1.0, b, b * (n + b)] for n, b in sizes]
    found = scaling.fit(features, [0.3 + b * (0.01 + 2e-5 * (n + b)) for n, b in sizes])
    assert found["coefficients"] == pytest.approx([0.3, 0.01, 2e-5])
    assert found["r2"] == pytest.approx(1)


def test_the_peak_counts_from_its_reset() -> None:
    """Memory that was taken and given back before is not in it; memory that is taken after is."""
    size = 64 << 20
    before = np.ones(2 * size, dtype=np.uint8)
    del before
    scaling._reset_peak()
    start = scaling._peak_bytes()
    after = np.ones(size, dtype=np.uint8)
    assert 0.9 * size < scaling._peak_bytes() - start < 1.2 * size
    del after


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "FIXED_BUDGET", 32)
        patch.setattr(scaling, "FIXED_BLOCK", 16)
        patch.setattr(scaling, "LONG_BUDGET", 32)
        shape = LayerShape(4, 2, 16)
        found = scaling.measure("onnx-cpu", [16, 32, 64], [8, 16], 4096, shape)
    return {"layer": vars(shape), "targets": {"onnx-cpu": found}}


def test_every_size_and_length_is_measured(report: dict[str, dict]) -> None:
    found = report["targets"]["onnx-cpu"]
    assert [(row["budget"], row["block"]) for row in found["rows"]] == [(16, 16), (32, 16), (64, 16), (32, 8)]
    # A graph's size depends on neither N nor B.
    assert len({tuple(row["operators"].values()) for row in found["rows"]}) == 1
    # Every doubling is met at a block's end, and the 50 tokens read there to time them count as well.
    tokens = [row["tokens"] for row in found["prompt"]]
    assert tokens[0] == 1024
    assert all(2 * before <= after < 2 * before + 150 for before, after in pairwise(tokens))
    assert tokens[-1] >= 4096


def test_the_report_names_every_row(report: dict[str, dict]) -> None:
    lines = scaling.markdown(report).splitlines()
    assert sum(line.startswith(("| 16 |", "| 32 |", "| 64 |")) for line in lines) == 4
    assert sum(line.startswith("- ") for line in lines) == 4
    assert "where a full cache would take 512." in lines[-1]


def test_plots_are_drawn_with_matplotlib(report: dict[str, dict], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "FIXED_BUDGET", 32)
        patch.setattr(scaling, "FIXED_BLOCK", 16)
        files = scaling.draw(report, tmp_path)
    assert sorted(file.name for file in files) == ["scaling-block.png", "scaling-prompt.png", "scaling-slots.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_without_matplotlib_there_is_an_install_line(
    report: dict[str, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert scaling.draw(report, tmp_path) == []
    assert "pip install 'keydiff-export[bench]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
