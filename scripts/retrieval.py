"""How often an exported folder finds a fact of page 1 again: two facts, two wordings, four texts, exact match."""

from __future__ import annotations

import argparse
from pathlib import Path

from keydiff_export import Sampling, load
from keydiff_export.commands.run import load_tokenizer, open_runtime
from keydiff_export.generation import generate
from keydiff_export.text import long_text

FACTS = (
    (
        "Page 1. The lighthouse of Port Ellery was built in 1847 by the engineer Samuel Oakhurst. "
        "Its keeper is Edmund Vale.\n\n",
        (
            "\n\nWho built the lighthouse of Port Ellery? The lighthouse of Port Ellery was built by",
            "\n\nThe lighthouse of Port Ellery was built in 1847 by the engineer",
        ),
        "Samuel Oakhurst",
    ),
    (
        "The secret word of this book is MARIGOLD. Remember: the secret word is MARIGOLD.\n\n",
        ("\n\nThe secret word of this book is", "\n\nRemember: the secret word is"),
        "MARIGOLD",
    ),
)
TEXTS = 4


def main() -> None:
    """Prints hits by prompt length and fact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[400, 3000, 7500])
    parser.add_argument("--runtime", default="onnxruntime")
    options = parser.parse_args()
    folder = load(options.folder)
    tokenizer, runner = load_tokenizer(folder), open_runtime(folder, options.runtime)
    body = tokenizer(long_text())["input_ids"]
    for tokens in options.tokens:
        for first_page, questions, answer in FACTS:
            hits = 0
            for question in questions:
                head, tail = tokenizer(first_page)["input_ids"], tokenizer(question)["input_ids"]
                size = tokens - len(head) - len(tail)
                for text in range(TEXTS):
                    start = text * len(body) // (TEXTS + 1)
                    prompt = [*head, *body[start : start + size], *tail]
                    result = generate(runner, tokenizer, prompt, 10, set(), Sampling())
                    hits += answer in " ".join(result.text.split())
            print(f"{tokens} tokens, {answer}: {hits} of {len(questions) * TEXTS}", flush=True)


if __name__ == "__main__":
    main()
