"""Runtime drivers: one file a runtime behind one interface. Modules are imported on use."""

from __future__ import annotations

from pathlib import Path

from .base import Runner


def open_artifact(
    place: Path,
    runtime: str,
    budget: int,
    block: int,
    threads: int | None = None,
    evict_every: int = 1,
    resident: bool = True,
    profile: Path | None = None,
) -> Runner:
    """A runner for the artifact in a folder.

    Args:
        place: the artifact's folder.
        runtime: executorch or onnxruntime.
        budget, block: N and B of the graph.
        threads: CPU threads, all cores by default.
        evict_every: k of the graph.
        resident: keep all methods loaded; without it ONNX Runtime holds the weights of one at a time.
        profile: folder that the runtime writes its own profile to, none by default.

    Raises:
        UserError: the runtime's package is missing, or it refuses the artifact.
    """
    if runtime == "executorch":
        from .executorch import ExecuTorchRunner

        return ExecuTorchRunner(place / "model.pte", budget, block, threads, evict_every, profile)
    from .onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(place, budget, block, threads, evict_every, resident, profile)
