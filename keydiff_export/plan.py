"""Memory and speed of an export before it is made: from a model's sizes, N, B, a quantisation and a device.

Memory of one artifact is the sum of

- the weights as its runtime holds them (`loaded_bytes`). A kernel packs the matrices into a layout of its own, and each
  method (prefill, decode) packs them again. ExecuTorch lets go of the matrices in its mapped file then and keeps the
  embedding there once; ONNX Runtime keeps everything a session, and the mapped embedding once more where it is no head
  (`scripts/plan_check.py` measures both). The files themselves are `file_bytes`;
- the state: keys, values, positions and what KeyDiff keeps (`all_state_bytes`);
- the activations of prefill (`activation_bytes`), most of which ExecuTorch plans ahead (`arena_bytes`);
- what a runtime takes beside (`RUNTIME_BYTES`): its code, XNNPACK's workspace, ONNX Runtime's arena, which no file
  tells of. Measured on the demo model alone, so a guess for others.

Speed is a roofline: a step takes the time of its bytes or of its operations, whichever is longer, with the figures of
`devices.py`. This file needs neither torch nor numpy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .complexity import FLOAT, KEYDIFF, Step, added_flops, attention_flops, state_bytes
from .devices import Device
from .errors import UserError
from .shape import CACHE_DTYPES, CacheShape
from .sizes import FAMILIES, ModelSizes

METHODS = 2  # prefill and decode
# Program, small constants and padding, a layer; measured on the demo cards. A .pte has the method `forward` as well.
GRAPH_BYTES = {"executorch-xnnpack": 100_000, "onnx-cpu": 66_000}
# Resident memory of the demo cards less the terms above (scripts/plan_check.py). ONNX Runtime's fused attention keeps
# no logits, which the activations count, and the rest of its arena takes about as much as that.
RUNTIME_BYTES = {"executorch-xnnpack": 16_000_000, "onnx-cpu": 0}


@dataclass(frozen=True)
class Storage:
    """Bytes of weights in a target's files, scales included.

    Attributes:
        matrix, head, embedding: bytes a number of the layers' matrices, the head and the embedding.
        matrix_row, head_row, embedding_row: bytes a row beside them.
        shared: a tied head and its embedding are stored once.
        per_method: every method holds all weights, not only the matrices.
    """

    matrix: float
    head: float
    embedding: float
    matrix_row: int = 0
    head_row: int = 0
    embedding_row: int = 0
    shared: bool = False
    per_method: bool = False


# Bytes a number of the matrices, the head and the embedding, then a row of each.
# XNNPACK: a bfloat16 scale a group of 32 for 4 bits, a float32 one a row for 8. MatMulNBits: a float32 scale a group.
STORAGE = {
    "executorch-xnnpack": {
        "none": Storage(4, 4, 4),
        "int8": Storage(1, 1, 1, 4, 4, 4),
        "8da4w": Storage(0.5 + 2 / 32, 1, 1, 0, 4, 4),
        "8da4w-head4": Storage(0.5 + 2 / 32, 0.5 + 2 / 32, 1, 0, 0, 4),
    },
    "onnx-cpu": {
        "none": Storage(4, 4, 4, shared=True, per_method=True),
        "int8": Storage(1 + 4 / 32, 1 + 4 / 32, 1, 0, 0, 4, per_method=True),
        "8da4w": Storage(0.5 + 4 / 32, 1 + 4 / 32, 1, 0, 0, 4, per_method=True),
        "8da4w-head4": Storage(0.5 + 4 / 32, 0.5 + 4 / 32, 1, 0, 0, 4, per_method=True),
        "int4": Storage(0.5 + 4 / 32, 1 + 4 / 32, 1, 0, 0, 4, per_method=True),
    },
}


def get_storage(target: str, quant: str) -> Storage:
    """How a target stores weights under a quantisation.

    Raises:
        UserError: unknown target, or a quantisation that it does not take.
    """
    if target not in STORAGE:
        raise UserError(f"plan knows no target {target!r}: choose one of {', '.join(STORAGE)}")
    if quant not in STORAGE[target]:
        raise UserError(f"target {target} does not take --quant {quant}: choose one of {', '.join(STORAGE[target])}")
    return STORAGE[target][quant]


def matrix_bytes(model: ModelSizes, storage: Storage) -> int:
    """Matrices of all layers and the head: what every token reads."""
    body = model.matrices * storage.matrix + model.rows * storage.matrix_row
    return round(body + model.table * storage.head + model.vocabulary * storage.head_row)


def embedding_bytes(model: ModelSizes, storage: Storage) -> int:
    """The embedding where it is stored beside the head, else 0."""
    if storage.shared and model.tied:
        return 0
    return round(model.table * storage.embedding + model.vocabulary * storage.embedding_row)


def file_bytes(model: ModelSizes, storage: Storage) -> int:
    """Files of one artifact."""
    matrices = matrix_bytes(model, storage) + embedding_bytes(model, storage)
    graph = GRAPH_BYTES["onnx-cpu" if storage.per_method else "executorch-xnnpack"]
    return matrices + FLOAT * model.vectors + graph * model.layers


def loaded_bytes(model: ModelSizes, storage: Storage) -> int:
    """Weights in memory once both methods are loaded."""
    file = file_bytes(model, storage)
    if storage.per_method:
        return METHODS * file + embedding_bytes(model, storage)
    return file + (METHODS - 1) * matrix_bytes(model, storage)


def cache_bytes(model: ModelSizes, slots: int, dtype: str = "float32") -> int:
    """Keys and values of all layers, with their scales where they are int8."""
    return CacheShape(model.layers, model.kv_heads, model.head_dim, slots, 0, dtype).bytes


def all_state_bytes(model: ModelSizes, slots: int, dtype: str = "float32") -> int:
    """The whole state of the graphs: cache, positions, KeyDiff's number a slot and sum a head."""
    heads = model.kv_heads
    layer = FLOAT * heads * slots + state_bytes(KEYDIFF, heads, slots, model.head_dim)
    return cache_bytes(model, slots, dtype) + model.layers * layer


