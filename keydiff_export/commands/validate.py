"""`validate`: every artifact of a folder against the eager reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import UserError
from ..isolated import CrashError
from ..lowering import get_target
from ..manifest import SCHEMA_VERSION, OutputFolder
from ..models import LoadedModel, load_model
from ..npu_parity import GREEDY_TOKENS as NPU_GREEDY_TOKENS
from ..npu_parity import crash_gate, npu_gates, npu_prompt_tokens
from ..parity import GREEDY_TOKENS, PROMPT_TOKENS, KeptSlots, Trace, compare_logits, fill_gate, gates, run_reference
from ..quantize import NPU_QUANTS, quantize, twin
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
    run = _Run(folder, loaded, tick, prompt_tokens, greedy_tokens)
    with torch.no_grad():
        report = [run.npu(a) if a["quant"] in NPU_QUANTS else run.cpu(a) for a in folder.artifacts]
    return {
        "schema_version": SCHEMA_VERSION,
        "prompt_tokens": len(run.prompt),
        "greedy_tokens": greedy_tokens,
        "artifacts": report,
    }


class _Run:
    """One validation: the text, and the float32 model's traces of it, each made once."""

    def __init__(
        self, folder: OutputFolder, loaded: LoadedModel, tick: Callable[[int], None], prompt_tokens: int, greedy: int
    ) -> None:
        self.folder, self.loaded, self.tick, self.greedy = folder, loaded, tick, greedy
        self.shape, self.policy = folder.shape, folder.policy
        if not self.policy.evicts:
            prompt_tokens = self.shape.budget - greedy
        self.prompt = loaded.tokenizer(long_text())["input_ids"][:prompt_tokens]
        self._models: dict[str, torch.nn.Module] = {}
        self._float32: dict[tuple[int, int], Trace] = {}

    def float32(self, prompt: list[int], greedy: int) -> Trace:
        """The float32 model's trace over a prompt."""
        key = (len(prompt), greedy)
        if key not in self._float32:
            self._float32[key], _, _ = run_reference(
                self._reference(self.loaded.model), prompt, greedy, None, self.tick
            )
        return self._float32[key]

    def _reference(self, model: torch.nn.Module) -> Reference:
        return Reference(model, self.policy, self.shape.budget, self.shape.block, evict_every=self.shape.evict_every)

    def cpu(self, artifact: dict[str, Any]) -> dict[str, Any]:
        """Report of an artifact that is held to an eager model with the same weights and rounding."""
        quant = artifact["quant"]
        model = self._models.setdefault(quant, quantize(self.loaded.model, quant))
        if quant != "none":
            model = twin(model, get_target(artifact["target"]).activation(quant))
        float32 = self.float32(self.prompt, self.greedy)
        runner = open_runner(self.folder, artifact)
        reference = self._reference(model)
        reference.cache_dtype = self.shape.dtype
        ours, theirs, kept = run_reference(reference, self.prompt, self.greedy, runner, self.tick, float32.tokens)
        assert theirs is not None
        against_reference, against_float32 = compare_logits(ours, theirs), compare_logits(float32, theirs)
        exact = quant == "none" and self.shape.dtype == "float32"
        checks = gates(exact, against_reference, against_float32, kept, artifact["sqnr_floor_db"])
        if runner.fills:
            checks.append(fill_gate(runner, self.prompt))
        return _report(artifact, self.shape.dtype, checks, against_reference, against_float32, kept)

    def npu(self, artifact: dict[str, Any]) -> dict[str, Any]:
        """Report of an artifact on an emulator, held to float32; a crash is a failed check."""
        prompt = self.prompt[: npu_prompt_tokens(self.shape.budget, self.shape.block)]
        greedy = min(self.greedy, NPU_GREEDY_TOKENS)
        lengths = {"prompt_tokens": len(prompt), "greedy_tokens": greedy}
        float32 = self.float32(prompt, greedy)
        try:
            runner = open_runner(self.folder, artifact)
            try:
                ours, theirs, kept = run_reference(
                    self._reference(self.loaded.model), prompt, greedy, runner, self.tick, float32.tokens
                )
            finally:
                runner.close()
        except CrashError as error:
            checks = [crash_gate(error.cause)]
            return {**_report(artifact, self.shape.dtype, checks, None, None, None), **lengths, "crash": str(error)}
        assert theirs is not None
        against_reference, against_float32 = compare_logits(ours, theirs), compare_logits(float32, theirs)
        checks = npu_gates(artifact["quant"], against_reference, kept, artifact)
        return {**_report(artifact, self.shape.dtype, checks, against_reference, against_float32, kept), **lengths}


def _report(
    artifact: dict[str, Any],
    dtype: str,
    checks: list[dict[str, Any]],
    against_reference: dict[str, float | None] | None,
    against_float32: dict[str, float | None] | None,
    kept: KeptSlots | None,
) -> dict[str, Any]:
    return {
        "target": artifact["target"],
        "quant": artifact["quant"],
        "cache_dtype": dtype,
        "passed": all(check["passed"] for check in checks),
        "gates": checks,
        "reference": against_reference,
        "float32": against_float32,
        "kept_slots": None if kept is None else kept.to_dict(),
    }
