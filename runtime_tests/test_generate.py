"""Sampling, end of sequence and streaming, with a runner that plays back logits."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from transformers import AutoTokenizer

import keydiff_export
from keydiff_export.errors import UserError
from keydiff_export.generation import Sampling, generate, stream
from keydiff_export.models import LoadedModel
from keydiff_export.runtime.base import Logits, Runner, Snapshot


class Playback(Runner):
    """Always prefers the next token of a script."""

    def __init__(self, script: list[int], vocabulary: int = 300) -> None:
        super().__init__(budget=8, block=4)
        self.script, self.vocabulary, self.blocks = script, vocabulary, []

    def _prefill(self, tokens: list[int]) -> Logits:
        self.blocks.append(list(tokens))
        logits = np.zeros(self.vocabulary, np.float32)
        done = sum(len(block) == 1 for block in self.blocks) if len(self.blocks[-1]) == 1 else 0
        logits[self.script[done]] = 5
        return logits

    def _decode(self, token: int) -> Logits:
        return self._prefill([token])

    def snapshot(self) -> Snapshot:
        raise NotImplementedError


def test_the_prompt_is_read_in_blocks_with_a_shorter_last_one() -> None:
    runner = Playback([9] * 5)
    assert list(stream(runner, list(range(10)), 3, {1}, Sampling())) == [9, 9, 9]
    assert runner.blocks == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [9], [9]]


def test_an_end_token_ends_the_answer_and_is_not_part_of_it() -> None:
    assert list(stream(Playback([7, 8, 1, 9]), [3, 4], 10, {1}, Sampling())) == [7, 8]


def test_progress_reports_tokens_read_and_held() -> None:
    seen: list[tuple[int, int]] = []
    list(stream(Playback([9]), list(range(10)), 1, {1}, Sampling(), lambda read, rate, held: seen.append((read, held))))
    assert seen == [(4, 4), (8, 8), (10, 8)]


def test_a_character_in_several_tokens_is_shown_whole(tiny: LoadedModel, tiny_folder: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_folder))
    script = [*tokenizer("h\u00e9")["input_ids"], 1]
    pieces: list[str] = []
    result = generate(Playback(script), tokenizer, [5, 6], 10, {1}, Sampling(), emit=pieces.append)
    assert "".join(pieces) == result.text == "h\u00e9"
    assert not any("\ufffd" in piece for piece in pieces)


def test_top_p_draws_only_from_the_nucleus() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draw = Sampling(temperature=1.0, top_p=0.79, seed=0).sampler()
    assert {draw(logits) for _ in range(300)} == {0, 1}
    draw = Sampling(temperature=1.0, top_p=1.0, seed=0).sampler()
    assert {draw(logits) for _ in range(500)} == {0, 1, 2, 3}


def test_sampling_follows_the_distribution() -> None:
    logits = np.log(np.array([0.7, 0.3], np.float32))
    draw = Sampling(temperature=1.0, seed=5).sampler()
    share = sum(draw(logits) == 0 for _ in range(4000)) / 4000
    assert share == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("bad", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_bad_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Sampling(**bad)


def test_no_module_hides_a_function_of_the_package() -> None:
    """Importing a submodule sets an attribute of the package by its name."""
    for module in ("cli", "commands.export", "commands.run", "commands.validate", "lowering"):
        importlib.import_module(f"keydiff_export.{module}")
    for name in keydiff_export.__all__:
        assert callable(getattr(keydiff_export, name)), name
