"""What is built once a test run is built once, by whichever worker comes first, and never found half built."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import FIXTURE_SECONDS, pytest_collection_modifyitems, share_folder


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The temporary folders of three workers of a run, as pytest-xdist lays them out."""
    monkeypatch.setitem(os.environ, "PYTEST_XDIST_WORKER", "gw0")
    folders = [tmp_path / f"popen-gw{number}" for number in range(3)]
    return [SimpleNamespace(getbasetemp=lambda folder=folder: folder) for folder in folders]


def test_one_worker_fills_the_folder_and_the_others_wait_for_it(workers: list[Any]) -> None:
    filled: list[Path] = []

    def fill(folder: Path) -> None:
        folder.mkdir()
        time.sleep(0.2)
        (folder / "done.txt").write_text("whole", encoding="utf-8")
        filled.append(folder)

    def use(factory: Any) -> str:
        return (share_folder(factory, "made", fill) / "done.txt").read_text(encoding="utf-8")

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(use, workers)) == ["whole"] * 3
    assert len(filled) == 1


def test_what_a_worker_left_half_filled_is_filled_anew(workers: list[Any]) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half.txt").touch()
        raise RuntimeError("ended")

    with pytest.raises(RuntimeError, match="ended"):
        share_folder(workers[0], "made", fail)
    assert list(share_folder(workers[1], "made", lambda folder: folder.mkdir()).iterdir()) == []


class Item:
    """What pytest collects, as far as limits go."""

    def __init__(self, fixtures: list[str], seconds: float | None) -> None:
        self.fixturenames, self.limit = fixtures, pytest.mark.timeout(seconds).mark if seconds else None

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.limit if name == "timeout" else None

    def add_marker(self, marker: pytest.MarkDecorator, *, append: bool) -> None:
        assert not append  # the nearest counts
        self.limit = marker.mark


def test_a_test_has_the_time_of_the_fixtures_that_it_may_be_the_first_to_need(request: pytest.FixtureRequest) -> None:
    items = [Item([], None), Item(["small_shop"], None), Item(["tmp_path", "small_shop", "dvc_shop"], 20)]
    pytest_collection_modifyitems(request.config, items)  # type: ignore[arg-type]
    usual = float(request.config.getini("timeout"))
    more = FIXTURE_SECONDS
    found = [item.limit and item.limit.args[0] for item in items]
    assert found == [None, usual + more["small_shop"], 20 + more["small_shop"] + more["dvc_shop"]]
    assert min(more.values()) >= 1800  # at a load of 30 the small shop took more than 600 s
