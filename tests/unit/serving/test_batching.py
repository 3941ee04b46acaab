"""Micro-batches: who is scored together, and that nobody waits for a clock."""

from __future__ import annotations

import asyncio
import datetime as dt
from dataclasses import replace

import pytest

from closedloop.errors import ServiceUnavailable
from closedloop.rules import ScoringRequest
from closedloop.serving.batching import BATCH_ROWS, OBSERVED_ROWS, Batcher
from closedloop.serving.models import load_model
from closedloop.serving.requests import RequestChecker
from closedloop.serving.slots.slots import Serving, Slot, Slots
from tests.model_folders import write_model_folder


class Recorder:
    """Log and metrics in memory."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.observed: list[int] = []
        self.counted: list[tuple] = []
        self.full_for: set[str] = set()

    def append(self, records) -> None:
        if records[0].model_version in self.full_for:
            raise ServiceUnavailable("the disk is full")
        self.batches.append(len(records))

    def count_predictions(self, version, variant, decisions, seconds) -> None:
        pass

    def count(self, name, *labels, by=1) -> None:
        self.counted.append((name, *labels, by))

    def observe_features(self, matrix, missing=None) -> None:
        self.observed.append(len(matrix))


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def submit(tmp_path, recorder):
    model = load_model(write_model_folder(tmp_path / "model"), version="1", folder_sha256=None)
    serving = Serving(Slots(1, "", Slot("1", "", "")), model, None, RequestChecker(model.contract, 1.0))
    batcher = Batcher(recorder, recorder, id_key=b"key", reader=lambda _: None, is_stale=lambda _: False)

    def send(serving=serving):
        return batcher.submit(ScoringRequest("r", None, (6.0, 40.0, "plus")), serving, arrived=0.0)

    send.batcher, send.serving = batcher, serving
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


def test_a_full_disk_is_no_error_of_the_model_nor_of_its_challenger(submit, recorder):
    challenger = replace(submit.serving.champion, version="2")
    serving = submit.serving._replace(challenger=challenger)

    async def run():
        recorder.full_for = {"1"}
        with pytest.raises(ServiceUnavailable):
            await submit(serving)
        recorder.full_for = {"2"}
        await submit(serving)
        await turn(3)  # the challenger scores in shadow

    asyncio.run(run())
    assert recorder.batches == [1]
    assert recorder.counted == []


def test_what_a_model_fails_to_answer_is_counted(submit, recorder, monkeypatch):
    async def run():
        with pytest.raises(RuntimeError):
            await submit()

    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr(type(submit.serving.champion), "pack", fail)
    asyncio.run(run())
    # a request that carries its features names nobody whom the online store knows
    assert recorder.counted == [("model_errors_total", "1", "champion", 1)]


class Known:
    """An online store that knows every customer."""

    async def read(self, customers):
        return [((6.0, 40.0, "plus"), dt.datetime(2024, 1, 1, tzinfo=dt.UTC)) for _ in customers]


def test_a_customer_whose_requests_fail_again_and_again_is_one_that_a_release_is_judged_by(
    submit, recorder, monkeypatch
):
    def fail(*_):
        raise RuntimeError

    reading = Batcher(recorder, recorder, id_key=b"key", reader=lambda _: Known(), is_stale=lambda _: False)

    async def ask(revision, *customers):
        serving = submit.serving._replace(slots=Slots(revision, "", None))
        asked = [ScoringRequest("r", customer) for customer in customers]
        await asyncio.gather(*[reading.submit(one, serving, arrived=0.0) for one in asked], return_exceptions=True)

    async def run():
        await ask(1, *["ann"] * 50)
        await ask(1, "ann", "bob")
        await ask(2, "ann")  # another step of a release

    monkeypatch.setattr(type(submit.serving.champion), "pack", fail)
    asyncio.run(run())
    failed = [by for name, *_, by in recorder.counted if name == "model_failed_customers_total"]
    assert failed == [1, 1, 1]
    assert sum(by for name, *_, by in recorder.counted if name == "model_errors_total") == 53
