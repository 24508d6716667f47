"""The bench's bookkeeping. Its timings are printed, never tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keydiff_export.bench import LayerShape, bench_policies, relative_latency
from keydiff_export.cli import main
from keydiff_export.commands.bench import bench_all, bench_table, complexity_rows
from keydiff_export.errors import UserError
from keydiff_export.policies import make_policy
from keydiff_export.policies.knorm import KNorm

SMALL = LayerShape(query_heads=4, kv_heads=2, head_dim=16)


@pytest.mark.parametrize("target", ["executorch-xnnpack", "onnx-cpu"])
def test_every_row_stands_beside_the_same_graph_without_eviction(tmp_path: Path, target: str) -> None:
    policies = {"full": make_policy("full"), "keydiff": make_policy("keydiff"), "tova": make_policy("tova")}
    rows = {row["policy"]: row for row in bench_policies(policies, target, 32, 8, tmp_path, SMALL)}
    assert rows["full"]["decode"]["added_ms"] == rows["full"]["prefill"]["added_ms"] == 0
    # Two heads, 32 slots: a float32 a slot and 16 doubles a head.
    assert {name: row["state_bytes"] for name, row in rows.items()} == {
        "full": 0,
        "keydiff": 2 * 32 * 4 + 2 * 16 * 8,
        "tova": 0,
    }
    for method in ("decode", "prefill"):
        assert rows["keydiff"]["operators"][method] > rows["full"]["operators"][method]
        low, high = rows["keydiff"][method]["added_ms_range"]
        assert low <= rows["keydiff"][method]["added_ms"] <= high


def test_latency_is_relative_to_keydiff_at_the_smallest_size() -> None:
    rows = [
        {"target": "t", "policy": policy, "slots": slots, "prefill": {"added_ms": added}}
        for policy, slots, added in (
            ("full", 512, 0.0), ("keydiff", 1024, 3.0), ("keydiff", 512, 2.0), ("h2o", 512, 5.0), ("h2o", 1024, 9.0),
        )
    ]  # fmt: skip
    assert relative_latency(rows) == {"t": {"keydiff": {1024: 1.5, 512: 1.0}, "h2o": {512: 2.5, 1024: 4.5}}}


def test_the_table_has_every_policy_and_size() -> None:
    report = bench_all(["keydiff", "sink:sinks=2"], ["onnx-cpu"], [48, 32], block=8, shape=SMALL)
    assert [(row["slots"], row["policy"]) for row in report["rows"]] == [
        (slots, policy) for slots in (32, 48) for policy in ("full", "keydiff", "sink:sinks=2")
    ]
    lines = bench_table(report).splitlines()
    assert sum(line.startswith("| onnx-cpu |") for line in lines) == 6
    assert next(line for line in lines if line.startswith("| keydiff |")).startswith("| keydiff | 1.00 |")
    on_paper = [line.split(" | ") for line in lines if line.startswith(("| 32 |", "| 48 |"))]
    assert [cells[1] for cells in on_paper] == ["full", "keydiff", "sink:sinks=2"] * 2
    measured = {(row["slots"], row["policy"]): row["state_bytes"] for row in report["rows"]}
    for row in report["complexity"]:
        assert row["state_bytes"] == measured[row["slots"], row["policy"]]


def test_a_policy_of_another_package_has_no_definition_on_paper() -> None:
    class Mine(KNorm):
        name = "mine"

    (row,) = complexity_rows({"mine": Mine()}, 32, 8, SMALL)
    assert row["asymptotic"] is None
    assert row["prefill"]["scoring_flops"] is None
    assert row["prefill"]["added_flops"] == 0
    assert row["state_bytes"] == 2 * 32 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "magic"], "unknown policy 'magic'"),
        (["--slots", "512,many"], "slots must be whole numbers separated by commas"),
        (["--slots", "200"], "slots must be at least twice the block of 128"),
        (["--target", "toaster"], "unknown target 'toaster'"),
        (["--target", "onnx-qnn"], "onnx-qnn has none here, only an emulator"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", "--policies", "sink", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_policy_that_does_not_fit_the_budget_is_refused() -> None:
    with pytest.raises(UserError, match="do not fit a budget of 24"):
        bench_all(["keydiff:pinned=30"], ["onnx-cpu"], [32], block=8, shape=SMALL)


def test_json_is_machine_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--policies", "sink", "--target", "onnx-cpu", "--slots", "256", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["block"] == 128
    assert [row["policy"] for row in report["rows"]] == ["full", "sink"]
