"""Runs a .pte with ExecuTorch's Python bindings."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from .base import LAYERED, Logits, Runner, Snapshot, make_snapshot, padded


@contextmanager
def _quiet_native_log() -> Iterator[None]:
    """Drops what ExecuTorch's C++ prints about the processor when it first runs; errors come back as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# The name of `decode` in programs that also have `forward`.
DECODE_BESIDE_FORWARD = "decode_one"


class ExecuTorchRunner(Runner):
    """Steps the methods of a .pte.

    Args:
        file: the .pte.
        budget, block: N and B of the graph.
        threads: CPU threads, all cores by default.
        evict_every: k of the graph.
        profile: folder for ExecuTorch's ETDump, none by default.

    Raises:
        UserError: ExecuTorch is missing or refuses the file.
    """

    def __init__(
        self,
        file: Path,
        budget: int,
        block: int,
        threads: int | None = None,
        evict_every: int = 1,
        profile: Path | None = None,
    ) -> None:
        super().__init__(budget, block, evict_every)
        self._profile = profile or Path()
        logging.getLogger("executorch").setLevel(logging.ERROR)
        try:
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
            from executorch.extension.pybindings import portable_lib
        except ImportError as error:
            raise UserError("running a .pte needs the package executorch: run `pip install executorch`") from error
        if threads is not None:
            portable_lib._unsafe_reset_threadpool(threads)
        try:
            # The Program API gives all methods one set of memory arenas, and so one cache; the Module API does not.
            with _quiet_native_log():
                self._program = portable_lib._load_program(str(file), enable_etdump=profile is not None)
                names = {self._program.get_method_name(i) for i in range(self._program.num_methods())}
                missing = DECODE_BESIDE_FORWARD not in names and "forward" in self.methods
                renamed = {"decode": DECODE_BESIDE_FORWARD} if DECODE_BESIDE_FORWARD in names else {}
                wanted = () if missing else self.methods
                self._methods = {name: self._program.load_method(renamed.get(name, name)) for name in wanted}
        except RuntimeError as error:
            raise UserError(f"{file} is not a program that ExecuTorch can load: export it again") from error
        if missing:
            raise UserError(f"{file} has no method forward: export it with --stock-runner")

    def _prefill(self, tokens: list[int]) -> Logits:
        row = torch.from_numpy(padded(tokens, self.block))
        return self._run("prefill", row, torch.tensor([self.seen]), torch.tensor([len(tokens)]))

    def _decode(self, token: int) -> Logits:
        staged = [torch.tensor([self.staged])] if self.evict_every > 1 else []
        return self._run(self._single, torch.tensor([[token]]), torch.tensor([self.seen]), *staged)

    def _run(self, method: str, *inputs: torch.Tensor) -> Logits:
        output = self._methods[method].call(inputs)
        return np.array(output[0].numpy()[0], dtype=np.float32)

    def end_profile(self) -> None:
        self._program.write_etdump_result_to_file(str(self._profile / "model.etdump"))

    def snapshot(self) -> Snapshot:
        if "snapshot" not in self._methods:
            self._methods["snapshot"] = self._program.load_method("snapshot")
        positions, *parts = (tensor.numpy()[:, :, 0] for tensor in self._methods["snapshot"].call(()))
        names = LAYERED if parts[0].dtype == np.int8 else LAYERED[:-1]
        layers = [
            dict(zip(names, parts[first : first + len(names)], strict=True))
            for first in range(0, len(parts), len(names))
        ]
        return make_snapshot(positions[:, :, 0], layers, self.held)


class ForwardRunner(ExecuTorchRunner):
    """Steps `forward` alone, as ExecuTorch's own LLM runner and Android's Module do: the same words to the last bit.

    Raises:
        UserError: also where the program has no such method.
    """

    methods = ("forward",)

    def _prefill(self, tokens: list[int]) -> Logits:
        return self._run("forward", torch.tensor([tokens]), torch.tensor([self.seen]))

    def _decode(self, token: int) -> Logits:
        return self._prefill([token])
