"""`validate`: every artifact of a folder against the eager reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import UserError
from ..lowering import get_target
from ..manifest import SCHEMA_VERSION, OutputFolder
from ..models import LoadedModel, load_model
from ..parity import GREEDY_TOKENS, PROMPT_TOKENS, compare_logits, gates, run_reference
from ..quantize import quantize, twin
from ..reference import Reference
from ..text import long_text
from .run import open_runner


def validate_folder(
    folder: OutputFolder,
    loaded: LoadedModel | None = None,
    tick: Callable[[int], None] = lambda tokens: None,
    prompt_tokens: int = PROMPT_TOKENS,
    greedy_tokens: int = GREEDY_TOKENS,
) -> dict[str, Any]:
    """Runs reference and artifacts over one text and returns the report that parity.json holds.

    Args:
        folder: an opened output folder.
        loaded: its model, if it is at hand already; else it is loaded from the manifest's source.
        tick: told the number of tokens read, after each step.
        prompt_tokens, greedy_tokens: length of the text and of the greedy continuation.

    Raises:
        UserError: the model is gone or is another one.
    """
    if loaded is None:
        loaded = load_model(folder.manifest["model"]["source"])
    if loaded.weights_sha256 != folder.manifest["model"]["weights_sha256"]:
        raise UserError(f"{loaded.source!r} is not the model that {folder.path} was exported from (weights differ)")
    shape, policy = folder.shape, folder.policy
    if not policy.evicts:
        prompt_tokens = shape.budget - greedy_tokens
    prompt = loaded.tokenizer(long_text())["input_ids"][:prompt_tokens]
    report: list[dict[str, Any]] = []
    with torch.no_grad():
        float32, _, _ = run_reference(
            Reference(loaded.model, policy, shape.budget, shape.block, evict_every=shape.evict_every),
            prompt,
            greedy_tokens,
            None,
            tick,
        )
        models: dict[str, torch.nn.Module] = {}
        for artifact in folder.artifacts:
            quant, dtype = artifact["quant"], shape.dtype
            model = models.setdefault(quant, quantize(loaded.model, quant))
            if quant != "none":
                model = twin(model, get_target(artifact["target"]).activation(quant))
            runner = open_runner(folder, artifact)
            reference = Reference(model, policy, shape.budget, shape.block, dtype, shape.evict_every)
            ours, theirs, kept = run_reference(reference, prompt, greedy_tokens, runner, tick, float32.tokens)
            assert theirs is not None
            against_reference, against_float32 = compare_logits(ours, theirs), compare_logits(float32, theirs)
            exact = quant == "none" and dtype == "float32"
            checks = gates(exact, against_reference, against_float32, kept, artifact["sqnr_floor_db"])
            report.append(
                {
                    "target": artifact["target"],
                    "quant": quant,
                    "cache_dtype": dtype,
                    "passed": all(check["passed"] for check in checks),
                    "gates": checks,
                    "reference": against_reference,
                    "float32": against_float32,
                    "kept_slots": kept.to_dict(),
                }
            )
    return {
        "schema_version": SCHEMA_VERSION,
        "prompt_tokens": len(prompt),
        "greedy_tokens": greedy_tokens,
        "artifacts": report,
    }
