"""Checks of the built app that need no phone.

Usage: python scripts/check_apk.py package FILE.apk [--program MODEL.pte]
       python scripts/check_apk.py references TRACE.txt
       python scripts/check_apk.py java-8 OUTPUT.jar
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

PAGE = 16384
ABIS = ["arm64-v8a", "x86_64"]
LIBRARIES = ["libc++_shared.so", "libexecutorch.so", "libfbjni.so", "libonnxruntime.so", "libonnxruntime4j_jni.so"]
JAVA_MODULES = ("java.base", "java.logging", "java.sql", "java.xml")
# What Android 8 lacks and no phone misses: reference -> why.
KNOWN_REFERENCES = {"javax.annotation.Nullable": "an annotation in fbjni, read by nobody at run time"}


def problems_of_package(file: Path, program: Path | None) -> list[str]:
    """What is wrong with an APK: manifest, ABIs, alignment, ELF pages; with a .pte also operators that are missing."""
    found = _badging(file)
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        names = sorted(n for n in archive.namelist() if n.startswith("lib/"))
        expected = [f"lib/{abi}/{library}" for abi in ABIS for library in LIBRARIES]
        if names != expected:
            found.append(f"native libraries are {names}, expected {expected}")
        if not any(name.endswith("manifest.schema.json") for name in archive.namelist()):
            found.append("the manifest's schema is missing")
        for info in archive.infolist():
            if not info.filename.endswith(".so"):
                continue
            stream.seek(info.header_offset + 26)
            lengths = struct.unpack("<HH", stream.read(4))
            start = info.header_offset + 30 + sum(lengths)
            if info.compress_type != zipfile.ZIP_STORED or start % PAGE:
                found.append(f"{info.filename} is not stored at a multiple of {PAGE}: {start}")
            content = archive.read(info)
            if any(alignment % PAGE for alignment in load_alignments(content)):
                found.append(f"{info.filename} is built for smaller pages: {load_alignments(content)}")
            if program is not None and info.filename.endswith("libexecutorch.so"):
                missing = [name for name in operators(program) if name.encode() not in content]
                if missing:
                    found.append(f"{info.filename} has no {', '.join(missing)}")
    return found


def _badging(file: Path) -> list[str]:
    text = subprocess.run(["aapt", "dump", "badging", str(file)], capture_output=True, text=True, check=True).stdout
    wanted = (
        "package: name='org.keydiff.app'",
        "sdkVersion:'26'",
        "targetSdkVersion:'34'",
        "launchable-activity: name='org.keydiff.app.MainActivity'",
        f"native-code: {' '.join(repr(abi) for abi in ABIS)}",
    )
    found = [f"badging lacks {line}" for line in wanted if line not in text]
    return found + [f"asks for a permission: {line}" for line in text.splitlines() if "uses-permission" in line]


def load_alignments(library: bytes) -> list[int]:
    """Alignments of the LOAD segments of a 64-bit ELF file."""
    table = struct.unpack_from("<Q", library, 32)[0]
    size, count = struct.unpack_from("<HH", library, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", library, table + size * number) for number in range(count)]
    return [header[7] for header in headers if header[0] == 1]


def operators(program: Path) -> list[str]:
    """Names of the kernels that a .pte calls outside its delegates."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    plans = deserialize_pte_binary(program.read_bytes()).program.execution_plan
    names = {f"{op.name}.{op.overload}" if op.overload else op.name for plan in plans for op in plan.operators}
    return sorted(names)


def unknown_references(trace: str) -> list[str]:
    """Missing classes, methods and fields that TraceReferences lists, without the known ones."""
    lines = [line.strip().removeprefix("Error: ").strip("[]") for line in trace.splitlines()]
    missing = [line for line in lines if line.startswith("Missing ")]
    if not missing and "rror" in trace:
        return [f"TraceReferences did not run: {trace[:300]}"]
    return [line for line in missing if not any(known in line for known in KNOWN_REFERENCES)]


def write_java_8(output: Path) -> None:
    """The Java 8 API, which Android 8 has, as a jar: the signatures that every JDK carries for `javac --release 8`.

    Robolectric's framework jar has no java.*: on a desktop it comes from the JDK.
    """
    javac = shutil.which("javac")
    assert javac is not None
    signatures = Path(os.path.realpath(javac)).parent.parent / "lib" / "ct.sym"
    with zipfile.ZipFile(signatures) as source, zipfile.ZipFile(output, "w") as target:
        for name in source.namelist():
            releases, module, path = [*name.split("/", 2), "", ""][:3]
            if "8" in releases and module in JAVA_MODULES and path.endswith(".sig"):
                target.writestr(path.removesuffix(".sig") + ".class", source.read(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    package = commands.add_parser("package")
    package.add_argument("file", type=Path)
    package.add_argument("--program", default="")
    references = commands.add_parser("references")
    references.add_argument("file", type=Path)
    commands.add_parser("java-8").add_argument("file", type=Path)
    options = parser.parse_args()
    found: list[str] = []
    if options.command == "package":
        found = problems_of_package(options.file, Path(options.program) if options.program else None)
    elif options.command == "java-8":
        write_java_8(options.file)
    else:
        found = unknown_references(options.file.read_text(encoding="utf-8"))
    for problem in found:
        print(f"{options.file.name}: {problem}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
