"""Cost of KeyDiff's graphs against N, B and prompt length, measured and fitted: O(N + B) a token, O(1) memory.

One attention layer of random weights through every target, in float32, processor time of one thread, all sizes step by
step in turn (`keydiff_export/bench.py`). Three sweeps:

    N       milliseconds of a token and of a block against the slots N + B, B fixed
    B       milliseconds of a block against B, N fixed
    prompt  milliseconds and peak memory of a child process while one long prompt is read; the peak is reset (Linux)
            when the artifact is loaded, because loading it takes more than reading and would hide growth

Writes scaling.json and scaling.md, and with matplotlib (`pip install 'keydiff-export[bench]'`) scaling-*.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from keydiff_export.bench import VOCABULARY, LayerShape, in_turn, lowered_runner, one_layer_model
from keydiff_export.lowering import TARGETS, get_target
from keydiff_export.models import cache_shape
from keydiff_export.policies import make_policy
from keydiff_export.runtime import open_artifact

BUDGETS, BLOCKS, FIXED_BUDGET, FIXED_BLOCK = (256, 512, 1024, 2048, 4096, 8192), (32, 64, 128, 256, 512), 1024, 128
# The long prompt goes through a smaller layer: what is shown is that nothing grows, and 131,072 tokens take a while.
LONG_SHAPE, LONG_BUDGET, LONG_TOKENS, FIRST_MARK = LayerShape(4, 2, 32), 256, 131_072, 1024
DECODE_REPEATS, PREFILL_REPEATS, PROBES = 60, 9, 50


def fit(features: list[list[float]], values: list[float]) -> dict[str, Any]:
    """Least squares of values on features, each relative to its value, so that small sizes count as large ones do.

    Returns:
        One coefficient a feature, and R squared of the unweighted values.
    """
    columns, target = np.array(features), np.array(values)
    coefficients = np.linalg.lstsq(columns / target[:, None], np.ones(len(target)), rcond=None)[0]
    residual = target - columns @ coefficients
    spread = target - target.mean()
    return {"coefficients": coefficients.tolist(), "r2": 1 - float(residual @ residual) / float(spread @ spread)}


def fit_line(sizes: list[float], values: list[float]) -> dict[str, float]:
    """A line through values against sizes (numpy.polyfit), and how much a parabola would bend it.

    Returns:
        slope, constant, R squared, and `curvature`: the share of a parabola's square term in its value at the largest
        size. Quadratic cost would have it near 1.
    """
    slope, constant = np.polyfit(sizes, values, 1)
    residual = np.array(values) - (slope * np.array(sizes) + constant)
    spread = np.array(values) - np.mean(values)
    square, linear, rest = np.polyfit(sizes, values, 2)
    last = max(sizes)
    return {
        "slope": float(slope),
        "constant": float(constant),
        "r2": 1 - float(residual @ residual) / float(spread @ spread),
        "curvature": float(square * last**2 / (square * last**2 + linear * last + rest)),
    }


def sweep(target: str, sizes: list[tuple[int, int]], shape: LayerShape, scratch: Path) -> list[dict[str, Any]]:
    """Median milliseconds of a token and of a block at several (N, B), and operators of both methods."""
    model, policy = one_layer_model(shape), make_policy("keydiff")
    runners, operators = {}, {}
    for budget, block in sizes:
        name = f"{target}-{budget}-{block}"
        print(name, file=sys.stderr, flush=True)
        cache = cache_shape(model.config, budget, block)
        runners[name], operators[name] = lowered_runner(model, target, cache, policy, scratch / name)
    tokens, blocks = in_turn(runners, 1, DECODE_REPEATS), in_turn(runners, None, PREFILL_REPEATS)
    return [
        {
            "budget": runner.budget,
            "block": runner.block,
            "slots": runner.budget + runner.block,
            "decode_ms": statistics.median(tokens[name]),
            "prefill_ms": statistics.median(blocks[name]),
            "operators": operators[name],
        }
        for name, runner in runners.items()
    ]


def read_long(place: Path, runtime: str, budget: int, block: int, tokens: int) -> list[dict[str, float]]:
    """Reads one prompt and stops at 1,024 tokens and every doubling: a row of costs and peak memory each."""
    runner = open_artifact(place, runtime, budget, block, threads=1)
    _reset_peak()
    ids = np.random.default_rng(0).integers(0, VOCABULARY, block).tolist()
    rows, times, mark = [], [], min(FIRST_MARK, tokens)
    while runner.seen < tokens:
        began = time.process_time()
        runner.step(ids)
        times.append((time.process_time() - began) * 1e3)
        if runner.seen >= mark:
            position, probes = runner.seen, []
            for token in (ids * PROBES)[:PROBES]:
                began = time.process_time()
                runner.step([token])
                probes.append((time.process_time() - began) * 1e3)
            rows.append(
                {
                    "tokens": position,
                    "prefill_ms": statistics.median(times),
                    "decode_ms": statistics.median(probes),
                    "peak_bytes": _peak_bytes(),
                }
            )
            times, mark = [], mark * 2
    return rows


def _reset_peak() -> None:
    """Lets the peak start again at what is resident now: proc(5), clear_refs, 5."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Peak resident memory of this process since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def long_prompt(target: str, tokens: int, scratch: Path) -> list[dict[str, float]]:
    """`read_long` in a child process, whose memory is its own."""
    model = one_layer_model(LONG_SHAPE)
    cache, place = cache_shape(model.config, LONG_BUDGET, FIXED_BLOCK), scratch / f"{target}-long"
    lowered_runner(model, target, cache, make_policy("keydiff"), place)
    child = [str(place), get_target(target).runtime, str(LONG_BUDGET), str(FIXED_BLOCK), str(tokens)]
    command = [sys.executable, __file__, "--child", *child]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(target: str, budgets: list[int], blocks: list[int], tokens: int, shape: LayerShape) -> dict[str, Any]:
    """All three sweeps of one target, with their fits."""
    sizes = [(budget, FIXED_BLOCK) for budget in budgets]
    sizes += [(FIXED_BUDGET, block) for block in blocks if (FIXED_BUDGET, block) not in sizes]
    with tempfile.TemporaryDirectory() as scratch:
        rows = sweep(target, sizes, shape, Path(scratch))
        prompt = long_prompt(target, tokens, Path(scratch))
    by_slots = [row for row in rows if row["block"] == FIXED_BLOCK]
    slots = [float(row["slots"]) for row in by_slots]
    # A block: something once, something a token, and attention and scoring of every token over every slot.
    features = [[1.0, row["block"], row["block"] * row["slots"]] for row in rows]
    lengths = [row["tokens"] for row in prompt]
    return {
        "rows": rows,
        "prompt": prompt,
        "fits": {
            "decode_ms_by_slots": fit_line(slots, [row["decode_ms"] for row in by_slots]),
            "prefill_ms_by_slots": fit_line(slots, [row["prefill_ms"] for row in by_slots]),
            "prefill_ms_all": fit(features, [row["prefill_ms"] for row in rows]),
            "decode_ms_by_prompt": fit_line(lengths, [row["decode_ms"] for row in prompt]),
            "peak_ratio": prompt[-1]["peak_bytes"] / prompt[0]["peak_bytes"],
            "peak_bytes_a_token": (prompt[-1]["peak_bytes"] - prompt[0]["peak_bytes"])
            / max(lengths[-1] - lengths[0], 1),
        },
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    shape = report["layer"]
    lines = [
        f"One layer of {shape['query_heads']} query and {shape['kv_heads']} KV heads of {shape['head_dim']}, float32, "
        "processor time of one thread."
    ]
    for target, found in report["targets"].items():
        lines += [
            "",
            f"{target}:",
            "",
            "| N | B | token ms | block ms | block ms a token | operators |",
            "|---" * 6 + "|",
        ]
        for row in found["rows"]:
            each = row["prefill_ms"] / row["block"]
            count = f"{row['operators']['decode']} + {row['operators']['prefill']}"
            lines.append(
                f"| {row['budget']} | {row['block']} | {row['decode_ms']:.3f} | {row['prefill_ms']:.2f} | {each:.4f} "
                f"| {count} |"
            )
        lines += ["", "| prompt tokens | token ms | block ms | peak MB |", "|---" * 4 + "|"]
        for row in found["prompt"]:
            peak = row["peak_bytes"] / 1e6
            lines.append(f"| {row['tokens']} | {row['decode_ms']:.3f} | {row['prefill_ms']:.2f} | {peak:.1f} |")
        lines += ["", *_sentences(found)]
    return "\n".join(lines)


def _sentences(found: dict[str, Any]) -> list[str]:
    fits, rows = found["fits"], found["prompt"]
    lines = []
    for name, key in (("token", "decode_ms_by_slots"), ("block", "prefill_ms_by_slots")):
        line = fits[key]
        lines.append(
            f"- A {name} costs {line['constant']:.3f} ms and {line['slope'] * 1e6:.1f} ns a slot; R² {line['r2']:.4f}, "
            f"a square term would make up {line['curvature']:.1%} at the largest size."
        )
    once, token, pair = fits["prefill_ms_all"]["coefficients"]
    lines.append(
        f"- A block of B costs {once:.3f} ms + B x ({token * 1e3:.2f} us + {pair * 1e6:.2f} ns x (N + B)) over all "
        f"sizes; R² {fits['prefill_ms_all']['r2']:.4f}."
    )
    lines.append(
        f"- From {rows[0]['tokens']} to {rows[-1]['tokens']} prompt tokens a token's cost goes to "
        f"{rows[-1]['decode_ms'] / rows[0]['decode_ms']:.3f} of what it was, a block's to "
        f"{rows[-1]['prefill_ms'] / rows[0]['prefill_ms']:.3f}, peak memory to {fits['peak_ratio']:.4f}: "
        f"{fits['peak_bytes_a_token']:.1f} bytes a token, where a full cache would take {_full_cache_bytes()}."
    )
    return lines


def _full_cache_bytes() -> int:
    """Bytes of float32 key and value a token in the layer of the long prompt."""
    return 2 * 4 * LONG_SHAPE.kv_heads * LONG_SHAPE.head_dim


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Three plots, points measured and lines fitted; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is missing, run `pip install 'keydiff-export[bench]'`", file=sys.stderr)
        return []
    files = []
    for name, label, upper, lower in (
        ("slots", "slots N + B", "token ms", "block ms"),
        ("block", "block B", "block ms", "block ms a token"),
        ("prompt", "prompt tokens", "token ms", "peak memory MB"),
    ):
        figure = Figure(figsize=(6, 6), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        for target, found in report["targets"].items():
            for axis, (x, y, line) in zip(axes, _curves(name, found), strict=True):
                (points,) = axis.plot(x, y, "o" if line is not None else "o-", label=target)
                if line is not None:
                    axis.plot(x, line, "-", color=points.get_color(), linewidth=1)
        for axis, title in zip(axes, (upper, lower), strict=True):
            axis.set_ylabel(title)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[0].legend()
        axes[1].set_xlabel(label)
        if name == "prompt":
            axes[1].set_xscale("log", base=2)
        files.append(folder / f"scaling-{name}.png")
        figure.savefig(files[-1], dpi=150)
    return files


def _curves(name: str, found: dict[str, Any]) -> list[tuple[list[float], list[float], list[float] | None]]:
    """Two curves of a plot: sizes, values, and the fitted line where there is one."""
    fits = found["fits"]
    if name == "prompt":
        x = [row["tokens"] for row in found["prompt"]]
        tokens = [row["decode_ms"] for row in found["prompt"]]
        return [(x, tokens, None), (x, [row["peak_bytes"] / 1e6 for row in found["prompt"]], None)]
    if name == "slots":
        rows = [row for row in found["rows"] if row["block"] == FIXED_BLOCK]
        x = [row["slots"] for row in rows]
        lines = [fits["decode_ms_by_slots"], fits["prefill_ms_by_slots"]]
        values = [[row[key] for row in rows] for key in ("decode_ms", "prefill_ms")]
        fitted = [[line["slope"] * slots + line["constant"] for slots in x] for line in lines]
        return [(x, value, line) for value, line in zip(values, fitted, strict=True)]
    rows = sorted((row for row in found["rows"] if row["budget"] == FIXED_BUDGET), key=lambda row: row["block"])
    x = [row["block"] for row in rows]
    once, token, pair = fits["prefill_ms_all"]["coefficients"]
    blocks = [once + block * (token + pair * (FIXED_BUDGET + block)) for block in x]
    return [
        (x, [row["prefill_ms"] for row in rows], blocks),
        (x, [row["prefill_ms"] / row["block"] for row in rows], [ms / b for ms, b in zip(blocks, x, strict=True)]),
    ]


def main() -> None:
    """Runs the sweeps and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=["executorch-xnnpack", "onnx-cpu"], choices=TARGETS)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--tokens", type=int, default=LONG_TOKENS, help="length of the long prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("scaling"))
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    if options.child:
        place, runtime, *numbers = options.child
        print(json.dumps(read_long(Path(place), runtime, *map(int, numbers))))
        return
    shape = LayerShape()
    report: dict[str, Any] = {"layer": vars(shape), "targets": {}}
    for target in options.target:
        report["targets"][target] = measure(target, options.budgets, options.blocks, options.tokens, shape)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scaling.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (options.output / "scaling.md").write_text(markdown(report) + "\n", encoding="utf-8")
    draw(report, options.output)
    print(markdown(report))


if __name__ == "__main__":
    main()
