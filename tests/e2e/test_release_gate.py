"""The champion-challenger gate and what registration refuses: without a win the champion stays."""

from __future__ import annotations

import pandas as pd
import pytest

pytestmark = pytest.mark.thorough


def read_registry(shop):
    """Versions by alias, and how many there are."""
    tracking = open_tracking(shop)
    aliases = {alias: tracking.read_alias(alias) for alias in ("champion", "challenger")}
    count = len(tracking.client.search_model_versions("name = 'shop_churn'"))
    return {alias: int(found.version) for alias, found in aliases.items() if found is not None}, count


def open_tracking(shop):
    from closedloop.bootstrap import build_tracking, load_run

    return build_tracking(load_run(shop.root / "params.yaml", root=shop.root))


def make_champion(shop, version):
    """Release a version as whoever released it by hand would."""
    import datetime as dt

    from closedloop.bootstrap import build_releases, load_run
    from closedloop.release.moves import deploy_champion

    releases = build_releases(load_run(shop.root / "params.yaml", root=shop.root))
    deploy_champion(releases, version, now=dt.datetime.now(dt.UTC), actor="a test", reason="for the test")


def read_reason(shop):
    """The reason of the journal's newest entry."""
    from closedloop.bootstrap import build_releases, load_run

    return build_releases(load_run(shop.root / "params.yaml", root=shop.root)).read_entries()[-1].reason


@pytest.fixture(scope="module")
def weak_shop(small_shop, tmp_path_factory):
    """Version 2 saw a fiftieth of the iterations of the champion, version 1; every other gate passes."""
    shop = small_shop.copy(tmp_path_factory.mktemp("weak") / "project")
    shop.change_params({"model": {"params": {"max_iter": 3}}})
    shop.run("train")
    shop.run("evaluate")
    return shop


@pytest.fixture(scope="module")
def equal_shop(small_shop, weak_shop, tmp_path_factory):
    """After the weak version 2, a candidate that scores every row as version 1, the champion, does."""
    shop = weak_shop.copy(tmp_path_factory.mktemp("equal") / "project")
    used = small_shop.read_json("models/pipeline/choices.json")["hyper_parameters"]  # of version 1
    shop.run("register")
    shop.change_params({"model": {"params": used}, "seed": 8})
    shop.run("train")
    shop.run("evaluate")
    return shop


@pytest.fixture(scope="module")
def better_shop(equal_shop, tmp_path_factory):
    """The same candidate, evaluated against the weak version 2 as champion."""
    shop = equal_shop.copy(tmp_path_factory.mktemp("better") / "project")
    make_champion(shop, "2")
    shop.run("evaluate")
    return shop


@pytest.fixture
def weak(weak_shop, tmp_path):
    return weak_shop.copy(tmp_path / "project")


@pytest.fixture
def equal(equal_shop, tmp_path):
    return equal_shop.copy(tmp_path / "project")


@pytest.fixture
def better(better_shop, tmp_path):
    return better_shop.copy(tmp_path / "project")


def require_verdict(shop, verdict, champion):
    found = shop.read_json("metrics/gates.json")
    gates = found["gates"]
    assert found["passed"]
    assert found["comparison"]["verdict"] == verdict
    assert found["champion"]["version"] == champion
    assert {name for name, gate in gates.items() if not gate["passed"]} == (
        set() if verdict == "win" else {"champion_challenger"}
    )
    assert not gates["champion_challenger"]["blocking"]
    assert gates["champion_challenger"]["figure"] == {"lose": -1, "inconclusive": 0, "win": 1}[verdict]
    return found["comparison"]


def test_a_model_worse_than_the_champion_becomes_challenger_only(weak):
    comparison = require_verdict(weak, "lose", champion=1)
    assert comparison["auc_interval"][1] < 0
    weak.run("register")
    assert read_registry(weak) == ({"champion": 1, "challenger": 2}, 2)
    assert weak.read_json("metrics/registration.json")["alias"] == "challenger"
    output = " ".join(weak.run("register", "--stage", "Production", status=2).output.split())
    assert "GateFailed: version 2 did not win against the champion and cannot be Production" in output
    assert "the challenger is worse: log loss changes by " in output
    assert read_registry(weak) == ({"champion": 1, "challenger": 2}, 2)


def test_a_model_like_the_champion_is_inconclusive_and_becomes_challenger_only(equal):
    comparison = require_verdict(equal, "inconclusive", champion=1)
    assert comparison["log_loss_interval"] == comparison["auc_interval"] == [0.0, 0.0]
    equal.run("register")
    assert read_registry(equal) == ({"champion": 1, "challenger": 3}, 3)
    output = " ".join(equal.run("register", "--stage", "Production", status=2).output.split())
    assert "cannot be Production: no difference beyond chance" in output
    assert read_registry(equal) == ({"champion": 1, "challenger": 3}, 3)


def test_a_better_model_becomes_champion(better):
    require_verdict(better, "win", champion=2)
    better.run("register")
    assert read_registry(better) == ({"champion": 3}, 3)
    assert better.read_json("metrics/registration.json")["alias"] == "champion"


def test_a_limit_that_the_champion_misses_too_stops_no_winner_and_every_page_says_why(better):
    better.change_dataset("shop", {"gates": {"roc_auc_min": 0.97}})
    output = better.run("evaluate").output
    found = better.read_json("metrics/gates.json")
    gate = found["gates"]["roc_auc"]
    assert (found["passed"], found["excused"]) == (True, ["roc_auc"])
    assert (gate["passed"], gate["blocking"], gate["excused"]) == (False, False, True)
    assert "excused: the champion misses it too (." in gate["sentence"]
    assert "the champion misses it too (." in (better.root / "reports/model_card.html").read_text("utf-8"), output
    better.run("register")
    assert read_registry(better) == ({"champion": 3}, 3)
    assert open_tracking(better).read_version("3").tags["closedloop.excused"] == "roc_auc"
    said = "roc_auc is missed and stops nothing: the champion misses it too, and loses to this version"
    assert read_reason(better) == f"won against the champion offline; {said}"


