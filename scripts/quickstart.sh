#!/usr/bin/env bash
# From a fresh machine to an answer: environment, demo model, export for both runtimes with parity, a long text, a table.
# Environment: CARD (default graphs/smollm2-135m), TOKENS (length of the demo text, default 12000).
set -euo pipefail
cd "$(dirname "$0")/.."
card="${CARD:-graphs/smollm2-135m}"
tokens="${TOKENS:-12000}"
output="exported/$(basename "$card")"
export PATH="$PWD/.venv/bin:$PATH"

echo "== 1. environment"
bash scripts/setup.sh
began=$SECONDS

echo "== 2. export and parity: $card -> $output"
keydiff-export export "$card" -o "$output"

echo "== 3. the program's own word on its memory"
keydiff-export inspect "$output" | grep -v 'kernels outside'

echo "== 4. a question about page 1 of a text of $tokens tokens, in a cache of constant size"
book="$(mktemp)"
trap 'rm -f "$book"' EXIT
python scripts/demo_text.py --tokens "$tokens" --tokenizer "$output" >"$book"
head -n 3 "$book"
echo "[...]"
tail -n 2 "$book"
for runtime in onnxruntime executorch; do
    echo "-- $runtime"
    keydiff-export run "$output" --runtime "$runtime" --prompt-file "$book" --raw --max-new-tokens 16 \
        --allow-beyond-trained-context
done

echo "== 5. memory at 1,000 and at $tokens tokens"
python scripts/memory.py "$output" --tokens 1000 "$tokens"
echo "quickstart: done in $((SECONDS - began)) s after the environment"
