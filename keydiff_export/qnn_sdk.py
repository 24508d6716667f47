"""Where Qualcomm's libraries are: an SDK that QNN_SDK_ROOT names, or those of the package onnxruntime-qnn.

The package brings what lowering needs and an emulator of the Hexagon processor for x86-64. ExecuTorch looks for the
layout of an SDK, so a folder of links is made once in the cache. Nothing of it is copied or shipped: the libraries are
under Qualcomm's AI Stack licence, which whoever installs the package accepts.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import UserError

PACKAGE = "onnxruntime-qnn"
# ExecuTorch 1.5.1 fails to create a device with the libraries of 2.3, 2.4, 2.6 and 2.7.
PINNED = "2.5.0"
INSTALL = "pip install 'keydiff-export[qnn]'"
_HOST = "x86_64-linux-clang"


@dataclass(frozen=True)
class Soc:
    """A phone's chip, as the two roads name it.

    Attributes:
        name: Qualcomm's part number, as ExecuTorch spells it.
        model: QNN's number for it.
        arch: version of its Hexagon processor.
        phone: marketing name.
    """

    name: str
    model: int
    arch: int
    phone: str


SOCS = {
    soc.name: soc
    for soc in (
        Soc("SM8650", 57, 75, "Snapdragon 8 Gen 3"),
        Soc("SM8750", 69, 79, "Snapdragon 8 Elite"),
        Soc("SM8850", 87, 81, "Snapdragon 8 Elite Gen 5"),
    )
}


def soc(name: str) -> Soc:
    """The chip of that name.

    Raises:
        UserError: unknown chip.
    """
    if name not in SOCS:
        raise UserError(f"unknown SoC {name!r}: choose one of {', '.join(SOCS)}")
    return SOCS[name]


@dataclass(frozen=True)
class Sdk:
    """Usable libraries.

    Attributes:
        root: a folder in the SDK's layout.
        source: where it comes from, in words.
        package: folder of the Python package, None when it is not installed.
    """

    root: Path
    source: str
    package: Path | None

    @property
    def libraries(self) -> Path:
        """Folder of this machine's libraries."""
        return self.root / "lib" / _HOST

    def environment(self) -> dict[str, str]:
        """Variables for a child process; the loader reads LD_LIBRARY_PATH only when a process starts."""
        others = os.environ.get("LD_LIBRARY_PATH")
        path = os.pathsep.join([str(self.libraries), *([others] if others else [])])
        return {"QNN_SDK_ROOT": str(self.root), "LD_LIBRARY_PATH": path, "ORT_DISABLE_TELEMETRY": "1"}


def package_version() -> str | None:
    """Version of the installed onnxruntime-qnn, or None."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec("onnxruntime_qnn")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def find_sdk() -> Sdk:
    """The libraries to use: QNN_SDK_ROOT first, then the package.

    Raises:
        UserError: another machine than Linux on x86-64, nothing installed, another version, or a wrong QNN_SDK_ROOT.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UserError(f"QNN lowering runs on Linux x86-64, this is {platform.system()} {platform.machine()}")
    package = _package_folder()
    given = os.environ.get("QNN_SDK_ROOT")
    if given:
        root = Path(given)
        if not (root / "lib" / _HOST / "libQnnHtp.so").exists():
            raise UserError(
                f"QNN_SDK_ROOT={given} has no lib/{_HOST}/libQnnHtp.so: point it to an unpacked QNN SDK, or unset it "
                f"and run `{INSTALL}`"
            )
        return Sdk(root, f"QNN_SDK_ROOT={given}", package)
    found = package_version()
    if package is None or found is None:
        raise UserError(
            f"QNN targets need the package {PACKAGE}: run `{INSTALL}` (Qualcomm's AI Stack licence applies)"
        )
    if found != PINNED:
        raise UserError(f"QNN targets need {PACKAGE}=={PINNED}, found {found}: run `{INSTALL}`")
    return Sdk(_linked(package), f"{PACKAGE} {found}", package)


def _linked(package: Path) -> Path:
    """Links in the SDK's layout; libQnnHtp.so looks for its C++ runtime in ../onnxruntime_qnn.libs."""
    cache = Path(os.environ.get("KEYDIFF_CACHE", Path.home() / ".cache" / "keydiff-export"))
    root = cache / f"qnn-sdk-{PINNED}"
    host = root / "lib" / _HOST
    try:
        host.mkdir(parents=True, exist_ok=True)
        for library in package.glob("*.so"):
            _link(host / library.name, library)
        bundled = package.parent / "onnxruntime_qnn.libs"
        _link(root / "lib" / bundled.name, bundled)
    except OSError as error:
        raise UserError(f"cannot link the QNN libraries into {root}: {error.strerror}") from error
    return root


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    # Renamed into place, so that a process that loads it meanwhile meets the old link or the new one.
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.symlink_to(target)
    temporary.replace(link)
