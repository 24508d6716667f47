"""ExecuTorch's own LLM runner over our .pte: it calls `forward`, after metadata of fixed names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, random_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import keydiff_export
from keydiff_export.commands.run import open_runner, run_prompt
from keydiff_export.errors import UserError
from keydiff_export.inspection import inspect_folder
from keydiff_export.manifest import OutputFolder
from keydiff_export.models import load_model
from keydiff_export.reference import Reference
from keydiff_export.spec import ExportSpec

BUDGET, BLOCK = 16, 8
SCRIPT = Path(__file__).parent.parent / "scripts" / "stock_runner.py"
TEXT = "Of all tokens read, every layer and head keeps those whose keys differ most from the rest; the others leave."


def stock(folder: Path, work: Path, prompts: list[str], max_new_tokens: int, *flags: str) -> list[list[str]]:
    """Pieces of the stock runner's answers. In a process of its own: it prints, and a bad program would end pytest."""
    files = [work / f"prompt-{number}.txt" for number in range(len(prompts))]
    for file, prompt in zip(files, prompts, strict=True):
        file.write_text(prompt, encoding="utf-8")
    command = [
        sys.executable,
        str(SCRIPT),
        str(folder),
        *map(str, files),
        "--max-new-tokens",
        str(max_new_tokens),
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that only ever says ASCII, as the Python binding takes no half characters, and ends early."""
    folder = build_model(tmp_path_factory.mktemp("models") / "ascii")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for token in range(len(tokenizer)):
            if not (tokenizer.decode([token]).isascii() and token >= 4):
                model.lm_head.weight[token] = 0
    model.save_pretrained(folder)
    loaded = load_model(str(folder))
    reference = Reference(
        loaded.model, keydiff_export.ExportSpec(str(folder), BUDGET, BLOCK).make_policy(), BUDGET, BLOCK
    )
    said = greedy(reference, tokenizer(TEXT)["input_ids"], 40)
    model.generation_config.eos_token_id = next(t for i, t in enumerate(said) if i > 8 and t not in said[:i])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> OutputFolder:
    spec = ExportSpec(str(model), BUDGET, BLOCK, targets=("executorch-xnnpack",), name="ascii")
    return keydiff_export.export(spec, tmp_path_factory.mktemp("exported") / "ascii", validate=False)


def greedy(reference: Reference, prompt: list[int], count: int) -> list[int]:
    """Tokens that the reference says after a prompt; the last of them is not read."""
    for first in range(0, len(prompt), reference.block):
        logits = reference.step(prompt[first : first + reference.block])
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(reference.step(tokens[-1:]).argmax()))
    return tokens


def test_every_tail_length_gives_the_tokens_of_run(exported: OutputFolder, tmp_path: Path) -> None:
    prompts = [TEXT[: 80 + tail] for tail in range(BLOCK)]
    found = stock(exported.path, tmp_path, prompts, 6)
    for prompt, pieces in zip(prompts, found, strict=True):
        expected = keydiff_export.generate(exported, prompt, runtime="executorch", raw=True, max_new_tokens=6)
        assert expected.prompt_tokens == len(prompt) > BUDGET + BLOCK
        assert pieces == list(expected.text)
        assert len(pieces) == len(expected.token_ids) == 6


def test_run_can_step_as_the_stock_runner_does(exported: OutputFolder) -> None:
    said = [run_prompt(exported, TEXT, runtime=r, raw=True) for r in ("executorch", "executorch-forward", "eager")]
    assert said[0].token_ids == said[1].token_ids == said[2].token_ids


def test_without_forward_it_says_so(model: Path, tmp_path: Path) -> None:
    spec = ExportSpec(str(model), BUDGET, BLOCK, targets=("executorch-xnnpack",), stock_runner=False)
    folder = keydiff_export.export(spec, tmp_path / "out", validate=False)
    with pytest.raises(UserError, match=r"model\.pte has no method forward: export it with --stock-runner"):
        run_prompt(folder, TEXT, runtime="executorch-forward", raw=True)


def test_it_stops_at_the_end_token(exported: OutputFolder, tmp_path: Path) -> None:
    """The stock runner shows the end token itself, as the last piece."""
    expected = keydiff_export.generate(exported, TEXT, runtime="executorch", raw=True, max_new_tokens=100)
    assert 8 < len(expected.token_ids) < 40
    [pieces] = stock(exported.path, tmp_path, [TEXT], 100)
    assert pieces[:-1] == list(expected.text)
    end = AutoTokenizer.from_pretrained(exported.path).decode(exported.manifest["model"]["eos_token_ids"][-1:])
    assert pieces[-1] == end


def test_a_second_prompt_follows_the_first_answer(exported: OutputFolder, model: Path, tmp_path: Path) -> None:
    """One cache over two calls. What the runner said last is never read: that is how it counts."""
    loaded = load_model(str(model))
    reference = Reference(loaded.model, exported.policy, BUDGET, BLOCK)
    prompts = [TEXT[:70], " And then?"]
    expected = [greedy(reference, loaded.tokenizer(prompt)["input_ids"], 6) for prompt in prompts]
    found = stock(exported.path, tmp_path, prompts, 6, "--follow")
    assert found == [list(loaded.tokenizer.decode(tokens)) for tokens in expected]


def test_sizes_that_change_are_bounded(exported: OutputFolder) -> None:
    [artifact] = inspect_folder(exported)["artifacts"]
    changing = {name: method["dynamic_tensors"] for name, method in artifact["methods"].items()}
    assert {name for name, count in changing.items() if count} == {"forward"}
    assert artifact["dynamic_tensors"] == changing["forward"]
    assert artifact["unbounded_tensors"] == 0
    assert artifact["constant_memory"]
    assert artifact["slots"] == [BUDGET + BLOCK]
    forward = artifact["methods"]["forward"]
    assert forward["inputs"] == [[1, BLOCK], [1]]
    outside = forward["kernels_outside_delegates"]
    assert not any(product in name for name in outside for product in ("linear", "addmm", "aten::mm", "bmm", "softmax"))


def test_methods_share_one_cache_and_may_be_mixed(exported: OutputFolder, model: Path) -> None:
    """Through the Program API; the stock runner gives every method a cache of its own."""
    loaded = load_model(str(model))
    reference = Reference(loaded.model, exported.policy, BUDGET, BLOCK)
    runner: Any = open_runner(exported, exported.artifacts[0])
    forward = runner._program.load_method("forward")
    tokens = random_tokens(80, loaded.model.config.vocab_size)
    for number, length in enumerate([8, 8, 8, 5, 1, 1, 1, 8, 3, 1, 1, 2, 8, 1, 6]):
        block = tokens[runner.seen : runner.seen + length]
        if number % 2:
            found = forward.call((torch.tensor([block]), torch.tensor([runner.seen])))[0].numpy()[0]
            runner.seen += length
        else:
            found = runner.step(block)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), reference.step(block), atol=1e-4, rtol=1e-4)
        assert runner.snapshot().held == reference.held(), f"after {runner.seen} tokens"


def test_metadata_is_what_the_stock_runner_reads(exported: OutputFolder) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.extension.pybindings import portable_lib

    file = exported.path / "executorch-xnnpack" / "model.pte"
    methods = {plan.name for plan in deserialize_pte_binary(file.read_bytes()).program.execution_plan}
    # Runners of ExecuTorch 1.5 take a method `decode` for generation, with a cache of its own.
    assert {"forward", "prefill", "decode_one", "snapshot"} <= methods
    assert "decode" not in methods
    program = portable_lib._load_program(str(file))

    def constant(name: str) -> list[object]:
        return list(program.load_method(name).call(()))

    assert constant("get_max_seq_len") == [BLOCK]
    assert constant("get_max_context_len") == [512]
    assert constant("get_vocab_size") == [exported.manifest["model"]["vocab_size"]]
    assert constant("get_eos_ids") == exported.manifest["model"]["eos_token_ids"]
    assert constant("use_kv_cache") == [True]
    assert constant("enable_dynamic_shape") == [True]
