#!/usr/bin/env bash
# From a fresh machine to an answer: environment, demo model, export for both runtimes with parity, a long text, a table.
# Environment: CARD (default graphs/smollm2-135m), TOKENS (length of the text with the question, default 3000),
# LONG (length of the longest text in the memory table, default 12000).
set -euo pipefail
cd "$(dirname "$0")/.."
card="${CARD:-graphs/smollm2-135m}"
tokens="${TOKENS:-3000}"
long="${LONG:-12000}"
output="exported/$(basename "$card")"
export PATH="$PWD/.venv/bin:$PATH"

echo "== 1. environment"
bash scripts/setup.sh
began=$SECONDS

echo "== 2. export and parity: $card -> $output"
keydiff-export export "$card" -o "$output"

echo "== 3. the program's own word on its memory"
keydiff-export inspect "$output" | grep -v 'kernels outside'

echo "== 4. a question about page 1, at the end of a text of $tokens tokens, six times the cache"
book="$(mktemp)"
trap 'rm -f "$book"' EXIT
python scripts/demo_text.py --tokens "$tokens" --tokenizer "$output" >"$book"
head -n 3 "$book"
echo "[...]"
tail -n 2 "$book"
echo
for runtime in onnxruntime executorch; do
    echo "-- $runtime"
    keydiff-export run "$output" --runtime "$runtime" --prompt-file "$book" --raw --max-new-tokens 8
done

echo "== 5. memory and speed at 1,000 and at $long tokens"
python scripts/memory.py "$output" --tokens 1000 "$long"
echo "quickstart: done in $((SECONDS - began)) s after the environment"
