"""`plan`: reads a config.json and prints what an export of the model would need and how fast it would be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..devices import get_device
from ..errors import UserError
from ..plan import Request, make_plan
from ..sizes import model_sizes

CONFIG = "config.json"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_tokens(text: str) -> int:
    """'32k' -> 32768, '4096' -> 4096.

    Raises:
        UserError: neither.
    """
    found = re.fullmatch(r"([0-9]+)(k?)", text.strip().lower())
    if not found or int(found[1]) == 0:
        raise UserError(f"context must be a number of tokens such as 32k or 4096, got {text!r}")
    return int(found[1]) * (1024 if found[2] else 1)


def parse_bytes(text: str) -> int:
    """'6GB' -> 6 * 10**9, '512MiB' -> 512 * 2**20.

    Raises:
        UserError: neither.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if not found or found[2] not in _UNITS or float(found[1]) == 0:
        raise UserError(f"ram must be a size such as 6GB or 512MiB, got {text!r}")
    return round(float(found[1]) * _UNITS[found[2]])


def read_config(source: str) -> dict[str, Any]:
    """config.json of a model folder, of an exported folder, or of a hub id, of which nothing else is downloaded.

    Raises:
        UserError: nothing there, or not a JSON object.
    """
    file = Path(source) / CONFIG if Path(source).is_dir() else Path(source)
    if file.name != CONFIG:
        file = _download(source)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "is not readable JSON"
        raise UserError(f"{file} {reason}: plan needs a Hugging Face model folder or a hub id") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a JSON object with fields such as model_type")
    return config


def _download(source: str) -> Path:
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"model {source!r}: plan needs a folder with {CONFIG}, or a hub id")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, CONFIG))
    except Exception as error:  # the hub client raises its own family, and its network library's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read {CONFIG} of {source!r} from the hub: {reason}") from error


def plan_model(source: str, request: Request) -> dict[str, Any]:
    """The report for a model folder or hub id; see `plan.make_plan`.

    Raises:
        UserError: no config, an unknown model or device, or a memory that nothing fits.
    """
    device = get_device(request.device)
    return make_plan(model_sizes(read_config(source), source), request, device)


def plan_table(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    model, request = report["model"], report["request"]
    lines = [
        f"{model['kind']}, {model['parameters'] / 1e6:.0f} M parameters: {model['layers']} layers, "
        f"{model['query_heads']} query / {model['kv_heads']} KV heads of {model['head_dim']}",
        f"{request['target']}, --quant {request['quant']}, {request['context']} prompt tokens, {request['device']}",
        "",
        f"{'':<28}{'N ' + str(report['budget']) + ' + B ' + str(report['block']):>20}{'full cache':>16}",
    ]
    rows = (
        ("slots", "slots", 1, ".0f"),
        ("cache MB", "cache_bytes", 1e6, ".1f"),
        ("weights in files MB", "file_bytes", 1e6, ".0f"),
        ("weights as loaded MB", "loaded_bytes", 1e6, ".0f"),
        ("activations MB", "activation_bytes", 1e6, ".1f"),
        ("runtime MB", "runtime_bytes", 1e6, ".0f"),
        ("all memory MB", "total_bytes", 1e6, ".0f"),
        ("predicted first token s", "ttft_s", 1, ".2f"),
        ("predicted tokens/s", "tokens_per_s", 1, ".1f"),
    )
    for title, key, unit, form in rows:
        slots, full = (format(report[kind][key] / unit, form) for kind in ("slot_cache", "full_cache"))
        lines.append(f"{title:<28}{slots:>20}{full:>16}")
    if request["ram"] is not None:
        verdict = "fits" if report["fits"] else "DOES NOT FIT"
        lines += ["", f"{verdict} {request['ram'] / 1e6:.0f} MB"]
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])
