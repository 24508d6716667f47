"""The bench of a folder: order, pairing, ratios, what is absent, what does not fit. Its timings are never tested."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import keydiff_export
from keydiff_export import ExportSpec, OutputFolder, UserError, peers
from keydiff_export.child import call_in_child
from keydiff_export.cli import main
from keydiff_export.commands.bench_folder import bench_folder, folder_table
from keydiff_export.commands.plots import draw_plots
from keydiff_export.machine import Usage, copy_bandwidth, machine_facts, peak_rss_bytes, rss_bytes
from keydiff_export.operators import operator_times
from keydiff_export.peers import Peer, Prepared, parse_peer
from keydiff_export.traffic import weight_bytes

PEER_CONTEXT = 40


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A peer named echo, known to child processes as well."""
    (tmp_path / "weights").write_bytes(b"x" * 1000)

    def prepare(folder: OutputFolder, path: Path | None) -> Prepared:
        return Prepared("echo_peer:open_echo", {}, [tmp_path / "weights"], 2, PEER_CONTEXT)

    monkeypatch.setitem(peers.PEERS, "echo", Peer("echo", "numpy", "numpy", "pip install echo", prepare))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return "echo"


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> OutputFolder:
    spec = ExportSpec(str(tiny_folder), 16, 8, quant="int8", name="tiny", stock_runner=False)
    return keydiff_export.export(spec, tmp_path_factory.mktemp("bench") / "out", validate=False)


class Clock:
    """Stands in for child processes: figures that can be told apart, and the order of the calls."""

    def __init__(self) -> None:
        self.order: list[tuple[str, int]] = []

    def __call__(self, function: str, arguments: dict[str, Any], time_limit: float | None = None) -> Any:
        if function.endswith("operator_times"):
            return {"decode": {"MatMul": 2.0, "Add": 1.0}, "prefill": {"MatMul": 9.0}}
        name = Path(arguments["arguments"].get("place", "echo")).name
        self.order.append((name, len(arguments["ids"])))
        # The machine gets slower with every call, by a factor that neighbours nearly share.
        slow = 1.01 ** len(self.order)
        unit = {"executorch-xnnpack": 2.0, "onnx-cpu": 3.0, "echo": 4.0}[name] * slow
        return {
            "load_s": unit,
            "ttft_s": unit,
            "prefill_tokens_per_s": 10.0,
            "decode_ms": [unit, unit, 100 * unit],
            "peak_rss_bytes": unit,
            "base_rss_bytes": unit / 2,
            "anonymous_rss_bytes": None if name == "echo" else unit,
            "copy_bytes_per_s": 1e9,
            "stolen": None,
            "others": 0.5,
        }


def test_contestants_take_turns_and_ratios_compare_neighbours(folder: OutputFolder, peer: str) -> None:
    clock = Clock()
    report = bench_folder(folder, [peer], [30, 10, 90], decode_tokens=4, repeats=2, threads=1, call=clock)
    forth = [("executorch-xnnpack", 10), ("onnx-cpu", 10), ("echo", 10)]
    there = forth + [(name, 30) for name, _ in forth] + [("executorch-xnnpack", 90), ("onnx-cpu", 90)]
    back = [*forth[::-1], *((name, 30) for name, _ in forth[::-1]), ("onnx-cpu", 90), ("executorch-xnnpack", 90)]
    assert clock.order == there + back

    by = {(row["ours"], row["peer"], row["prompt_tokens"]): row for row in report["ratios"]}
    ratio = by["executorch-xnnpack", "echo", 10]
    # Two calls apart in either direction: 0.5 / 1.01^2 in the first repeat, 0.5 * 1.01^2 in the second.
    assert ratio["decode_ms"]["min"] == pytest.approx(0.5 / 1.01**2)
    assert ratio["decode_ms"]["max"] == pytest.approx(0.5 * 1.01**2)
    assert ratio["ttft_s"]["median"] == pytest.approx((0.5 / 1.01**2 + 0.5 * 1.01**2) / 2)
    for figure in ("peak_rss_bytes", "model_rss_bytes"):
        assert by["onnx-cpu", "echo", 30][figure]["median"] == pytest.approx(0.75, rel=0.01)
    best = by["best of ours", "best peer", 10]["decode_ms"]
    assert (best["ours"], best["peer"]) == ("executorch-xnnpack", "echo")
    assert {key: best[key] for key in ratio["decode_ms"]} == ratio["decode_ms"]


