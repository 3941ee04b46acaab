"""The benchmarks of growth and capacity: exponents, queues and spools of which the answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # where the benchmarks find their parts

from benchmarks import capacity, growth


@pytest.mark.parametrize("power", [0.9, 1.0, 1.5])
def test_the_exponent_is_that_of_the_cost_beyond_the_start(power: float) -> None:
    sizes = [1_000, 10_000, 100_000]
    seconds = [3.0 + 1e-4 * size**power for size in sizes]
    assert growth.fit_exponent(sizes, seconds, 3.0) == pytest.approx(power)


@pytest.mark.parametrize(("power", "status"), [(1.0, 0), (1.4, 1)])
def test_a_stage_that_grows_too_fast_is_named(
    power: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_stage(folder: Path, stage: str) -> dict[str, float]:
        """What a stage would take: a second to start, and the rest by the customers."""
        own = power if stage == "features" else 1.0
        return {"cpu_s": 1.0 + 1e-3 * (int(folder.name) - growth.SMALLEST) ** own, "peak_mb": 100.0}

    monkeypatch.setattr(growth, "run_stage", run_stage)
    given = ["growth.py", "--customers", "2000", "8000", "--stages", "ingest", "features"]
    monkeypatch.setattr(sys, "argv", given)
    assert growth.main() == status
    assert ("missed: exponent of features" in capsys.readouterr().err) is bool(status)


def test_waits_of_the_queue_are_those_of_theory() -> None:
    # one worker, half busy (M/M/1): P(wait > t) = .5 exp(-.5 t / s), so that 99 in 100 wait at most 2 s ln 50
    found = capacity.simulate_wait(500.0, 0.001, 1)
    assert found == pytest.approx(0.002 * np.log(50), rel=0.1)
    assert capacity.simulate_wait(500.0, 0.001, 4) < found / 10


def test_the_spool_holds_what_the_store_does_not_take() -> None:
    mean = 100.0
    assert capacity.simulate_spool(mean, 10 * mean) == 0
    waits = [capacity.simulate_spool(mean, share * mean) for share in (2.0, 1.5, 1.2)]
    assert waits == sorted(waits)
    assert 0 < waits[0] < waits[2] < mean * capacity.DAY_SECONDS


def test_workers_are_not_busier_than_they_may_be() -> None:
    assert capacity.find_workers(7_000.0, 0.001) == 10
    assert capacity.find_workers(1.0, 0.001) == 1
