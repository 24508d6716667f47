"""What the JVM tests of android_app compare with: exported folders and what `keydiff-export run` says of them.

Usage: python scripts/android_fixtures.py OUTPUT [--demo FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import keydiff_export
from keydiff_export.manifest import OutputFolder
from keydiff_export.spec import ExportSpec
from keydiff_export.text import long_text

sys.path.insert(0, str(Path(__file__).parent.parent / "runtime_tests"))
from conftest import build_model, export_npu

TINY_BUDGET, TINY_BLOCK = 16, 8
# Tokenizer cases: contractions, digits, blanks of all kinds, scripts, emoji, marks, the special tokens as text.
TEXTS = (
    "It's 12345 o'clock, isn't it?  We'll see;\n\n\tI'VE waited\r\n   ",
    "naïve Ünïcode e\u0301 ﬁne Ⅳ ½ x² \u00a0no-break\u3000wide\u2028line \u200bzero",
    "中文字符和日本語テキスト 한국어 हिन्दी ไทย العربية",
    "emoji 👩\u200d👩\u200d👧 🇩🇪 👍🏽 \U0001f9ff",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> < |im_end|>",
    "    def f(x):\n        return {'a': [1, 2.5e-3]}  # done\n",
    "'S 'LL 's'S don''t 'vex",
    "\x00\x07\x1f\x7f\x85",
)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def run(folder: OutputFolder, prompt: str, tokens: int, raw: bool, runtime: str = "onnxruntime") -> dict[str, Any]:
    """A case: the question and the answer that ONNX Runtime, or another runtime, gives in Python."""
    result = keydiff_export.generate(folder, prompt, max_new_tokens=tokens, runtime=runtime, raw=raw)
    picked = ("prompt_tokens", "token_ids", "text", "evictions", "cache_slots")
    answer = {key: value for key, value in dataclasses.asdict(result).items() if key in picked}
    return {"folder": str(folder.path), "prompt": prompt, "raw": raw, "max_new_tokens": tokens, **answer}


def encode(folder: Path) -> list[dict[str, Any]]:
    """Texts and their token ids, with and without the tokenizer's special tokens."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return [
        {
            "folder": str(folder),
            "text": text,
            "ids": tokenizer(text)["input_ids"],
            "plain_ids": tokenizer(text, add_special_tokens=False)["input_ids"],
            "decoded": tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True),
        }
        for text in (*TEXTS, long_text()[:20_000])
    ]


def train_tokenizer(folder: Path) -> Path:
    """A small tokenizer that splits as Llama 3's and Qwen's do, with a start token and digits apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([long_text(), *TEXTS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--demo", type=Path, help="the exported demo card; without it only a tiny model is used")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    model = build_model(options.output / "tiny-model", max_position_embeddings=4096)
    spec = ExportSpec(
        str(model),
        TINY_BUDGET,
        TINY_BLOCK,
        {"name": "keydiff", "recent": 0.2},
        targets=("onnx-cpu",),
        name="tiny",
    )
    tiny = keydiff_export.export(spec, options.output / "tiny", validate=False)
    packed = [
        keydiff_export.export(
            dataclasses.replace(spec, cache_dtype=dtype, name=dtype), options.output / dtype, validate=False
        )
        for dtype in ("float16", "int8")
    ]
    # With float32 arithmetic, which the JVM has for the NPU's graphs, they give the eager reference's tokens.
    npu = export_npu(model, options.output / "npu", "onnx-qnn", "fp16", name="npu")
    text = long_text()
    cases = [run(tiny, text[: 40 + length], 24, raw) for length in range(10) for raw in (True, False)]
    cases += [run(folder, text[:45], 24, raw=True) for folder in packed]
    cases += [run(npu, text[: 40 + length], 24, raw=True, runtime="eager") for length in range(10)]
    encodings = encode(tiny.path) + encode(train_tokenizer(options.output / "trained"))
    if options.demo is not None:
        demo = keydiff_export.load(options.demo)
        tokenizer = AutoTokenizer.from_pretrained(demo.path)
        ids = tokenizer(text)["input_ids"]
        cases.append(run(demo, tokenizer.decode(ids[:8000]), 64, raw=False))
        cases.append(run(demo, tokenizer.decode(ids[:1003]), 64, raw=True))
        cases += [run(demo, "What is the capital of France?", 64, raw=False)]
        encodings += encode(demo.path)
    content = {"tiny": str(tiny.path), "npu": str(npu.path), "cases": cases, "encodings": encodings}
    (options.output / "expected.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
