"""docs/new-policy.md, executed as it stands, on a tiny model in place of the demo model."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
from conftest import DEMO_MODEL

import keydiff_export.policies
from keydiff_export.inspection import inspect_folder
from keydiff_export.manifest import open_folder
from keydiff_export.policies import POLICIES

PAGE = Path(__file__).parent.parent / "docs" / "new-policy.md"


def test_the_page_runs(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keydiff_export.policies.POLICIES", dict(POLICIES))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    assert sum(DEMO_MODEL in block for block in blocks) == 2
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # dataclass looks its module up
    for block in blocks:
        exec(block.replace(DEMO_MODEL, str(tiny_folder)), vars(page))
    folder = open_folder(tmp_path / "out")
    assert folder.manifest["policy"]["name"] == "far-and-long"
    method = inspect_folder(folder)["artifacts"][0]["methods"]["prefill"]
    cache = {"keys", "values", "positions"}
    assert {name.rsplit("_", 1)[0] for name in method["state"]} == cache | {"state", "total"}
    assert page.Stride(step=2).name in keydiff_export.policies.policy_names()
