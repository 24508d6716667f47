"""Runtime drivers: one file a runtime behind one interface. Modules are imported on use."""

from __future__ import annotations

from pathlib import Path

from .base import Runner


def open_artifact(
    place: Path, runtime: str, budget: int, block: int, threads: int | None = None, profile: Path | None = None
) -> Runner:
    """A runner for the artifact in a folder; with a folder `profile` it writes the runtime's own profile there.

    Raises:
        UserError: the runtime's package is missing, or it refuses the artifact.
    """
    if runtime == "executorch":
        from .executorch import ExecuTorchRunner

        return ExecuTorchRunner(place / "model.pte", budget, block, threads, profile)
    from .onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(place, budget, block, threads, profile)
