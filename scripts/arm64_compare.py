"""Compares what ARM64 kernels computed with x86 and with the eager reference: single layers, tokens, kept sets, logits.

Usage: python scripts/arm64_compare.py WORK CPU...   after `--prepare WORK`, which exports tiny models and runs x86

Demanded: a single quantised layer equals its twin, with the rounding of activations that this processor's kernel has;
whole models pass the gates of `validate` against the reference with that rounding; where nothing is rounded, tokens and
kept sets are x86's. The lines `nudged` are the control: the reference beside itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from numpy.typing import NDArray
from torch import nn
from torchao.utils import unwrap_tensor_subclass

import keydiff_export
from keydiff_export import parity
from keydiff_export.lowering.xnnpack_partition import SegmentPartitioner
from keydiff_export.models import load_model
from keydiff_export.policies import Policy
from keydiff_export.quantize import Activation, quantize, twin
from keydiff_export.reference import Reference
from keydiff_export.runtime.base import Logits, Runner, Snapshot
from keydiff_export.spec import ExportSpec

sys.path.insert(0, str(Path(__file__).parent.parent / "runtime_tests"))
from conftest import build_model, random_tokens

Steps = dict[str, NDArray[Any]]
BUDGET, BLOCK = 16, 8
LENGTHS = [8] * 5 + [5] + [1] * 8 + [8, 3] + [1] * 3
TARGETS = {
    "none": ("onnx-cpu", "executorch-xnnpack"),
    "int4": ("onnx-cpu",),
    "int8": ("onnx-cpu", "executorch-xnnpack"),
}
ARTIFACTS = [
    *((quant, "onnx") for quant in TARGETS),
    *((quant, engine) for quant in ("none", "int8") for engine in ("methods", "forward")),
]
LAYERS = {"q_proj": "model.layers.0.self_attn.q_proj", "lm_head": "lm_head"}
LAYER_QUANTS = {"pte": ("8da4w", "int8"), "onnx": ("8da4w", "int8", "int4")}
ROWS = (24, 1)
# A layer alone amplifies nothing. Kernels that round otherwise come out at 46 dB or less.
LAYER_SQNR_DB = 100.0


def rounding(engine: str, quant: str, layer: str, machine: str) -> Activation:
    """How a kernel rounds activations. XNNPACK's does it alike everywhere, ONNX Runtime's MatMulNBits does not."""
    if quant in ("none", "int4"):
        return "float"
    if engine != "onnx":
        return "int8_per_token"
    if machine == "cortex-a53":
        return "float"
    # With dot products, 4-bit weights of suitable size go to KleidiAI, which rounds a token at a time. The head has 8.
    if machine == "cortex-a76" and quant == "8da4w" and layer != "lm_head":
        return "int8_per_token"
    return "int8_per_group"


def layer_files() -> dict[str, tuple[str, str, str]]:
    """File name -> engine, quant, layer of every single layer."""
    return {
        f"{quant}-{layer}-{rows}.{engine}": (engine, quant, layer)
        for engine, quants in LAYER_QUANTS.items()
        for quant in quants
        for layer in LAYERS
        for rows in ROWS
    }


def prepare(work: Path) -> None:
    """Exports models and layers, and runs them on x86."""
    source = build_model(work / "model")
    loaded = load_model(str(source))
    tokens = random_tokens(sum(LENGTHS), loaded.model.config.vocab_size)
    for quant, targets in TARGETS.items():
        spec = ExportSpec(str(source), BUDGET, BLOCK, quant=quant, targets=targets, name="tiny")
        keydiff_export.export(spec, work / quant, validate=False)
    for name, (engine, quant, layer) in layer_files().items():
        export_layer(work / name, loaded.model, engine, quant, layer)
    plan = {
        "budget": BUDGET,
        "block": BLOCK,
        "lengths": LENGTHS,
        "tokens": tokens,
        "artifacts": ARTIFACTS,
        "layers": list(layer_files()),
    }
    (work / "plan.json").write_text(json.dumps(plan))
    steps = Path(__file__).with_name("arm64_steps.py")
    subprocess.run([sys.executable, str(steps), str(work), "x86"], check=True, stderr=subprocess.DEVNULL)


def export_layer(file: Path, model: nn.Module, engine: str, quant: str, layer: str) -> None:
    """Writes one linear layer, and its input [1, rows, K] beside it."""
    generator = torch.Generator().manual_seed(2)
    rows = int(file.stem.split("-")[-1])
    x = torch.randn(1, rows, model.config.hidden_size, generator=generator)
    np.save(file.with_name(f"{file.name}-x.npy"), x.numpy())
    quantised = quantize(model, quant)
    if engine == "onnx":
        activation: Activation = "float" if quant == "int4" else "int8_per_group"
        module = nn.Sequential(twin(quantised, activation).get_submodule(LAYERS[layer])).eval()
        program: Any = torch.onnx.export(module, (x,), dynamo=True, opset_version=21, verbose=False)
        program.save(file)
        return
    module = nn.Sequential(copy.deepcopy(quantised.get_submodule(LAYERS[layer])))
    unwrap_tensor_subclass(module)
    edge = to_edge_transform_and_lower(
        torch.export.export(module, (x,)),
        partitioner=[SegmentPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    file.write_bytes(edge.to_executorch().buffer)


class Recorded(Runner):
    """Plays back what arm64_steps.py wrote."""

    def __init__(self, steps: Steps) -> None:
        super().__init__(BUDGET, BLOCK)
        self._steps, self._next = steps, 0

    def step(self, tokens: list[int]) -> Logits:
        self._next += 1
        return np.asarray(self._steps["logits"][self._next - 1])

    def snapshot(self) -> Snapshot:
        positions = self._steps["positions"][self._next - 1]
        slots = [[{int(p): slot for slot, p in enumerate(head) if p >= 0} for head in layer] for layer in positions]
        keys, values = (self._steps[name][self._next - 1] for name in ("keys", "values"))
        return Snapshot([[set(head) for head in layer] for layer in slots], keys, values, slots)

    def _prefill(self, tokens: list[int]) -> Logits:
        raise NotImplementedError

    _decode = _prefill  # type: ignore[assignment]


def judge(model: nn.Module, policy: Policy, tokens: list[int], steps: Steps) -> tuple[dict[str, Any], parity.KeptSlots]:
    """Plays a record against the reference, which follows each other choice; returns logits' errors and kept sets."""
    reference, recorded, kept = Reference(model, policy, BUDGET, BLOCK), Recorded(steps), parity.KeptSlots()
    ours, theirs = [], []
    for number, length in enumerate(LENGTHS):
        block = tokens[reference.seen : reference.seen + length]
        ours.append(reference.step(block).numpy())
        theirs.append(recorded.step(block))
        parity.compare_slots(number, reference, recorded, kept)
    traces = [parity.Trace(np.stack(rows), np.stack(rows).argmax(-1).tolist()) for rows in (ours, theirs)]
    return parity.compare_logits(*traces), kept


