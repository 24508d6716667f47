"""The checks of the APK find what they are there for."""

from __future__ import annotations

import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import check_apk

BADGING = check_apk._badging
SOUND = """package: name='org.keydiff.app' versionCode='1' versionName='0.1.0'
sdkVersion:'26'
targetSdkVersion:'34'
launchable-activity: name='org.keydiff.app.MainActivity'  label='' icon=''
native-code: 'arm64-v8a' 'x86_64'
"""


def elf(alignment: int) -> bytes:
    """A 64-bit ELF file of one LOAD segment and nothing else."""
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 1)
    return bytes(header) + struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, 0, alignment)


def build(file: Path, alignment: int = check_apk.PAGE, compress: int = zipfile.ZIP_STORED, shift: int = 0) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("org/keydiff/core/manifest.schema.json", "{}")
        for abi in check_apk.ABIS:
            for library in check_apk.LIBRARIES:
                info = zipfile.ZipInfo(f"lib/{abi}/{library}")
                info.compress_type = compress
                start = archive.fp.tell() + 30 + len(info.filename)  # type: ignore[union-attr]
                padding = -start % check_apk.PAGE + shift
                info.extra = struct.pack("<HH", 0xD935, padding - 4 if padding >= 4 else padding + check_apk.PAGE - 4)
                info.extra += bytes(len(info.extra) and struct.unpack("<HH", info.extra)[1])
                archive.writestr(info, elf(alignment))
    return file


@pytest.fixture(autouse=True)
def _no_aapt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_apk, "_badging", lambda file: [])


def test_a_sound_package_passes(tmp_path: Path) -> None:
    assert check_apk.problems_of_package(build(tmp_path / "a.apk"), None) == []


def test_small_pages_are_found(tmp_path: Path) -> None:
    found = check_apk.problems_of_package(build(tmp_path / "a.apk", alignment=4096), None)
    assert len(found) == 10
    assert "is built for smaller pages: [4096]" in found[0]


def test_a_library_off_the_page_is_found(tmp_path: Path) -> None:
    found = check_apk.problems_of_package(build(tmp_path / "a.apk", shift=8), None)
    assert found
    assert "is not stored at a multiple of 16384" in found[0]


def test_a_compressed_library_is_found(tmp_path: Path) -> None:
    found = check_apk.problems_of_package(build(tmp_path / "a.apk", compress=zipfile.ZIP_DEFLATED), None)
    assert any("is not stored" in problem for problem in found)


def test_a_missing_library_is_found(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.apk", "w") as archive:
        archive.writestr("lib/x86_64/libexecutorch.so", elf(check_apk.PAGE))
    found = check_apk.problems_of_package(tmp_path / "a.apk", None)
    assert any("native libraries are" in problem for problem in found)
    assert "the manifest's schema is missing" in found


@pytest.mark.parametrize(
    ("sound", "changed", "problem"),
    [
        ("", "", None),
        (
            "sdkVersion:'26'",
            "uses-permission: name='android.permission.INTERNET'\nsdkVersion:'26'",
            "asks for a permission: uses-permission: name='android.permission.INTERNET'",
        ),
        ("\nsdkVersion:'26'", "\nsdkVersion:'28'", "badging lacks sdkVersion:'26'"),
        (" 'x86_64'", "", "badging lacks native-code: 'arm64-v8a' 'x86_64'"),
    ],
)
def test_badging(monkeypatch: pytest.MonkeyPatch, sound: str, changed: str, problem: str | None) -> None:
    text = SOUND.replace(sound, changed) if sound else SOUND
    monkeypatch.setattr(check_apk.subprocess, "run", lambda *command, **options: SimpleNamespace(stdout=text))
    assert BADGING(Path("a.apk")) == ([] if problem is None else [problem])


def test_operators_that_the_library_lacks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apk = build(tmp_path / "a.apk")
    # Every ELF file says so of itself; no library of ours has the other.
    monkeypatch.setattr(check_apk, "operators", lambda program: ["ELF", "aten::no_such.out"])
    found = check_apk.problems_of_package(apk, tmp_path / "model.pte")
    assert found == [f"lib/{abi}/libexecutorch.so has no aten::no_such.out" for abi in check_apk.ABIS]


def test_missing_references_are_found_and_known_ones_are_not() -> None:
    known = "Error: Missing class javax.annotation.Nullable (referenced from: x)\n"
    new = "Error: [Missing method java.lang.String java.lang.String.strip() (referenced from: y)\n"
    assert check_apk.unknown_references(known) == []
    assert len(check_apk.unknown_references(known + new)) == 1
    assert check_apk.unknown_references("Error: No library specified")