def arena_bytes(model: ModelSizes, slots: int, block: int, dtype: str = "float32") -> int:
    """What a .pte plans for prefill beside its state: tensors that cross a delegate's border. The most of

        a layer   R B S + 2 Hq B d + 2 B D + 2 H B d + 4 B d   mask, queries and output, stream, rows, angles; float32
        order     6 L H S                                     of leaving, in all layers; float64
        moves     2 L H B d, 3/4 R B S                        rows in the cache's dtype, above what the mask left
        logits    V + D                                       float32

    and where the cache is stored in fewer bits, in float32 beside one of them or all layers' at once

        unpacked  H S d                               one layer, with its mask and streams
        kept      L H S (d or 2 d) + 4 L H S          keys (int8), values as well (float16): decode unpacks all first

    The share of the mask is fitted to thirty layers with N = 512 and 1,024. ExecuTorch places tensors greedily, so the
    arena of a program is up to a tenth away from this; state and arena together are within 5 %.
    """
    rows, width = model.layers * model.kv_heads, model.head_dim
    mask = model.query_heads // model.kv_heads * block * slots
    stream = 2 * block * (model.query_heads * width + model.hidden + model.kv_heads * width + 2 * width)
    moved = CacheShape(model.layers, model.kv_heads, width, block, 0, dtype).bytes
    unpacked = {"float32": 0, "float16": 2, "int8": 1}[dtype] * width
    return max(
        FLOAT * (mask + stream + bool(unpacked) * model.kv_heads * slots * width),
        8 * 6 * rows * slots,
        moved + FLOAT * 3 * mask // 4,
        bool(unpacked) * FLOAT * rows * slots * (unpacked + 4),
        FLOAT * (model.vocabulary + model.hidden),
    )


def activation_bytes(model: ModelSizes, slots: int, block: int, dtype: str = "float32") -> int:
    """Activations alive at the peak of prefill: the arena, and inside XNNPACK the logits of one layer's attention.

    They become its probabilities in place: Hq B S in float32, shared by all layers.
    """
    return arena_bytes(model, slots, block, dtype) + FLOAT * model.query_heads * block * slots