def nudged(model: nn.Module, policy: Policy, tokens: list[int]) -> Steps:
    """Steps of the eager reference itself after embeddings were changed by 1e-6 of their size, as a sum's order might.

    What such a run differs by from the reference is what rounded activations make of the last bits of a float.
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(
        lambda *call: call[2] * (1 + 1e-6 * torch.randn(call[2].shape, generator=generator))
    )
    reference = Reference(model, policy, BUDGET, BLOCK)
    rows: dict[str, list[NDArray[Any]]] = {"logits": [], "positions": [], "keys": [], "values": []}
    for length in LENGTHS:
        rows["logits"].append(reference.step(tokens[reference.seen : reference.seen + length]).numpy())
        layers = [reference.layers[layer] for layer in sorted(reference.layers)]
        free = BUDGET - layers[0].positions.shape[1]
        for name, padding in (("positions", (0, free)), ("keys", (0, 0, 0, free)), ("values", (0, 0, 0, free))):
            stacked = torch.stack([getattr(layer, name) for layer in layers])
            rows[name].append(nn.functional.pad(stacked, padding, value=-1).numpy())
    return {name: np.array(arrays) for name, arrays in rows.items()}


def compare_layers(work: Path, model: nn.Module, machine: str) -> int:
    """Prints the worst layer of each engine and rounding; returns how many are not their twins' equals."""
    worst: dict[tuple[str, Activation], tuple[float, str]] = {}
    failed = 0
    for name, (engine, quant, layer) in layer_files().items():
        activation = rounding(engine, quant, layer, machine)
        x = torch.from_numpy(np.load(work / f"{name}-x.npy"))
        expected = twin(quantize(model, quant), activation).get_submodule(LAYERS[layer])(x)
        found = sqnr(expected.detach().numpy(), np.load(work / f"{name}-{machine}.npy"))
        failed += found <= LAYER_SQNR_DB
        worst[engine, activation] = min(worst.get((engine, activation), (found, name)), (found, name))
    for (engine, activation), (found, name) in worst.items():
        print(f"{machine:10} single layers, {engine:4} with {activation} activations: {found:.0f} dB or more ({name})")
    return failed


