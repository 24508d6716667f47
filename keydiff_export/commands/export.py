"""`export`: from a model to a folder of artifacts, proven equal to the reference before it appears."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..chat import CHAT, cut_template
from ..errors import UserError
from ..generation import system_prompt_tokens
from ..lowering import Phases, get_target
from ..manifest import (
    MANIFEST,
    PARITY,
    SCHEMA_VERSION,
    OutputFolder,
    describe_files,
    new_folder,
    open_folder,
    tool_versions,
    write_json,
)
from ..models import LoadedModel, load_model
from ..quantize import quantize
from ..spec import ExportSpec
from .validate import validate_folder

Report = Callable[[str, float], None]


def export_model(
    spec: ExportSpec, output: Path, validate: bool = True, report: Report = lambda phase, seconds: None
) -> OutputFolder:
    """Lowers a model for every target of a spec, validates the artifacts and puts the folder in place.

    Nothing appears at `output` unless every step ends well.

    Args:
        spec: what to export.
        output: folder to make; a former export there is replaced.
        validate: run parity as the last step.
        report: told each phase and its seconds.

    Raises:
        UserError: bad spec, or an artifact that fails parity.
    """
    targets = [get_target(name) for name in spec.targets]
    for target in targets:
        target.stock_runner = spec.stock_runner
        if spec.quant not in target.quants:
            raise UserError(
                f"target {target.name} does not take --quant {spec.quant}: choose one of {', '.join(target.quants)}"
            )
    phases = Phases(report)
    began = time.perf_counter()
    with new_folder(output) as folder:
        with phases.phase("load model"):
            loaded = load_model(spec.model)
            # One list of end tokens for the manifest, generation_config.json and the metadata of a .pte.
            loaded.model.generation_config.eos_token_id = eos_token_ids(loaded)
        pinned = 0 if spec.system_prompt is None else system_prompt_tokens(loaded.tokenizer, spec.system_prompt)
        policy = spec.make_policy(pinned)
        with phases.phase("quantise"):
            model = quantize(loaded.model, spec.quant)
        shape = loaded.cache_shape(spec.budget, spec.block, spec.cache_dtype, spec.evict_every)
        for target in targets:
            target.prepare(spec, loaded)
        artifacts = []
        for target in targets:
            (folder / target.name).mkdir()
            lowered = target.lower(model, spec.quant, shape, policy, folder / target.name, phases)
            names = [f"{target.name}/{file}" for file in lowered.files]
            artifacts.append(
                {
                    "target": target.name,
                    "runtime": target.runtime,
                    "quant": spec.quant,
                    "sqnr_floor_db": spec.sqnr_floor,
                    "files": describe_files(folder, names),
                    "methods": lowered.methods,
                    "cache_bytes": shape.bytes,
                    "planned_memory_bytes": lowered.planned_memory_bytes,
                    **target.extra(spec),
                }
            )
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "name": spec.name or Path(spec.model).stem,
            "model": _describe_model(loaded),
            "policy": policy.parameters(),
            "system_prompt": spec.system_prompt,
            "cache": {
                "layers": shape.layers,
                "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "budget": shape.budget,
                "block": shape.block,
                "slots": shape.slots,
                "dtype": shape.dtype,
                "evict_every": shape.evict_every,
                "bytes": shape.bytes,
            },
            "files": _write_tokenizer(loaded, folder),
            "artifacts": artifacts,
            "tools": tool_versions(),
        }
        if validate:
            with phases.phase("validate"):
                parity = validate_folder(OutputFolder(folder, manifest), loaded)
            _refuse_failures(parity)
            write_json(folder / PARITY, parity)
        # Last of all: a folder without its manifest is none, so a killed export leaves nothing that passes for one.
        write_json(folder / MANIFEST, manifest)
        open_folder(folder)
    report("total", round(time.perf_counter() - began, 1))
    return OutputFolder(output, manifest)


def _refuse_failures(parity: dict[str, Any]) -> None:
    for artifact in parity["artifacts"]:
        for gate in artifact["gates"]:
            if not gate["passed"]:
                raise UserError(
                    f"{artifact['target']} is not equal to the reference: {gate['name']} is {gate['value']}, needs "
                    f"{gate['limit']}; nothing was written (--no-validate and then validate show the whole report)"
                )


def _describe_model(loaded: LoadedModel) -> dict[str, object]:
    config = loaded.model.config
    return {
        "source": loaded.source,
        "architecture": config.model_type,
        "weights_sha256": loaded.weights_sha256,
        "context_limit": loaded.context_limit,
        "vocab_size": config.vocab_size,
        "eos_token_ids": eos_token_ids(loaded),
    }


def eos_token_ids(loaded: LoadedModel) -> list[int]:
    """Ids that end an answer: the generation config's and the tokenizer's."""
    configured = loaded.model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) | {loaded.tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)


def _write_tokenizer(loaded: LoadedModel, folder: Path) -> list[dict[str, object]]:
    before = {p.name for p in folder.iterdir()}
    loaded.tokenizer.save_pretrained(folder)
    loaded.model.generation_config.save_pretrained(folder)
    loaded.model.config.save_pretrained(folder)
    chat = cut_template(loaded.tokenizer)
    if chat is not None:
        write_json(folder / CHAT, chat)
    names = [p.name for p in folder.iterdir() if p.name not in before]
    if "tokenizer.json" not in names:
        raise UserError(f"model {loaded.source!r} has no fast tokenizer (tokenizer.json): use a model that has one")
    return describe_files(folder, names)
