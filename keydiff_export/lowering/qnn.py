"""What both roads to Qualcomm's NPU share: the job, its child process, tracing, calibration, the one-delegate rule.

Lowering runs in a process of its own, with the SDK's libraries on its path: a crash in them must not take the command
line along, and the loader reads LD_LIBRARY_PATH only when a process starts.
"""

from __future__ import annotations

import json
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration import calibration_runs, enough, openings, read_texts
from ..errors import UserError
from ..isolated import CrashError, run_isolated, tell
from ..models import LoadedModel
from ..npu_slots import HostStep, NpuStep, StepInputs, check_policy, new_npu_layers, state_names
from ..policies import Policy
from ..qnn_sdk import Soc, find_sdk, soc
from ..quantize import Activation
from ..runtime.npu import TorchEngine
from ..shape import CacheShape
from ..spec import ExportSpec
from .base import Lowered, Phases, Target
from .rotation import obstacle, rotate_residual

PHONE = "phone"
RANGES = "calibration.json"
_MODEL = ".model.pt"


@dataclass(frozen=True)
class QnnJob:
    """All that the child needs.

    Attributes:
        model_file: the float32 model, written by torch.save.
        quant: fp16, or activation and weight bits such as 16a8w.
        soc: the chip that the context binaries are made for.
        compile: also make what a phone loads, both methods over one copy of the weights.
        runs: calibration steps, empty for fp16.
        folder: where to write.
    """

    model_file: Path
    quant: str
    shape: CacheShape
    policy: Policy
    soc: Soc
    compile: bool
    runs: list[list[list[int]]]
    folder: Path


class QnnTarget(Target):
    """A road to the Hexagon processor.

    Attributes:
        readings: how often calibration reads its text.
    """

    readings: ClassVar[int] = 1

    def __init__(self) -> None:
        find_sdk()
        self._soc, self._compile = soc("SM8650"), False
        self._tokens: list[int] = []
        self._openings: list[list[int]] = []
        self._rotation: str | None = None

    def activation(self, quant: str) -> Activation:
        return "float"

    def prepare(self, spec: ExportSpec, loaded: LoadedModel) -> None:
        self._soc, self._compile = soc(spec.soc), spec.compile
        if spec.cache_dtype != "float32" or spec.evict_every != 1:
            raise UserError(f"target {self.name} takes neither --cache-dtype nor --evict-every: leave them out")
        check_policy(spec.make_policy(), spec.budget, spec.block, quantised=spec.quant != "fp16")
        if spec.quant != "fp16":
            text = read_texts(None if spec.calibration is None else Path(spec.calibration))
            tokens = loaded.tokenizer(text)["input_ids"]
            # A text of the user's is read whole; of the built-in one, whose start parity reads, the end.
            self._tokens = tokens if spec.calibration is not None else tokens[-enough(spec.budget, spec.block) :]
            self._openings = openings(loaded.tokenizer, text, spec.block)

    def extra(self, spec: ExportSpec) -> dict[str, Any]:
        return {
            "soc": spec.soc,
            "jaccard_floor": spec.jaccard_floor,
            "token_floor": spec.token_floor,
            "rotation": self._rotation,
        }

    def lower(
        self, model: nn.Module, quant: str, shape: CacheShape, policy: Policy, folder: Path, phases: Phases
    ) -> Lowered:
        runs = calibration_runs(self._tokens, shape.budget, shape.block, self._openings) if quant != "fp16" else []
        if quant != "fp16":
            # Measured with and without (docs/qnn.md): three layers of the demo model were 4 dB worse rotated.
            reason = "4-bit weights lose more by it" if quant == "16a4w" else obstacle(model)
            self._rotation = "hadamard" if reason is None else f"none: {reason}"
            model = rotate_residual(model) if reason is None else model
        job = QnnJob(folder / _MODEL, quant, shape, policy, self._soc, self._compile, runs, folder)
        torch.save(model, job.model_file)
        try:
            total = self.readings * sum(len(step) for run in runs for step in run)
            with _progress(self.name, total, phases) as listener:
                return run_isolated(self._function(), job, environment=find_sdk().environment(), listener=listener)
        except CrashError as error:
            raise UserError(f"lowering for {self.name} {error.cause}; the last it said: {_tail(error.log)}") from error
        finally:
            job.model_file.unlink()

    @abstractmethod
    def _function(self) -> Callable[[QnnJob], Lowered]:
        """Lowers a job; runs in the child."""