def test_a_prompt_over_a_context_is_a_result(folder: OutputFolder, peer: str) -> None:
    report = bench_folder(folder, [peer], [36, 37], decode_tokens=4, repeats=1, threads=1, call=Clock())
    status = {(row["name"], row["prompt_tokens"]): row["status"] for row in report["summary"]}
    assert status["echo", 36] == "ok"
    assert status["echo", 37] == "over its context"
    assert status["onnx-cpu", 37] == "ok"
    assert "| 37 | echo | over its context |" in folder_table(report)
    over = [row for row in report["ratios"] if row["prompt_tokens"] == 37]
    assert all(row[figure] is None for row in over for figure in ("decode_ms", "ttft_s", "peak_rss_bytes"))


def test_disturbed_measurements_are_left_out(folder: OutputFolder, peer: str) -> None:
    class Busy(Clock):
        def __call__(self, function: str, arguments: dict[str, Any], time_limit: float | None = None) -> Any:
            figures = super().__call__(function, arguments, time_limit)
            return {**figures, "others": 0.05 if len(self.order) in (1, 2, 5) else 0.2}

    report = bench_folder(folder, [peer], [10], 4, repeats=2, threads=1, max_others=0.1, call=Busy())
    # In turn: executorch, onnx and the peer, then the peer, onnx and executorch.
    assert [run["status"] for run in report["runs"]] == ["ok", "ok", "disturbed", "disturbed", "ok", "disturbed"]
    rows = {row["name"]: row for row in report["summary"]}
    assert rows["executorch-xnnpack"]["decode_ms"]["max"] == pytest.approx(2.0 * 1.01)
    assert rows["echo"]["decode_ms"] is None
    assert all(row["decode_ms"] is None for row in report["ratios"])
    assert "| 10 | echo | disturbed |" in folder_table(report)


def test_full_cache_artifacts_have_a_context_too(folder: OutputFolder) -> None:
    full = OutputFolder(folder.path, {**folder.manifest, "policy": {"name": "full"}})
    report = bench_folder(full, [], [12, 13], decode_tokens=4, repeats=1, threads=1, call=Clock())
    assert [row["status"] for row in report["summary"]] == ["ok"] * 2 + ["over its context"] * 2
    assert report["ratios"] == []


def test_growth_bandwidth_and_notes(folder: OutputFolder, peer: str) -> None:
    report = bench_folder(folder, [peer], [10, 30], decode_tokens=4, repeats=1, threads=1, call=Clock())
    growth = {row["name"]: row for row in report["growth"]}
    assert growth["echo"]["decode_ms"]["median"] == pytest.approx(1.01**3)
    assert growth["onnx-cpu"]["anonymous_rss_bytes"] == growth["onnx-cpu"]["decode_ms"]
    assert growth["echo"]["anonymous_rss_bytes"] is None
    rows = {(row["name"], row["prompt_tokens"]): row for row in report["summary"]}
    # Two layers, two KV heads of 32: 256 numbers of two bytes a token beside 1000 bytes of weights.
    assert rows["echo", 30]["bytes_a_token"] == 1000 + 30 * 2 * 2 * 2 * 32 * 2
    # Fused attention reads the tokens held, at most N = 16; a delegate's reads all N + B = 24 slots.
    item = 2 * 2 * 2 * 32 * 4
    assert rows["onnx-cpu", 30]["bytes_a_token"] - rows["onnx-cpu", 10]["bytes_a_token"] == 6 * item
    weights = {name: weight_bytes(folder.path, "int8", name) for name in ("executorch", "onnxruntime")}
    assert rows["onnx-cpu", 30]["bytes_a_token"] == weights["onnxruntime"] + 16 * item
    for tokens in (10, 30):
        assert rows["executorch-xnnpack", tokens]["bytes_a_token"] == weights["executorch"] + 24 * item
    run = next(r for r in report["runs"] if (r["name"], r["prompt_tokens"]) == ("echo", 30))
    assert run["bandwidth_share"] == pytest.approx(rows["echo", 30]["bytes_a_token"] / (run["ttft_s"] / 1e3) / 1e9)
    table = folder_table(report)
    assert "1 threads" in table
    assert "other processes took 50%" in table


