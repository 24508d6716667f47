"""Peers to measure beside an export: how each is installed, prepared from the same model, and run.

None is a dependency. A peer runs the same model the way its makers recommend, in 4 bits and greedily. It gets a cache
just large enough for the prompt where it lets one choose.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .child import call_in_child
from .errors import UserError
from .measure import Prompt, Session

if TYPE_CHECKING:  # a peer's process imports nothing that the peer does not need
    from .manifest import OutputFolder


@dataclass(frozen=True)
class Prepared:
    """A peer ready to be measured.

    Attributes:
        opener, arguments: as in `measure.measure`.
        files: what it loads; their size is the size of the artifact.
        cache_item_bytes: bytes of one number of its KV cache.
        context: most tokens it takes, prompt and answer; None for no limit of its own.
    """

    opener: str
    arguments: dict[str, Any]
    files: list[Path]
    cache_item_bytes: int
    context: int | None


@dataclass(frozen=True)
class Peer:
    """A peer by name.

    Attributes:
        name: as `--against` takes it.
        package: that it comes in.
        module: import name that tells whether it is installed.
        install: how to get it.
        prepare: (exported folder, path given by the user or None) -> what to run.
    """

    name: str
    package: str
    module: str
    install: str
    prepare: Callable[[OutputFolder, Path | None], Prepared]

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False


def parse_peer(text: str) -> tuple[Peer, Path | None]:
    """`NAME` or `NAME=PATH`, the path being an artifact of the peer's own that is measured as it is.

    Raises:
        UserError: unknown name, or nothing at the path.
    """
    name, given, where = text.partition("=")
    if name not in PEERS:
        raise UserError(f"unknown peer {name!r}: choose from {', '.join(PEERS)}")
    if given and not Path(where).exists():
        raise UserError(f"peer {name}: nothing at {where!r}")
    return PEERS[name], Path(where) if given else None


def _cache(folder: OutputFolder, name: str) -> Path:
    """Where an artifact made for a peer is kept: per peer, version and model."""
    root = Path(os.environ.get("KEYDIFF_CACHE", Path.home() / ".cache" / "keydiff-export"))
    return root / "peers" / f"{name}-{folder.manifest['model']['weights_sha256'][:16]}"


# ONNX Runtime GenAI


def prepare_genai(folder: OutputFolder, path: Path | None) -> Prepared:
    """A model folder of onnxruntime-genai, or one made by its int4 builder."""
    place = path or _cache(folder, f"onnxruntime-genai-{version('onnxruntime-genai')}-int4")
    if path is None and not place.exists():
        call_in_child("keydiff_export.peers:build_genai", {**_source(folder), "place": str(place)})
    try:
        context = int(json.loads((place / "genai_config.json").read_text(encoding="utf-8"))["model"]["context_length"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{place} is not a model folder of onnxruntime-genai: genai_config.json is unreadable"
        ) from error
    arguments = {"place": str(place)}
    return Prepared("keydiff_export.peers:open_genai", arguments, sorted(place.glob("model.onnx*")), 4, context)


def _source(folder: OutputFolder) -> dict[str, str]:
    model = folder.manifest["model"]
    return {"source": model["source"], "weights_sha256": model["weights_sha256"]}


def save_model(source: str, weights_sha256: str, place: str) -> None:
    """Writes the model that was exported as a Hugging Face folder.

    Raises:
        UserError: it is gone or has changed.
    """
    from .models import load_model

    loaded = load_model(source)
    if loaded.weights_sha256 != weights_sha256:
        raise UserError(f"{source!r} is not the model that was exported (weights differ)")
    loaded.model.save_pretrained(place)
    loaded.tokenizer.save_pretrained(place)


def build_genai(source: str, weights_sha256: str, place: str) -> None:
    """Runs the builder; the folder appears whole or not at all."""
    target = Path(place)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        model, made = Path(scratch) / "model", Path(scratch) / "made"
        save_model(source, weights_sha256, str(model))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(made)]
        command += ["-p", "int4", "-e", "cpu", "-c", str(Path(scratch) / "cache")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["no message"]
            raise UserError(f"onnxruntime-genai cannot build this model: {said[-1]}")
        made.rename(target)


class GenaiSession:
    """Greedy search of onnxruntime-genai; the prompt is read in `append_tokens`."""

    def __init__(self, place: str, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(place)
        session = {"intra_op_num_threads": threads, "log_severity_level": 3}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._og, self._model = og, og.Model(config)

    def read(self, prompt: Prompt, count: int, emit: Callable[[], None]) -> None:
        params = self._og.GeneratorParams(self._model)
        length = len(prompt.ids) + count
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(prompt.ids)
        for _ in range(count):
            generator.generate_next_token()
            emit()


def open_genai(place: str, threads: int, context: int) -> Callable[[], Session]:
    """Opener of an onnxruntime-genai folder."""
    import onnxruntime_genai  # noqa: F401

    return lambda: GenaiSession(place, threads)


# llama.cpp


def prepare_llama(folder: OutputFolder, path: Path | None) -> Prepared:
    """A .gguf file as it is, or the exported model's own file in Q4_0, the kind with the fastest CPU kernels."""
    if path is None:
        from .models import gguf_file

        own = gguf_file(folder.manifest["model"]["source"])
        if own is None:
            raise UserError("llama.cpp needs the model as .gguf: --against llama.cpp=FILE.gguf")
        path = _cache(folder, f"llama.cpp-{version('llama-cpp-python')}-q4_0") / "model.gguf"
        if not path.exists():
            call_in_child("keydiff_export.peers:requantise", {"source": str(own), "target": str(path)})
    return Prepared("keydiff_export.peers:open_llama", {"file": str(path)}, [path], 2, None)