def _tail(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return " / ".join(lines[-2:])[-300:] or "nothing"


@contextmanager
def _progress(name: str, total: int, phases: Phases) -> Iterator[Callable[[Any], None]]:
    """A listener for the child's notes: ("phase", name, seconds) and ("tokens", count), a bar while those come."""
    bar: tqdm[Any] | None = None

    def listen(note: tuple[Any, ...]) -> None:
        nonlocal bar
        if note[0] == "tokens":
            # Not made earlier: a phase reported under a bar ends up in its line, and its clock would run.
            if bar is None:
                bar = tqdm(
                    desc=f"{name}: calibrate", total=total, unit=" tokens", leave=False, disable=None, file=sys.stderr
                )
            bar.update(note[1])
            return
        _, phase, seconds = note
        close()
        phases.seconds[phase] = seconds
        phases.report(phase, seconds)

    def close() -> None:
        nonlocal bar
        if bar is not None:
            bar.close()
            bar = None

    try:
        yield listen
    finally:
        close()


def child_phases() -> Phases:
    """Phases that report to the parent."""
    return Phases(lambda name, seconds: tell(("phase", name, seconds)))


def tick(tokens: int) -> None:
    """Tells the parent of calibration tokens read."""
    tell(("tokens", tokens))


@dataclass
class Halves:
    """A job's graphs before tracing: the CPU's and the NPU's share of both methods.

    Attributes:
        hosts: method -> `HostStep`.
        step: `NpuStep`, one module for both methods.
        state: names of the state tensors, in graph I/O order.
        examples: method -> all inputs of the NPU's share.
    """

    hosts: dict[str, HostStep]
    step: NpuStep
    state: list[str]
    examples: dict[str, tuple[Tensor, ...]]
    lengths: dict[str, int] = field(default_factory=dict)


def split(job: QnnJob) -> Halves:
    """Loads the job's model and cuts it into the two halves."""
    model = torch.load(job.model_file, weights_only=False)
    lengths = {"prefill": job.shape.block, "decode": 1}
    hosts = {method: HostStep(model, job.shape, job.policy, length).eval() for method, length in lengths.items()}
    step = NpuStep(model, job.shape, job.policy).eval()
    layers = new_npu_layers(job.shape, job.policy)
    engine = TorchEngine(hosts, {}, job.shape, job.policy)
    examples = {
        method: (*engine.inputs(method, torch.zeros(1, length, dtype=torch.int64).numpy(), 0, length), *engine.empty())
        for method, length in lengths.items()
    }
    return Halves(hosts, step, state_names(layers), examples, lengths)


def host_examples(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of `HostStep`: tokens [1, T], start [1], count [1]."""
    one = torch.ones(1, dtype=torch.int64)
    return torch.zeros(1, length, dtype=torch.int64), one - 1, one * length


def describe(halves: Halves, vocabulary: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Inputs and outputs of all four methods, as the manifest lists them."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for method, example in halves.examples.items():
        inputs = [_tensor(n, t) for n, t in zip((*StepInputs._fields, *halves.state), example, strict=True)]
        split_at = len(StepInputs._fields)
        tokens = host_examples(halves.lengths[method])
        found[f"{method}_inputs"] = {
            "inputs": [_tensor(n, t) for n, t in zip(("tokens", "start", "count"), tokens, strict=True)],
            "outputs": inputs[:split_at],
        }
        states = [{**entry, "name": f"{entry['name']}_next"} for entry in inputs[split_at:]]
        logits = {"name": "logits", "dtype": "float32", "shape": [1, vocabulary]}
        found[method] = {"inputs": inputs, "outputs": [logits, *states]}
    return found


def _tensor(name: str, value: Tensor) -> dict[str, Any]:
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def refuse_breaks(target: str, partitions: int, outside: dict[str, str]) -> None:
    """The one-delegate rule: a step is one partition and nothing of it stays on the CPU.

    Args:
        outside: operator -> why it stayed on the CPU.

    Raises:
        UserError: naming the operators and the reasons.
    """
    if partitions == 1 and not outside:
        return
    named = "; ".join(f"{operator} ({reason})" for operator, reason in outside.items()) or "no operator by itself"
    raise UserError(f"{target}: the graph breaks into {partitions} partitions; left on the CPU: {named}")


def write_ranges(folder: Path, ranges: dict[str, dict[str, list[float]]], runs: list[list[list[int]]]) -> str:
    """Saves the ranges that tensors are rounded over: {method: {tensor: [min, max]}}; returns the file's name."""
    tokens = sum(len(step) for run in runs for step in run)
    report = {"tokens": tokens, "steps": sum(map(len, runs)), "ranges": ranges}
    (folder / RANGES).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return RANGES
