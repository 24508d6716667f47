"""`bench OUT`: an export and its peers, measured side by side at several prompt lengths."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from ..child import call_in_child
from ..errors import UserError
from ..inspection import inspect_program
from ..machine import Usage, machine_facts
from ..manifest import OutputFolder
from ..measure import Prompt
from ..peers import Peer, Prepared, parse_peer
from ..text import long_text
from ..traffic import weight_bytes
from .run import load_tokenizer

PROMPT_TOKENS = (512, 2048, 7900, 32_768)
CONTEXT_STEP = 256
FIGURES = ("decode_ms", "ttft_s", "peak_rss_bytes", "model_rss_bytes")
# What should not grow with the prompt. Pages of mapped files come and go: those of an embedding as words are met.
GROWTH = ("decode_ms", "peak_rss_bytes", "anonymous_rss_bytes")


@dataclass(frozen=True)
class Contestant:
    """Something to measure.

    Attributes:
        name: an artifact's target, or a peer's name and its file where one was given.
        version: of the package that made it (ours) or that runs it (a peer).
        ours: whether it is an artifact of the folder.
        opener, arguments: as in `measure.measure`.
        file_bytes: size of its files.
        context: most tokens that it takes, prompt and answer; None for any number.
        weight_bytes: weights that a decode step reads; a peer's files as a whole.
        cache_item_bytes: keys and values of one token in all layers.
        cache_tokens: of how many tokens a decode step reads them at least and at most, None for no limit.
    """

    name: str
    version: str
    ours: bool
    opener: str
    arguments: dict[str, Any]
    file_bytes: int
    context: int | None
    weight_bytes: int
    cache_item_bytes: int
    cache_tokens: tuple[int, int | None]

    def bytes_a_token(self, prompt_tokens: int) -> int:
        """Bytes that a decode step reads behind a prompt."""
        least, most = self.cache_tokens
        read = max(prompt_tokens, least)
        return self.weight_bytes + self.cache_item_bytes * (read if most is None else min(read, most))


def bench_folder(
    folder: OutputFolder,
    against: Iterable[str] = (),
    prompt_tokens: Iterable[int] = PROMPT_TOKENS,
    decode_tokens: int = 32,
    repeats: int = 3,
    threads: int = 2,
    time_limit: float = 1800.0,
    max_others: float | None = None,
    report: Callable[[str], None] = lambda line: None,
    call: Callable[..., Any] = call_in_child,
) -> dict[str, Any]:
    """Measures every artifact of a folder and the named peers, each measurement in a process of its own.

    Within a repeat all contestants take their turn at every prompt length, in reverse order in every second repeat, so
    that a ratio compares what ran next to each other.

    Args:
        folder: an opened output folder.
        against: peers, `NAME` or `NAME=PATH`.
        prompt_tokens: lengths of the prompt, cut from a real text.
        decode_tokens: tokens generated behind it.
        repeats: measurements of each.
        threads: CPU threads of all.
        time_limit: seconds a measurement may take.
        max_others: share of the machine that other processes may take during a measurement; one with more is reported
            as disturbed and left out of summary and ratios. No limit by default.
        report: told each measurement as it begins.
        call: how a function is called in a child process.

    Returns:
        settings, machine, contestants, absent peers with their install line, all runs, their summary, ratios, growth
        with the prompt, and operators.

    Raises:
        UserError: a bad setting, or an unknown peer.
    """
    lengths = sorted(set(prompt_tokens))
    _check(lengths, decode_tokens, repeats, threads)
    parsed = [(text, *parse_peer(text)) for text in dict.fromkeys(against)]
    prompts = _prompts(folder, lengths)
    contestants = _artifacts(folder)
    absent: list[dict[str, str]] = []
    for text, peer, path in parsed:
        try:
            report(f"preparing {text}")
            contestants.append(_peer(folder, peer, path))
        except UserError as error:
            absent.append({"name": peer.name, "reason": str(error), "install": peer.install})
    before = Usage.now()
    runs: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for tokens, contestant in product(lengths, contestants[:: -1 if repeat % 2 else 1]):
            report(f"repeat {repeat + 1} of {repeats}, {tokens} tokens: {contestant.name}")
            run = _run(contestant, prompts[tokens], decode_tokens, threads, time_limit, call)
            if max_others is not None and run["status"] == "ok" and (run["others"] or 0.0) > max_others:
                run["status"] = "disturbed"
            runs.append({"name": contestant.name, "prompt_tokens": tokens, "repeat": repeat, **run})
    summary = [_summary(contestant, tokens, runs) for tokens, contestant in product(lengths, contestants)]
    return {
        "folder": str(folder.path),
        "model": folder.manifest["model"],
        "policy": folder.manifest["policy"],
        "cache": folder.manifest["cache"],
        "tools": folder.manifest["tools"],
        "settings": {
            "prompt_tokens": lengths,
            "decode_tokens": decode_tokens,
            "repeats": repeats,
            "threads": threads,
            "time_limit_s": time_limit,
            "max_others": max_others,
        },
        "machine": {
            **machine_facts(),
            "copy_bytes_per_s": _spread([run["copy_bytes_per_s"] for run in runs if run["status"] == "ok"]),
            "stolen": Usage.now().shares_since(before)["stolen"],
        },
        "contestants": [
            {key: getattr(c, key) for key in ("name", "version", "ours", "file_bytes", "context")} for c in contestants
        ],
        "absent": absent,
        "runs": runs,
        "summary": summary,
        "ratios": _ratios(contestants, lengths, runs, summary),
        "growth": [entry for c in contestants if (entry := _growth(c.name, runs))],
        "operators": {c.name: _operators(c, threads, time_limit, report, call) for c in contestants if c.ours},
    }


def _check(lengths: list[int], decode_tokens: int, repeats: int, threads: int) -> None:
    least = {"prompt-tokens": (min(lengths, default=0), 2), "decode-tokens": (decode_tokens, 2)}
    least |= {"repeats": (repeats, 1), "threads": (threads, 1)}
    for name, (value, limit) in least.items():
        if value < limit:
            raise UserError(f"{name} must be at least {limit}, got {value}")


def _prompts(folder: OutputFolder, lengths: list[int]) -> dict[int, Prompt]:
    """A text's first tokens, for each length."""
    tokenizer = load_tokenizer(folder)
    ids = [int(i) for i in tokenizer(long_text(), add_special_tokens=False)["input_ids"]]
    if max(lengths) > len(ids):
        raise UserError(f"prompt-tokens must be at most {len(ids)}, the length of the text, got {max(lengths)}")
    return {length: Prompt(ids[:length], str(tokenizer.decode(ids[:length]))) for length in lengths}


