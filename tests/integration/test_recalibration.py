"""A registered version recalibrated on newer outcomes, through the real registry, skops and the ONNX export."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from closedloop.adapters.mlflow import DIGEST_TAG, Tracking
from closedloop.adapters.onnx import export_model
from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.config.dataset import load_dataset
from closedloop.config.featureset import FeatureSet, list_features
from closedloop.config.params import Params, parse_params
from closedloop.config.settings import load_settings
from closedloop.config.yaml import read_yaml
from closedloop.contract import Lineage, digest_folder
from closedloop.core.evaluation.metrics import list_log_losses
from closedloop.core.training.deciding import DecidingModel
from closedloop.core.training.estimators import encode_frame, score
from closedloop.errors import GateFailed
from closedloop.stages.parts.challengers import choose_challenger, list_recent, recalibrate
from closedloop.stages.parts.fitting import Fitted, fit
from closedloop.stages.parts.model_folder import write_model

ROOT = Path(__file__).parents[2]
SHOP = load_dataset("shop", ROOT / "configs/datasets")
DAY = dt.datetime(2024, 3, 1, tzinfo=dt.UTC)


def make_params(calibrate: bool) -> Params:
    values = read_yaml(ROOT / "params.yaml")
    values["model"] = {**values["model"], "params": {"max_iter": 30}, "calibrate": calibrate, "recalibrates": 1}
    return parse_params(values, "a test")


def make_rows(features: FeatureSet, rows: int, seed: int, intercept: float) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({name: rng.normal(size=rows) for name in features.numeric})
    for name in features.categorical:
        frame[name] = rng.choice(["a", "b"], rows)
    odds = intercept + frame[features.numeric[0]] - frame[features.numeric[1]]
    frame["churned"] = rng.random(rows) < 1 / (1 + np.exp(-odds))
    frame.insert(0, "customer_id", [f"C{number}" for number in range(rows)])
    frame.insert(1, "event_timestamp", pd.Timestamp(DAY))
    return frame


def split(features: FeatureSet, intercept: float, seed: int) -> dict[str, pd.DataFrame]:
    sizes = {"train": 1_500, "validation": 1_000, "test": 400}
    return {
        part: make_rows(features, size, seed + place, intercept) for place, (part, size) in enumerate(sizes.items())
    }


def register(tracking: Tracking, params: Params, fitted: Fitted, rows: dict[str, pd.DataFrame], folder: Path) -> None:
    folder.mkdir()
    lineage = Lineage(
        dataset="shop",
        as_of=DAY.date(),
        git_commit="0" * 40,
        git_dirty=False,
        data_md5={},
        params_md5=params.digest_md5(),
    )
    model = fitted.pipeline, fitted.features, fitted.threshold
    write_model(folder, *model, params=params, dataset=SHOP, test=rows["test"], lineage=lineage)
    with tracking.start_run("a test") as run_id:
        names = [feature.name for feature in fitted.features]
        example = rows["train"][names].head(3)
        uri = tracking.log_pipeline(DecidingModel(fitted.pipeline, fitted.threshold), example, params.model.type)
        tracking.log_files({"contract": folder})
    tracking.register(uri, run_id, {DIGEST_TAG: digest_folder(folder)})


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_moved_base_rate_is_followed_by_the_champions_own_trees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrate: bool
) -> None:
    monkeypatch.setenv("CLOSEDLOOP_TRACKING__URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("CLOSEDLOOP_TRACKING__ARTIFACTS", str(tmp_path / "artifacts"))
    tracking = Tracking(load_settings("local", folder=ROOT / "configs"), SHOP.model_name)
    params = make_params(calibrate)
    features = list_features(params, SHOP)
    before, after = split(features, -1.5, 1), split(features, 0.5, 10)
    champion = fit(params, features, {"max_iter": 30}, before)
    register(tracking, params, champion, before, tmp_path / "model")
    found = recalibrate(tracking, params.model, after["train"], features)
    assert not isinstance(found, str)
    truth = after["test"]["churned"].to_numpy()
    scores = score(found.pipeline, after["test"])
    assert (
        list_log_losses(truth, scores).mean() < list_log_losses(truth, score(champion.pipeline, after["test"])).mean()
    )
    assert scores.mean() == pytest.approx(truth.mean(), abs=0.05)
    order = np.argsort(score(champion.uncalibrated, after["test"]), kind="stable")
    assert (np.diff(scores[order]) >= -1e-12).all()  # the same trees rank
    export_model(found.pipeline, tmp_path / "recalibrated.onnx", len(found.features))
    exported = OnnxScorer(tmp_path / "recalibrated.onnx").score(encode_frame(found.features, after["test"]))
    np.testing.assert_allclose(exported, scores, atol=1e-5)
    few = after["train"].head(30).assign(churned=[True] * 5 + [False] * 25)
    assert "a class has fewer than 10 training rows" in str(recalibrate(tracking, params.model, few, features))
    other = params.model.model_copy(update={"type": "random_forest"})
    assert "is of type" in str(recalibrate(tracking, other, after["train"], features))
    # beside a model that knows nothing of the change it is chosen; beside one that was trained on these rows it is not
    chosen = choose_challenger(params, features, champion, after, found)
    assert (chosen.kind, chosen.features) == ("recalibration of version 1", champion.features)
    better = fit(params, features, {"max_iter": 30}, after | {"train": pd.concat([after["validation"]] * 2)})
    assert choose_challenger(params, features, better, after, found) is better
    only = params.model_copy(update={"model": params.model.model_copy(update={"recalibrates_only": True})})
    assert choose_challenger(only, features, better, after, found).kind == "recalibration of version 1"
    with pytest.raises(GateFailed, match=r"not recalibrated: it is too few .monitoring\.policy recalibrate"):
        choose_challenger(only, features, better, after, "it is too few")


def test_right_after_a_change_the_newest_snapshots_alone_train_the_better_model() -> None:
    params = make_params(calibrate=True)
    features = list_features(params, SHOP)
    days = [DAY + dt.timedelta(days=7 * week) for week in range(9)]
    for changed, kind in ((3, "training on the newest 3 snapshots"), (0, "training")):
        odds = [-2.0] * (9 - changed) + [1.5] * changed
        each = [
            make_rows(features, 400, week, intercept).assign(event_timestamp=pd.Timestamp(day))
            for week, (day, intercept) in enumerate(zip(days, odds, strict=True))
        ]
        held_out = {
            part: make_rows(features, 1_000, seed, odds[-1]) for part, seed in (("validation", 50), ("test", 60))
        }
        rows = {"train": pd.concat(each, ignore_index=True), **held_out}
        trained = fit(params, features, {"max_iter": 30}, rows)
        assert choose_challenger(params, features, trained, rows, "a test").kind == kind
    assert list_recent(rows["train"].head(800)) is None  # two snapshots
