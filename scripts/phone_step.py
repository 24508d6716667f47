"""Inputs for one prefill step on a phone, and the comparison of what came back; `run_on_phone.sh` calls both."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from executorch.exir._serialize._program import deserialize_pte_binary
from transformers import AutoTokenizer

from keydiff_export.commands.run import open_runner
from keydiff_export.manifest import OutputFolder, open_folder
from keydiff_export.models import load_model
from keydiff_export.npu_slots import HostStep
from keydiff_export.runtime.npu import TorchEngine
from keydiff_export.text import long_text


def first_block(folder: OutputFolder) -> list[int]:
    """The first B tokens of the parity text: what `validate` reads first too."""
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    return tokenizer(long_text())["input_ids"][: folder.shape.block]


def write_inputs(folder: OutputFolder, place: Path) -> int:
    """Writes every input of `prefill` as raw bytes, and their list; returns the method's index for the runner."""
    program = deserialize_pte_binary((folder.path / "executorch-qnn" / "phone" / "model.pte").read_bytes()).program
    model = load_model(folder.manifest["model"]["source"]).model
    host = HostStep(model, folder.shape, folder.policy, folder.shape.block)
    engine = TorchEngine({"prefill": host}, {}, folder.shape, folder.policy)
    tokens = np.array([first_block(folder)])
    names = []
    for number, tensor in enumerate([*engine.inputs("prefill", tokens, 0, tokens.size), *engine.empty()]):
        names.append(f"input_{number}.raw")
        tensor.numpy().tofile(place / names[-1])
    (place / "input_list.txt").write_text(" ".join(names) + "\n", encoding="utf-8")
    return [plan.name for plan in program.execution_plan].index("prefill")


def compare(folder: OutputFolder, results: Path) -> int:
    """Prints how far the phone's logits are from the emulator's, beside what parity.json says of the emulator."""
    print((results / "run.log").read_text(encoding="utf-8", errors="replace").strip())
    files = sorted(results.glob("outputs/*output*0.raw"))
    if not files:
        print("run_on_phone: the phone wrote no outputs, see run.log above")
        return 1
    phone = np.fromfile(files[0], dtype=np.float32)
    artifact = folder.artifact_for("executorch-qnn")
    runner = open_runner(folder, artifact)
    emulator = runner.step(first_block(folder))
    runner.close()
    noise, signal = float(((phone - emulator) ** 2).sum()), float((emulator**2).sum())
    sqnr = "exact" if noise == 0 else f"{10 * np.log10(signal / noise):.1f} dB"
    parity = json.loads((folder.path / "parity.json").read_text(encoding="utf-8"))
    known = next(a for a in parity["artifacts"] if a["target"] == "executorch-qnn")
    print(f"first block: phone against emulator, SQNR {sqnr}; greedy token {phone.argmax()} and {emulator.argmax()}")
    print(f"emulator against float32, whole run: SQNR {known['float32']['sqnr_db']} dB, passed {known['passed']}")
    return int(phone.argmax() != emulator.argmax())


def main() -> int:
    """Writes inputs or compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("inputs", "compare"))
    parser.add_argument("exported", type=Path)
    parser.add_argument("place", type=Path)
    options = parser.parse_args()
    folder = open_folder(options.exported)
    if options.verb == "inputs":
        print(write_inputs(folder, options.place))
        return 0
    return compare(folder, options.place)


if __name__ == "__main__":
    raise SystemExit(main())
