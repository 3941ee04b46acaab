"""What moved a score, which entry put a version in its place, and what is said of parts that are missing."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from closedloop.contract import digest_folder
from closedloop.core.release.entries import Deployment, Entry
from closedloop.errors import DataError, GateFailed
from closedloop.loop.lineage import (
    describe_reasons,
    find_entry,
    find_model,
    find_prediction,
    give_reasons,
    open_model,
    reproduce,
    score_again,
)
from closedloop.records import Prediction
from closedloop.serving.models import load_model
from closedloop.serving.slots.slots import Slot, Slots, write_slots
from tests.model_folders import ROWS, expected_score, write_model_folder
from tests.trained_folders import list_values, write_trained_folder

NOW = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)


def predict(**changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "prediction_id": "p",
        "request_id": "r",
        "model_name": "test_churn",
        "model_version": "1",
        "variant": "champion",
        "source": "http",
        "predicted_at": NOW,
        "features": tuple(ROWS[2].values()),
        "score": expected_score(ROWS[2]),
        "decision": 1,
        "latency_ms": 1.0,
    }
    return Prediction(**(values | changes))


def test_the_services_own_model_explains_without_a_registry(tmp_path: Path) -> None:
    trained = write_trained_folder(tmp_path / "models" / "4", "gradient_boosting")
    write_slots(tmp_path, Slots(1, "salt", Slot("4", str(trained.folder), digest_folder(trained.folder))))
    model = find_model(tmp_path, None, "4", tmp_path)  # type: ignore[arg-type]
    values = list_values(trained.frame, 0)
    prediction = predict(model_version="4", features=tuple(values.values()))
    found = give_reasons(model, prediction, 2)
    assert found.raw_score == pytest.approx(trained.read_raw_scores(trained.frame.head(1))[0], abs=1e-5)
    assert [one.value for one in found.reasons] == [values[one.feature] for one in found.reasons]
    shown = describe_reasons(model, prediction, 2)
    assert [one["contribution"] for one in shown["features"]] == [one.contribution for one in found.reasons]

    class Downloads:
        def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
            place = write_model_folder(folder / version)
            return place, digest_folder(place)

    other = find_model(tmp_path, Downloads(), "3", tmp_path / "download")
    assert other.version == "3"
    assert describe_reasons(other, predict(), 2)["method"].startswith("none: ")


def test_a_score_at_the_threshold_is_decided_as_it_was_recorded(tmp_path: Path) -> None:
    model = load_model(write_model_folder(tmp_path), version="1", folder_sha256=None)
    zero = {"visits_30d": 5.0, "age": 0.0, "plan": None}  # .5 - 0 - .5: the score is exactly the threshold
    for recorded, decision in ((0.5 - 4e-7, 0), (0.5, 1)):
        again = score_again(model, predict(features=tuple(zero.values()), score=recorded))
        assert (again.score, again.decision) == (pytest.approx(0.5, abs=1e-6), decision)
    with pytest.raises(DataError, match="the log has 2 values, version 1 takes 3"):
        score_again(model, predict(features=(1.0, 2.0)))


def test_another_score_is_told(tmp_path: Path) -> None:
    class Kept:
        def read_predictions(self, *_: Any, ids: list[str]) -> Any:
            return iter([[predict(source=ids[0], score=expected_score(ROWS[2]) + 0.004, decision=0)]])

        def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
            place = write_model_folder(folder)
            return place, digest_folder(place)

    kept: Any = Kept()
    with pytest.raises(GateFailed, match=r"was recorded .* the same features give"):
        reproduce(kept, kept, "test_churn", "edge")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    class Empty:
        def read_predictions(self, *_: Any, **__: Any) -> Any:
            return iter([])

        def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
            place = write_model_folder(folder)
            return place, "f" * 64 if version == "2" else digest_folder(place)

    empty: Any = Empty()
    with pytest.raises(DataError, match="prediction p of test_churn is not in the operations store: it was purged"):
        find_prediction(empty, "test_churn", "p")
    with pytest.raises(DataError, match="version 'bundled' was in no registry"):
        open_model(empty, "bundled", tmp_path)
    with pytest.raises(DataError, match="the registry says ffff"):
        open_model(empty, "2", tmp_path / "2")
    assert open_model(empty, "1", tmp_path / "1").version == "1"


def test_the_entry_is_the_one_that_gave_the_version_its_place() -> None:
    moves = [("1", None), ("1", "2"), ("2", "1"), ("2", None), ("1", None), ("1", None)]
    entries = [
        Entry("move", "", NOW + hour * dt.timedelta(hours=1), "", Deployment("m", hour, champion, "s", NOW, challenger))
        for hour, (champion, challenger) in enumerate(moves, start=1)
    ]
    numbered = list(enumerate(entries, start=1))

    def find(version: str, variant: str, hours: float) -> int | None:
        made = predict(model_version=version, variant=variant, predicted_at=NOW + hours * dt.timedelta(hours=1))
        found = find_entry(numbered, made)
        return None if found is None else found[0]

    assert find("1", "champion", 0.5) is None
    assert find("1", "champion", 2.5) == 1
    assert find("2", "shadow", 2.5) == 2
    assert find("2", "champion", 4.5) == 3
    assert find("1", "shadow", 3.5) == 3
    assert find("1", "champion", 9) == 5
    assert find("7", "champion", 9) is None