def compare_models(work: Path, model: nn.Module, tokens: list[int], machine: str) -> int:
    """Prints a line an artifact; returns how many fail the gates of `validate`, or are not x86's equals."""
    failed = 0
    for quant, engine in ARTIFACTS:
        activation = rounding(engine, quant, "q_proj", machine)
        eager = model if quant == "none" else twin(quantize(model, quant), activation)
        policy = keydiff_export.load(work / quant).policy
        lines = {machine: dict(np.load(work / f"{quant}-{engine}-{machine}.npz"))}
        if machine == "x86" and activation != "float":
            lines["nudged"] = nudged(eager, policy, tokens)
        for line, record in lines.items():
            errors, kept = judge(eager, policy, tokens, record)
            gates = parity.gates(activation == "float", errors, errors, kept, None)
            wrong = [f"{gate['name']} {gate['value']}, not {gate['limit']}" for gate in gates if not gate["passed"]]
            # Where both round nothing, the two machines must agree with each other as well.
            if activation == rounding(engine, quant, "q_proj", "x86") == "float":
                wrong += (
                    [] if same_as_x86(work, quant, engine, record) else ["tokens or kept sets are not those of x86"]
                )
            failed += bool(wrong) and line != "nudged"
            gap = max((found["score_gap"] for found in kept.disagreements), default=0.0)
            print(
                f"{line:10} {quant:4} {engine:7} with {activation:14} activations: "
                f"{errors['token_agreement']:.0%} of tokens, logits within {errors['logits_max_abs']:.1e}, "
                f"{kept.equal} of {kept.compared} kept sets (scores {gap:.1e} apart at most)"
                f"{' FAILED: ' + '; '.join(wrong) if wrong else ''}"
            )
    return failed


def compare(work: Path, machines: list[str]) -> int:
    """Prints all comparisons; returns how many failed."""
    model = load_model(str(work / "model")).model
    tokens = json.loads((work / "plan.json").read_text())["tokens"]
    return sum(
        compare_layers(work, model, machine) + compare_models(work, model, tokens, machine)
        for machine in ["x86", *machines]
    )


def same_as_x86(work: Path, quant: str, engine: str, record: Steps) -> bool:
    """Whether every step has x86's token and x86's kept sets."""
    other = np.load(work / f"{quant}-{engine}-x86.npz")
    tokens = record["logits"].argmax(-1) == other["logits"].argmax(-1)
    sets = np.sort(record["positions"]) == np.sort(other["positions"])
    return bool(tokens.all() and sets.all())


def sqnr(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    noise = ((found.astype(np.float64) - expected) ** 2).sum()
    return float("inf") if noise == 0 else float(10 * np.log10((expected.astype(np.float64) ** 2).sum() / noise))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("work", type=Path)
    parser.add_argument("machines", nargs="*")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.work)
    else:
        sys.exit(1 if compare(options.work, options.machines) else 0)


if __name__ == "__main__":
    main()
