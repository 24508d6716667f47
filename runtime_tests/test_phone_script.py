"""`scripts/run_on_phone.sh` without a phone: what it would do, and what it says of missing files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from keydiff_export.manifest import SCHEMA_VERSION, OutputFolder

SCRIPT = Path(__file__).parent.parent / "scripts" / "run_on_phone.sh"


@pytest.fixture(scope="module")
def exported(npu_fp16: dict[str, OutputFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("phone") / "out"
    shutil.copytree(npu_fp16["executorch-qnn"].path, place)
    # A dry run compares nothing, but the folder is opened, and so its schema is checked.
    report = {"schema_version": SCHEMA_VERSION, "prompt_tokens": 1, "greedy_tokens": 1, "artifacts": []}
    (place / "parity.json").write_text(json.dumps(report))
    return place


@pytest.fixture
def sdk(tmp_path: Path) -> Path:
    root = tmp_path / "sdk"
    names = ["aarch64-android/libQnnHtp.so", "aarch64-android/libQnnSystem.so", "aarch64-android/libQnnHtpV79Stub.so"]
    for name in [*names, "hexagon-v79/unsigned/libQnnHtpV79Skel.so"]:
        (root / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "lib" / name).write_bytes(b"")
    (tmp_path / "qnn_executor_runner").write_bytes(b"")
    return root


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(Path.home())}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_dry_run_prints_every_command(exported: Path, sdk: Path) -> None:
    done = run("--dry-run", "--serial", "abc", exported, sdk, sdk.parent / "qnn_executor_runner")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(("adb -s abc ", "python scripts/phone_step.py compare ")) for line in lines)
    pushed = done.stdout
    for name in ("phone/model.pte", "libQnnHtpV79Stub.so", "libQnnHtpV79Skel.so", "input_list.txt", "run.log"):
        assert name in pushed
    inputs = json.loads((exported / "manifest.json").read_text())["artifacts"][0]["methods"]["prefill"]["inputs"]
    assert pushed.count(".raw") == 2 * len(inputs)
    assert not (exported / "phone-results").exists()


def test_what_is_missing_is_named(exported: Path, sdk: Path, tmp_path: Path) -> None:
    runner = sdk.parent / "qnn_executor_runner"
    for arguments, words in (
        ((exported, sdk), "needs EXPORTED_FOLDER, QNN_SDK and RUNNER"),
        ((tmp_path, sdk, runner), "is not an exported folder"),
        ((exported, tmp_path, runner), "is not a QNN SDK with Android libraries"),
        ((exported, sdk, tmp_path / "none"), "runner"),
        (("--fast",), "unknown option --fast"),
    ):
        done = run("--dry-run", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_shellcheck_is_content() -> None:
    found = shutil.which("shellcheck") or shutil.which("shellcheck", path=_installed())
    assert found, "shellcheck is missing: bash scripts/setup.sh installs it"
    # From the root: scripts source each other by paths from there.
    root = SCRIPT.parent.parent
    scripts = [str(script.relative_to(root)) for script in sorted(SCRIPT.parent.glob("*.sh"))]
    assert len(scripts) > 5
    done = subprocess.run([found, "-x", *scripts], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def _installed() -> str:
    """Scripts of the packages that scripts/setup.sh links to."""
    return str(Path(pytest.__file__).parents[4] / "bin")
