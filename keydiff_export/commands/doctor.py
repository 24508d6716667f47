"""`doctor`: what is installed, what every target needs, and the line that installs what is missing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import UserError
from ..lowering import TARGETS, get_target
from ..qnn_sdk import INSTALL, PACKAGE, PINNED, find_sdk

_PACKAGES = ("torch", "executorch", "torchao", "transformers", "onnx", "onnxruntime", PACKAGE)


def diagnose() -> dict[str, Any]:
    """Facts for a bug report and for the next step: machine, packages, QNN libraries, and a verdict on every target."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "packages": {name: _version(name) for name in _PACKAGES},
        "qnn": _qnn(),
        "targets": {name: _target(name) for name in TARGETS},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _qnn() -> dict[str, Any]:
    try:
        sdk = find_sdk()
    except UserError as error:
        return {"ready": False, "reason": str(error), "install": INSTALL, "pinned": PINNED}
    return {"ready": True, "source": sdk.source, "root": str(sdk.root), "pinned": PINNED}


def _target(name: str) -> dict[str, Any]:
    try:
        target = get_target(name)
    except UserError as error:
        return {"ready": False, "reason": str(error)}
    return {"ready": True, "quants": list(target.quants)}


def doctor_table(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = [f"Python {report['python']} on {report['machine']}", "", "packages"]
    lines += [f"  {name:<18}{found or 'not installed'}" for name, found in report["packages"].items()]
    qnn = report["qnn"]
    lines += ["", "Qualcomm NPU libraries"]
    lines.append(f"  {qnn['source']}, linked in {qnn['root']}" if qnn["ready"] else f"  {qnn['reason']}")
    lines += ["", "targets"]
    for name, target in report["targets"].items():
        verdict = f"ready, --quant {', '.join(target['quants'])}" if target["ready"] else target["reason"]
        lines.append(f"  {name:<20}{verdict}")
    return "\n".join(lines)
