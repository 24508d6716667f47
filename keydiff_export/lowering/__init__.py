"""Registry of lowering targets. Modules are imported on use: each needs its own heavy package."""

from __future__ import annotations

from importlib import import_module

from ..errors import UserError
from .base import Lowered, Phases, Target

_MODULES = {
    "executorch-xnnpack": ("executorch_xnnpack", "ExecuTorchXnnpack"),
    "onnx-cpu": ("onnx_cpu", "OnnxCpu"),
    "executorch-qnn": ("executorch_qnn", "ExecuTorchQnn"),
    "onnx-qnn": ("onnx_qnn", "OnnxQnn"),
}
TARGETS = tuple(_MODULES)


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UserError: unknown target, or a package that it needs is missing.
    """
    if name not in _MODULES:
        raise UserError(f"unknown target {name!r}: choose from {', '.join(TARGETS)}")
    module, cls = _MODULES[name]
    try:
        return getattr(import_module(f".{module}", __name__), cls)()
    except ImportError as error:
        raise UserError(f"target {name} needs the package {error.name}: run `pip install {error.name}`") from error


__all__ = ["TARGETS", "Lowered", "Phases", "Target", "get_target"]
