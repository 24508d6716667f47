"""Peak memory of an exported folder at several prompt lengths: one process a run, both runtimes, one table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from demo_text import demo_text
from transformers import AutoTokenizer

from keydiff_export import load


def measure(folder: Path, runtime: str, text: str) -> dict[str, float]:
    """Runs one prompt in a process of its own and returns what `run --json` prints."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        command = [sys.executable, "-m", "keydiff_export", "run", str(folder), "--runtime", runtime, "--raw", "--json"]
        command += ["--prompt-file", file.name, "--max-new-tokens", "16", "--allow-beyond-trained-context"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 12_000])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    titles = ("prompt", "held", "evicted", "prefill tok/s", "decode tok/s", "peak MB", "ratio")
    print(f"{'runtime':<14}" + "".join(f"{title:>14}" for title in titles))
    folder = load(options.folder)
    for runtime in sorted({artifact["runtime"] for artifact in folder.artifacts}):
        first = 0.0
        for tokens in options.tokens:
            result = measure(options.folder, runtime, demo_text(tokenizer, tokens))
            peak = result["peak_rss_bytes"] / 1e6
            first = first or peak
            held = min(result["prompt_tokens"], folder.shape.budget)
            figures = (
                f"{result['prompt_tokens']}",
                f"{held}",
                f"{result['evictions']}",
                f"{result['prefill_tokens_per_s']:.0f}",
                f"{result['decode_tokens_per_s'] or 0:.1f}",
                f"{peak:.0f}",
                f"{peak / first:.3f}",
            )
            print(f"{runtime:<14}" + "".join(f"{figure:>14}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
