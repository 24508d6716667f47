"""Opens a QNN artifact: on x86-64 Linux the HTP emulator runs it, in a process of its own."""

from __future__ import annotations

from pathlib import Path

from ..policies import Policy
from ..qnn_sdk import Soc, find_sdk
from ..shape import CacheShape
from .base import Runner
from .isolated import IsolatedRunner


def open_qnn(runtime: str, folder: Path, shape: CacheShape, policy: Policy, soc: Soc) -> IsolatedRunner:
    """A runner for the artifact of runtime "executorch-qnn" or "onnx-qnn" in `folder`.

    Raises:
        UserError: no QNN libraries.
        CrashError: the process died while it loaded the artifact.
    """
    return IsolatedRunner(
        _load,
        runtime,
        folder,
        shape,
        policy,
        soc,
        budget=shape.budget,
        block=shape.block,
        environment=find_sdk().environment(),
    )


def _load(runtime: str, folder: Path, shape: CacheShape, policy: Policy, soc: Soc) -> Runner:
    # Imported here: each needs a package of its own, and this runs in the child.
    if runtime == "executorch-qnn":
        from .executorch_qnn import make_runner
    else:
        from .onnx_qnn import make_runner
    return make_runner(folder, shape, policy, soc)
