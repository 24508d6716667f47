"""The output folder: what `manifest.json` and `parity.json` say, and the checks that every command makes first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema

from .errors import UserError
from .shape import CacheShape

if TYPE_CHECKING:
    from .policies import Policy

SCHEMA_VERSION = 1
MANIFEST, PARITY = "manifest.json", "parity.json"
_TOOLS = ("torch", "transformers", "torchao", "executorch", "onnx", "onnxruntime")


def load_schema(name: str) -> dict[str, Any]:
    """The published JSON Schema of "manifest" or "parity"."""
    return json.loads(files("keydiff_export.schemas").joinpath(f"{name}.schema.json").read_text(encoding="utf-8"))


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tool_versions() -> dict[str, str]:
    """Versions of the packages that an export depends on."""
    found = {}
    for name in _TOOLS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe_files(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Name, size and digest of files, as the manifest lists them."""
    return [{"path": n, "bytes": (folder / n).stat().st_size, "sha256": sha256(folder / n)} for n in sorted(names)]


@dataclass(frozen=True)
class OutputFolder:
    """An exported folder whose manifest and checksums hold."""

    path: Path
    manifest: dict[str, Any]

    @property
    def shape(self) -> CacheShape:
        """Static sizes of the cache."""
        cache = self.manifest["cache"]
        return CacheShape(**{field.name: cache[field.name] for field in fields(CacheShape)})

    @property
    def policy(self) -> Policy:
        """The policy that the artifacts carry."""
        from .policies import make_policy

        parameters = dict(self.manifest["policy"])
        return make_policy(parameters.pop("name"), **parameters)

    @property
    def evicts(self) -> bool:
        """False where the cache only fills, known without the policy's code."""
        return bool(self.manifest["policy"]["name"] != "full")

    @property
    def artifacts(self) -> list[dict[str, Any]]:
        """The artifacts' entries."""
        return list(self.manifest["artifacts"])

    def artifact_for(self, runtime: str) -> dict[str, Any]:
        """The first artifact that a runtime runs.

        Raises:
            UserError: the folder holds none.
        """
        for artifact in self.artifacts:
            if artifact["runtime"] == runtime:
                return artifact
        have = ", ".join(sorted({a["runtime"] for a in self.artifacts}))
        raise UserError(f"{self.path} has no artifact for {runtime}: it has {have}")


def open_folder(path: Path) -> OutputFolder:
    """Opens an exported folder after checking its manifest and every checksum.

    Raises:
        UserError: not an exported folder, a file is missing or differs from the manifest, or the schema does not match.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{path} is not an exported folder: {MANIFEST} is missing; make one with `keydiff-export export`"
        )
    manifest = _read_json(file, "manifest")
    for entry in [*manifest["files"], *(f for artifact in manifest["artifacts"] for f in artifact["files"])]:
        part = path / entry["path"]
        if not part.is_file():
            raise UserError(f"{part} is missing: export the folder again")
        if part.stat().st_size != entry["bytes"] or sha256(part) != entry["sha256"]:
            raise UserError(f"{part} does not match its checksum in {MANIFEST}: export the folder again")
    if (path / PARITY).is_file():
        _read_json(path / PARITY, "parity")
    return OutputFolder(path, manifest)


def _read_json(file: Path, schema: str) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        jsonschema.validate(data, load_schema(schema))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: export the folder again") from error
    except jsonschema.ValidationError as error:
        where = "/".join(str(part) for part in error.absolute_path) or "top level"
        raise UserError(
            f"{file} does not match its schema at {where}: {error.message.splitlines()[0][:120]}"
        ) from error
    assert isinstance(data, dict)
    return data


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Writes JSON beside its place and renames it, so that no reader meets half a file."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well; else it is removed.

    A former output folder is replaced; any other folder that holds files is left alone.

    Raises:
        UserError: `target` exists and is not an output folder, or its parent cannot be written.
    """
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise UserError(f"{target} exists and is not an exported folder: choose another -o")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            old = temporary.with_name(temporary.name + ".old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
