"""Registry of eviction policies. Adding one is one file here and one line in POLICIES, or an entry point elsewhere."""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any

import yaml

from ..errors import UserError
from .base import EVERY_QUERY, KeySum, Policy, SlotView
from .full import Full
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import KNorm
from .random import Random
from .sink import Sink
from .snapkv import SnapKV
from .tova import Tova

POLICIES: dict[str, type[Policy]] = {p.name: p for p in (KeyDiff, Sink, Tova, H2O, SnapKV, KNorm, Random, Full)}
# Another package adds a policy under this group: `mine = "my_package.mine:Mine"`.
ENTRY_POINTS = "keydiff_export.policies"


def policy_names() -> list[str]:
    """Names of our own policies and of those that installed packages add, sorted."""
    return sorted({*POLICIES, *entry_points(group=ENTRY_POINTS).names})


def policy_class(name: str) -> type[Policy]:
    """The policy of that name; our own come before a package's.

    Raises:
        UserError: unknown name, or a package's policy that does not load.
    """
    if name in POLICIES:
        return POLICIES[name]
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            found = entry.load()
        except Exception as error:  # whatever the other package raises on import
            raise UserError(f"policy {name!r} from {entry.value} does not load: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Policy) and found.name == name):
            raise UserError(f"policy {name!r}: {entry.value} is not a Policy of that name")
        return found
    raise UserError(f"unknown policy {name!r}: choose one of {', '.join(policy_names())}")


def make_policy(name: str, **parameters: Any) -> Policy:
    """Builds a policy from its name and parameters.

    Raises:
        UserError: unknown name, unknown parameter, or a value out of range.
    """
    found = policy_class(name)
    known = {f.name for f in fields(found)}
    for key in parameters:
        if key not in known:
            raise UserError(f"policy {name} has no parameter {key!r}: it takes {', '.join(sorted(known))}")
    try:
        return found(**parameters)
    except (TypeError, ValueError) as error:
        raise UserError(f"policy {name}: {error}") from error


def parse_policy(text: str) -> dict[str, Any]:
    """`NAME` or `NAME:key=value,key=value` as the mapping that a graph card holds; values are YAML scalars.

    Raises:
        UserError: a part without `=`.
    """
    name, _, rest = text.partition(":")
    policy: dict[str, Any] = {"name": name.strip()}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"policy {text!r}: {part!r} is not key=value; write e.g. keydiff:anchor=median,recent=0.2")
        policy[key.strip()] = yaml.safe_load(value)
    return policy


__all__ = [
    "EVERY_QUERY",
    "POLICIES",
    "KeySum",
    "Policy",
    "SlotView",
    "make_policy",
    "parse_policy",
    "policy_class",
    "policy_names",
]
