"""Writes a Llama model as the checkpoint and parameters that ExecuTorch's export_llm reads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from keydiff_export.models import load_model

NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attention_norm",
    "model.layers.": "layers.",
}


def meta_name(name: str) -> str:
    """The name of a Hugging Face Llama weight in Meta's layout."""
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def main() -> None:
    """Writes checkpoint.pth and params.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="as `keydiff-export export --model`")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    loaded = load_model(options.model)
    config = loaded.model.config
    if config.model_type != "llama":
        raise SystemExit(
            f"export_llm_checkpoint: {options.model} is a {config.model_type}, this writes Llama models only"
        )
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        # The weights of Hugging Face rotate halves, Meta's rotate pairs.
        "use_hf_rope": True,
        "use_scaled_rope": False,
    }
    (options.output / "params.json").write_text(json.dumps(params, indent=2), encoding="utf-8")
    weights = {meta_name(name): tensor for name, tensor in loaded.model.state_dict().items()}
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    torch.save(weights, options.output / "checkpoint.pth")
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    metadata = {"get_bos_id": config.bos_token_id, "get_eos_ids": ends}
    (options.output / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")


if __name__ == "__main__":
    main()
