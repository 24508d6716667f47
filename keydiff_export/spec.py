"""What to export: a graph card (`spec.yaml` in a folder of `graphs/`) or the same fields from the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .policies import Policy, make_policy
from .quantize import QUANTS, REFUSED_QUANTS
from .shape import CACHE_DTYPES

CARD_FILE = "spec.yaml"


@dataclass(frozen=True)
class ExportSpec:
    """One export.

    Attributes:
        model: folder, .gguf file, hub id, or `package:NAME/FILE` of an installed package.
        budget: N, tokens held a layer and KV head.
        block: B, tokens read a prefill step.
        policy: name and parameters of the eviction policy, e.g. {"name": "keydiff", "recent": 0.2}.
        quant: none, 8da4w, 8da4w-head4, int4 or int8; for NPUs fp16, 16a8w or 16a4w.
        evict_every: k; generated tokens leave k at a time, which the paper does not do. 1 evicts at every token.
        cache_dtype: what keys and values are stored as: float32, float16, or int8 with a scale a row.
        targets: where the graph is lowered to.
        sqnr_floor: least SQNR in dB against the float32 model that `validate` accepts for a quantised artifact.
        jaccard_floor, token_floor: the same for the mean Jaccard of kept sets and the share of equal greedy tokens, of
            NPU targets, which are held to the float32 model.
        system_prompt: text that opens every chat; its tokens are pinned. None for no system prompt.
        soc: chip that NPU targets are compiled for.
        compile: NPU targets also write what a phone loads.
        calibration: text file or folder that quantised NPU targets are calibrated with; a built-in text without it.
        stock_runner: whether a .pte also carries the method `forward`, which ExecuTorch's own LLM runners call; never
            where generated tokens leave k at a time.
        name: name of the card, or of the model.
    """

    model: str
    budget: int
    block: int
    policy: dict[str, Any] = field(default_factory=lambda: {"name": "keydiff"})
    quant: str = "none"
    cache_dtype: str = "float32"
    evict_every: int = 1
    targets: tuple[str, ...] = ("executorch-xnnpack", "onnx-cpu")
    sqnr_floor: float | None = None
    jaccard_floor: float | None = None
    token_floor: float | None = None
    system_prompt: str | None = None
    soc: str = "SM8650"
    compile: bool = False
    calibration: str | None = None
    stock_runner: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        for key in ("budget", "block", "evict_every"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{key} must be a whole number of at least 1, got {value!r}")
        if self.block > self.budget:
            raise UserError(
                f"block {self.block} is larger than budget {self.budget}: choose a block of at most the budget"
            )
        if self.evict_every > self.block:
            raise UserError(f"evict_every {self.evict_every} is more than the {self.block} spare slots of a block")
        if self.quant in REFUSED_QUANTS:
            raise UserError(f"--quant {self.quant}: {REFUSED_QUANTS[self.quant]}")
        if self.quant not in QUANTS:
            raise UserError(f"unknown quantisation {self.quant!r}: choose one of {', '.join(QUANTS)}")
        if self.cache_dtype not in CACHE_DTYPES:
            raise UserError(f"unknown cache dtype {self.cache_dtype!r}: choose one of {', '.join(CACHE_DTYPES)}")
        if not self.targets:
            raise UserError("no target given: see `keydiff-export targets`")
        if self.system_prompt is not None and not (isinstance(self.system_prompt, str) and self.system_prompt.strip()):
            raise UserError(f"system_prompt must be text, got {self.system_prompt!r}")
        if not isinstance(self.stock_runner, bool):
            raise UserError(f"stock_runner must be true or false, got {self.stock_runner!r}")
        self.make_policy()

    def make_policy(self, pinned: int = 0) -> Policy:
        """The policy object, with at least `pinned` positions pinned.

        Raises:
            UserError: unknown name or parameter, or more tokens that never leave than the budget holds.
        """
        parameters = dict(self.policy)
        name = parameters.pop("name", None)
        if not isinstance(name, str):
            raise UserError("policy has no name: write `policy: {name: keydiff}`")
        if pinned:
            parameters["pinned"] = max(pinned, parameters.get("pinned", 0))
        policy = make_policy(name, **parameters)
        try:
            policy.check_budget(self.budget)
        except ValueError as error:
            raise UserError(f"policy {name}: {error}") from error
        return policy

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {**asdict(self), "targets": list(self.targets)}


def load_card(folder: Path) -> ExportSpec:
    """Reads a graph card.

    Raises:
        UserError: no card there, not YAML, an unknown field or a bad value.
    """
    file = folder / CARD_FILE
    if not file.is_file():
        raise UserError(f"no graph card at {folder}: expected {file}")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not readable YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise UserError(f"{file} must hold fields such as `model:` and `budget:`")
    known = {f.name for f in fields(ExportSpec)}
    for key in data:
        if key not in known:
            raise UserError(f"{file}: unknown field {key!r}; known are {', '.join(sorted(known))}")
    for key in ("model", "budget", "block"):
        if key not in data:
            raise UserError(f"{file}: field {key!r} is missing")
    data.setdefault("name", folder.resolve().name)
    if isinstance(data.get("targets"), list):
        data["targets"] = tuple(data["targets"])
    return ExportSpec(**data)
