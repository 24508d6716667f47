"""What one step costs on paper: FLOPs, bytes and state of attention, scoring and selection, policy by policy.

Two counts of scoring stand side by side. *As defined* is a policy's formula carried out by itself, the keys read once
more and, for the policies that look at attention, their rows of it computed once more, because a fused attention kernel
does not hand them out. *In our graphs* is what a graph of ours adds to the matrix products that attention makes anyway;
`runtime_tests/test_complexity.py` holds it to what torch's FLOP counter sees. The counts are derived from the
definitions (arXiv 2504.15364, Eq. 4-8, A.1 and F.2; the policies' own papers), not copied from the paper's table.

Conventions: a product of [m, k] and [k, n] is 2 m k n FLOPs; every other number that is added, multiplied, divided,
compared or put through a function is one. All counts are for one layer. This file needs neither torch nor numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

SOFTMAX = 5  # maximum, difference, exponential, sum, quotient: FLOPs a number
FLOAT, DOUBLE, INT64 = 4, 8, 8  # bytes


@dataclass(frozen=True)
class Step:
    """Sizes of one step of one layer.

    Attributes:
        heads, groups, width: H KV heads, R query heads a KV head, d numbers a head.
        slots: S = N + B, all of which a static graph attends to.
        length: T new tokens, B in prefill and 1 in decode.
    """

    heads: int
    groups: int
    width: int
    slots: int
    length: int


@dataclass(frozen=True)
class Needs:
    """What a policy's graphs carry and compute: see `policies.base.Policy`.

    Attributes:
        slot_number: a float32 a slot.
        key_sum: a vector of doubles a head, new keys added and leaving keys taken out.
        decays: the sum forgets instead, so nothing is taken out of it.
        probe: a product of all keys with one more vector.
        queries: number of last queries whose attention is observed.
    """

    slot_number: bool = False
    key_sum: bool = False
    decays: bool = False
    probe: bool = False
    queries: int = 0


KEYDIFF = Needs(slot_number=True, key_sum=True, probe=True)


def attention_flops(step: Step) -> int:
    """Scaled q K^T, softmax and the product with V, for all T queries over all S slots."""
    rows = step.heads * step.groups * step.length
    return rows * step.slots * (4 * step.width + 1 + SOFTMAX)


def attention_bytes(step: Step) -> int:
    """Float32 keys and values, read once."""
    return 2 * FLOAT * step.heads * step.slots * step.width


def selection_comparisons(step: Step) -> int:
    """Comparisons that find the tokens to leave, whatever the policy: one pass for a token, a heap of B for a block."""
    each = 1 if step.length == 1 else math.ceil(math.log2(step.length))
    return step.heads * step.slots * each


def _attention_rows(step: Step, queries: int) -> int:
    """FLOPs of the attention rows of some queries, their probabilities summed a slot."""
    rows = step.groups * min(queries, step.length)
    return rows * step.slots * (2 * step.width + 1 + SOFTMAX + 1)


def _keydiff(step: Step) -> int:
    mean = step.slots * step.width
    lengths = 2 * (step.slots + 1) * step.width
    products = 2 * step.slots * step.width
    return mean + lengths + products + 4 * step.slots  # a root, a product of lengths, a quotient and a sign a slot


# Per KV head. A random lot is two additions and three products modulo a prime; snapkv pools over 7 neighbours.
_AS_DEFINED: dict[str, Callable[[Step], int]] = {
    "full": lambda step: 0,
    "h2o": lambda step: _attention_rows(step, step.length) + step.slots,
    "keydiff": _keydiff,
    "knorm": lambda step: (2 * step.width + 2) * step.slots,
    "random": lambda step: 8 * step.slots,
    "sink": lambda step: step.slots,
    "snapkv": lambda step: _attention_rows(step, 32) + 7 * step.slots,
    "tova": lambda step: _attention_rows(step, 1),
}
# A head and step, S = N + B. The window W of snapkv is 32; H2O observes all T queries.
ASYMPTOTIC = {
    "full": "0",
    "h2o": "O(T R (N+B) d)",
    "keydiff": "O((N+B) d)",
    "knorm": "O((N+B) d)",
    "random": "O(N+B)",
    "sink": "O(N+B)",
    "snapkv": "O(W R (N+B) d)",
    "tova": "O(R (N+B) d)",
}


def scoring_flops(policy: str, step: Step) -> int:
    """FLOPs of a policy's scores as defined, from nothing but keys, queries and accumulated sums.

    Raises:
        KeyError: a policy of another package, whose definition is not known here.
    """
    return step.heads * _AS_DEFINED[policy](step)


def product_flops(needs: Needs, step: Step) -> int:
    """FLOPs of all matrix products in one of our attention layers: attention, probe, observed rows, sums of keys.

    A single token stands beside the slots and its probe is one more query row, which goes all the way through; a
    block's probe has a product of its own.
    """
    token, queries = step.length == 1, step.groups * step.length
    rows = queries + needs.probe * token
    met = step.slots + token
    flops = 2 * rows * step.width * (met + step.slots)
    if needs.probe and not token:
        flops += 2 * step.slots * step.width
    if needs.queries:
        flops += 2 * queries * met
    if needs.key_sum and not token:
        flops += 2 * step.length * step.width * (1 if needs.decays else 2)
    return step.heads * flops


def added_flops(needs: Needs, step: Step) -> int:
    """FLOPs of matrix products that a policy adds to those of attention."""
    return product_flops(needs, step) - product_flops(Needs(), step)


def state_bytes(needs: Needs, heads: int, slots: int, width: int) -> int:
    """Bytes a layer that a policy keeps beside keys, values, positions."""
    return heads * (FLOAT * slots * needs.slot_number + DOUBLE * width * needs.key_sum)