def _artifacts(folder: OutputFolder) -> list[Contestant]:
    found = []
    for artifact in folder.artifacts:
        if artifact["runtime"].endswith("-qnn"):
            continue  # an emulator's time says nothing
        arguments = {
            "place": str(folder.path / artifact["target"]),
            "runtime": artifact["runtime"],
            "budget": folder.shape.budget,
            "block": folder.shape.block,
            "evict_every": folder.shape.evict_every,
        }
        found.append(
            Contestant(
                name=artifact["target"],
                version=folder.manifest["tools"].get(artifact["runtime"], ""),
                ours=True,
                opener="keydiff_export.measure:open_exported",
                arguments=arguments,
                file_bytes=sum(entry["bytes"] for entry in artifact["files"]),
                context=None if folder.policy.evicts else folder.shape.budget,
                weight_bytes=weight_bytes(folder.path, artifact["quant"], artifact["runtime"]),
                cache_item_bytes=artifact["cache_bytes"] // folder.shape.slots,
                cache_tokens=_cache_tokens(folder, artifact),
            )
        )
    return found


def _cache_tokens(folder: OutputFolder, artifact: dict[str, Any]) -> tuple[int, int]:
    """Fused attention reads the slots that hold a token, attention spelled out in a static graph reads them all."""
    methods = inspect_program(folder.path / artifact["target"], artifact["runtime"])
    fused = any("GroupQueryAttention" in name for name in methods["prefill"]["kernels_outside_delegates"])
    return (0, folder.shape.budget) if fused else (folder.shape.slots,) * 2


