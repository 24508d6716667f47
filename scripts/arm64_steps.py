"""Steps an exported ONNX folder and writes logits and held positions; needs numpy and onnxruntime only.

Usage: python scripts/arm64_steps.py FOLDER BUDGET BLOCK LENGTHS TOKENS OUTPUT.npz   (LENGTHS and TOKENS: a,b,c)
It runs on ARM64 under qemu, where transformers and torch are not at hand: the package is entered beside its front door.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np

package = types.ModuleType("keydiff_export")
package.__path__ = [str(Path(__file__).parent.parent / "keydiff_export")]
sys.modules["keydiff_export"] = package

from keydiff_export.runtime.onnxruntime import OnnxRuntimeRunner  # noqa: E402


def main() -> None:
    folder, budget, block, lengths, tokens, output = sys.argv[1:]
    runner = OnnxRuntimeRunner(Path(folder), int(budget), int(block), threads=1)
    ids = [int(token) for token in tokens.split(",")]
    logits, held = [], []
    for length in map(int, lengths.split(",")):
        logits.append(runner.step(ids[runner.seen : runner.seen + length]))
        kept = [sorted(head) for layer in runner.snapshot().held for head in layer]
        held.append([row + [-1] * (int(budget) - len(row)) for row in kept])
    np.savez(output, logits=np.array(logits), held=np.array(held))


if __name__ == "__main__":
    main()
