#!/usr/bin/env bash
# Makes the artifact for `keydiff-export bench OUT --against export_llm=FILE.pte`: the same Llama model through ExecuTorch's
# own export_llm, 8da4w in groups of 32, with a full KV cache. About half an hour for a model of 135M parameters.
# Usage: scripts/export_llm_peer.sh MODEL FILE.pte
# Environment: CONTEXT (slots of the cache, default 8192).
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 MODEL FILE.pte" >&2; exit 2; }
model="$1"
file="$(realpath -m "$2")"
context="${CONTEXT:-8192}"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
.venv/bin/python scripts/export_llm_checkpoint.py "$model" "$scratch"
.venv/bin/python -m executorch.extension.llm.export.export_llm \
    base.model_class=smollm2 \
    base.checkpoint="$scratch/checkpoint.pth" \
    base.params="$scratch/params.json" \
    "base.metadata='$(cat "$scratch/metadata.json")'" \
    model.dtype_override=fp32 \
    model.use_kv_cache=true \
    model.use_sdpa_with_kv_cache=true \
    export.max_seq_length="$context" \
    export.max_context_length="$context" \
    export.output_name="$scratch/model.pte" \
    quantization.qmode=8da4w \
    quantization.group_size=32 \
    "quantization.embedding_quantize='8,0'" \
    backend.xnnpack.enabled=true \
    backend.xnnpack.extended_ops=true \
    hydra.run.dir="$scratch" hydra.output_subdir=null
mkdir -p "$(dirname "$file")"
mv "$scratch/model.pte" "$file"
echo "wrote $file"