def _peer(folder: OutputFolder, peer: Peer, path: Path | None) -> Contestant:
    if not peer.installed:
        raise UserError("it is not installed")
    prepared: Prepared = peer.prepare(folder, path)
    size = sum(file.stat().st_size for file in prepared.files)
    shape = folder.shape
    item = 2 * shape.layers * shape.kv_heads * shape.head_dim * prepared.cache_item_bytes
    return Contestant(
        name=peer.name if path is None else f"{peer.name} ({path.name})",
        version=version(peer.package),
        ours=False,
        opener=prepared.opener,
        arguments=prepared.arguments,
        file_bytes=size,
        context=prepared.context,
        weight_bytes=size,
        cache_item_bytes=item,
        cache_tokens=(0, None),
    )


def _run(
    contestant: Contestant, prompt: Prompt, count: int, threads: int, time_limit: float, call: Callable[..., Any]
) -> dict[str, Any]:
    """One measurement, or why there is none."""
    tokens = len(prompt.ids)
    if contestant.context is not None and tokens + count > contestant.context:
        return {"status": "over its context"}
    context = -(-(tokens + count) // CONTEXT_STEP) * CONTEXT_STEP
    arguments = {
        "opener": contestant.opener,
        "arguments": contestant.arguments,
        "ids": prompt.ids,
        "text": prompt.text,
        "count": count,
        "threads": threads,
        "context": context,
    }
    try:
        figures = call("keydiff_export.measure:measure", arguments, time_limit)
    except UserError as error:
        return {"status": f"failed: {error}"}
    token_s = statistics.median(figures["decode_ms"]) / 1e3
    share = contestant.bytes_a_token(tokens) / token_s / figures["copy_bytes_per_s"]
    base = figures["base_rss_bytes"]
    model = None if base is None else figures["peak_rss_bytes"] - base
    return {"status": "ok", **figures, "model_rss_bytes": model, "bandwidth_share": share}


def _figure(run: dict[str, Any], figure: str) -> float:
    """One number of a run; its decode time is the median over its tokens."""
    value = run[figure]
    return float(statistics.median(value) if isinstance(value, list) else value)


def _spread(values: list[float]) -> dict[str, float] | None:
    """Median, smallest and largest; None of nothing."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def _summary(contestant: Contestant, tokens: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians with range over the repeats of one contestant at one length."""
    own = [run for run in runs if run["name"] == contestant.name and run["prompt_tokens"] == tokens]
    done = [run for run in own if run["status"] == "ok"]
    row: dict[str, Any] = {"name": contestant.name, "ours": contestant.ours, "prompt_tokens": tokens}
    row["status"] = next((run["status"] for run in own if run["status"] != "ok"), "ok")
    row["file_bytes"], row["bytes_a_token"] = contestant.file_bytes, contestant.bytes_a_token(tokens)
    for figure in (*FIGURES, "prefill_tokens_per_s", "load_s", "bandwidth_share", "base_rss_bytes", "others"):
        values = [_figure(run, figure) for run in done if run[figure] is not None]
        row[figure] = _spread(values)
    return row


def _ratios(
    contestants: list[Contestant], lengths: list[int], runs: list[dict[str, Any]], summary: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Ours over each peer's, repeat by repeat; then the best of ours over the best peer, best by median."""
    ours = [c.name for c in contestants if c.ours]
    peers = [c.name for c in contestants if not c.ours]
    rows: list[dict[str, Any]] = []
    for tokens in lengths:
        for one, other in product(ours, peers):
            figures = {figure: _paired(runs, figure, (one, tokens), (other, tokens)) for figure in FIGURES}
            rows.append({"prompt_tokens": tokens, "ours": one, "peer": other, **figures})
        best: dict[str, Any] = {}
        for figure in FIGURES:
            names = [_best(summary, tokens, figure, side) for side in (ours, peers)]
            if all(names):
                pairs = _paired(runs, figure, (names[0], tokens), (names[1], tokens))
                best[figure] = pairs and {**pairs, "ours": names[0], "peer": names[1]}
        if any(best.values()):
            rows.append({"prompt_tokens": tokens, "ours": "best of ours", "peer": "best peer"} | best)
    return rows


def _best(summary: list[dict[str, Any]], tokens: int, figure: str, names: list[str]) -> str | None:
    rows = [row for row in summary if row["prompt_tokens"] == tokens and row["name"] in names and row[figure]]
    return min(rows, key=lambda row: row[figure]["median"])["name"] if rows else None


def _paired(
    runs: list[dict[str, Any]], figure: str, upper: tuple[str | None, int], lower: tuple[str | None, int]
) -> dict[str, float] | None:
    """Spread of upper / lower over the repeats in which both were measured; each is (name, prompt length)."""
    sides: list[dict[int, float]] = [
        {
            run["repeat"]: _figure(run, figure)
            for run in runs
            if (run["name"], run["prompt_tokens"]) == side and run["status"] == "ok" and run[figure] is not None
        }
        for side in (upper, lower)
    ]
    return _spread([sides[0][repeat] / sides[1][repeat] for repeat in sides[0] if repeat in sides[1]])


def _growth(name: str, runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Figures behind the longest prompt that was measured over those behind the shortest; None with one length."""
    measured = sorted({run["prompt_tokens"] for run in runs if run["name"] == name and run["status"] == "ok"})
    if len(measured) < 2:
        return None
    first, last = measured[0], measured[-1]
    ratios = {figure: _paired(runs, figure, (name, last), (name, first)) for figure in GROWTH}
    return {"name": name, "from_tokens": first, "to_tokens": last, **ratios}


def _operators(
    contestant: Contestant,
    threads: int,
    time_limit: float,
    report: Callable[[str], None],
    call: Callable[..., Any],
) -> dict[str, Any]:
    report(f"operators of {contestant.name}")
    try:
        return dict(
            call("keydiff_export.operators:operator_times", {**contestant.arguments, "threads": threads}, time_limit)
        )
    except UserError as error:
        return {"failed": str(error)}


def folder_table(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    lines = [
        "| prompt | what | prefill tokens/s | TTFT s | decode ms | of a copy | peak MB | of it before loading | load s "
        "| size MB |",
        "|---" * 10 + "|",
    ]
    for row in report["summary"]:
        cells = [str(row["prompt_tokens"]), row["name"]]
        if row["decode_ms"] is None:
            lines.append(f"| {' | '.join(cells)} | {row['status']} |" + " |" * 7)
            continue
        cells += [
            f"{row['prefill_tokens_per_s']['median']:.0f}",
            _cell(row["ttft_s"]),
            _cell(row["decode_ms"]),
            f"{row['bandwidth_share']['median']:.2f}",
            f"{row['peak_rss_bytes']['median'] / 1e6:.0f}",
            "" if row["base_rss_bytes"] is None else f"{row['base_rss_bytes']['median'] / 1e6:.0f}",
            f"{row['load_s']['median']:.2f}",
            f"{row['file_bytes'] / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if report["ratios"]:
        lines += [
            "",
            "| prompt | ours / peer | decode | TTFT | peak memory | after loading libraries |",
            "|---" * 6 + "|",
        ]
        for row in report["ratios"]:
            cells = [_cell(row.get(figure)) for figure in FIGURES]
            lines.append(f"| {row['prompt_tokens']} | {row['ours']} / {row['peer']} | " + " | ".join(cells) + " |")
    if report["growth"]:
        columns = "| what | longest / shortest prompt | decode | peak memory | memory without mapped files |"
        lines += ["", columns, "|---" * 5 + "|"]
        for row in report["growth"]:
            span = f"{row['to_tokens']} / {row['from_tokens']}"
            lines.append(f"| {row['name']} | {span} | " + " | ".join(_cell(row[figure]) for figure in GROWTH) + " |")
    return "\n".join([*lines, "", *_notes(report)])


def _cell(spread: dict[str, Any] | None) -> str:
    """Median and range; empty for nothing."""
    return "" if spread is None else f"{spread['median']:.3g} ({spread['min']:.3g}-{spread['max']:.3g})"


def _notes(report: dict[str, Any]) -> list[str]:
    machine, settings = report["machine"], report["settings"]
    others = [row["others"]["median"] for row in report["summary"] if row["others"]]
    copy = machine["copy_bytes_per_s"]
    lines = [
        f"medians (min-max) of {settings['repeats']} repeats in turn, {settings['decode_tokens']} tokens decoded, "
        f"{settings['threads']} threads; {machine['cpu']}, {machine['cpus']} CPUs"
        + (f", memory copy {copy['median'] / 1e9:.1f} GB/s" if copy else "")
        + (f", other processes took {max(others):.0%} of it at worst" if others else "")
        + (f", stolen {machine['stolen']:.0%}" if machine["stolen"] is not None else "")
    ]
    lines += [f"absent: {a['name']}: {a['reason']}; to install it: {a['install']}" for a in report["absent"]]
    return lines
