"""What NPU artifacts themselves say: partitions, operators left on the CPU, and the caches' sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .isolated import run_isolated
from .qnn_sdk import Soc, find_sdk, soc

# Why operators are outside a delegate: those of the CPU's share by design, any other because a backend refused them,
# which an export does not let pass.
_BY_DESIGN = "by design: angles, positions and masks need more than an NPU's 16 bits, the embedding is a table look-up"
_NOT_TAKEN = "the NPU's backend does not take them"


def inspect_npu(place: Path, artifact: dict[str, Any], programs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Completes what the program files say with what only the manifest or the provider knows.

    Args:
        place: the artifact's folder.
        artifact: its manifest entry.
        programs: facts of every method, as the readers of CPU artifacts find them.

    Returns:
        The same facts with `state` and `slots` of the methods whose caches are inputs, for ONNX with `delegates`, as
        ONNX Runtime assigns its nodes, and with `why_outside` where operators are left on the CPU.

    Raises:
        UserError: an ONNX artifact and no QNN libraries.
    """
    for name, facts in programs.items():
        listed = artifact["methods"][name]["inputs"]
        state = {
            entry["name"]: entry["shape"] for entry in listed if entry["name"].rpartition("_")[0] in ("keys", "values")
        }
        if state:
            # Lowered programs number their inputs; the manifest has the names, the program the sizes.
            sizes = facts["state"] or dict(zip((e["name"] for e in listed), facts["inputs"], strict=True))
            facts["state"] = {n: sizes[n] for n in state}
            facts["slots"] = sorted({shape[1] for shape in facts["state"].values()})
        if artifact["runtime"] == "onnx-qnn" and not name.endswith("_inputs"):
            environment = find_sdk().environment()
            found = run_isolated(_assignment, place / f"{name}.onnx", soc(artifact["soc"]), environment=environment)
            facts["delegates"], facts["kernels_outside_delegates"] = found
        if facts["kernels_outside_delegates"]:
            facts["why_outside"] = _BY_DESIGN if name.endswith("_inputs") else _NOT_TAKEN
    return programs


def _assignment(file: Path, chip: Soc) -> tuple[dict[str, int], dict[str, int]]:
    """Partitions by provider other than the CPU, and operators on the CPU; runs in a child."""
    from .runtime.onnx_qnn import PROVIDER, qnn_session

    parts = qnn_session(file, chip, fallback=True).get_provider_graph_assignment_info()
    outside = Counter(node.op_type for part in parts if part.ep_name != PROVIDER for node in part.get_nodes())
    return dict(Counter(part.ep_name for part in parts if part.ep_name == PROVIDER)), dict(outside)