def requantise(source: str, target: str) -> None:
    """Writes a .gguf file in Q4_0, with llama.cpp's own choice for the head.

    Raises:
        UserError: llama.cpp refuses.
    """
    import llama_cpp

    place = Path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(".partial")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    if llama_cpp.llama_model_quantize(source.encode(), str(partial).encode(), params) != 0:
        raise UserError(f"llama.cpp cannot quantise {source} to Q4_0")
    partial.rename(place)


class LlamaSession:
    """llama.cpp through llama-cpp-python: blocks of 512, float16 cache, flash attention."""

    def __init__(self, file: str, threads: int, context: int) -> None:
        from llama_cpp import Llama

        self._llama = Llama(
            file,
            n_ctx=context,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )

    def read(self, prompt: Prompt, count: int, emit: Callable[[], None]) -> None:
        self._llama.reset()
        answer = self._llama.generate(prompt.ids, temp=0.0)
        for _ in range(count):
            next(answer)
            emit()


def open_llama(file: str, threads: int, context: int) -> Callable[[], Session]:
    """Opener of a .gguf file."""
    import llama_cpp  # noqa: F401

    return lambda: LlamaSession(file, threads, context)


# ExecuTorch's own export


def prepare_export_llm(folder: OutputFolder, path: Path | None) -> Prepared:
    """A .pte of ExecuTorch's export_llm; making one takes too long to do it here."""
    if path is None:
        raise UserError("export_llm needs its artifact: --against export_llm=FILE.pte, see scripts/export_llm_peer.sh")
    context = call_in_child("keydiff_export.peers:pte_context", {"file": str(path)})
    arguments = {"file": str(path), "tokenizer": str(folder.path / "tokenizer.json")}
    return Prepared("keydiff_export.peers:open_export_llm", arguments, [path], 4, context)


def pte_context(file: str) -> int:
    """Tokens that an export_llm artifact has room for.

    Raises:
        UserError: it does not say.
    """
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.extension.pybindings import portable_lib

    try:
        return int(portable_lib._load_for_executorch(file).run_method("get_max_context_len", ())[0])
    except RuntimeError as error:
        raise UserError(f"{file} is not an artifact of export_llm: it does not say its context") from error


class ExportLlmSession:
    """ExecuTorch's stock TextLLMRunner.

    It tokenises for itself, uses all cores whatever `threads` says, stops at the end tokens in its .pte, and its Python
    bindings fail on a token that ends inside a character of several bytes.
    """

    def __init__(self, file: str, tokenizer: str) -> None:
        from executorch.extension.llm.runner import TextLLMRunner

        self._runner = TextLLMRunner(file, tokenizer)

    def read(self, prompt: Prompt, count: int, emit: Callable[[], None]) -> None:
        from executorch.extension.llm.runner import GenerationConfig

        config = GenerationConfig(echo=False, max_new_tokens=count, temperature=0.0)
        self._runner.reset()
        self._runner.generate(prompt.text, config, token_callback=lambda piece: emit())


def open_export_llm(file: str, tokenizer: str, threads: int, context: int) -> Callable[[], Session]:
    """Opener of an export_llm artifact."""
    from executorch.extension.llm import runner  # noqa: F401
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.kernels import quantized  # noqa: F401

    return lambda: ExportLlmSession(file, tokenizer)


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="onnxruntime-genai",
            package="onnxruntime-genai",
            module="onnxruntime_genai",
            install="pip install onnxruntime-genai==0.18.0",
            prepare=prepare_genai,
        ),
        Peer(
            name="llama.cpp",
            package="llama-cpp-python",
            module="llama_cpp",
            install="pip install llama-cpp-python==0.3.36",
            prepare=prepare_llama,
        ),
        Peer(
            name="export_llm",
            package="executorch",
            module="executorch.extension.llm.runner",
            install="pip install executorch",
            prepare=prepare_export_llm,
        ),
    )
}
