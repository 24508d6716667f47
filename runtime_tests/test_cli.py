"""The command line as a user meets it: answers, JSON, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import build_model
from transformers import AutoTokenizer

import keydiff_export
from keydiff_export.cli import main
from keydiff_export.commands.run import load_tokenizer, open_runner

RESULT_FIELDS = {
    "prompt_tokens",
    "token_ids",
    "text",
    "ttft_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_rss_bytes",
    "cache_slots",
    "evictions",
}


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "out"
    assert (
        main(
            [
                "export",
                "--model",
                str(tiny_folder),
                "--budget",
                "16",
                "--block",
                "8",
                "-o",
                str(output),
                "--no-validate",
                "--no-stock-runner",
            ]
        )
        == 0
    )
    return output


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must end with exit code 2 and one line on stderr, which is returned."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("keydiff-export: ")
    return lines[0]


@pytest.mark.parametrize("runtime", ["executorch", "onnxruntime", "eager"])
def test_run_prints_every_figure_as_json(folder: Path, capsys: pytest.CaptureFixture[str], runtime: str) -> None:
    command = ["run", str(folder), "--prompt", "x" * 60, "--max-new-tokens", "12", "--runtime", runtime, "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == RESULT_FIELDS
    assert result["prompt_tokens"] == 62
    assert result["cache_slots"] == 24
    assert 1 <= len(result["token_ids"]) <= 12
    assert result["evictions"] == 62 + len(result["token_ids"]) - 1 - 16


def test_all_runtimes_generate_the_same_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = []
    for runtime in ("executorch", "onnxruntime", "eager"):
        assert main(["run", str(folder), "--prompt", "hello", "--runtime", runtime, "--json"]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert tokens[0] == tokens[1] == tokens[2]


def test_sampling_is_repeatable_with_a_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: str) -> list[int]:
        options = ["--temperature", "2.0", "--top-p", "0.95", "--seed", seed, "--max-new-tokens", "20", "--json"]
        assert main(["run", str(folder), "--prompt", "hello", *options]) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    assert sample("1") == sample("1") != sample("2")


def test_the_prompt_may_come_from_a_file_or_standard_input(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("a long story " * 20, encoding="utf-8")
    command = [sys.executable, "-m", "keydiff_export", "run", str(folder), "--json", "--max-new-tokens", "4", "--raw"]
    with file.open("rb") as stream:
        piped = subprocess.run(command, stdin=stream, capture_output=True, text=True, check=True)
    named = subprocess.run([*command, "--prompt-file", str(file)], capture_output=True, text=True, check=True)
    assert json.loads(piped.stdout)["token_ids"] == json.loads(named.stdout)["token_ids"]
    assert json.loads(named.stdout)["prompt_tokens"] == 260


def test_the_answer_goes_to_stdout_and_the_figures_to_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(folder), "--prompt", "hello", "--max-new-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert "prompt tokens, first token after" in captured.err
    assert "prompt tokens" not in captured.out


def test_inspect_and_lists(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    report = capsys.readouterr().out
    assert "memory constant; slots in the program [24], tensors of dynamic size 0 (0 without a bound)" in report
    assert "  decode: inputs [[1, 1], [1]]" in report
    assert "  forward: " not in report
    assert main(["inspect", str(folder), "--json"]) == 0
    assert all(a["constant_memory"] for a in json.loads(capsys.readouterr().out)["artifacts"])
    for what, expected in (("models", "llama"), ("policies", "keydiff"), ("targets", "executorch-xnnpack")):
        assert main([what]) == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "model './nowhere' not found"),
        (["--model", "package:no_such_package/x.gguf"], "package no_such_package is not installed"),
        (["--budget", "0"], "budget must be a whole number of at least 1, got 0"),
        (["--block", "0"], "block must be a whole number of at least 1, got 0"),
        (["--block", "17"], "block 17 is larger than budget 16"),
        (["--policy", "magic"], "unknown policy 'magic'"),
        (["--policy", "keydiff:anchor"], "'anchor' is not key=value"),
        (["--policy", "keydiff:anchor=middle"], "anchor must be one of mean"),
        (["--pinned", "17"], "17 pinned and 0 recent tokens do not fit a budget of 16"),
        (["--system-prompt", " "], "system_prompt must be text"),
        (["--recent", "2"], "recent must be between 0 and 1"),
        (["--quant", "2bit"], "unknown quantisation '2bit'"),
        (["--target", "toaster"], "unknown target 'toaster'"),
        (["--quant", "int4", "--target", "executorch-xnnpack"], "executorch-xnnpack does not take --quant int4"),
    ],
)
def test_export_refuses_bad_input_in_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    output = tmp_path / "out"
    base = {"--model": str(tiny_folder), "--budget": "16", "--block": "8", "-o": str(output)}
    base.update(zip(arguments[::2], arguments[1::2], strict=True))
    assert message in fails(capsys, "export", *(word for pair in base.items() for word in pair))
    assert list(tmp_path.iterdir()) == []


def test_a_system_prompt_is_pinned_and_opens_every_chat(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["export", "--model", str(tiny_folder), "--block", "8", "--target", "onnx-cpu", "-o", str(tmp_path / "out")]
    assert main([*base, "--budget", "16", "--system-prompt", "Be brief."]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    # <user>, nine characters, and the <user> that opens the next message: the same whatever is asked.
    assert manifest["policy"]["pinned"] == 11
    capsys.readouterr()
    assert main(["run", str(tmp_path / "out"), "--prompt", "Why?", "--max-new-tokens", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 11 + 4 + 1
    assert main([*base, "--budget", "8", "--system-prompt", "Be brief."]) == 2
    assert "11 pinned and 0 recent tokens do not fit a budget of 8" in capsys.readouterr().err


def test_export_without_model_or_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model is missing" in fails(capsys, "export", "--budget", "8", "--block", "8")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (None, "no graph card at"),
        ("model: [", "is not readable YAML"),
        ("model: m\nbudget: 8\nblock: 8\ncolour: red\n", "unknown field 'colour'"),
        ("model: m\nblock: 8\n", "field 'budget' is missing"),
        ("model: m\nbudget: many\nblock: 8\n", "budget must be a whole number"),
        ("model: m\nbudget: 8\nblock: 8\nstock_runner: 1\n", "stock_runner must be true or false, got 1"),
    ],
)
def test_a_bad_graph_card_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], card: str | None, message: str
) -> None:
    if card is not None:
        (tmp_path / "spec.yaml").write_text(card, encoding="utf-8")
    assert message in fails(capsys, "export", str(tmp_path))


def test_export_does_not_overwrite_a_foreign_folder(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    command = ["export", "--model", str(tiny_folder), "--budget", "16", "--block", "8", "-o", str(tmp_path)]
    assert "is not an exported folder" in fails(capsys, *command)
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "   \n "], "the prompt is empty"),
        (["--prompt-file", "nowhere.txt"], "cannot read prompt file nowhere.txt"),
        (["--prompt", "x" * 600], "the model was trained for 512"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens must be at least 1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be at least 0"),
        (["--prompt", "x", "--top-p", "0"], "top-p must be above 0"),
    ],
)
def test_run_refuses_bad_input_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in fails(capsys, "run", str(folder), *arguments)


def test_positions_past_the_trained_context_on_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(folder), "--prompt", "x" * 600, "--max-new-tokens", "2", "--json"]
    assert main([*command, "--allow-beyond-trained-context"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 602


def test_a_prompt_that_is_not_utf8(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes("caf\u00e9".encode("latin-1"))
    assert "is not UTF-8 text (byte 3)" in fails(capsys, "run", str(folder), "--prompt-file", str(file))


def test_a_model_without_chat_template_asks_for_raw(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = edited(folder, tmp_path, remove="chat_template.jinja")
    assert "no chat template: run with --raw" in fails(capsys, "run", str(copy), "--prompt", "x")


def edited(folder: Path, tmp_path: Path, remove: str | None = None, replace: dict[str, bytes] | None = None) -> Path:
    """A copy of an exported folder with files removed or replaced and the manifest made to match."""
    from keydiff_export.manifest import sha256

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for name, data in (replace or {}).items():
        (copy / name).write_bytes(data)
    if remove is not None:
        (copy / remove).unlink()
    entries = []
    for entry in manifest["files"]:
        if entry["path"] != remove:
            file = copy / entry["path"]
            entries.append({**entry, "bytes": file.stat().st_size, "sha256": sha256(file)})
    manifest["files"] = entries
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_a_wrong_tokenizer_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append(
        {"id": 9999, "content": "<extra>", "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
    )
    copy = edited(folder, tmp_path, replace={"tokenizer.json": json.dumps(data).encode()})
    assert "wrong tokenizer" in fails(capsys, "run", str(copy), "--prompt", "x")


def test_an_unreadable_tokenizer_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = edited(folder, tmp_path, replace={"tokenizer.json": b"{}"})
    assert "tokenizer.json cannot be loaded" in fails(capsys, "run", str(copy), "--prompt", "x")


@pytest.mark.parametrize("command", ["run", "validate", "inspect"])
def test_every_command_checks_the_folder_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    extra = ["--prompt", "x"] if command == "run" else []
    (copy / "tokenizer.json").write_text("{}")
    assert "tokenizer.json does not match its checksum" in fails(capsys, command, str(copy), *extra)
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in fails(capsys, command, str(copy), *extra)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    assert "does not match its schema at schema_version" in fails(capsys, command, str(copy), *extra)
    (copy / "manifest.json").write_text("{")
    assert "is not valid JSON" in fails(capsys, command, str(copy), *extra)
    (copy / "manifest.json").unlink()
    assert "is not an exported folder" in fails(capsys, command, str(copy), *extra)


def test_a_runtime_that_the_folder_lacks(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "onnx"
    command = ["export", "--model", str(tiny_folder), "--budget", "16", "--block", "8", "--no-validate"]
    assert main([*command, "--target", "onnx-cpu", "-o", str(output)]) == 0
    capsys.readouterr()
    message = fails(capsys, "run", str(output), "--prompt", "x", "--runtime", "executorch")
    assert "has no artifact for executorch: it has onnxruntime" in message


def test_another_model_is_not_taken_for_the_exported_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model(tmp_path / "model")
    output = tmp_path / "out"
    command = [
        "export",
        "--model",
        str(model),
        "--budget",
        "16",
        "--block",
        "8",
        "--target",
        "onnx-cpu",
        "--no-validate",
    ]
    assert main([*command, "-o", str(output)]) == 0
    build_model(model, initializer_range=0.1)
    capsys.readouterr()
    assert "weights differ" in fails(capsys, "validate", str(output))


@pytest.mark.parametrize("seconds", [4.0, 8.0, 13.0])
def test_a_killed_export_leaves_nothing_that_passes_for_one(tiny_folder: Path, tmp_path: Path, seconds: float) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "keydiff_export", "export", "--model", str(tiny_folder), "--budget", "16"]
    process = subprocess.Popen([*command, "--block", "8", "-o", str(output)], stdout=subprocess.DEVNULL)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for left in tmp_path.iterdir():
        assert left == output or main(["inspect", str(left)]) == 2
    if output.exists():
        assert main(["inspect", str(output)]) == 0, "a folder in place is a whole one"


def test_a_folder_is_none_until_parity_has_passed(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill during the parity run leaves a folder that no command accepts; a failed gate leaves none at all."""
    from keydiff_export.commands import export
    from keydiff_export.manifest import OutputFolder

    def failing(folder: OutputFolder, loaded: object) -> dict[str, object]:
        assert main(["inspect", str(folder.path)]) == 2
        gate = {"name": "greedy tokens equal", "value": 0.5, "limit": "= 1", "passed": False}
        return {"artifacts": [{"target": "onnx-cpu", "gates": [gate]}]}

    monkeypatch.setattr(export, "validate_folder", failing)
    command = ["export", "--model", str(tiny_folder), "--budget", "16", "--block", "8", "--target", "onnx-cpu"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 2
    assert "onnx-cpu is not equal to the reference: greedy tokens equal is 0.5" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", "--budget", "many"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_onnx_runs_without_torch(folder: Path) -> None:
    """Importing torch alone takes longer and more memory than all of a small model's run."""
    code = (
        "import sys; from keydiff_export.cli import main; "
        f"code = main(['run', {str(folder)!r}, '--runtime', 'onnxruntime', '--prompt', 'hello', '--raw', "
        "'--max-new-tokens', '2']); sys.exit(code or ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_a_runner_that_holds_one_method_answers_the_same(folder: Path) -> None:
    opened = keydiff_export.load(folder)
    artifact = opened.artifact_for("onnxruntime")
    lean, resident = open_runner(opened, artifact, resident=False), open_runner(opened, artifact)
    for step in ([1, 2, 3, 4], [5], [6], [7, 8, 9], [10]):
        np.testing.assert_array_equal(lean.step(step), resident.step(step))


def test_the_tokenizer_of_run_is_the_models_own(folder: Path, tiny_folder: Path) -> None:
    """`run` loads it by another class, which needs no torch."""
    ours, theirs = load_tokenizer(keydiff_export.load(folder)), AutoTokenizer.from_pretrained(tiny_folder)
    text = "Hello, world!\n  two  spaces, caf\u00e9 and 42"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    chats = [t.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) for t in (ours, theirs)]
    assert chats[0] == chats[1]
    assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
