"""keydiff-export: decoder LLMs as static graphs with a fixed KV cache that evicts by key similarity.

The Python API has four verbs:

    folder = keydiff_export.export(spec, "out")          # or load("out") for one that exists
    report = keydiff_export.validate(folder)
    result = keydiff_export.generate(folder, "a long prompt")
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .generate import Result, Sampling

if TYPE_CHECKING:
    from .manifest import OutputFolder
    from .spec import ExportSpec, load_card

__version__ = "0.1.0"

# Looked up on first use: they need torch, which a process that only runs an artifact does not.
_ON_USE = {"ExportSpec": "spec", "OutputFolder": "manifest", "load_card": "spec"}


def __getattr__(name: str) -> Any:
    if name not in _ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ON_USE[name]}", __name__), name)


def load(path: str | Path) -> OutputFolder:
    """Opens an exported folder after checking its manifest and checksums.

    Raises:
        UserError: not an exported folder, or a file in it does not match.
    """
    from .manifest import open_folder

    return open_folder(Path(path))


def export(spec: ExportSpec | str | Path, output: str | Path, validate: bool = True) -> OutputFolder:
    """Exports a spec, or the graph card in a folder; see `commands.export.export_model`."""
    from .commands.export import export_model
    from .spec import ExportSpec, load_card

    return export_model(spec if isinstance(spec, ExportSpec) else load_card(Path(spec)), Path(output), validate)


def validate(folder: OutputFolder) -> dict[str, Any]:
    """Parity report of every artifact against the eager reference; see `commands.validate.validate_folder`."""
    from .commands.validate import validate_folder

    return validate_folder(folder)


def generate(folder: OutputFolder, prompt: str, **options: Any) -> Result:
    """Answers a prompt of any length; options as in `commands.run.run_prompt`."""
    from .commands.run import run_prompt

    return run_prompt(folder, prompt, **options)


__all__ = [
    "ExportSpec",
    "OutputFolder",
    "Result",
    "Sampling",
    "UserError",
    "export",
    "generate",
    "load",
    "load_card",
    "validate",
]
