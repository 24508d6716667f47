"""PNG plots of a bench: decode and time to first token against prompt length, and the time of a step by operator."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError

LARGEST = 10


def check_plots(folder: Path) -> None:
    """Makes the folder, before anything is measured.

    Raises:
        UserError: matplotlib is missing, or the folder cannot be made.
    """
    if find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: run `pip install 'keydiff-export[bench]'`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write plots to {folder}: {error.strerror}") from error


def draw_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws a report of `bench_folder`; returns the files, fewer where there is nothing to draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    files = [
        _lines(report, folder, figure, title)
        for figure, title in (("decode_ms", "decode, ms a token"), ("ttft_s", "time to first token, s"))
    ]
    return [*files, *_operators(report, folder)]


def _lines(report: dict[str, Any], folder: Path, figure: str, title: str) -> Path:
    """A line per contestant with its range, both axes logarithmic."""
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for contestant in report["contestants"]:
        rows = [row for row in report["summary"] if row["name"] == contestant["name"] and row[figure]]
        middle = [row[figure]["median"] for row in rows]
        below = [row[figure]["median"] - row[figure]["min"] for row in rows]
        above = [row[figure]["max"] - row[figure]["median"] for row in rows]
        axes.errorbar(
            [row["prompt_tokens"] for row in rows],
            middle,
            yerr=[below, above],
            marker="o",
            capsize=3,
            linestyle="-" if contestant["ours"] else "--",
            label=contestant["name"],
        )
    axes.set(xscale="log", yscale="log", xlabel="prompt, tokens", ylabel=title)
    axes.set_xticks(report["settings"]["prompt_tokens"], [str(n) for n in report["settings"]["prompt_tokens"]])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(alpha=0.3)
    axes.legend()
    file = folder / f"{figure.rpartition('_')[0]}.png"
    canvas.savefig(file, dpi=150)
    pyplot.close(canvas)
    return file


def _operators(report: dict[str, Any], folder: Path) -> list[Path]:
    """A bar per operator, both methods side by side, per artifact."""
    from matplotlib import pyplot

    files = []
    for name, methods in report["operators"].items():
        if "failed" in methods:
            continue
        canvas, panels = pyplot.subplots(1, len(methods), figsize=(6 * len(methods), 4.5), layout="constrained")
        for axes, (method, times) in zip(panels, methods.items(), strict=True):
            rows = list(times.items())
            rest = sum(milliseconds for _, milliseconds in rows[LARGEST:])
            rows = rows[:LARGEST] + ([("all others", rest)] if rest else [])
            axes.barh([operator for operator, _ in rows][::-1], [milliseconds for _, milliseconds in rows][::-1])
            axes.set(title=f"{name}: {method}", xlabel="ms a step")
        file = folder / f"operators-{name}.png"
        canvas.savefig(file, dpi=150)
        pyplot.close(canvas)
        files.append(file)
    return files
