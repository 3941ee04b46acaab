"""Retraining: which days, once for each trigger, and what is recorded of it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from closedloop.adapters.kfp import PipelineFailed
from closedloop.config.dataset import load_dataset
from closedloop.config.params import Params, parse_params
from closedloop.config.yaml import read_yaml
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.loop.retrain import name_trigger, plan_retraining, record_end, run_retraining
from closedloop.store.checks import Checks, Retraining
from closedloop.store.database import Database

ROOT = Path(__file__).parents[3]
SHOP, TELCO = (load_dataset(name, ROOT / "configs/datasets") for name in ("shop", "telco"))
PARAMS = parse_params(read_yaml(ROOT / "params.yaml"), "params.yaml")
NOW = dt.datetime(2025, 1, 2, 9, tzinfo=dt.UTC)
AS_OF = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
PLAN = partial(plan_retraining, dataset=SHOP, window_days=90, split="time")
REQUEST = Retraining("t-1", "shop_churn", "monitor", "drift", AS_OF, NOW)


def test_other_code_or_other_parameters_are_another_retraining() -> None:
    changed = PARAMS.model_copy(update={"as_of": dt.date(2024, 12, 1)})
    ids = [name_trigger(params, commit) for params in (PARAMS, changed) for commit in ("a" * 40, "b" * 40)]
    assert len(set(ids)) == 4
    assert name_trigger(PARAMS, "a" * 40) == ids[0]


class FakeRunner:
    """Records what it is asked to run; ``act`` stands for what the stages do."""

    def __init__(self, act: Callable[[], Any] = lambda: None, *, free: bool = True, exclusive: bool = True) -> None:
        self.ran: list[tuple[str, dict[str, str]]] = []
        self._act, self._free, self.is_exclusive = act, free, exclusive

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        yield self._free

    def run(self, name: str, arguments: Mapping[str, str]) -> None:
        self.ran.append((name, dict(arguments)))
        self._act()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checks]:
    made = Checks(Database(f"sqlite:///{tmp_path_factory.mktemp('retrain') / 'operations.db'}"))
    made.database.upgrade()
    yield made
    made.database.close()


@pytest.fixture
def checks(database: Checks) -> Checks:
    with database.database.begin() as connection:
        connection.exec_driver_sql("DELETE FROM retrainings")
    database.request_retraining(REQUEST)
    return database


def run(
    checks: Checks, runner: FakeRunner, params: Params = PARAMS, trigger_id: str = "t-1"
) -> tuple[Retraining, bool]:
    return run_retraining(params, SHOP, checks, runner, trigger_id, plan=PLAN, now=lambda: NOW)


def end(checks: Checks, state: Any, **values: str) -> Callable[[], Retraining]:
    return lambda: record_end(checks, "t-1", checks.read_retraining("t-1").updated_at, state, now=NOW, **values)


def test_the_stages_record_how_it_ended(checks):
    runner = FakeRunner(end(checks, "registered", model_version="3"))
    found, ran = run(checks, runner)
    assert ran
    assert (found.state, found.model_version) == ("registered", "3")
    assert checks.read_retraining("t-1") == found
    [(name, arguments)] = runner.ran
    assert name == "shop_churn-t-1"
    # newest snapshot whose 30 days had closed, and 90 days before it
    assert arguments["data_end_date"] == "2024-12-02"
    assert arguments["data_start_date"] == "2024-09-03"
    assert (arguments["as_of"], arguments["model_name"]) == ("2025-01-01", "shop_churn")
    assert Params.model_validate_json(arguments["params"]).data.end_date == dt.date(2024, 12, 2)


@pytest.mark.parametrize("state", ["registered", "refused"])
def test_the_same_trigger_again_does_nothing(checks, state):
    first = run(checks, FakeRunner(end(checks, state)))[0]
    runner = FakeRunner()
    assert run(checks, runner) == (first, False)
    assert runner.ran == []


def test_one_that_another_process_holds_is_left_alone(checks):
    runner = FakeRunner(free=False)
    found, ran = run(checks, runner)
    assert (found.state, ran, runner.ran) == ("requested", False, [])


def test_of_two_that_claim_it_at_once_one_runs(checks):
    """On a cluster nothing but the store holds the second one off."""
    inner = FakeRunner(end(checks, "registered"))

    class Slow(Checks):
        def __init__(self) -> None:
            self._reads = 0

        def read_retraining(self, trigger_id: str) -> Retraining:
            self._reads += 1
            found = checks.read_retraining(trigger_id)
            if self._reads == 2:
                run(checks, inner)
            return found

        def advance_retraining(self, *arguments: Any, **values: Any) -> Retraining:
            return checks.advance_retraining(*arguments, **values)

    slow = FakeRunner()
    found, ran = run(Slow(), slow)
    assert (found.state, ran) == ("registered", False)
    assert (len(inner.ran), len(slow.ran)) == (1, 0)


def test_a_pipeline_that_fails_is_recorded_and_can_be_tried_again(checks):
    def fail() -> None:
        raise PipelineFailed("Inner task failed: 'train'")

    found, _ = run(checks, FakeRunner(fail))
    assert (found.state, found.detail) == ("failed", "Inner task failed: 'train'")
    found, ran = run(checks, FakeRunner(end(checks, "registered", model_version="4")))
    assert (found.state, found.model_version, found.detail, ran) == ("registered", "4", None, True)


def test_what_a_gate_said_is_kept(checks):
    def refuse() -> None:
        end(checks, "refused", detail="evaluate: accuracy .6 must be >= .7")()
        raise PipelineFailed("Inner task failed: 'evaluate'")

    found, _ = run(checks, FakeRunner(refuse))
    assert (found.state, found.detail) == ("refused", "evaluate: accuracy .6 must be >= .7")


def test_one_that_was_killed_runs_again(checks):
    checks.advance_retraining(checks.read_retraining("t-1"), "running", now=NOW)
    found, ran = run(checks, FakeRunner(end(checks, "registered")))
    assert (found.state, ran) == ("registered", True)


def test_what_becomes_of_a_killed_runs_last_stage_is_not_recorded(checks):
    """It goes on alone, and finds its folder gone."""
    killed = checks.advance_retraining(checks.read_retraining("t-1"), "running", now=NOW)

    def act() -> None:
        record_end(checks, "t-1", killed.updated_at, "failed", now=NOW, detail="validate: no such folder")
        end(checks, "registered", model_version="3")()

    found, _ = run(checks, FakeRunner(act))
    assert (found.state, found.model_version, found.detail) == ("registered", "3", None)


def test_a_clusters_run_that_goes_on_is_waited_for_under_its_own_claim(checks):
    killed = checks.advance_retraining(checks.read_retraining("t-1"), "running", now=NOW)

    def act() -> None:
        record_end(checks, "t-1", killed.updated_at, "registered", now=NOW, model_version="3")

    found, ran = run(checks, FakeRunner(act, exclusive=False))
    assert (found.state, found.model_version, ran) == ("registered", "3", True)


def test_a_pipeline_that_records_nothing_has_failed(checks):
    assert run(checks, FakeRunner())[0].state == "failed"


def test_an_unreachable_cluster_leaves_it_to_be_tried_again(checks):
    def lose() -> None:
        raise ServiceUnavailable("no route")

    with pytest.raises(ServiceUnavailable, match="no route"):
        run(checks, FakeRunner(lose))
    assert run(checks, FakeRunner(end(checks, "registered")))[1]


def test_an_unknown_trigger_and_another_models_are_refused(checks):
    with pytest.raises(DataError, match="t-9"):
        run(checks, FakeRunner(), trigger_id="t-9")
    checks.request_retraining(dataclasses.replace(REQUEST, trigger_id="t-2", model_name="telco_churn"))
    with pytest.raises(ConfigError, match="telco_churn, not to shop_churn"):
        run(checks, FakeRunner(), trigger_id="t-2")


def test_a_check_at_nine_in_the_morning_knows_what_happened_before_midnight(checks):
    later = dataclasses.replace(REQUEST, trigger_id="t-3", as_of=AS_OF.replace(hour=9))
    checks.request_retraining(later)
    runner = FakeRunner()
    run(checks, runner, trigger_id="t-3")
    assert runner.ran[0][1]["as_of"] == "2025-01-01"


def test_dates_that_were_asked_for_win():
    day = dt.date(2024, 10, 3)
    asked = PARAMS.model_copy(update={"data": PARAMS.data.model_copy(update={"end_date": day})})
    chosen = plan_retraining(asked, SHOP, window_days=90, split="time").data
    assert (chosen.start_date, chosen.end_date) == (day - dt.timedelta(days=90), day)
    both = {"start_date": dt.date(2024, 1, 1), "end_date": day}
    asked = PARAMS.model_copy(update={"data": PARAMS.data.model_copy(update=both)})
    assert plan_retraining(asked, SHOP, window_days=90, split="time") == asked


def test_without_a_window_a_retraining_uses_as_many_snapshots_as_a_run():
    planned = plan_retraining(PARAMS, SHOP, window_days=None, split="customer")
    assert planned.data == PARAMS.data
    assert planned.split == PARAMS.split.model_copy(update={"by": "customer"})
    assert planned.model == PARAMS.model


def test_the_champion_is_recalibrated_beside_what_is_trained():
    for dataset in (SHOP, TELCO):
        for only in (True, False):
            how: Any = {"window_days": None, "split": "customer", "champion": "7", "recalibrates_only": only}
            assert plan_retraining(PARAMS, dataset, **how).model.recalibrates_only is only
        planned = plan_retraining(PARAMS, dataset, window_days=None, split="customer", champion="7")
        assert planned.model.recalibrates == 7


def test_a_table_without_days_has_nothing_to_choose_from():
    assert plan_retraining(PARAMS, TELCO, window_days=90, split="customer") == PARAMS


def test_a_table_with_days_holds_customers_out_and_ends_now():
    dated = TELCO.model_copy(update={"columns": TELCO.columns.model_copy(update={"time": "day"})})
    planned = plan_retraining(PARAMS, dated, window_days=None, split="customer")
    assert (planned.split.by, planned.data) == ("customer", PARAMS.data)
    chosen = plan_retraining(PARAMS, dated, window_days=90, split="customer").data
    assert chosen.end_date == PARAMS.as_of - dt.timedelta(days=1)
    assert chosen.start_date == PARAMS.as_of - dt.timedelta(days=90)