def test_weight_bytes(folder: OutputFolder) -> None:
    # Two layers of 64 -> 128 + 2 * 64 -> 64 attention and three 64 x 96 products, a head of 260 tokens, five norms.
    attention = 2 * (64 * 128 + 64 * 64 * 2 + 128 * 64)
    linear = attention + 2 * 3 * 64 * 96
    head, norms = 260 * 64, 5 * 64 * 4
    rows = 2 * (128 + 64 + 64 + 64 + 96 + 96 + 64)
    assert weight_bytes(folder.path, "none", "onnxruntime") == 4 * (linear + head) + norms
    assert weight_bytes(folder.path, "int8", "executorch") == linear + head + 4 * (rows + 260) + norms
    assert weight_bytes(folder.path, "8da4w", "executorch") == linear // 2 + linear // 16 + head + 4 * 260 + norms
    in_groups = (linear + head) // 2 + (linear + head) // 16
    assert weight_bytes(folder.path, "8da4w-head4", "executorch") == in_groups + norms
    assert weight_bytes(folder.path, "int4", "onnxruntime") == linear // 2 + head + (linear + head) // 8 + norms


@pytest.mark.parametrize("target", ["executorch-xnnpack", "onnx-cpu"])
def test_a_measurement_in_a_child(folder: OutputFolder, target: str) -> None:
    runtime = next(a["runtime"] for a in folder.artifacts if a["target"] == target)
    place = {"place": str(folder.path / target), "runtime": runtime, "budget": 16, "block": 8, "evict_every": 1}
    arguments = {"opener": "keydiff_export.measure:open_exported", "arguments": place, "ids": [5] * 50, "text": ""}
    figures = call_in_child("keydiff_export.measure:measure", {**arguments, "count": 6, "threads": 1, "context": 256})
    assert len(figures["decode_ms"]) == 5
    assert min(figures["decode_ms"]) > 0
    assert figures["prefill_tokens_per_s"] == pytest.approx(50 / figures["ttft_s"])
    assert figures["base_rss_bytes"] < figures["peak_rss_bytes"]
    assert 0 < figures["anonymous_rss_bytes"] < figures["peak_rss_bytes"]
    # ONNX Runtime runs without torch in the process, which this one has loaded.
    assert runtime == "executorch" or figures["peak_rss_bytes"] < peak_rss_bytes() / 2


def test_a_peer_in_a_child_and_what_befalls_it(peer: str) -> None:
    def answer(opener: str) -> Any:
        task = {"opener": f"echo_peer:{opener}", "arguments": {}, "ids": [1] * 9, "text": "", "count": 4}
        return call_in_child("keydiff_export.measure:measure", {**task, "threads": 1, "context": 256}, 60)

    assert len(answer("open_echo")["decode_ms"]) == 3
    with pytest.raises(UserError, match=r"^it ended its answer after 1 tokens$"):
        answer("open_brief")
    with pytest.raises(UserError, match=r"^OSError: no such kernel$"):
        answer("open_broken")
    with pytest.raises(UserError, match=rf"^the process ended with status {-signal.SIGABRT}$"):
        answer("open_crashing")
    with pytest.raises(UserError, match=r"took more than 0\.2 s"):
        call_in_child("echo_peer:linger", {"seconds": 30}, 0.2)


