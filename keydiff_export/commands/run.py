"""`run`: a prompt through an exported folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..generation import Result, Sampling, check_context, encode_prompt, generate
from ..manifest import OutputFolder
from ..qnn_sdk import soc
from ..runtime import open_artifact
from ..runtime.base import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_runner(
    folder: OutputFolder, artifact: dict[str, Any], threads: int | None = None, resident: bool = True
) -> Runner:
    """A runner for one artifact of a folder; NPU artifacts run on an emulator, each in a process of its own.

    Args:
        folder: an opened output folder.
        artifact: its entry in the manifest.
        threads: CPU threads, all cores by default.
        resident: as in `runtime.open_artifact`.

    Raises:
        UserError: the runtime is missing, or refuses the artifact.
        CrashError: an NPU runtime's process died.
    """
    place, shape = folder.path / artifact["target"], folder.shape
    if artifact["runtime"].endswith("-qnn"):
        from ..runtime.qnn import open_qnn

        return open_qnn(artifact["runtime"], place, shape, folder.policy, soc(artifact["soc"]))
    return open_artifact(place, artifact["runtime"], shape.budget, shape.block, threads, shape.evict_every, resident)


def open_runtime(folder: OutputFolder, runtime: str | None, threads: int | None = None) -> Runner:
    """A runner by runtime name: the folder's first artifact without one; "eager" is the float32 reference, and

    "executorch-forward" a .pte stepped through `forward` alone, as ExecuTorch's own runner does.

    Raises:
        UserError: the folder has no artifact for it, or the original model is gone or changed.
    """
    if runtime == "eager":
        from ..models import load_model
        from ..runtime.eager import EagerRunner

        loaded = load_model(folder.manifest["model"]["source"])
        if loaded.weights_sha256 != folder.manifest["model"]["weights_sha256"]:
            raise UserError(f"{loaded.source!r} is not the model that {folder.path} was exported from (weights differ)")
        return EagerRunner(loaded.model, folder.policy, folder.shape)
    if runtime == "executorch-forward":
        from ..runtime.executorch import ForwardRunner

        shape, place = folder.shape, folder.path / folder.artifact_for("executorch")["target"]
        return ForwardRunner(place / "model.pte", shape.budget, shape.block, threads)
    artifact = folder.artifacts[0] if runtime is None else folder.artifact_for(runtime)
    # One prompt is read and answered, so the methods change once.
    return open_runner(folder, artifact, threads, resident=False)


def load_tokenizer(folder: OutputFolder) -> PreTrainedTokenizerBase:
    """The folder's own tokenizer, without torch: AutoTokenizer would import it.

    Raises:
        UserError: not loadable, or it has more tokens than the model.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder.path)
    except Exception as error:  # tokenizers raises plain Exception on a bad file
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder.path / 'tokenizer.json'} cannot be loaded: {reason}") from error
    vocabulary = folder.manifest["model"]["vocab_size"]
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"{folder.path / 'tokenizer.json'} has {len(tokenizer)} tokens and the model {vocabulary}: wrong tokenizer"
        )
    return tokenizer


def run_prompt(
    folder: OutputFolder,
    text: str,
    max_new_tokens: int = 128,
    runtime: str | None = None,
    raw: bool = False,
    sampling: Sampling = Sampling(),
    allow_beyond_trained_context: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int, float, int], None] = lambda read, total, rate, held: None,
    emit: Callable[[str], None] = lambda piece: None,
) -> Result:
    """Reads a prompt of any length and answers it.

    Args:
        folder: an opened output folder.
        text: the prompt, put into the model's chat template unless `raw`.
        max_new_tokens: most tokens to generate, at least 1.
        runtime: executorch, executorch-forward, onnxruntime, eager, or None for the folder's first artifact.
        sampling: how tokens are drawn; greedy by default.
        allow_beyond_trained_context: accept positions past the model's trained context.
        threads: CPU threads, all cores by default.
        progress: told (tokens read, tokens in the prompt, tokens/s, tokens held) after each block.
        emit: receives the answer piece by piece.

    Raises:
        UserError: empty prompt, too many positions, or an artifact that does not load.
    """
    if max_new_tokens < 1:
        raise UserError(f"max-new-tokens must be at least 1, got {max_new_tokens}")
    tokenizer = load_tokenizer(folder)
    prompt = encode_prompt(tokenizer, text, raw, folder.manifest.get("system_prompt"))
    needed = len(prompt) + max_new_tokens
    if not folder.evicts and needed > folder.shape.budget:
        raise UserError(
            f"policy full holds {folder.shape.budget} tokens and prompt and answer need {needed}: "
            "export with a larger --budget or another --policy"
        )
    check_context(needed, folder.manifest["model"]["context_limit"], allow_beyond_trained_context)
    runner = open_runtime(folder, runtime, threads)
    return generate(
        runner,
        tokenizer,
        prompt,
        max_new_tokens,
        set(folder.manifest["model"]["eos_token_ids"]),
        sampling,
        lambda read, rate, held: progress(read, len(prompt), rate, held),
        emit,
    )


def read_prompt(file: Path | None, text: str | None, stdin: Callable[[], bytes]) -> str:
    """The prompt from a file, the command line or standard input, as UTF-8.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    if text is not None:
        return text
    try:
        data = stdin() if file is None else file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read prompt file {file}: {error.strerror}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "standard input" if file is None else str(file)
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}): convert it, e.g. with iconv") from error
