"""The demo model end to end: SmolLM2-135M exported, proven, and reading a text longer than its trained context."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from test_stock_runner import stock
from transformers import AutoTokenizer

import keydiff_export
from keydiff_export.commands.run import run_prompt
from keydiff_export.inspection import inspect_folder
from keydiff_export.manifest import OutputFolder
from keydiff_export.text import long_text

# Export and parity of thirty layers beside another worker take a busy machine half an hour.
pytestmark = [pytest.mark.real_model, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
CARD = ROOT / "graphs" / "smollm2-135m"


@pytest.fixture(scope="module")
def folder(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> OutputFolder:
    """The shipped card, exported with its parity run over 4,096 tokens; an artifact that fails leaves no folder.

    KEYDIFF_DEMO_EXPORT names a folder to put it, for those that come after these tests.
    """
    assert keydiff_export.load_card(CARD).model == demo_model
    place = os.environ.get("KEYDIFF_DEMO_EXPORT")
    return keydiff_export.export(CARD, Path(place) if place else tmp_path_factory.mktemp("demo") / "out")


def test_parity_report(folder: OutputFolder) -> None:
    report = json.loads((folder.path / "parity.json").read_text())
    assert report["prompt_tokens"] >= 4096
    assert report["greedy_tokens"] == 64
    assert [a["target"] for a in report["artifacts"]] == ["executorch-xnnpack", "onnx-cpu"]
    for artifact in report["artifacts"]:
        assert artifact["passed"], artifact["gates"]
        assert artifact["kept_slots"]["sets_compared"] == 30 * 3 * (32 + 64)


def test_the_graphs_have_the_cards_locked_signature(folder: OutputFolder) -> None:
    from lock_card import signature

    assert signature(folder.manifest) == json.loads((CARD / "signature.json").read_text())


def test_the_chat_template_in_pieces(folder: OutputFolder) -> None:
    turn = "<|im_end|>\n<|im_start|>user\n"
    greeting = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert json.loads((folder.path / "chat.json").read_text()) == {
        "user": {
            "before": f"<|im_start|>system\n{greeting}{turn}",
            "after": "<|im_end|>\n<|im_start|>assistant\n",
        },
        "follow_up": turn,
        "system": {"before": "<|im_start|>system\n", "after": turn},
        "trims": False,
    }


def test_the_stock_runner_says_what_run_says(folder: OutputFolder, tmp_path: Path) -> None:
    """ExecuTorch's own LLM runner, a prompt longer than the cache, with a tail; --runtime executorch-forward.

    The other methods add attention up in another order, and with 8-bit activations a value on a rounding edge can then
    change a word. test_stock_runner.py has float32, where the tokens are those of every method.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    prompt = tokenizer.decode(tokenizer(long_text())["input_ids"][:1003])
    ids = tokenizer(prompt)["input_ids"]
    assert len(ids) > 512 + 128
    assert len(ids) % 128
    result = run_prompt(folder, prompt, max_new_tokens=24, runtime="executorch-forward", raw=True)
    [pieces] = stock(folder.path, tmp_path, [prompt], 24)
    assert pieces == [tokenizer.decode([token]) for token in result.token_ids]


def test_programs_hold_exactly_n_plus_b_slots(folder: OutputFolder) -> None:
    for artifact in inspect_folder(folder)["artifacts"]:
        assert artifact["slots"] == [512 + 128]
        assert artifact["constant_memory"]


def test_plan_knows_the_memory_of_the_artifacts(folder: OutputFolder) -> None:
    from test_plan import check

    check(folder)


@pytest.mark.parametrize("runtime", ["executorch", "onnxruntime"])
def test_memory_does_not_grow_with_the_prompt(folder: OutputFolder, runtime: str) -> None:
    from demo_text import demo_text
    from memory import measure

    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    short, long = (measure(folder.path, runtime, demo_text(tokenizer, tokens)) for tokens in (1000, 12_000))
    assert long["prompt_tokens"] >= 11_900
    assert long["evictions"] == long["prompt_tokens"] + len(long["token_ids"]) - 1 - 512  # type: ignore[arg-type]
    assert long["peak_rss_bytes"] <= 1.05 * short["peak_rss_bytes"]