def _step(model: ModelSizes, slots: int, length: int) -> Step:
    return Step(model.kv_heads, model.query_heads // model.kv_heads, model.head_dim, slots, length)


@dataclass(frozen=True)
class Request:
    """What to plan for.

    Attributes:
        context: tokens of the prompt.
        block: B.
        target, quant: name of the lowering, and its --quant.
        device: name in `devices.DEVICES`.
        ram: bytes that an artifact may take, or None for no limit.
        budget: N, or None for the largest that fits.
        cache_dtype: what keys and values are stored as.
    """

    context: int
    block: int
    target: str
    quant: str
    device: str
    ram: int | None
    budget: int | None
    cache_dtype: str = "float32"


@dataclass(frozen=True)
class Cost:
    """What a cache of some slots costs: bytes, seconds to the first token of the whole prompt, tokens/s after it."""

    slots: int
    file_bytes: int
    loaded_bytes: int
    cache_bytes: int
    state_bytes: int
    activation_bytes: int
    runtime_bytes: int
    total_bytes: int
    ttft_s: float
    tokens_per_s: float


def step_seconds(
    model: ModelSizes, request: Request, device: Device, slots: int, length: int, evicts: bool = True
) -> float:
    """Seconds of one step of `length` tokens that attends to `slots` slots, the head for one token included.

    Attention is computed in float32; the matrices with int8 activations or, under none and int4, in float32.
    """
    step = _step(model, slots, length)
    attention = attention_flops(step) + (added_flops(KEYDIFF, step) if evicts else 0)
    matrices = 2 * (model.matrices * length + model.table)
    compute = matrices / device.flops_per_s(request.quant not in ("none", "int4"))
    compute += model.layers * attention / device.flops_per_s(integer=False)
    read = matrix_bytes(model, get_storage(request.target, request.quant))
    read += cache_bytes(model, slots, request.cache_dtype)
    return max(compute, read / device.bytes_per_s)


def memory_bytes(model: ModelSizes, request: Request, slots: int) -> int:
    """Weights as loaded, state, activations and runtime of one artifact."""
    moving = all_state_bytes(model, slots, request.cache_dtype) + activation_bytes(
        model, slots, request.block, request.cache_dtype
    )
    weights = loaded_bytes(model, get_storage(request.target, request.quant))
    return weights + moving + RUNTIME_BYTES[request.target]


def _cost(model: ModelSizes, request: Request, device: Device, slots: int, full: bool) -> Cost:
    """Costs of a slot cache; of a full one, which attends to half of the prompt on average, with `full`."""
    storage, block = get_storage(request.target, request.quant), request.block
    blocks = -(-request.context // block)
    met = slots // 2 if full else slots
    return Cost(
        slots=slots,
        file_bytes=file_bytes(model, storage),
        loaded_bytes=loaded_bytes(model, storage),
        cache_bytes=cache_bytes(model, slots, request.cache_dtype),
        state_bytes=all_state_bytes(model, slots, request.cache_dtype),
        activation_bytes=activation_bytes(model, slots, block, request.cache_dtype),
        runtime_bytes=RUNTIME_BYTES[request.target],
        total_bytes=memory_bytes(model, request, slots),
        ttft_s=blocks * step_seconds(model, request, device, met, block, not full),
        tokens_per_s=1 / step_seconds(model, request, device, slots, 1, not full),
    )


def largest_budget(model: ModelSizes, request: Request) -> int:
    """The largest multiple of B that (1) fits the memory, (2) is no more than the prompt, whose full cache needs no

    eviction, and (3) leaves a token reading no more bytes of cache than of weights, so that a full cache of N costs at
    most about twice the time of an empty one. B itself where nothing more fits (3).

    Raises:
        UserError: not even N = B fits.
    """
    storage, block, ram = get_storage(request.target, request.quant), request.block, request.ram
    weights = matrix_bytes(model, storage)
    best = 0
    for budget in range(block, -(-request.context // block) * block + 1, block):
        slots = budget + block
        fits = ram is None or memory_bytes(model, request, slots) <= ram
        if not fits or (best and cache_bytes(model, slots, request.cache_dtype) > weights):
            break
        best = budget
    if not best:
        least = memory_bytes(model, request, 2 * block)
        raise UserError(
            f"{request.target} with --quant {request.quant} needs at least {least / 1e6:.0f} MB, more than --ram "
            f"{(ram or 0) / 1e6:.0f} MB: choose fewer bits, a smaller block or a smaller model"
        )
    return best


def make_plan(model: ModelSizes, request: Request, device: Device) -> dict[str, Any]:
    """The report that `plan --json` prints.

    Raises:
        UserError: sizes that no cache can have, or a memory that nothing fits.
    """
    for name, value in (("context", request.context), ("block", request.block), ("budget", request.budget)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, got {value}")
    if request.cache_dtype not in CACHE_DTYPES:
        raise UserError(f"unknown cache dtype {request.cache_dtype!r}: choose one of {', '.join(CACHE_DTYPES)}")
    budget = request.budget or largest_budget(model, request)
    if request.block > budget:
        raise UserError(f"block {request.block} is larger than budget {budget}: choose a block of at most the budget")
    cost = _cost(model, request, device, budget + request.block, full=False)
    return {
        "request": asdict(request),
        "model": {**asdict(model), "parameters": model.parameters},
        "budget": budget,
        "block": request.block,
        "fits": request.ram is None or cost.total_bytes <= request.ram,
        "slot_cache": asdict(cost),
        "full_cache": asdict(_cost(model, request, device, request.context, full=True)),
        "notes": _notes(model, request),
    }


def _notes(model: ModelSizes, request: Request) -> list[str]:
    notes = []
    if not FAMILIES[model.kind].exported:
        notes.append(f"export does not serve {model.kind} yet: these are its sizes, not an artifact's")
    elif model.sliding:
        notes.append("some layers attend to a sliding window only: export refuses the model, and a window needs less")
    if request.context > model.trained_context:
        notes.append(f"the model was trained for {model.trained_context} positions, fewer than the context")
    return notes