def test_a_failed_measurement_is_named_and_fails_the_command(
    folder: OutputFolder, peer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()

    def call(function: str, arguments: dict[str, Any], time_limit: float | None = None) -> Any:
        if "echo" in arguments.get("opener", ""):
            raise UserError("took more than 1800 s")
        return clock(function, arguments)

    monkeypatch.setattr("keydiff_export.commands.bench_folder.bench_folder", partial(bench_folder, call=call))
    command = ["bench", str(folder.path), "--against", "echo", "--prompt-tokens", "10", "--decode-tokens", "4"]
    assert main([*command, "--repeats", "1", "--threads", "1", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [run["status"] for run in report["runs"]] == ["ok", "ok", "failed: took more than 1800 s"]
    assert "| 10 | echo | failed: took more than 1800 s |" in folder_table(report)


def test_absent_peers_are_named_with_their_install_line(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Peer("gone", "gone", "no.such.module", "pip install gone", lambda folder, path: pytest.fail("not asked for"))
    monkeypatch.setitem(peers.PEERS, "gone", gone)
    report = bench_folder(folder, ["gone", "export_llm"], [10], decode_tokens=4, repeats=1, call=Clock())
    assert [entry["name"] for entry in report["absent"]] == ["gone", "export_llm"]
    table = folder_table(report)
    assert "absent: gone: it is not installed; to install it: pip install gone" in table
    assert "export_llm needs its artifact: --against export_llm=FILE.pte" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench takes either OUT, an exported folder, or --policies"),
        (["OUT", "--policies", "all"], "bench takes either OUT, an exported folder, or --policies"),
        (["OUT", "--slots", "512"], "--slots does not go with bench OUT"),
        (["--policies", "all", "--against", "llama.cpp"], "--against does not go with bench --policies"),
        (["OUT", "--against", "nobody"], "unknown peer 'nobody': choose from onnxruntime-genai, llama.cpp, export_llm"),
        (["OUT", "--against", "llama.cpp=nowhere.gguf"], "peer llama.cpp: nothing at 'nowhere.gguf'"),
        (["OUT", "--prompt-tokens", "512,many"], "prompt-tokens must be whole numbers separated by commas"),
        (["OUT", "--prompt-tokens", "1"], "prompt-tokens must be at least 2, got 1"),
        (["OUT", "--prompt-tokens", "10000000"], "the length of the text, got 10000000"),
        (["OUT", "--decode-tokens", "1"], "decode-tokens must be at least 2, got 1"),
        (["OUT", "--repeats", "0"], "repeats must be at least 1, got 0"),
        (["OUT", "--threads", "0"], "threads must be at least 1, got 0"),
        (["nowhere"], "nowhere is not an exported folder"),
    ],
)
def test_bad_input_is_one_line(
    folder: OutputFolder, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", *(str(folder.path) if word == "OUT" else word for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def test_a_peer_with_a_path() -> None:
    assert parse_peer("llama.cpp") == (peers.PEERS["llama.cpp"], None)
    assert parse_peer(f"llama.cpp={__file__}") == (peers.PEERS["llama.cpp"], Path(__file__))


@pytest.mark.parametrize("target", ["executorch-xnnpack", "onnx-cpu"])
def test_operators_are_those_of_the_runtime(folder: OutputFolder, target: str) -> None:
    runtime = next(a["runtime"] for a in folder.artifacts if a["target"] == target)
    times = operator_times(str(folder.path / target), runtime, 16, 8, 1, threads=1)
    product = "MatMulNBits" if runtime == "onnxruntime" else "Fully Connected (NC, QDU8, F32, QC8W) GEMM"
    victims = {"onnxruntime": ("ArgMin", "TopK"), "executorch": ("amax", "topk")}[runtime]
    for method, choice in zip(("decode", "prefill"), victims, strict=True):
        assert product in times[method]
        assert choice in times[method] or "ArgMax" in times[method]
        assert list(times[method].values()) == sorted(times[method].values(), reverse=True)


def test_plots(folder: OutputFolder, peer: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'keydiff-export[bench]'")
    report = bench_folder(folder, [peer], [10, 90], decode_tokens=4, repeats=2, threads=1, call=Clock())
    files = draw_plots(json.loads(json.dumps(report)), tmp_path)
    assert {file.name for file in files} == {
        "decode.png",
        "ttft.png",
        "operators-executorch-xnnpack.png",
        "operators-onnx-cpu.png",
    }
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_plots_without_matplotlib(folder: OutputFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("keydiff_export.commands.plots.find_spec", lambda name: None)
    assert main(["bench", str(folder.path), "--plots", str(tmp_path / "plots")]) == 2
    assert not (tmp_path / "plots").exists()


def test_machine() -> None:
    facts = machine_facts()
    assert facts["cpus"] >= 1
    assert facts["memory_bytes"] > 1 << 28
    assert copy_bandwidth(1) > 1e7
    assert 0 < (rss_bytes() or 1) <= peak_rss_bytes()
    before = Usage((10.0, 4.0, 1.0), 2.0)
    assert Usage((20.0, 6.0, 2.0), 5.0).shares_since(before) == {"stolen": 0.1, "others": 0.4}
    assert Usage(None, 5.0).shares_since(before) == {"stolen": None, "others": None}


def test_an_onnx_artifact_runs_without_torch() -> None:
    code = "import sys, keydiff_export.measure, keydiff_export.peers, keydiff_export.runtime.onnxruntime as r; "
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
