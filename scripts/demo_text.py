"""Prints a long text with two facts on its first page and a question about them at its end."""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer

from keydiff_export.text import long_text

FIRST_PAGE = (
    "Page 1. The lighthouse of Port Ellery was built in 1847 by the engineer Samuel Oakhurst. "
    "Its keeper is Edmund Vale.\n\n"
)
QUESTION = "\n\nWho built the lighthouse of Port Ellery? The lighthouse of Port Ellery was built by"


def demo_text(tokenizer: object, tokens: int) -> str:
    """The first page, as much of the language reference as fits, and the question: `tokens` tokens in all."""
    size = len(tokenizer(FIRST_PAGE + QUESTION)["input_ids"])  # type: ignore[operator]
    body = tokenizer(long_text())["input_ids"][: tokens - size]  # type: ignore[operator]
    return FIRST_PAGE + tokenizer.decode(body) + QUESTION  # type: ignore[attr-defined]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--tokenizer", required=True, help="exported folder or model folder")
    options = parser.parse_args()
    print(demo_text(AutoTokenizer.from_pretrained(options.tokenizer), options.tokens), end="")
