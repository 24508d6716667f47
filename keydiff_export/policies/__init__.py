"""Registry of eviction policies. Adding one is one file here and one line in POLICIES."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..errors import UserError
from .base import Policy, SlotView
from .full import Full
from .keydiff import KeyDiff
from .knorm import KNorm
from .random import Random
from .sink import Sink

POLICIES: dict[str, type[Policy]] = {p.name: p for p in (KeyDiff, Sink, KNorm, Random, Full)}


def make_policy(name: str, **parameters: Any) -> Policy:
    """Builds a policy from its name and parameters.

    Raises:
        UserError: unknown name, unknown parameter, or a value out of range.
    """
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}: choose one of {', '.join(sorted(POLICIES))}")
    known = {f.name for f in fields(POLICIES[name])}
    for key in parameters:
        if key not in known:
            raise UserError(f"policy {name} has no parameter {key!r}: it takes {', '.join(sorted(known))}")
    try:
        return POLICIES[name](**parameters)
    except (TypeError, ValueError) as error:
        raise UserError(f"policy {name}: {error}") from error


__all__ = ["POLICIES", "Policy", "SlotView", "make_policy"]
