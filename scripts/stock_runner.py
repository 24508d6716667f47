"""Runs an exported .pte, as it is, in ExecuTorch's own LLM runner (TextLLMRunner, Android's LlmModule), greedily.

Usage: python scripts/stock_runner.py FOLDER PROMPT_FILE... [--max-new-tokens N] [--follow]

Every prompt starts anew, or with --follow comes after the answer before it. Prints, as the last line, one JSON list a
prompt: the pieces of text, a token each. The runner also prints of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the operators)
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
from executorch.kernels import quantized  # noqa: F401  (registers the operators)

from keydiff_export import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", type=Path, nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--follow", action="store_true")
    options = parser.parse_args()
    folder = load(options.folder)
    program = folder.path / folder.artifact_for("executorch")["target"] / "model.pte"
    runner = TextLLMRunner(str(program), str(folder.path / "tokenizer.json"))
    config = GenerationConfig(echo=False, max_new_tokens=options.max_new_tokens, temperature=0.0)
    answers: list[list[str]] = []
    for prompt in options.prompts:
        if not options.follow:
            runner.reset()
        answers.append([])
        runner.generate(prompt.read_text(encoding="utf-8"), config, answers[-1].append)
    print("\n" + json.dumps(answers))


if __name__ == "__main__":
    main()
