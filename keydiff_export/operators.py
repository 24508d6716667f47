"""Where the time of a step goes, by operator, as the runtimes themselves record it."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .runtime import open_artifact

STEPS = {"decode": 24, "prefill": 4}
# Envelopes around the operators that have their own records.
_ENVELOPES = ("Method::execute", "OPERATOR_CALL")
_DELEGATE = "DELEGATE_CALL"
# What is left out of names such as "Fully Connected (NC, QD8, F32, QC8W) GEMM #3" and "native_call_argmax.out".
_NUMBERING = r"^native_call_|\.\w+$| #\d+$"


def operator_times(
    place: str, runtime: str, budget: int, block: int, evict_every: int, threads: int
) -> dict[str, dict[str, float]]:
    """Milliseconds a step by operator, the largest first, of both methods with a full cache.

    Every operator of the graph counts with its median over the steps. The caches hold zeros: nothing that is computed
    depends on what is in them. Recording costs time of its own, so the sum is above an unrecorded step.

    Args:
        place: folder of the artifact.
        runtime: executorch or onnxruntime.
        budget, block, evict_every: N, B and k. Of k > 1 the decode step is one that only appends.
        threads: CPU threads.
    """
    found = {}
    for method, steps in STEPS.items():
        with tempfile.TemporaryDirectory() as scratch:
            runner = open_artifact(Path(place), runtime, budget, block, threads, evict_every, profile=Path(scratch))
            runner.seen = budget + block
            for _ in range(steps):
                runner.staged = 0
                runner.step([0] * (1 if method == "decode" else block))
            runner.end_profile()
            read = _read_executorch if runtime == "executorch" else _read_onnxruntime
            times: dict[str, float] = defaultdict(float)
            recorded = "append" if method == "decode" and evict_every > 1 else method
            for name, milliseconds in read(Path(scratch), recorded):
                times[name] += milliseconds
        found[method] = {name: round(times[name], 4) for name in sorted(times, key=lambda name: -times[name])}
    return found


def _read_onnxruntime(folder: Path, method: str) -> Iterator[tuple[str, float]]:
    (file,) = folder.glob(f"{method}*.json")
    nodes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(file.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    for (operator, _), durations in nodes.items():
        yield operator, statistics.median(durations)


def _read_executorch(folder: Path, method: str) -> Iterator[tuple[str, float]]:
    from executorch.devtools import Inspector

    delegates = inside = 0.0
    for block in Inspector(etdump_path=str(folder / "model.etdump")).event_blocks:
        for event in block.events if block.name == "Execute" else []:
            milliseconds = statistics.median(event.perf_data.raw)
            if event.name == _DELEGATE:
                delegates += milliseconds
            elif event.name not in _ENVELOPES:
                inside += milliseconds if event.is_delegated_op else 0.0
                yield re.sub(_NUMBERING, "", event.name), milliseconds
    yield "delegates, outside their operators", max(delegates - inside, 0.0)
