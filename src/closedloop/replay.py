"""`closedloop replay`: the whole loop over a data set's history, by a simulated clock, in a folder of its own."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from closedloop import bootstrap
from closedloop.adapters.checks import Retraining
from closedloop.adapters.warm import warm_components
from closedloop.core.assignment import is_canary
from closedloop.dataset import load_dataset, read_yaml
from closedloop.errors import ConfigError, DataError, GateFailed
from closedloop.files import write_json, write_text
from closedloop.loop.monitor import run_check
from closedloop.loop.outcomes import label_predictions
from closedloop.loop.release import run_pass, start_release
from closedloop.loop.rollback import promote
from closedloop.loop.sabotage import register_inverted
from closedloop.loop.story import Story, compare_arms, describe_check, describe_difference, measure_ticks, pair_arms
from closedloop.loop.traffic import Traffic
from closedloop.params import PARAMS_FILE
from closedloop.serving.clock import Clock
from closedloop.serving.models import load_model
from closedloop.stages.refresh import refresh
from closedloop.workflow import WORKSPACES, prepare_workspace

if TYPE_CHECKING:
    from closedloop.adapters.checks import Check
    from closedloop.stages.deploy import State

DAY = dt.timedelta(days=1)
STEP_DAYS_MAX = 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to replay.

    Attributes
    ----------
    days
        The ticks' dates; the first model is trained as of the first.
    share
        Of the customers, by a stable hash of their ids.
    requests_min
        Each step's least sample.
    horizon_days
        Of the label rule, if it is another than the data set's.
    bad_tick
        Number of the tick at which the bad challenger is offered.
    """

    days: tuple[dt.date, ...]
    share: float
    requests_min: int
    horizon_days: int | None = None
    bad_tick: int = 1


def list_days(first: dt.date, last: dt.date, every_days: int) -> tuple[dt.date, ...]:
    """The ticks from ``first`` to ``last``.

    Raises
    ------
    ConfigError
        If there are fewer than three: nothing could close.
    """
    count = (last - first).days // every_days + 1 if every_days > 0 else 0
    if count < 3:
        raise ConfigError(f"replay: {first} to {last} every {every_days} days are {max(count, 0)} ticks, 3 are needed")
    return tuple(first + number * every_days * DAY for number in range(count))


def replay(plan: Plan, *, dataset: str | None, source: str | None) -> dict[str, Any]:
    """Replay in ``workspaces/loop/<data set>``, which is made anew; returns what is written to loop.json.

    Raises
    ------
    ConfigError
        If this is no project folder.
    """
    if not Path("dvc.yaml").is_file():
        raise ConfigError(f"{Path.cwd()}: there is no dvc.yaml; run this in the project's folder")
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(prepare_folder(before, dataset, source, plan))
    os.environ["CLOSEDLOOP_RELEASE__REQUESTS_MIN"] = str(plan.requests_min)
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    logging.getLogger("py.warnings").setLevel("ERROR")  # libraries' own, which are deprecated, not wrong
    try:
        with warm_components("closedloop.cli", "closedloop.bootstrap"):
            return Replay(plan).run()
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)


def prepare_folder(root: Path, dataset: str | None, source: str | None, plan: Plan) -> Path:
    """A project folder whose stores are its own: a real ``configs`` is what stores are found by."""
    name = dataset or bootstrap.load_run(root / PARAMS_FILE, root=root).params.dataset
    load_dataset(name, root / "configs/datasets")  # a path in place of a name would lose what it leads to
    folder = root / WORKSPACES / "loop" / name
    shutil.rmtree(folder, ignore_errors=True)
    prepare_workspace(root, dataset=name, source=source, as_of=f"{plan.days[0]}", folder=folder)
    (folder / "configs").unlink()
    for copied in ("configs", "pipelines"):
        shutil.copytree(root / copied, folder / copied)
    if plan.horizon_days:
        path = folder / "configs/datasets" / f"{name}.yaml"
        config = read_yaml(path)
        config["label"] = {**config["label"], "horizon_days": plan.horizon_days}
        write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    store = folder / "feature_repo/feature_store.yaml"
    write_text(store, store.read_text(encoding="utf-8").replace("../../../state/", "../state/"))
    return folder