def test_a_limit_that_is_missed_without_a_win_is_refused_whatever_the_champion_misses(equal):
    equal.change_dataset("shop", {"gates": {"roc_auc_min": 0.97}})
    output = " ".join(equal.run("evaluate", status=2).output.split())
    assert "must be >= .970 (lower end of the 95% interval, test rows); find better features" in output
    assert equal.read_json("metrics/gates.json")["excused"] == []


def test_a_winner_that_is_too_good_is_refused_though_the_champion_is_too(better):
    better.change_dataset("shop", {"gates": {"accuracy_max": 0.5}})
    better.run("evaluate", status=2)
    assert better.read_json("metrics/gates.json")["excused"] == []


def test_a_better_model_waits_where_promotion_is_switched_off_until_it_is_asked_for(better, monkeypatch):
    monkeypatch.setenv("CLOSEDLOOP_RELEASE__AUTO_PROMOTE", "false")
    better.run("register")
    assert read_registry(better) == ({"champion": 2, "challenger": 3}, 3)
    better.run("register", "--stage", "Staging")
    assert read_registry(better) == ({"champion": 2, "challenger": 3}, 3)
    better.run("register", "--stage", "Production")
    assert read_registry(better) == ({"champion": 3}, 3)


def test_a_champion_that_moved_since_the_evaluation_refuses_the_promotion(better):
    make_champion(better, "1")
    output = " ".join(better.run("register", status=1).output.split())
    assert "DataError: the evaluation compared with champion" in output
    assert "run 'closedloop evaluate' again" in output
    assert read_registry(better)[0]["champion"] == 1


def test_an_evaluation_from_before_a_retraining_is_refused(weak, small_shop):
    old = (small_shop.root / "metrics/gates.json").read_bytes()
    (weak.root / "metrics/gates.json").write_bytes(old)
    output = weak.run("register", status=1).output
    assert "DataError: the evaluation is of another model than this one: run 'closedloop evaluate' again" in output
    assert read_registry(weak) == ({"champion": 1}, 1)


def test_a_version_without_a_passed_evaluation_cannot_become_champion(weak):
    from closedloop.adapters.mlflow import GATES_TAG
    from closedloop.errors import DataError

    weak.run("register")
    tracking = open_tracking(weak)
    tracking.client.set_model_version_tag("shop_churn", "2", GATES_TAG, "failed")
    with pytest.raises(DataError, match="shop_churn version 2: no passed evaluation is recorded"):
        tracking.move_champion("2")
    assert read_registry(weak)[0]["champion"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stage", "production"), "--stage is 'production'; allowed: Staging, Production"),
        (("--model-name", "telco"), "--model-name is 'telco', but this model's contract says 'shop_churn'"),
    ],
)
def test_a_wrong_request_is_refused(weak_shop, arguments, words):
    before = read_registry(weak_shop)
    assert f"ConfigError: {words}" in " ".join(weak_shop.run("register", *arguments, status=1).output.split())
    assert read_registry(weak_shop) == before


def test_production_refuses_to_promote_without_evidence(weak, monkeypatch):
    local = (weak.root / "configs/local.yaml").read_text(encoding="utf-8")
    (weak.root / "configs/production.yaml").write_text(local, encoding="utf-8")
    monkeypatch.setenv("CLOSEDLOOP_PROFILE", "production")
    output = " ".join(weak.run("register", status=1).output.split())
    monkeypatch.delenv("CLOSEDLOOP_PROFILE")
    assert "ConfigError: configs/production.yaml and the environment" in output
    assert "release.auto_promote is refused in production: a champion is released by canary" in output
    assert read_registry(weak)[1] == 1


def test_a_model_that_ranks_better_and_earns_less_is_refused(better):
    """Money lies in the four of a thousand customers who are worth an offer; about these alone it is wrong."""
    better.change_dataset(
        "shop", {"value": {"kept": {"column": "income", "share": 0.01}, "offer_cost": 300, "save_rate": 0.1}}
    )
    for part in ("train", "validation", "test"):
        path = better.root / f"data/training/{part}.parquet"
        rows = pd.read_parquet(path)
        rich = rows["customer_id"].str.endswith(("017", "317", "617", "817"))
        rows.loc[rich, "income"] = 1e6
        if part != "test":
            rows.loc[rich, "churned"] = ~rows.loc[rich, "churned"]
        rows.to_parquet(path, index=False)
    better.run("train")
    output = " ".join(better.run("evaluate", status=2).output.split())
    found = better.read_json("metrics/gates.json")
    assert [name for name, gate in found["gates"].items() if gate["blocking"] and not gate["passed"]] == ["profit"]
    assert found["comparison"]["auc_interval"][0] > 0
    assert "- profit -" in output
    assert "must be >= 0 (difference in profit of the offers, upper end of the interval; " in output
    assert "look at the profit curves on the model card" in output
    figures = better.read_json("metrics/eval_metrics.json")
    assert found["intervals"]["profit"][0] < figures["profit"] < found["intervals"]["profit"][1]
    card = (better.root / "reports/model_card.html").read_text("utf-8")
    assert "What a threshold earns" in card
    assert "What a number of offers earns" in card
