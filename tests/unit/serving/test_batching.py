"""Micro-batches: who is scored together, and that nobody waits for a clock."""

from __future__ import annotations

import asyncio

import pytest

from closedloop.serving.batching import BATCH_ROWS, OBSERVED_ROWS, Batcher
from closedloop.serving.models import load_model
from closedloop.serving.requests import RequestChecker, ScoringRequest
from closedloop.serving.slots import Serving, Slot, Slots
from tests.model_folders import write_model_folder


class Recorder:
    """Log and metrics in memory."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.observed: list[int] = []

    def append(self, records) -> None:
        self.batches.append(len(records))

    def count_predictions(self, version, variant, decisions, seconds) -> None:
        pass

    def observe_features(self, matrix, missing=None) -> None:
        self.observed.append(len(matrix))


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def submit(tmp_path, recorder):
    model = load_model(write_model_folder(tmp_path / "model"), version="1", folder_sha256=None)
    serving = Serving(Slots(1, "", Slot("1", "", "")), model, None, RequestChecker(model.contract, 1.0))
    batcher = Batcher(recorder, recorder, id_key=b"key", reader=lambda _: None, state_of=lambda _: "fresh")

    def send():
        return batcher.submit(ScoringRequest("r", None, (6.0, 40.0, "plus")), serving, arrived=0.0)

    send.batcher = batcher
    return send


async def turn(count: int = 1) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_lone_request_waits_for_two_turns_and_no_clock(submit, recorder):
    async def run():
        future = submit()
        await turn(3)
        assert future.done()

    asyncio.run(run())
    assert recorder.batches == [1]


def test_requests_of_turns_in_a_row_are_scored_together(submit, recorder):
    async def run():
        futures = [submit()]
        for _ in range(4):
            await turn()
            futures.append(submit())
        await asyncio.gather(*futures)
        await submit()

    asyncio.run(run())
    assert recorder.batches == [5, 1]


def test_a_batch_ends_however_many_go_on_coming(submit, recorder):
    async def run():
        futures = []
        for _ in range(3 * BATCH_ROWS):
            futures.append(submit())
            await turn()
        await asyncio.gather(*futures)

    asyncio.run(run())
    assert sum(recorder.batches) == 3 * BATCH_ROWS
    assert max(recorder.batches) <= BATCH_ROWS + 1


def test_features_are_counted_many_at_once_and_none_is_forgotten(submit, recorder):
    async def run():
        await asyncio.gather(*[submit() for _ in range(OBSERVED_ROWS)])
        assert recorder.observed == [OBSERVED_ROWS]
        await submit()
        assert recorder.observed == [OBSERVED_ROWS]  # not yet

    asyncio.run(run())
    submit.batcher.observe()
    assert recorder.observed == [OBSERVED_ROWS, 1]
