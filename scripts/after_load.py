"""Whether a generated token costs more after a long prompt, or only after minutes of work: the prompt or the machine.

A decode step after a short prompt, after a long one, after a short one read right behind it, and after a short one
behind a rest. What the third has in common with the second is the machine's state, with the first the graph's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from keydiff_export import load
from keydiff_export.runtime import open_artifact
from keydiff_export.runtime.base import Runner

STEPS, REST = 32, 5.0


def decode_after(runner: Runner, length: int) -> float:
    """Milliseconds of a decode step behind a prompt, median of 32."""
    runner.reset()
    for _ in range(0, length, runner.block):
        runner.step(list(range(runner.block)))
    times = []
    for token in range(STEPS):
        began = time.perf_counter()
        runner.step([token])
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def main() -> None:
    """One line an artifact."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=32768, help="length of the long prompt")
    options = parser.parse_args()
    folder = load(options.folder)
    for artifact in folder.artifacts:
        place, short = options.folder / artifact["target"], folder.shape.budget
        runner = open_artifact(place, artifact["runtime"], folder.shape.budget, folder.shape.block, 2)
        time.sleep(REST)
        first, long, behind = (decode_after(runner, length) for length in (short, options.tokens, short))
        time.sleep(REST)
        rested = decode_after(runner, short)
        print(
            f"{artifact['target']}: {first:.2f} ms after {short} tokens; over it: "
            f"after {options.tokens} {long / first:.3f}, "
            f"after {short} right behind {behind / first:.3f}, after a rest {rested / first:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
