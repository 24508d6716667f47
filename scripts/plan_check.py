"""What `plan` says of exported folders against what they are: files, cache, planned and resident memory.

Resident memory is what a process gains by loading both methods and filling the cache, its libraries in memory before.
A runtime's code is in it; in a small model it shows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from keydiff_export import load
from keydiff_export.inspection import inspect_folder
from keydiff_export.plan import (
    Request,
    all_state_bytes,
    arena_bytes,
    cache_bytes,
    file_bytes,
    get_storage,
    memory_bytes,
)
from keydiff_export.runtime import open_artifact
from keydiff_export.sizes import model_sizes


def resident(place: Path, runtime: str, budget: int, block: int) -> int:
    """Bytes that this process gains by an artifact."""
    if runtime == "executorch":
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
        from executorch.extension.pybindings import portable_lib  # noqa: F401
    else:
        import onnxruntime  # noqa: F401
    before = _resident()
    runner = open_artifact(place, runtime, budget, block)
    # A slot takes memory once it is written.
    for _ in range(-(-budget // block) + 1):
        runner.step([0] * block)
    runner.step([0])
    return _resident() - before


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def check(path: Path) -> None:
    """Prints the rows of one folder."""
    folder = load(path)
    shape = folder.shape
    model = model_sizes(json.loads((path / "config.json").read_text(encoding="utf-8")), str(path))
    state, arena = (
        all_state_bytes(model, shape.slots, shape.dtype),
        arena_bytes(model, shape.slots, shape.block, shape.dtype),
    )
    for artifact, inspected in zip(folder.artifacts, inspect_folder(folder)["artifacts"], strict=True):
        target, quant = artifact["target"], artifact["quant"]
        storage, request = (
            get_storage(target, quant),
            Request(1, shape.block, target, quant, "cpu", None, shape.budget, shape.dtype),
        )
        child = [str(path / artifact["target"]), artifact["runtime"], str(shape.budget), str(shape.block)]
        command = [sys.executable, __file__, "--child", *child]
        gained = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        rows = [
            ("files", file_bytes(model, storage), inspected["bytes"]),
            ("cache", cache_bytes(model, shape.slots, shape.dtype), inspected["cache_bytes"]),
            ("state and arena", state + arena, inspected["planned_memory_bytes"]),
            ("resident", memory_bytes(model, request, shape.slots), gained),
        ]
        for name, planned, actual in rows:
            if actual is not None:
                ratio = f"{planned / 1e6:.2f} | {actual / 1e6:.2f} | {planned / actual:.3f}"
                print(f"| {path.name} | {artifact['target']} | {name} | {ratio} |", flush=True)


def main() -> None:
    """One table for all folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        place, runtime, budget, block = options.child
        print(resident(Path(place), runtime, int(budget), int(block)))
        return
    print("| folder | target | what | planned MB | actual MB | ratio |\n" + "|---" * 6 + "|")
    for folder in options.folders:
        check(folder)


if __name__ == "__main__":
    main()
