"""Stand-ins for the CUDA libraries that the ARM64 package of torch links and an import without a GPU never needs.

Usage: python scripts/arm64_stubs.py TORCH_LIB OUTPUT   (needs aarch64-linux-gnu-gcc and -readelf)

Every function of a stand-in returns 0. The real libraries are gigabytes, and the only ARM64 package of torch on PyPI
is the one with CUDA.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

TOOLS = "aarch64-linux-gnu-"
CUDA = re.compile(r"cu|nv|nccl|__cuda")
OURS = re.compile(r"lib(cu|nv|nccl)")


def readelf(file: Path, *flags: str) -> str:
    return subprocess.run(
        [f"{TOOLS}readelf", "-W", *flags, str(file)], capture_output=True, text=True, check=True
    ).stdout


def main() -> None:
    libraries, output = list(Path(sys.argv[1]).glob("*.so*")), Path(sys.argv[2])
    present = {library.name for library in libraries}
    missing: set[str] = set()
    # The dynamic linker looks a versioned name up in one library and any other name in all of them.
    wanted: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    loose: set[str] = set()
    for library in libraries:
        missing |= set(re.findall(r"Shared library: \[(.*)\]", readelf(library, "--dynamic"))) - present
        owner, owners = "", {}
        for found in re.finditer(r"File: (\S+)|Name: (\S+)", readelf(library, "--version-info")):
            owner = found[1] or owner
            owners[found[2]] = owner
        for symbol in re.findall(r" UND (\S+)", readelf(library, "--dyn-syms")):
            name, _, version = symbol.partition("@")
            if version in owners:
                wanted[owners[version]][version].add(name)
            elif CUDA.match(name):
                loose.add(name)
    missing = {name for name in missing if OURS.match(name)}
    output.mkdir()
    for number, name in enumerate(sorted(missing)):
        versions = wanted[name]
        names = sorted(set().union(*versions.values(), loose if number == 0 else ()))
        source, script = output / "stub.s", output / "stub.map"
        source.write_text("".join(f".globl {n}\n.type {n},%function\n{n}:\n" for n in names) + "mov x0, #0\nret\n")
        script.write_text(
            "".join(f"{v} {{ {' '.join(f'{n};' for n in sorted(ns))} }};\n" for v, ns in versions.items())
        )
        flags = [f"-Wl,--version-script={script}"] if versions else []
        link = [f"{TOOLS}gcc", "-shared", "-nostdlib", f"-Wl,-soname={name}", *flags]
        subprocess.run([*link, "-o", str(output / name), str(source)], check=True)
        source.unlink()
        script.unlink()


if __name__ == "__main__":
    main()
