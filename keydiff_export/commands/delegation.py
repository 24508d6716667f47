"""`inspect --delegation`: what eviction costs in every lowered graph, against the same graph without it.

Both graphs are lowered for one decoder layer of the folder's model, with the artifact's own shapes: a layer is what
repeats, and two full lowerings would take an hour. "Without" is policy full, which only appends.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..inspection import inspect_folder
from ..manifest import OutputFolder
from ..models import LoadedModel, load_model
from ..npu_slots import HostStep, NpuStep, new_npu_layers
from ..spec import ExportSpec
from .export import export_model

FIGURES = ("operators", "delegates", "bytes")


def price_eviction(folder: OutputFolder) -> dict[str, Any]:
    """Operators, delegates (graph breaks) and program bytes that eviction adds, a target and method.

    Returns:
        {"policy", "targets": {target: {"bytes": {with, without, added}, "methods": {method: {figure: ...}}}}}.
        Operators
        count what the program lists: kernels and delegate calls for ExecuTorch on CPUs, nodes for ONNX; of an NPU graph
        in ExecuTorch, the operators that went into its one delegate.

    Raises:
        UserError: the model is gone, or a target's packages are missing.
    """
    targets: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source = _one_layer(load_model(folder.manifest["model"]["source"]), Path(scratch) / "model")
        for artifact in folder.artifacts:
            spec = _spec(folder, artifact, source)
            own = _measure(spec, Path(scratch) / "own")
            without = _measure(replace(spec, policy={"name": "full"}), Path(scratch) / "full")
            targets[artifact["target"]] = {
                "quant": artifact["quant"],
                "bytes": _difference(own.pop("bytes"), without.pop("bytes")),
                "methods": {m: {f: _difference(own[m][f], without[m][f]) for f in FIGURES[:2]} for m in own},
            }
    return {"policy": folder.manifest["policy"], "layers": 1, "targets": targets}


def _difference(own: int, without: int) -> dict[str, int]:
    return {"with": own, "without": without, "added": own - without}


def _one_layer(loaded: LoadedModel, place: Path) -> Path:
    """Saves the model cut to its first decoder layer."""
    model = loaded.model
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:1]
    # A model from a GGUF file carries that reader's settings, which a folder of safetensors must not have.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(place)
    loaded.tokenizer.save_pretrained(place)
    return place


def _spec(folder: OutputFolder, artifact: dict[str, Any], source: Path) -> ExportSpec:
    shape = folder.shape
    return ExportSpec(
        str(source),
        shape.budget,
        shape.block,
        dict(folder.manifest["policy"]),
        quant=artifact["quant"],
        cache_dtype=shape.dtype,
        targets=(artifact["target"],),
        stock_runner=False,
        soc=artifact.get("soc", "SM8650"),
        name="one layer",
    )


def _measure(spec: ExportSpec, place: Path) -> dict[str, Any]:
    """{"bytes": n, method: {"operators", "delegates"}} of an export."""
    exported = export_model(spec, place, validate=False)
    artifact = inspect_folder(exported)["artifacts"][0]
    inside = _traced_operators(exported) if exported.artifacts[0]["runtime"].endswith("-qnn") else {}
    methods = {
        name: {
            "operators": inside.get(name, 0)
            + sum(facts["kernels_outside_delegates"].values())
            + sum(facts["delegates"].values()),
            "delegates": sum(facts["delegates"].values()),
        }
        for name, facts in artifact["methods"].items()
        if name in ("prefill", "decode")
    }
    return {"bytes": artifact["bytes"], **methods}


def _traced_operators(folder: OutputFolder) -> dict[str, int]:
    """Operators of an NPU folder's graphs as they are traced, before the runtime takes them into its one delegate."""
    loaded = load_model(folder.manifest["model"]["source"])
    examples = {}
    for method, length in (("prefill", folder.shape.block), ("decode", 1)):
        host = HostStep(loaded.model, folder.shape, folder.policy, length)
        examples[method] = host(*(torch.ones(shape, dtype=torch.int64) for shape in ((1, length), (1,), (1,))))
    step = NpuStep(loaded.model, folder.shape, folder.policy).eval()
    state = [t for layer in new_npu_layers(folder.shape, folder.policy) for t in layer.tensors().values()]
    with torch.no_grad():
        programs = {m: torch.export.export(step, (*inputs, *state), strict=False) for m, inputs in examples.items()}
    return {m: sum(n.op == "call_function" for n in program.graph.nodes) for m, program in programs.items()}


def delegation_table(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    policy = report["policy"]["name"]
    lines = [f"what policy {policy} adds to the same graph without eviction, one decoder layer"]
    lines.append(f"{'target':<20}{'method':<10}{'operators':>22}{'delegates':>20}{'bytes of all files':>30}")
    for target, priced in report["targets"].items():
        for number, (method, figures) in enumerate(priced["methods"].items()):
            cells = [_cell(figures["operators"], 22), _cell(figures["delegates"], 20)]
            cells.append(_cell(priced["bytes"], 30) if number == 0 else "")
            lines.append(f"{target if number == 0 else '':<20}{method:<10}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def _cell(figure: dict[str, int], width: int) -> str:
    return f"{figure['without']} + {figure['added']}".rjust(width)