class Replay:
    """One run in the folder that is the present one."""

    def __init__(self, plan: Plan) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.plan, self.story, self.console = plan, Story(), Console(highlight=False)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, console=self.console, transient=True)
        self.bar = self.progress.add_task("the first model is trained", total=len(plan.days))
        run = self._load(plan.days[0])
        self.run_context, self.name = run, run.dataset.model_name
        clock_path = Path("state/clock")
        self.clock = Clock(clock_path)
        self.clock.set(run.params.as_of_at)
        self.store, self.checks = bootstrap.build_store(run), bootstrap.build_checks(run)
        self.store.upgrade()
        self.features, self.releases = bootstrap.build_features(run), bootstrap.build_releases(run)
        self.horizon_days = run.dataset.label.horizon_days if run.dataset.label else 0
        if not self.horizon_days:
            raise ConfigError(f"{run.dataset.name}: it has no label rule, so there is no history to replay")

    def run(self) -> dict[str, Any]:
        """Every tick, and the page."""
        with self.progress:
            self._train_first()
            self.traffic = Traffic(Path("state/clock"), Path("state/service.log"))
            try:
                self.traffic.wait_for(1)
                self.policy = bootstrap.build_release_policy(self._load(self.plan.days[0]))
                self.evidence = bootstrap.build_release_evidence(self._load(self.plan.days[0]))
                for number, day in enumerate(self.plan.days):
                    self.progress.update(self.bar, description=f"{day}", completed=number)
                    self._tick(number, day)
            finally:
                self.traffic.stop()
        return self._finish()

    def _load(self, day: dt.date) -> bootstrap.RunContext:
        return bootstrap.load_run(PARAMS_FILE, overrides={"as_of": f"{day}"})

    def _say(self, day: dt.date, kind: str, what: str, why: str = "") -> None:
        colour = {"promoted": "green", "rolled back": "red", "refused": "yellow"}.get(kind, "bold")
        self.console.print(f"{day}  [{colour}]{kind:>12}[/]  {what}" + (f": {why}" if why else ""))

    def _tell(self, day: dt.date, kind: str, what: str, why: str = "") -> None:
        self.story.tell(day, kind, what, why)
        self._say(day, kind, what, why)

    def _train_first(self) -> None:
        day = self.plan.days[0]
        ended = self._retrain(day, "first", "the first model")
        if ended.model_version is None:
            raise DataError(f"the first model is {ended.state}: {ended.detail}")
        self.clock.set(self._midnight(day))  # the journal's times never go back: the first tick goes on from here
        promote(self.releases, self.features, ended.model_version, actor="replay", reason="first", now=self.clock())
        with tempfile.TemporaryDirectory() as folder:
            place, digest = self.releases.tracking.fetch_version(ended.model_version, Path(folder))
            self.frozen = load_model(place, version=ended.model_version, folder_sha256=digest)
        self._tell(day, "first model", f"version {ended.model_version} serves; the frozen arm keeps it")

    def _retrain(self, day: dt.date, trigger_id: str, reason: str) -> Retraining:
        run = self._load(day)
        wall = dt.datetime.now(dt.UTC)
        self.checks.request_retraining(
            Retraining(trigger_id, self.name, "replay", reason, run.params.as_of_at, wall)
        )  # the monitor's own request is there already, and stays
        return bootstrap.build_retraining(run, self.checks)(trigger_id)[0]

    def _tick(self, number: int, day: dt.date) -> None:
        run = self._load(day)
        if number:
            self.clock.set(max(run.params.as_of_at, self.clock()))  # a release may have gone on beyond this day
        work_dir = Path("state/refresh") / self.name
        with bootstrap.build_engine(run) as engine:
            refresh(run.params, run.dataset, self.features, engine, work_dir=work_dir)
            samples = bootstrap.build_samples(run)
            labelled = label_predictions(
                run.params, run.dataset, engine, samples, self.store, work_dir=work_dir, read=False
            )
        customers = self._choose(work_dir / "features" / f"{day}.parquet", run.params.as_of_at)
        self._continue_release(day)
        check, asked = self._check(run, samples) if number else (None, None)
        samples.close()
        self._wait_stored(self.traffic.ask(customers))
        tick = {"at": f"{day}", "customers": len(customers), "outcomes": labelled.stored}
        if check is not None:
            tick |= describe_check(check)
        self.story.ticks.append(tick)
        self._say(day, "tick", f"{len(customers):,} customers scored, {labelled.stored:,} outcomes closed")
        if number == self.plan.bad_tick:
            self._offer_bad(day, customers)
        if asked is not None and asked.state == "requested":
            self._answer_trigger(day, asked, customers)

    def _choose(self, path: Path, snapshot: dt.datetime) -> list[str]:
        from closedloop.core.estimators import encode_frame

        rows = pd.read_parquet(path)
        rows = rows[[is_canary("replay", one, self.plan.share) for one in rows["customer_id"]]]
        scores = self.frozen.scorer.score(encode_frame(self.frozen.contract.features, rows))
        frozen = pd.DataFrame({"customer_id": rows["customer_id"], "snapshot_at": snapshot, "score": scores})
        self.story.frozen.append(frozen.astype({"snapshot_at": "datetime64[us, UTC]"}))
        return [str(one) for one in rows["customer_id"]]

    def _check(self, run: bootstrap.RunContext, samples: Any) -> tuple[Check, Retraining | None]:
        with bootstrap.open_slot(run, None) as slot:
            check, asked = run_check(
                self.checks,
                samples,
                model_dir=Path(slot.folder),
                version=slot.version,
                as_of=run.params.as_of_at,
                now=dt.datetime.now(dt.UTC),
                rules=bootstrap.build_monitor_rules(run),
            )
        if check.verdict != "none":
            what = f"the monitor says {check.verdict} of version {check.model_version}"
            self._tell(run.params.as_of, check.verdict, what, "; ".join(check.evidence["reasons"]))
        return check, asked

    def _answer_trigger(self, day: dt.date, asked: Retraining, customers: list[str]) -> None:
        ended = self._retrain(day, asked.trigger_id, asked.reason)
        if ended.model_version is None:
            self._tell(day, "refused", f"the retraining is {ended.state}", ended.detail or "")
            return
        self._tell(day, "retrained", f"version {ended.model_version} is challenger", asked.reason)
        self._release(day, ended.model_version, customers)

    def _offer_bad(self, day: dt.date, customers: list[str]) -> None:
        state = self.releases.settle()
        assert state.row is not None  # noqa: S101 - the first model was promoted
        version = register_inverted(self.releases.tracking, state.row.champion_version)
        self._tell(day, "bad offered", f"version {version}: the champion's scores turned round, its win forged")
        self._release(day, version, customers)

    def _release(self, day: dt.date, version: str, customers: list[str]) -> None:
        """From shadow to champion or back, a step a day; the journal's times never go back."""
        actor, began = "replay", max(self._midnight(day), self._midnight(self.clock().date()))
        try:
            state = start_release(self.releases, self.evidence, version, actor=actor, now=self.clock())
        except GateFailed as error:
            self._tell(day, "refused", f"version {version}", str(error))
            return
        for step in range(1, STEP_DAYS_MAX + 1):
            self._take_up(state)
            self.clock.set(began + step * DAY)
            self._wait_stored(self.traffic.ask(customers))
            found = run_pass(self.releases, self.evidence, self.policy, now=self.clock(), as_of=self._midnight(day))
            state = found.state
            if self._report((began + step * DAY).date(), version, found):
                break
        self._take_up(state)

    def _continue_release(self, day: dt.date) -> None:
        """Closed outcomes go on testing a new champion."""
        rollout = self.releases.settle().rollout
        if rollout is None:
            return
        found = run_pass(self.releases, self.evidence, self.policy, now=self.clock(), as_of=self._midnight(day))
        self._report(day, rollout.version, found)
        self._take_up(found.state)

    def _report(self, day: dt.date, version: str, found: Any) -> bool:
        """Tell what a pass did; True if the version has got where it gets for now."""
        decision, rollout = found.decision, found.state.rollout
        champion = found.state.row.champion_version
        reasons = "; ".join(decision.reasons) if decision else ""
        if decision.verdict == "roll_back":
            self._tell(day, "rolled back", f"version {version}; version {champion} serves", reasons)
        elif decision.verdict == "advance" and rollout is None:
            self._tell(day, "confirmed", f"version {version}", reasons)
        elif decision.verdict == "advance" and rollout.step == "champion":
            self._tell(day, "promoted", f"version {version} serves everybody", reasons)
        elif decision.verdict == "advance":
            self._tell(day, "step", f"version {version} goes to {rollout.step}", reasons)
        return rollout is None or rollout.step == "champion"

    def _midnight(self, day: dt.date) -> dt.datetime:
        return dt.datetime.combine(day, dt.time(), dt.UTC)

    def _take_up(self, state: State) -> None:
        if state.row is not None:
            self.traffic.wait_for(state.row.revision)

    def _wait_stored(self, prediction_id: str) -> None:
        """Until the last prediction has reached the store; those before it are there then."""
        import time

        if not prediction_id:
            said = f"{self.traffic.failed} requests failed, the first: {[*self.traffic.failures, 'none was sent'][0]}"
            raise DataError(f"the service answered nobody ({said}); see {Path('state/service.log').resolve()}")
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if any(self.store.read_predictions(self.name, ids=[prediction_id])):
                return
            time.sleep(0.2)
        raise DataError(f"prediction {prediction_id} did not reach the operations store in two minutes")

    def _finish(self) -> dict[str, Any]:
        from closedloop.loop.page import write_page

        truth = Path("state/refresh") / self.name / "raw/truth.json"
        changes = json.loads(truth.read_text(encoding="utf-8"))["regime_changes"] if truth.is_file() else []
        as_of = self._midnight(self.plan.days[-1])
        outcomes = self.store.list_outcomes(self.name, as_of=as_of, horizon_days=self.horizon_days)
        pairs = pair_arms(outcomes, self.story.frozen)
        concept = next((dt.date.fromisoformat(one["at"]) for one in changes if one["kind"] == "concept"), None)
        compared = compare_arms(pairs, concept, seed=self.run_context.params.seed)
        report = {
            "dataset": self.run_context.dataset.name,
            "days": [f"{day}" for day in self.plan.days],
            "share": self.plan.share,
            "requests_answered": self.traffic.answered,
            "requests_failed": self.traffic.failed,
            "failures": self.traffic.failures,
            "champion": self.releases.settle().row.champion_version,  # type: ignore[union-attr]
            "comparison": compared,
            "conclusion": describe_difference(compared),
            "regime_changes": changes,
            "arms": measure_ticks(pairs),
            "ticks": self.story.ticks,
            "events": [event._asdict() for event in self.story.events],
        }
        write_json(Path("loop.json"), report)
        write_page(Path("loop.html"), report)
        self.console.print(f"\n{report['conclusion']}")
        self.console.print(f"{self.traffic.answered:,} requests answered, {self.traffic.failed} failed")
        self.console.print(f"[bold]Open[/] {Path('loop.html').resolve()}")
        return report
