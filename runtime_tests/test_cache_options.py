"""What the cache stores keys and values as, and how often it evicts, held to the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_tokens
from one_layer import EagerLayer, StaticLayer, random_rows

import keydiff_export
from keydiff_export.commands.run import open_runner
from keydiff_export.errors import UserError
from keydiff_export.manifest import OutputFolder
from keydiff_export.models import LoadedModel
from keydiff_export.parity import compare_logits, run_reference
from keydiff_export.policies import make_policy
from keydiff_export.reference import Reference
from keydiff_export.shape import CacheShape
from keydiff_export.spec import ExportSpec

BUDGET, BLOCK = 16, 8
POLICIES = ("keydiff", "knorm", "sink", "tova", "h2o", "snapkv", "random")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("evict_every", [1, 3, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_static_graph_equals_the_reference(policy: str, evict_every: int, dtype: str) -> None:
    chosen = make_policy(policy, recent=0.25)
    eager = EagerLayer(chosen, BUDGET, BLOCK, dtype, evict_every)
    static = StaticLayer(chosen, BUDGET, BLOCK, cache_dtype=dtype, evict_every=evict_every)
    # A pile ends at a multiple of k before the next block comes: 24 is one of 1, 3 and 8.
    lengths, read = [5, 8, 8, *[1] * 24, 8, 3, *[1] * 25], 0
    rows = random_rows(sum(lengths))
    for length in lengths:
        part = rows.part(read, read + length)
        read += length
        torch.testing.assert_close(static.step(part), eager.step(part), atol=1e-5, rtol=1e-5)
        assert [sorted(head) for head in static.held()] == eager.held(), f"after {read} tokens"


def test_k_tokens_leave_at_once() -> None:
    eager = EagerLayer(make_policy("keydiff"), BUDGET, BLOCK, evict_every=4)
    rows = random_rows(40)
    eager.step(rows.part(0, 8))
    eager.step(rows.part(8, 16))
    counts = []
    for read in range(16, 25):
        eager.step(rows.part(read, read + 1))
        counts.append(len(eager.held()[0]))
    assert counts == [17, 18, 19, 16, 17, 18, 19, 16, 17]


def test_an_int8_row_is_within_half_a_step() -> None:
    rows = random_rows(8, width=64)
    static = StaticLayer(make_policy("keydiff"), BUDGET, BLOCK, width=64, cache_dtype="int8")
    static.step(rows)
    slots = static.slots
    assert slots.keys[0].dtype == slots.values[0].dtype == torch.int8
    for column, (packed, exact) in enumerate(((slots.keys[0], rows.keys), (slots.values[0], rows.values))):
        scale = slots.scales[0][:, :8, column : column + 1]
        assert ((packed[:, :8] * scale - exact).abs() <= 0.5001 * scale).all()
        assert (packed[:, :8].abs().amax(-1) == 127).all()


def test_the_cosine_does_not_see_the_scale() -> None:
    """Keys that differ by a factor are the same integers, and so are their scores to the last bits."""
    rows = random_rows(8, width=64)
    longer = random_rows(8, width=64)
    longer.keys = rows.keys * 4.0
    layers = []
    for part in (rows, longer):
        static = StaticLayer(make_policy("keydiff"), BUDGET, BLOCK, width=64, cache_dtype="int8")
        static.step(part)
        layers.append(static.slots)
    assert torch.equal(layers[0].keys[0], layers[1].keys[0])
    assert layers[0].state is not None
    assert layers[1].state is not None
    torch.testing.assert_close(layers[0].state, layers[1].state * 4.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "share"), [("float16", 0.5), ("int8", 0.27)])
def test_bytes_of_a_cache(dtype: str, share: float) -> None:
    full = CacheShape(30, 3, 64, 1024, 128)
    assert CacheShape(30, 3, 64, 1024, 128, dtype).bytes <= share * full.bytes


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], OutputFolder]:
    root = tmp_path_factory.mktemp("options")
    made = {}
    for dtype, every in (("int8", 1), ("float16", 1), ("float32", 4), ("int8", 4)):
        spec = ExportSpec(str(tiny_folder), BUDGET, BLOCK, cache_dtype=dtype, evict_every=every, stock_runner=False)
        made[dtype, every] = keydiff_export.export(spec, root / f"{dtype}-{every}", validate=False)
    return made


@pytest.mark.parametrize("target", ["executorch-xnnpack", "onnx-cpu"])
@pytest.mark.parametrize("option", [("int8", 1), ("float16", 1), ("float32", 4), ("int8", 4)], ids=str)
def test_an_artifact_equals_its_reference(
    tiny: LoadedModel, folders: dict[tuple[str, int], OutputFolder], option: tuple[str, int], target: str
) -> None:
    folder = folders[option]
    artifact = next(a for a in folder.artifacts if a["target"] == target)
    reference = Reference(tiny.model, folder.policy, BUDGET, BLOCK, *option)
    runner = open_runner(folder, artifact)
    prompt = random_tokens(70, tiny.model.config.vocab_size)
    ours, theirs, kept = run_reference(reference, prompt, 22, runner, lambda tokens: None)
    assert theirs is not None
    if option[0] == "float32":
        assert kept.equal == kept.compared
        assert compare_logits(ours, theirs)["logits_max_abs"] < 1e-4
        return
    # A key that is a last bit off may round to the next step; the rest is as exact as float32.
    assert kept.jaccard / kept.compared > 0.99
    sqnr = compare_logits(ours, theirs)["sqnr_db"]
    assert sqnr is None or sqnr > 40


@pytest.mark.parametrize("target", ["executorch-xnnpack", "onnx-cpu"])
def test_a_block_after_piled_up_tokens(
    tiny: LoadedModel, folders: dict[tuple[str, int], OutputFolder], target: str
) -> None:
    """Two tokens wait when a block comes; its first two are read one by one, and then all are held in N slots."""
    folder = folders["float32", 4]
    runner = open_runner(folder, next(a for a in folder.artifacts if a["target"] == target))
    reference = Reference(tiny.model, folder.policy, BUDGET, BLOCK, evict_every=4)
    tokens = random_tokens(64, tiny.model.config.vocab_size)
    held = []
    for length in [8, 8, 1, 1, 8, 1, 5, 8]:
        block = tokens[reference.seen : reference.seen + length]
        assert np.abs(runner.step(block) - reference.step(block).numpy()).max() < 1e-4
        assert runner.snapshot().held == reference.held()
        assert runner.held == len(runner.snapshot().held[0][0])
        held.append(runner.held)
    assert held == [8, 16, 17, 18, 16, 17, 16, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "int4"}, "unknown cache dtype 'int4': choose one of float32, float16, int8"),
        ({"evict_every": 9}, "evict_every 9 is more than the 8 spare slots of a block"),
        ({"evict_every": 0}, "evict_every must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        ExportSpec("model", BUDGET, BLOCK, **options)  # type: ignore[arg-type]
