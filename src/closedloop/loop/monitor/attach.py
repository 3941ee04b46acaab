"""`closedloop attach`: the monitor alone, for a model that somebody else serves."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from closedloop.config.attached import AttachedModel
from closedloop.core.features.parsing import parse_codes, parse_ids, parse_labels, parse_numbers
from closedloop.core.features.profiles import profile_column
from closedloop.core.monitoring.evidence import SCORE, build_baseline, measure_outcomes, measure_window
from closedloop.core.monitoring.verdict import PastCheck, Verdict, decide, find_judged_at
from closedloop.errors import DataError
from closedloop.files import read_json, replace_folder, write_json, write_text
from closedloop.loop.monitor.monitor import explain_no_alarm
from closedloop.loop.monitor.report import Pages, write_pages
from closedloop.store.checks import Check, name_check
from closedloop.tabular.describe.sniff import read_table

CHECKS_FILE, METRICS_FILE = "checks.json", "metrics.prom"
CATEGORIES_MAX = 50
VERSION = "attached"


def check_attached(model: AttachedModel, folder: Path, *, as_of: dt.datetime, now: dt.datetime) -> Check:
    """Compare the window with the reference; write the report, the figures for Prometheus and the record to ``folder``.

    Earlier checks in the same folder count: drift retrains only after several. A check of the same day is replaced.

    Raises
    ------
    DataError
        If a file cannot be read, or lacks a column; a value of ``score`` or of a numeric feature is no number.
    """
    reference, window = (_read(model, place) for place in (model.reference, model.window))
    features = _choose_features(model, reference)
    reference, window = (_convert(model, frame, features) for frame in (reference, window))
    if reference["churned"].isna().any():
        raise DataError(f"reference: rows without a label ({model.label.column}); all of them need one")
    policy, since = model.policy, as_of - dt.timedelta(days=model.policy.window_days_max)
    baseline = build_baseline(reference.astype({"churned": bool}), features, model.threshold)
    known = window.dropna(subset="churned").assign(outcome=lambda rows: rows["churned"].astype(int))
    evidence = {**measure_window(baseline, window, policy), **measure_outcomes(baseline, known, policy)}
    evidence |= {"window_rows": len(window), "outcome_rows": len(known), "outcomes_until": as_of.isoformat()}
    earlier = [check for check in _read_checks(folder) if check.as_of < as_of]
    before = [check.evidence for check in earlier]
    evidence["judged_at"] = find_judged_at(evidence, before, as_of=as_of, horizon_days=None).isoformat()
    trained = dt.datetime.combine(model.trained or as_of.date(), dt.time(), dt.UTC)
    past = [PastCheck(check.since, check.evidence) for check in earlier]
    decision = decide(evidence, past, (), policy, as_of=as_of, since=since, model_as_of=trained)
    evidence["reasons"] = list(decision.reasons) or explain_no_alarm(evidence, policy)
    check = Check(
        check_id=name_check(model.name, as_of),
        model_name=model.name,
        model_version=VERSION,
        as_of=as_of,
        since=since,
        until=as_of,
        predictions=len(window),
        outcomes=len(known),
        verdict=decision.verdict,
        evidence=evidence,
        recorded_at=now,
    )
    frames = Pages(reference, window, known, features, model.threshold)
    _write(folder, [check, *earlier], frames)
    return check


def _read(model: AttachedModel, place: str) -> pd.DataFrame:
    _, frame = read_table(place, [])
    wanted = [model.score, *model.numeric, *model.categorical]
    if missing := [name for name in wanted if name not in frame]:
        raise DataError(f"{place}: no column {', '.join(map(repr, missing))}; its columns: {', '.join(frame.columns)}")
    return frame.sample(min(len(frame), model.policy.sample_rows_max), random_state=0).sort_index()


def _choose_features(model: AttachedModel, reference: pd.DataFrame) -> dict[str, Sequence[str] | None]:
    """Every feature, with its categories if it is categorical; see `build_baseline`."""
    if model.label.column not in reference:
        raise DataError(f"reference: no column {model.label.column!r}, which holds what happened (label.column)")
    taken = {model.score, model.label.column, model.customer_id}
    found: dict[str, Sequence[str] | None] = dict.fromkeys(model.numeric)
    profiles = {name: profile_column(reference[name]) for name in reference.columns if name not in taken}
    guess = not model.numeric and not model.categorical
    for name, one in profiles.items():
        if guess and one.kind == "number" and not one.trouble:
            found[name] = None
        elif name in model.categorical or (guess and one.kind == "text" and one.different <= CATEGORIES_MAX):
            found[name] = one.values
    if not found:
        raise DataError(f"{model.reference}: no column can be a feature; name them in numeric and categorical")
    return found


def _convert(model: AttachedModel, frame: pd.DataFrame, features: dict[str, Sequence[str] | None]) -> pd.DataFrame:
    rows = pd.Series(frame.index + 1, index=frame.index)
    place: dict[str, Any] = {"place": "the table", "row_numbers": rows}
    converted = pd.DataFrame({SCORE: parse_numbers(frame[model.score], **place)}, index=frame.index)
    if converted[SCORE].isna().any() or not converted[SCORE].between(0, 1).all():
        raise DataError(f"{model.score}: a score is a probability from 0 to 1, and none may be missing")
    for name, categories in features.items():
        if name not in frame:
            raise DataError(f"{model.window}: no column {name!r}, which the reference has")
        converted[name] = (parse_numbers if categories is None else parse_codes)(frame[name], **place)
    converted["customer_id"] = parse_ids(frame[model.customer_id], **place) if model.customer_id else rows
    converted["churned"] = pd.Series(None, index=frame.index, dtype=object)
    if model.label.column in frame:
        known = frame[model.label.column].dropna()
        sides = {"churned": model.label.churned, "stayed": model.label.stayed}
        converted.loc[known.index, "churned"] = parse_labels(
            known, **sides, place="label", row_numbers=rows[known.index]
        )
    return converted


def _read_checks(folder: Path) -> list[Check]:
    """Those of this folder, the newest first."""
    if not (folder / CHECKS_FILE).is_file():
        return []
    times = ("as_of", "since", "until", "recorded_at")
    found = read_json(folder / CHECKS_FILE, made_by="closedloop attach")
    return [Check(**{**one, **{name: dt.datetime.fromisoformat(one[name]) for name in times}}) for one in found]


def _write(folder: Path, checks: list[Check], frames: Pages) -> None:
    with replace_folder(folder) as beside:
        write_pages(beside, checks[0], checks[1:], frames)
        records = [asdict(check) for check in checks]
        write_json(beside / CHECKS_FILE, json.loads(json.dumps(records, default=lambda time: time.isoformat())))
        write_text(beside / METRICS_FILE, format_metrics(checks[0]))


def format_metrics(check: Check) -> str:
    """The check's figures as a page for Prometheus' textfile collector."""
    evidence, model = check.evidence, json.dumps(check.model_name)
    of_model = f"model_name={model},model={model}"  # the second name is deprecated, as is "feature" below
    figures = {"verdict": get_args(Verdict).index(check.verdict), "as_of_seconds": check.as_of.timestamp()}
    figures |= {"window_rows": evidence["window_rows"], "outcome_rows": evidence["outcome_rows"]}
    if "drift" in evidence:
        figures["drifted_features"] = len(evidence["drift"]["drifted"])
        figures["estimated_accuracy"] = evidence["estimate"]["accuracy"]
    if "realised" in evidence:
        figures["realised_accuracy"] = evidence["realised"]["accuracy"]
        figures["realised_brier"] = evidence["realised"]["brier"]
    lines = [f"closedloop_attached_{name}{{{of_model}}} {value}" for name, value in figures.items()]
    for name, shift in evidence.get("drift", {"features": {}})["features"].items():
        feature = json.dumps(name, ensure_ascii=False)
        labels = f"{of_model},feature_name={feature},feature={feature}"
        lines.append(f"closedloop_attached_effect{{{labels}}} {shift['effect']}")
    return "\n".join(lines) + "\n"
