"""A long real text that every CPython carries, for parity runs: the language reference behind `help()`."""

from __future__ import annotations

from pydoc_data.topics import topics


def long_text() -> str:
    """English technical prose of some 200,000 tokens, the same for every run under one Python version."""
    return "\n\n".join(topics[name] for name in sorted(topics))
