"""A function in a process of its own: its memory is its own, and what kills it kills nothing else."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .errors import UserError


def call_in_child(function: str, arguments: dict[str, Any], time_limit: float | None = None) -> Any:
    """Calls `module:function` with keyword arguments in a new Python process and returns its result.

    Args:
        function: where it is, e.g. "keydiff_export.measure:measure".
        arguments: anything that JSON holds, as is what comes back.
        time_limit: seconds, none by default.

    Raises:
        UserError: it raised, was killed or took too long; the message is one line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        call, answer = Path(scratch) / "call.json", Path(scratch) / "answer.json"
        call.write_text(json.dumps({"function": function, "arguments": arguments}), encoding="utf-8")
        command = [sys.executable, "-m", "keydiff_export.child", str(call), str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=time_limit)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"took more than {time_limit:g} s") from error
        if done.returncode != 0 or not answer.is_file():
            said = done.stderr.strip().splitlines()[-1:] if done.returncode > 0 else []
            raise UserError(said[0] if said else f"the process ended with status {done.returncode}")
        return json.loads(answer.read_text(encoding="utf-8"))


def resolve(function: str) -> Any:
    """The object at `module:name`."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def main() -> int:
    """Makes the call of one file and writes the result to another; standard output is left to native libraries."""
    call = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        result = resolve(call["function"])(**call["arguments"])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
