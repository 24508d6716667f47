"""`bench`: what policies cost, through every target."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bench import LayerShape, bench_policies, relative_latency
from ..errors import UserError
from ..lowering import get_target
from ..policies import Policy, make_policy, parse_policy, policy_names


def bench_all(
    policies: list[str],
    targets: list[str],
    slots: list[int],
    block: int = 128,
    shape: LayerShape = LayerShape(),
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Costs of policies at several cache sizes.

    Args:
        policies: `NAME[:key=value,...]` each, or "all".
        targets: lowerings to go through.
        slots: numbers of slots N + B, each above 2 * block.
        block: B.
        report: told each artifact as it is made.

    Raises:
        UserError: unknown policy or target, or a size that leaves no budget.
    """
    if block < 1 or any(size < 2 * block for size in slots):
        raise UserError(f"slots must be at least twice the block of {block}: that is N + B with N >= B")
    for name in targets:
        if "none" not in get_target(name).quants:
            raise UserError(f"bench times this machine's processor, and {name} has none here, only an emulator")
    chosen: dict[str, Policy] = {"full": make_policy("full")}
    for text in policy_names() if policies == ["all"] else policies:
        parameters = parse_policy(text)
        chosen[text] = make_policy(parameters.pop("name"), **parameters)
        try:
            chosen[text].check_budget(min(slots) - block)
        except ValueError as error:
            raise UserError(f"policy {text}: {error}") from error
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for target in targets:
            for size in sorted(slots):
                rows += bench_policies(chosen, target, size, block, Path(scratch), shape, report)
    return {"block": block, "layer": vars(shape), "rows": rows, "relative": relative_latency(rows)}


def bench_table(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    lines = [
        "| target | slots | policy | decode ms | eviction adds | prefill ms | eviction adds | operators | state B |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [row["target"], row["slots"], row["policy"]]
        for method in ("decode", "prefill"):
            low, high = row[method]["added_ms_range"]
            cells += [
                f"{row[method]['ms']:.3f}",
                f"{row[method]['added_ms']:+.3f} ({low:+.3f} to {high:+.3f})",
            ]
        cells += [f"{row['operators']['decode']} + {row['operators']['prefill']}", row["state_bytes"]]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    for target, table in report["relative"].items():
        sizes = sorted(next(iter(table.values())))
        lines += ["", f"{target}: prefill latency that eviction adds, over KeyDiff's at {sizes[0]} slots"]
        lines += ["| policy | " + " | ".join(str(size) for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
        for policy, values in table.items():
            lines.append(f"| {policy} | " + " | ".join(f"{values[size]:.2f}" for size in sizes) + " |")
    return "\n".join(lines)
