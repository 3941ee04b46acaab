"""`closedloop replay`: run the whole loop over a data set's history, on a simulated clock, in a folder of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from closedloop import bootstrap
from closedloop.adapters.kfp_fork import fork_components
from closedloop.config.dataset import load_dataset
from closedloop.config.environment import keep_environment
from closedloop.config.params import PARAMS_FILE
from closedloop.config.sources import SimulatorSource
from closedloop.config.yaml import format_yaml, read_yaml
from closedloop.core.release.assignment import is_canary
from closedloop.errors import ConfigError, DataError, GateFailed, count_noun
from closedloop.files import write_json, write_text
from closedloop.loop.monitor.monitor import run_check
from closedloop.loop.monitor.outcomes import label_predictions
from closedloop.release.by_hand import promote
from closedloop.release.controller import run_pass, start_release
from closedloop.replay.bad_model import register_inverted
from closedloop.replay.calls import Calls, open_calls
from closedloop.replay.harm import measure_harm
from closedloop.replay.results import compare_arms, describe_check, describe_difference, measure_ticks, pair_arms
from closedloop.replay.traffic import Traffic, wait_stored
from closedloop.serving.clock import Clock
from closedloop.serving.models import load_model
from closedloop.stages.refresh import refresh
from closedloop.store.checks import Retraining
from closedloop.waiting import build_bar, show_clock
from closedloop.workflow import WORKSPACES, prepare_workspace

if TYPE_CHECKING:
    from closedloop.release.moves import ReleaseState
    from closedloop.store.checks import Check

DAY = dt.timedelta(days=1)
STEP_DAYS_MAX = 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """The days, customers and limits of a replay.

    Attributes
    ----------
    days
        The dates of the ticks; the first model is trained as of the first date.
    share
        The share of the customers to score, chosen by a stable hash of their ids.
    requests_min
        The minimum sample of each release step.
    horizon_days
        The horizon of the label rule, if it differs from the data set's.
    bad_tick
        Number of the tick at which the bad challenger is offered.
    calls_tick
        Number of the tick at which the simulated shop starts a campaign; other data cannot answer one.
    verbose
        Show what the stages of each training say, and not only their names.
    """

    days: tuple[dt.date, ...]
    share: float
    requests_min: int
    horizon_days: int | None = None
    bad_tick: int = 1
    calls_tick: int = 1
    verbose: bool = False


def list_days(first: dt.date, last: dt.date, every_days: int) -> tuple[dt.date, ...]:
    """The ticks from ``first`` to ``last``.

    Raises
    ------
    ConfigError
        If there are fewer than three: no outcome could become known within the replay.
    """
    count = (last - first).days // every_days + 1 if every_days > 0 else 0
    if count < 3:
        ticks = count_noun(max(count, 0), "tick")
        raise ConfigError(f"replay: {first} to {last} every {count_noun(every_days, 'day')}: {ticks}, 3 are needed")
    return tuple(first + number * every_days * DAY for number in range(count))


def replay(plan: Plan, *, dataset: str | None, source: str | None) -> dict[str, Any]:
    """Replay in ``workspaces/loop/<data set>``, which is made anew; return the content of loop.json.

    Raises
    ------
    ConfigError
        If this is no project folder.
    """
    if not Path("dvc.yaml").is_file():
        raise ConfigError(f"{Path.cwd()}: there is no dvc.yaml; run this in the project's folder")
    root, folder = Path.cwd(), prepare_folder(Path.cwd(), dataset, source, plan)
    logging.getLogger("py.warnings").setLevel("ERROR")  # deprecation warnings of libraries
    if not plan.verbose:
        logging.getLogger("closedloop").setLevel("WARNING")  # the steps of stages would hide the story
    with keep_environment(), contextlib.chdir(folder):
        os.environ["CLOSEDLOOP_RELEASE__REQUESTS_MIN"] = str(plan.requests_min)
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        with fork_components("closedloop.cli.main", "closedloop.bootstrap"):
            with show_clock("loop", 10):
                begun = Replay(plan)
            report = begun.run()
    write_start_pages(root, folder)
    return report


def write_start_pages(root: Path, folder: Path) -> None:
    """The replay's own start page, and that of the data set's project or workspace, which links to the replay."""
    for place in (root, root / WORKSPACES / folder.name, folder):
        if (place / PARAMS_FILE).is_file():
            with contextlib.chdir(place):
                run = bootstrap.load_run(PARAMS_FILE)
                if run.dataset.name == folder.name:
                    bootstrap.write_start_page(run, dt.datetime.now(dt.UTC))


def prepare_folder(root: Path, dataset: str | None, source: str | None, plan: Plan) -> Path:
    """Make a project folder with its own stores: `load_settings` locates stores beside the real ``configs`` folder."""
    name = dataset or bootstrap.load_run(root / PARAMS_FILE, root=root).params.dataset
    described = load_dataset(name, root / "configs/datasets")  # refuses a path, whose target would be deleted below
    folder = root / WORKSPACES / "loop" / name
    shutil.rmtree(folder, ignore_errors=True)
    prepare_workspace(root, dataset=name, source=source, as_of=f"{plan.days[0]}", folder=folder)
    (folder / "configs").unlink()
    for copied in ("configs", "pipelines"):
        shutil.copytree(root / copied, folder / copied)
    if isinstance(described.source, SimulatorSource):
        open_calls(folder, name)
    if plan.horizon_days:
        path = folder / "configs/datasets" / f"{name}.yaml"
        config = read_yaml(path)
        config["label"] = {**config["label"], "horizon_days": plan.horizon_days}
        write_text(path, format_yaml(config))
    store = folder / "feature_repo/feature_store.yaml"
    write_text(store, store.read_text(encoding="utf-8").replace("../../../state/", "../state/"))
    return folder


class Stages(io.TextIOBase):
    """Takes what the stages of a training write to people, and passes on the names of the stages.

    Their whole output is in the log of the retraining.
    """

    def __init__(self, day: dt.date, show: Callable[[str], None]) -> None:
        super().__init__()
        self._day, self._show = day, show

    def write(self, text: str) -> int:
        """Take some text."""
        for line in text.splitlines():
            if (name := line[:12].strip()) and line[12:14] == "  ":
                self._show(f"{self._day}: training, {name} is done")
        return len(text)


class Replay:
    """One replay in the working directory."""

    def __init__(self, plan: Plan) -> None:
        from rich.console import Console

        self.plan, self.console = plan, Console(highlight=False)
        # each with the day of the simulated clock; its kind has a mark in the picture
        self.events: list[dict[str, Any]] = []
        self.ticks: list[dict[str, Any]] = []
        # of each tick: customer_id, snapshot_at, and the first model's score
        self.frozen_scores: list[pd.DataFrame] = []
        self.bad_version: str | None = None  # the bad challenger's, once it is offered
        self.calls = Calls()
        self.progress = build_bar(self.console)
        self.bar = self.progress.add_task("the first model is trained", total=len(plan.days))
        run = self._load(plan.days[0])
        self.run_context, self.name = run, run.dataset.model_name
        clock_path = Path("state/clock")
        self.clock = Clock(clock_path)
        self.clock.set(run.params.as_of_at)
        self.store, self.checks = bootstrap.build_predictions(run), bootstrap.build_checks(run)
        run.database.upgrade()
        self.features, self.releases = bootstrap.build_features(run), bootstrap.build_releases(run)
        self.horizon_days = run.dataset.label.horizon_days if run.dataset.label else 0
        if not self.horizon_days:
            raise ConfigError(f"{run.dataset.name}: it has no label rule, so there is no history to replay")

    def run(self) -> dict[str, Any]:
        """Run every tick and write the page."""
        with self.progress:
            self._train_first()
            self.traffic = Traffic(Path("state/clock"), Path("state/service.log"))
            try:
                self.traffic.wait_for(1)
                self.policy = self.run_context.settings.release
                # read again: the settings name the service's ports only now
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
        from rich.markup import escape

        colour = {"promoted": "green", "rolled back": "red", "refused": "yellow"}.get(kind, "bold")
        self.console.print(f"{day}  [{colour}]{kind:>12}[/]  {escape(f'{what}: {why}' if why else what)}")

    def _record(self, day: dt.date, kind: str, what: str, why: str = "") -> None:
        self.events.append({"at": day, "kind": kind, "what": what, "why": why})
        self._say(day, kind, what, why)

    def _train_first(self) -> None:
        day = self.plan.days[0]
        ended = self._retrain(day, "first", "the first model")
        if ended.model_version is None:
            raise DataError(f"the first model is {ended.state}: {ended.detail}")
        self.clock.set(self._midnight(day))  # the journal's times never go back: the first tick starts here
        promote(self.releases, self.features, ended.model_version, actor="replay", reason="first", now=self.clock())
        with tempfile.TemporaryDirectory() as folder:
            place, digest = self.releases.tracking.fetch_version(ended.model_version, Path(folder))
            self.frozen = load_model(place, version=ended.model_version, folder_sha256=digest)
        self._record(day, "first model", f"version {ended.model_version} serves; the frozen arm keeps it")

    def _retrain(self, day: dt.date, trigger_id: str, reason: str) -> Retraining:
        run = self._load(day)
        wall = dt.datetime.now(dt.UTC)
        self.checks.request_retraining(
            Retraining(trigger_id, self.name, "replay", reason, run.params.as_of_at, wall)
        )  # has no effect if the monitor's request is on record
        with (
            contextlib.nullcontext() if self.plan.verbose else contextlib.redirect_stderr(Stages(day, self._name_step))
        ):
            return bootstrap.build_retraining(run, self.checks)(trigger_id)[0]

    def _name_step(self, text: str) -> None:
        self.progress.update(self.bar, description=text)

    def _tick(self, number: int, day: dt.date) -> None:
        run = self._load(day)
        if number:
            self.clock.set(max(run.params.as_of_at, self.clock()))  # a release may have gone on beyond this day
        work_dir = Path("state/refresh") / self.name
        with bootstrap.build_engine(run) as engine:
            refresh(run.params, run.dataset, self.features, engine, work_dir=work_dir)
            samples = bootstrap.build_samples(self.run_context)
            labelled = label_predictions(
                run.params, run.dataset, engine, samples, self.store, work_dir=work_dir, read=False
            )
        customers = self._choose(work_dir / "features" / f"{day}.parquet", run.params.as_of_at)
        self._continue_release(day)
        check, asked = self._check(run, samples) if number else (None, None)
        self._wait_stored(self.traffic.ask(customers))
        tick = {"at": f"{day}", "customers": len(customers), "outcomes": labelled.stored}
        if check is not None:
            tick |= describe_check(check)
        self.ticks.append(tick)
        self._say(
            day,
            "tick",
            f"{count_noun(len(customers), 'customer')} scored, {count_noun(labelled.stored, 'outcome')} closed",
        )
        self._call_customers(number, run)
        if number == self.plan.bad_tick:
            self._offer_bad(day, customers)
        if asked is not None and asked.state == "requested":
            self._answer_trigger(day, asked, customers)

    def _call_customers(self, number: int, run: bootstrap.RunContext) -> None:
        """Start the campaign at its tick; tell what came of it at a later one."""
        if (ended := self.calls.report(run)) is not None:
            self._record(run.params.as_of, "reported", *ended)
        if number == self.plan.calls_tick and isinstance(run.dataset.source, SimulatorSource):
            self._record(run.params.as_of, *self.calls.start(run, self.clock()))

    def _choose(self, path: Path, snapshot: dt.datetime) -> list[str]:
        from closedloop.core.training.estimators import encode_frame

        rows = pd.read_parquet(path)
        rows = rows[[is_canary("replay", one, self.plan.share) for one in rows["customer_id"]]]
        scores = self.frozen.scorer.score(encode_frame(self.frozen.contract.features, rows))
        frozen = pd.DataFrame({"customer_id": rows["customer_id"], "snapshot_at": snapshot, "score": scores})
        self.frozen_scores.append(frozen.astype({"snapshot_at": "datetime64[us, UTC]"}))
        return [str(one) for one in rows["customer_id"]]

    def _check(self, run: bootstrap.RunContext, samples: Any) -> tuple[Check, Retraining | None]:
        with bootstrap.open_slot(run, None) as slot:
            check, asked = run_check(
                self.checks,
                samples,
                slot=slot,
                as_of=run.params.as_of_at,
                now=dt.datetime.now(dt.UTC),
                policy=run.settings.monitoring,
                worth=bootstrap.read_worth(run),
            )
        if check.verdict != "none":
            what = f"the monitor says {check.verdict} of version {check.model_version}"
            self._record(run.params.as_of, check.verdict, what, "; ".join(check.evidence["reasons"]))
        return check, asked

    def _answer_trigger(self, day: dt.date, asked: Retraining, customers: list[str]) -> None:
        ended = self._retrain(day, asked.trigger_id, asked.reason)
        if ended.model_version is None:
            self._record(day, "refused", f"the retraining is {ended.state}", ended.detail or "")
            return
        version = ended.model_version
        if (state := self._start(day, version)) is not None:
            self._record(day, "retrained", f"version {version} is challenger", asked.reason)
            self._release(day, version, customers, state)

    def _offer_bad(self, day: dt.date, customers: list[str]) -> None:
        state = self.releases.read_state()
        assert state.row is not None  # noqa: S101 - the first model was promoted
        version = register_inverted(self.releases.tracking, state.row.champion_version)
        self.bad_version = version
        self._record(day, "bad offered", f"version {version}: the champion with inverted scores and a forged win")
        if (started := self._start(day, version)) is not None:
            self._release(day, version, customers, started)

    def _start(self, day: dt.date, version: str) -> ReleaseState | None:
        """Put a version into shadow; None, and a recorded refusal, if it did not win against the champion."""
        try:
            return start_release(self.releases, self.evidence, version, actor="replay", now=self.clock())
        except GateFailed as error:
            self._record(day, "refused", f"version {version} does not become challenger", str(error))
            return None

    def _release(self, day: dt.date, version: str, customers: list[str], state: ReleaseState) -> None:
        """Take a version from shadow to champion, or back, a step a day; the journal's times never go back."""
        began = max(self._midnight(day), self._midnight(self.clock().date()))
        # while a release goes on, every customer asks once a day
        policy = self.policy.model_copy(update={"requests_a_day": float(len(customers))})
        for step in range(1, STEP_DAYS_MAX + 1):
            self._wait_for_service(state)
            self.clock.set(began + step * DAY)
            self._wait_stored(self.traffic.ask(customers))
            found = run_pass(self.releases, self.evidence, policy, now=self.clock(), as_of=self._midnight(day))
            state = found.state
            if self._report((began + step * DAY).date(), version, found):
                break
        self._wait_for_service(state)

    def _continue_release(self, day: dt.date) -> None:
        """Let outcomes that became known test a new champion against its predecessor."""
        rollout = self.releases.read_state().rollout
        if rollout is None:
            return
        found = run_pass(self.releases, self.evidence, self.policy, now=self.clock(), as_of=self._midnight(day))
        self._report(day, rollout.version, found)
        self._wait_for_service(found.state)

    def _report(self, day: dt.date, version: str, found: Any) -> bool:
        """Tell what a pass of the controller did; return True if the release needs no further pass on this tick."""
        decision, rollout = found.decision, found.state.rollout
        champion = found.state.row.champion_version
        reasons = "; ".join(decision.reasons) if decision else ""
        if decision.verdict == "roll_back":
            self._record(day, "rolled back", f"version {version}; version {champion} serves", reasons)
        elif decision.verdict == "advance" and rollout is None:
            self._record(day, "confirmed", f"version {version}", reasons)
        elif decision.verdict == "advance" and rollout.step == "champion":
            self._record(day, "promoted", f"version {version} serves every customer", reasons)
        elif decision.verdict == "advance":
            self._record(day, "step", f"version {version} goes to {rollout.step}", reasons)
        return rollout is None or rollout.step == "champion"

    def _midnight(self, day: dt.date) -> dt.datetime:
        return dt.datetime.combine(day, dt.time(), dt.UTC)

    def _wait_for_service(self, state: ReleaseState) -> None:
        if state.row is not None:
            self.traffic.wait_for(state.row.revision)

    def _wait_stored(self, prediction_id: str) -> None:
        wait_stored(self.store, self.name, prediction_id, self.traffic)

    def _finish(self) -> dict[str, Any]:
        from closedloop.replay.page import write_page

        truth = Path("state/refresh") / self.name / "raw/truth.json"
        changes = json.loads(truth.read_text(encoding="utf-8"))["regime_changes"] if truth.is_file() else []
        as_of = self._midnight(self.plan.days[-1])
        outcomes = self.store.list_outcomes(self.name, as_of=as_of, horizon_days=self.horizon_days, untreated=True)
        pairs = pair_arms(outcomes, self.frozen_scores)
        concept = next((dt.date.fromisoformat(one["at"]) for one in changes if one["kind"] == "concept"), None)
        compared = compare_arms(pairs, concept, seed=self.run_context.params.seed)
        served = {version: len(customers) for version, customers in self.traffic.served.items()}
        harm = measure_harm(pairs, self.events, concept, served=served, bad_version=self.bad_version)
        report = {
            "dataset": self.run_context.dataset.name,
            "days": [f"{day}" for day in self.plan.days],
            "share": self.plan.share,
            "requests_answered": self.traffic.answered,
            "requests_failed": self.traffic.failed,
            "failures": self.traffic.failures,
            "champion": self.releases.read_state().row.champion_version,  # type: ignore[union-attr]
            "comparison": compared,
            "conclusion": describe_difference(compared),
            "harm": harm,
            "campaign": self.calls.tell(),
            "drift_limit": self.run_context.settings.monitoring.effect_min,
            "outcome_rows_min": self.run_context.settings.monitoring.outcome_rows_min,
            "regime_changes": changes,
            "arms": measure_ticks(pairs),
            "ticks": self.ticks,
            "events": self.events,
        }
        write_json(Path("loop.json"), report)
        write_page(Path("loop.html"), report)
        self.console.print(f"\n{report['conclusion']}", markup=False)
        self.console.print(f"{count_noun(self.traffic.answered, 'request')} answered, {self.traffic.failed} failed")
        self.console.print("[bold]Open[/]", Path("loop.html").resolve())
        return report
