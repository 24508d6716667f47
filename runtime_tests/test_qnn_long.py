"""The demo model on the HTP emulator: first layers by both roads and every scheme, and the whole in float16."""

from __future__ import annotations

from pathlib import Path

import pytest

import keydiff_export
from keydiff_export.commands.validate import validate_folder
from keydiff_export.models import load_model
from keydiff_export.spec import ExportSpec

pytestmark = [pytest.mark.qnn_long, pytest.mark.real_model]


@pytest.fixture(scope="module")
def few_layers(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model cut to its first three layers, as a folder."""
    loaded = load_model(demo_model)
    loaded.model.model.layers = loaded.model.model.layers[:3]
    loaded.model.config.num_hidden_layers = 3
    if hasattr(loaded.model.config, "quantization_config"):
        del loaded.model.config.quantization_config
    place = tmp_path_factory.mktemp("demo") / "model"
    loaded.model.save_pretrained(place)
    loaded.tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("target", "quant"),
    [
        ("executorch-qnn", "fp16"),
        ("onnx-qnn", "fp16"),
        ("executorch-qnn", "16a8w"),
        ("executorch-qnn", "16a4w"),
        ("onnx-qnn", "16a8w"),
    ],
)
def test_a_few_layers(few_layers: Path, tmp_path: Path, target: str, quant: str) -> None:
    policy = {"name": "keydiff", "recent": 0.2}
    floors = {"sqnr_floor": 30.0, "jaccard_floor": 0.98, "token_floor": 0.9} if quant == "16a8w" else {}
    spec = ExportSpec(str(few_layers), 64, 32, policy, quant=quant, targets=(target,), **floors)
    report = validate_folder(keydiff_export.export(spec, tmp_path / "out", validate=False))["artifacts"][0]
    print({key: report[key] for key in ("target", "quant", "gates")})
    assert report["passed"], report["gates"]


@pytest.mark.parametrize("target", ["executorch-qnn", "onnx-qnn"])
def test_the_whole_model_in_float16(demo_model: str, tmp_path: Path, target: str) -> None:
    policy = {"name": "keydiff", "recent": 0.2}
    spec = ExportSpec(demo_model, 512, 128, policy, quant="fp16", targets=(target,))
    report = validate_folder(keydiff_export.export(spec, tmp_path / "out", validate=False))["artifacts"][0]
    assert report["passed"], report["gates"]
