"""What decides whether an NPU artifact passes. It computes in 16 bits or fewer and is held to the float32 reference."""

from __future__ import annotations

from typing import Any

from .parity import KeptSlots

# An emulator is slow, so an NPU run is shorter than a CPU run: twice through the cache, and this many greedy tokens.
GREEDY_TOKENS = 32
# Each of two cosines may be off by 1e-3 in float16; nearer than this, either may stay.
HALF_TIE = 2e-3
# Where a card says nothing. 4-bit weights of a tiny random model leave 0.94; below this a graph is broken, not coarse.
LEAST_JACCARD = 0.9


def npu_prompt_tokens(budget: int, block: int) -> int:
    """Prompt tokens of an NPU parity run: the cache is full after half of them."""
    return 2 * (budget + block)


def _gate(name: str, value: float | None, limit: str, passed: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "passed": bool(passed)}


def crash_gate(cause: str) -> dict[str, Any]:
    """The one failed check of an artifact whose process died."""
    return _gate(f"runs without a crash ({cause})", None, "an answer", False)


def npu_gates(
    quant: str, against: dict[str, Any], kept: KeptSlots, floors: dict[str, float | None]
) -> list[dict[str, Any]]:
    """The checks of an NPU artifact against float32.

    Args:
        quant: fp16 has fixed limits; fewer bits lose what they lose, and the card says how much is accepted.
        against: `parity.compare_logits` against the float32 reference.
        kept: agreement of the kept sets.
        floors: the card's `sqnr_floor_db`, `jaccard_floor` and `token_floor`, each perhaps None. Without one, kept sets
            are held to LEAST_JACCARD and the others reported.
    """
    tokens, sqnr = against["token_agreement"], against["sqnr_db"]
    if quant == "fp16":
        gap = max((d["score_gap"] for d in kept.disagreements), default=0.0)
        return [
            _gate("greedy tokens equal", tokens, "= 1", tokens == 1),
            _gate("kept sets equal, near ties apart (largest score gap)", gap, f"< {HALF_TIE}", gap < HALF_TIE),
        ]
    values = {
        "token_floor": ("greedy tokens equal to float32", tokens),
        "jaccard_floor": ("kept sets, mean Jaccard", kept.jaccard / max(kept.compared, 1)),
        "sqnr_floor_db": ("SQNR to float32, dB", sqnr),
    }
    checks = []
    for key, (name, value) in values.items():
        floor = floors.get(key)
        if floor is None and key == "jaccard_floor":
            floor = LEAST_JACCARD
        passed = floor is None or value is None or value >= floor
        checks.append(_gate(name, value, "reported" if floor is None else f">= {floor}", passed))
    return checks
