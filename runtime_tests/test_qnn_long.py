"""The demo model on the HTP emulator: first layers by both roads and every scheme, the whole in float16, the cards."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import keydiff_export
from keydiff_export.commands.validate import validate_folder
from keydiff_export.manifest import OutputFolder
from keydiff_export.models import load_model
from keydiff_export.spec import ExportSpec

pytestmark = [pytest.mark.qnn_long, pytest.mark.real_model]

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
# Six blocks, the last two of which evict, and not the ten that `validate` reads: on one core the emulator took
# 64 s for a block of the whole model in float16 and 11 s for a token.
WHOLE_PROMPT = 768
# Chosen after measuring: docs/qnn.md ("What was run") has what each was at.
FLOORS = {
    ("executorch-qnn", "16a8w"): {"sqnr_floor": 40.0, "jaccard_floor": 0.99, "token_floor": 0.9},
    ("executorch-qnn", "16a4w"): {"sqnr_floor": 20.0, "jaccard_floor": 0.97, "token_floor": 0.5},
    ("onnx-qnn", "16a8w"): {"sqnr_floor": 35.0, "jaccard_floor": 0.99, "token_floor": 0.8},
}


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
    floors = FLOORS.get((target, quant), {})
    spec = ExportSpec(str(few_layers), 64, 32, policy, quant=quant, targets=(target,), **floors)
    report = validate_folder(keydiff_export.export(spec, tmp_path / "out", validate=False))["artifacts"][0]
    print({key: report[key] for key in ("target", "quant", "gates")})
    assert report["passed"], report["gates"]


@pytest.mark.parametrize("card", sorted((ROOT / "graphs").glob("*-npu*")), ids=lambda card: card.name)
def test_a_shipped_card(card: Path, demo_model: str, tmp_path: Path) -> None:
    from lock_card import signature

    folder = keydiff_export.export(card, tmp_path / "out", validate=False)
    assert signature(folder.manifest) == json.loads((card / "signature.json").read_text())
    passes(folder)


def test_the_whole_model_by_the_other_road(demo_model: str, tmp_path: Path) -> None:
    spec = replace(keydiff_export.load_card(ROOT / "graphs" / "smollm2-135m-npu"), targets=("onnx-qnn",))
    passes(keydiff_export.export(spec, tmp_path / "out", validate=False))


def passes(folder: OutputFolder) -> None:
    """Parity of a whole model, and that it evicted in both methods."""
    report = validate_folder(folder, prompt_tokens=WHOLE_PROMPT)["artifacts"][0]
    print({key: report[key] for key in ("target", "quant", "gates")})
    assert report["passed"], report["gates"]
    assert (report["prompt_tokens"], report["greedy_tokens"]) == (WHOLE_PROMPT, 32)
    assert report["kept_slots"]["sets_compared"] == 30 * 3 * (6 + 32)
