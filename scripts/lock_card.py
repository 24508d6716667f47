"""Writes an export's I/O signature and measured results into its graph card: signature.json and results.json.

An export of some of a card's targets (`export CARD --target ...`) locks those; what the card says of the others stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from keydiff_export import load


def signature(manifest: dict[str, Any]) -> dict[str, Any]:
    """Inputs and outputs of every method of every target, the state of all layers by the first one's tensors."""
    shapes: dict[str, Any] = {}
    for artifact in manifest["artifacts"]:
        methods = {}
        for name, method in artifact["methods"].items():
            methods[name] = {
                side: [t for t in method[side] if not _later_layer(t["name"])] for side in ("inputs", "outputs")
            }
        shapes[artifact["target"]] = methods
    return {"layers": manifest["cache"]["layers"], "targets": shapes}


def _later_layer(name: str) -> bool:
    last = name.removesuffix("_next").removesuffix("_appended").rsplit("_", 1)[-1]
    return last.isdigit() and int(last) > 0


def results(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Sizes, planned memory and the parity run in short."""
    parity = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
    found = {}
    for artifact in manifest["artifacts"]:
        report = next(r for r in parity["artifacts"] if r["target"] == artifact["target"])
        lists = ("by_layer_and_head", "by_step", "disagreements")
        kept = {key: value for key, value in report["kept_slots"].items() if key not in lists}
        found[artifact["target"]] = {
            "quant": artifact["quant"],
            "bytes": sum(file["bytes"] for file in artifact["files"]),
            "cache_bytes": artifact["cache_bytes"],
            "planned_memory_bytes": artifact["planned_memory_bytes"],
            "reference": report["reference"],
            "float32": report["float32"],
            "kept_slots": kept,
            # An emulator reads less than the folder's other artifacts do.
            **{key: report[key] for key in ("prompt_tokens", "greedy_tokens") if key in report},
        }
    return {
        "weights_sha256": manifest["model"]["weights_sha256"],
        "tools": manifest["tools"],
        "prompt_tokens": parity["prompt_tokens"],
        "greedy_tokens": parity["greedy_tokens"],
        "targets": found,
    }


def main() -> None:
    """Locks one card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("exported", type=Path)
    parser.add_argument("card", type=Path)
    options = parser.parse_args()
    manifest = load(options.exported).manifest
    for name, data in (("signature", signature(manifest)), ("results", results(options.exported, manifest))):
        file = options.card / f"{name}.json"
        if file.exists():
            data["targets"] = {**json.loads(file.read_text(encoding="utf-8"))["targets"], **data["targets"]}
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
