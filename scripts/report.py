"""Prints the parity figures of all graph cards as a Markdown table, from their results.json."""

from __future__ import annotations

import json
from pathlib import Path

GRAPHS = Path(__file__).parent.parent / "graphs"


def main() -> None:
    """One row a card and target."""
    print("| card | target | size | cache | kept sets equal | greedy tokens | logits max abs | SQNR to float32 |")
    print("|---|---|---|---|---|---|---|---|")
    for file in sorted(GRAPHS.glob("*/results.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        for target, entry in results["targets"].items():
            kept, reference, float32 = entry["kept_slots"], entry["reference"], entry["float32"]
            sqnr = "exact" if float32["sqnr_db"] is None else f"{float32['sqnr_db']:.1f} dB"
            print(
                f"| {file.parent.name} | {target} | {entry['bytes'] / 1e6:.0f} MB "
                f"| {entry['cache_bytes'] / 1e6:.1f} MB "
                f"| {kept['sets_equal'] / kept['sets_compared']:.1%} (Jaccard {kept['mean_jaccard']:.4f}) "
                f"| {reference['token_agreement']:.1%} | {reference['logits_max_abs']:.1e} | {sqnr} |"
            )


if __name__ == "__main__":
    main()
