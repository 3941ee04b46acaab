"""Counts of several processes add up, also after the death of some; buckets are checked by hand."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.parser import text_string_to_metric_families

from closedloop.contract import CategoricalFeature, Feature, NumericFeature, ReferenceStatistics
from closedloop.errors import ServiceUnavailable
from closedloop.processes import start_process
from closedloop.serving.exposition import build_registry, name_registry
from closedloop.serving.metric_docs import METRICS
from closedloop.serving.metrics import WorkerMetrics

NAN = math.nan


@dataclass
class Contract:
    """The part of a model's contract that is read here."""

    features: tuple[Feature, ...]
    reference: dict[str, ReferenceStatistics]


def describe(mean: float | None, deviation: float | None) -> ReferenceStatistics:
    return ReferenceStatistics(rows=10, missing_share=0, mean=mean, standard_deviation=deviation)


AGE = NumericFeature(name="age")
PLAN = CategoricalFeature(name="plan", categories=("basic", "plus", "pro"))
CITY = CategoricalFeature(name="city", categories=("A",))
CONTRACT = Contract((PLAN, AGE, CITY), {"age": describe(10, 2)})


COUNTING: list[WorkerMetrics] = []


@pytest.fixture(autouse=True)
def counting():
    yield
    while COUNTING:
        COUNTING.pop().close()


def make(*arguments):
    """Metrics whose counts are written down before a page is read, as their thread would do."""
    COUNTING.append(WorkerMetrics(*arguments))
    return COUNTING[-1]


def close(metrics: WorkerMetrics) -> None:
    metrics.close()
    COUNTING.remove(metrics)


def render(folder: Path) -> str:
    for metrics in COUNTING:
        metrics.flush()
    return generate_latest(build_registry(folder)).decode()


def read_page(folder: Path) -> dict[str, float]:
    """The page's samples: {'name{label="value",...}': value}, the labels in the order of their names."""
    found = {}
    for family in text_string_to_metric_families(render(folder)):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def read_buckets(page: dict[str, float], name: str, labels: str = "") -> dict[str, float]:
    """The counts of a histogram's own buckets, those of the lower ones taken off again; empty ones left out."""
    start = f"{name}_bucket{{{labels}le="
    cumulated = [(key.removeprefix(start).strip('"}'), value) for key, value in page.items() if key.startswith(start)]
    values = np.diff([0, *[value for _, value in cumulated]])
    return {edge: float(value) for (edge, _), value in zip(cumulated, values, strict=True) if value}


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


@pytest.fixture
def metrics(tmp_path):
    return make(tmp_path, "one", CONTRACT)


def test_every_metric_of_the_table_is_on_the_page_with_type_and_help(tmp_path):
    families = {family.name: family for family in text_string_to_metric_families(render(tmp_path))}
    found = {name + "_total" * (family.type == "counter"): family for name, family in families.items()}
    assert found.keys() == METRICS.keys()
    for name, family in found.items():
        assert (family.type, family.documentation) == (METRICS[name].type, METRICS[name].help)


def read_named(folder: Path, *, aliases: bool) -> tuple[dict[tuple[str, ...], float], dict[tuple[str, ...], float]]:
    """The page's samples by name and labels: those under the present names, and the aliases'."""
    for one in COUNTING:
        one.flush()
    named = name_registry(build_registry(folder), "shop_churn", aliases=aliases)
    present: dict[tuple[str, ...], float] = {}
    old: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(generate_latest(named).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name", None) == ("shop_churn" if sample.name.startswith("closedloop_") else None)
            found = present if sample.name.startswith("closedloop_") else old
            found[sample.name.removeprefix("closedloop_"), *sorted(labels.items())] = sample.value
    return present, old


def test_a_page_has_the_prefix_and_the_models_name_and_aliases_with_the_same_values(metrics, tmp_path):
    metrics.count_request(200, 0.1)
    metrics.count_predictions("7", "champion", [0, 1], 0.1)
    metrics.observe_features(rows([0, 10, 0]))
    metrics.set("spool_depth_bytes", value=10)
    present, old = read_named(tmp_path, aliases=True)
    assert present["spool_depth_bytes",] == 10
    assert present["prediction_requests_total", ("status", "200")] == 1
    assert old == present
    assert read_named(tmp_path, aliases=False) == (present, {})
    page = generate_latest(name_registry(build_registry(tmp_path), "shop_churn", aliases=True)).decode()
    assert "# HELP spool_depth_bytes Deprecated name of closedloop_spool_depth_bytes\n" in page
    assert f"# HELP closedloop_spool_depth_bytes {METRICS['spool_depth_bytes'].help}\n" in page


def test_each_metric_has_the_labels_of_the_table(metrics, tmp_path):
    metrics.count_request(200, 0.1)
    metrics.count_predictions("7", "champion", [0, 1], 0.1)
    metrics.observe_features(rows([0, 10, 0]))
    metrics.set_slots({"champion": "7"})
    metrics.count("models_refused_total", "digest")
    metrics.count("model_errors_total", "7", "champion")
    metrics.count("model_failed_customers_total", "7", "champion")
    metrics.count_outcomes(accepted=3, refused=1)
    metrics.count("prediction_rows_total", "stored", by=5)
    metrics.set("spool_depth_bytes", value=17)
    metrics.set("spool_drain_seconds", value=1)
    for family in text_string_to_metric_families(render(tmp_path)):
        doc = METRICS[family.name + "_total" * (family.type == "counter")]
        assert family.samples
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(doc.labels)


def test_requests_are_counted_by_status_and_time(metrics, tmp_path):
    """Not by the time of those that were refused, which take none: under overload the mean would fall."""
    for status, seconds in [(200, 0.0005), (200, 0.00051), (400, 0.3), (401, 0.3), (429, 0.3), (500, 0.3), (503, 60)]:
        metrics.count_request(status, seconds)
    page = read_page(tmp_path)
    assert page['prediction_requests_total{status="200"}'] == 2
    assert page['prediction_requests_total{status="400"}'] == 1
    assert page['prediction_requests_total{status="429"}'] == 1
    assert page['prediction_requests_total{status="503"}'] == 1
    name = "prediction_request_latency_seconds"
    assert read_buckets(page, name) == {"0.0005": 1, "0.001": 1, "0.5": 1, "+Inf": 1}
    assert page[f"{name}_count"] == 4
    assert page[f"{name}_sum"] == pytest.approx(60.30101, rel=1e-12)


def test_times_are_shown_from_the_start(metrics, tmp_path):
    assert read_page(tmp_path)["prediction_request_latency_seconds_count"] == 0
    assert read_page(tmp_path)["model_prediction_latency_seconds_count"] == 0


def test_predictions_are_counted_by_version_variant_and_class(metrics, tmp_path):
    metrics.count_predictions("7", "champion", [0, 1, 1, 0, 0], 0.00002)
    metrics.count_predictions("8", "canary", [1], 0.002)
    page = read_page(tmp_path)
    found = {key: value for key, value in page.items() if key.startswith("model_predictions_total")}
    assert found == {
        'model_predictions_total{model_version="7",prediction_class="0",variant="champion"}': 3,
        'model_predictions_total{model_version="7",prediction_class="1",variant="champion"}': 2,
        'model_predictions_total{model_version="8",prediction_class="1",variant="canary"}': 1,
    }
    name = "model_prediction_latency_seconds"
    assert read_buckets(page, name) == {"2.5e-05": 5, "0.0025": 1}
    assert page[f"{name}_sum"] == pytest.approx(0.0021, rel=1e-12)


def test_numbers_are_counted_in_standard_deviations_from_the_mean(metrics, tmp_path):
    # mean 10, standard deviation 2: -3.5, -3, -2.5, -0.5, 0, 0.25, 3 and 3.5 of them, and a missing one
    values = [3, 4, 5, 9, 10, 10.5, 16, 17, NAN]
    metrics.observe_features(rows(*[[0, value, 0] for value in values]))
    page = read_page(tmp_path)
    found = read_buckets(page, "feature_distribution", 'feature_name="age",')
    assert found == {"-3.0": 2, "-2.0": 1, "-0.5": 1, "0.0": 1, "0.5": 1, "3.0": 1, "+Inf": 1}
    assert page['feature_categories_total{category="missing",feature_name="age"}'] == 1


def test_features_have_the_buckets_of_standard_deviations(metrics, tmp_path):
    metrics.observe_features(rows([0, 10, 0]))
    start = 'feature_distribution_bucket{feature_name="age",le="'
    edges = [key.removeprefix(start).rstrip('"}') for key in read_page(tmp_path) if key.startswith(start)]
    assert edges == ["-3.0", "-2.0", "-1.0", "-0.5", "0.0", "0.5", "1.0", "2.0", "3.0", "+Inf"]


def test_a_histogram_with_negative_values_has_no_sum(metrics, tmp_path):
    metrics.observe_features(rows([0, 3, 0]))
    assert "feature_distribution_sum" not in render(tmp_path)
    assert 'feature_distribution_bucket{feature_name="age",le="+Inf"} 1.0' in render(tmp_path)


def test_infinite_and_enormous_numbers_are_far_off(metrics, tmp_path):
    with np.errstate(all="raise"):
        metrics.observe_features(rows(*[[0, value, 0] for value in (math.inf, -math.inf, 3.4e38)]))
    found = read_buckets(read_page(tmp_path), "feature_distribution", 'feature_name="age",')
    assert found == {"-3.0": 1, "+Inf": 2}


@pytest.mark.parametrize("statistics", [describe(0.1, 0.0), describe(0.1, None)])
def test_what_differs_from_a_constant_is_far_off(tmp_path, statistics):
    metrics = make(tmp_path, "one", Contract((AGE,), {"age": statistics}))
    with np.errstate(all="raise"):
        metrics.observe_features(rows([0.1], [0.1], [0.10001], [-3e38], [NAN]))
    found = read_buckets(read_page(tmp_path), "feature_distribution", 'feature_name="age",')
    assert found == {"-3.0": 1, "0.0": 2, "+Inf": 1}


def test_a_number_that_the_reference_never_had_is_far_off(tmp_path):
    metrics = make(tmp_path, "one", Contract((AGE,), {"age": describe(None, None)}))
    metrics.observe_features(rows([5]))
    assert read_buckets(read_page(tmp_path), "feature_distribution", 'feature_name="age",') == {"+Inf": 1}


def test_categories_are_counted_by_name(metrics, tmp_path):
    metrics.observe_features(rows([0, 10, 0], [2, 10, -1], [2, 10, 1], [-1, 10, 0]))  # city has no code 1
    page = read_page(tmp_path)
    found = {key: value for key, value in page.items() if key.startswith("feature_categories_total") and value}
    assert found == {
        'feature_categories_total{category="basic",feature_name="plan"}': 1,
        'feature_categories_total{category="pro",feature_name="plan"}': 2,
        'feature_categories_total{category="other",feature_name="plan"}': 1,
        'feature_categories_total{category="A",feature_name="city"}': 2,
        'feature_categories_total{category="other",feature_name="city"}': 2,
    }


def test_a_category_that_was_not_given_is_missing(metrics, tmp_path):
    missing = np.array([[True, False, False], [False, False, True], [False, False, False]])
    metrics.observe_features(rows([-1, 10, 0], [-1, 10, -1], [1, 10, 0]), missing)
    page = read_page(tmp_path)
    found = {key: value for key, value in page.items() if key.startswith("feature_categories_total") and value}
    assert found == {
        'feature_categories_total{category="missing",feature_name="plan"}': 1,
        'feature_categories_total{category="other",feature_name="plan"}': 1,
        'feature_categories_total{category="plus",feature_name="plan"}': 1,
        'feature_categories_total{category="A",feature_name="city"}': 2,
        'feature_categories_total{category="missing",feature_name="city"}': 1,
    }


def test_many_rows_are_the_sum_of_single_ones(tmp_path):
    generator = np.random.default_rng(0)
    matrix = np.column_stack(
        [generator.integers(-1, 3, 500), generator.normal(10, 4, 500), generator.integers(-1, 1, 500)]
    ).astype(np.float32)
    matrix[generator.random(500) < 0.1, 1] = NAN
    together = make(tmp_path / "together", "one", CONTRACT)
    together.observe_features(matrix)
    single = make(tmp_path / "single", "one", CONTRACT)
    for row in matrix:
        single.observe_features(row[None])
    assert read_page(tmp_path / "together") == read_page(tmp_path / "single")
    assert read_page(tmp_path / "single")['feature_distribution_bucket{feature_name="age",le="+Inf"}'] > 400


@pytest.mark.parametrize("features", [(AGE,), (PLAN,), ()])
def test_models_with_features_of_one_kind_or_none(tmp_path, features):
    metrics = make(tmp_path, "one", Contract(features, {"age": describe(1, 1)}))
    metrics.observe_features(rows([1] * len(features)))
    metrics.observe_features(np.empty((0, len(features)), dtype=np.float32))
    page = read_page(tmp_path)
    counted = sum(value for key, value in page.items() if "+Inf" in key or "categories" in key)
    assert counted == len(features)


def test_a_new_model_brings_its_own_reference_and_categories(metrics, tmp_path):
    metrics.observe_features(rows([0, 12, 0]))  # age one deviation above the mean
    plan = CategoricalFeature(name="plan", categories=("plus", "gold"))
    metrics.use_reference(Contract((AGE, plan), {"age": describe(14, 1)}))
    metrics.observe_features(rows([12, 0], [12, 1]))  # two below
    page = read_page(tmp_path)
    found = read_buckets(page, "feature_distribution", 'feature_name="age",')
    assert found == {"-2.0": 2, "1.0": 1}
    assert page['feature_categories_total{category="basic",feature_name="plan"}'] == 1
    assert page['feature_categories_total{category="plus",feature_name="plan"}'] == 1
    assert page['feature_categories_total{category="gold",feature_name="plan"}'] == 1


def test_slots_show_what_living_processes_have_and_nothing_else(tmp_path):
    first, second, third = (make(tmp_path, name) for name in ("first", "second", "third"))
    third.set_slots({"champion": "8"})
    first.set_slots({"champion": "7", "canary": "8"})
    second.set_slots({"champion": "7"})
    first.set_slots({"champion": "8"})
    slots = {key: value for key, value in read_page(tmp_path).items() if key.startswith("model_slot_info")}
    assert slots == {
        'model_slot_info{model_version="7",variant="champion"}': 1,
        'model_slot_info{model_version="8",variant="champion"}': 1,
    }
    close(second)
    slots = {key: value for key, value in read_page(tmp_path).items() if key.startswith("model_slot_info")}
    assert slots == {'model_slot_info{model_version="8",variant="champion"}': 1}


def test_a_gauge_without_labels_is_shown_at_zero(metrics, tmp_path):
    metrics.set("spool_depth_bytes", value=5)
    metrics.set("spool_depth_bytes", value=0)
    assert read_page(tmp_path)["spool_depth_bytes"] == 0


def test_labels_may_hold_anything(tmp_path):
    name = 'a "quoted"\\ name,\nof two lines é'
    metrics = make(tmp_path, "one", Contract((NumericFeature(name=name),), {name: describe(0, 1)}))
    metrics.observe_features(rows([0]))
    (family,) = [
        family for family in text_string_to_metric_families(render(tmp_path)) if family.name == "feature_distribution"
    ]
    assert {sample.labels["feature_name"] for sample in family.samples} == {name}


def test_labels_that_do_not_fit_the_table_are_a_mistake_in_the_code(metrics):
    with pytest.raises(TypeError, match=r"prediction_requests_total takes the labels \('status',\)"):
        metrics.count("prediction_requests_total")


COUNT = """
import os, signal, sys
from pathlib import Path
import numpy as np
from closedloop.serving.metrics import WorkerMetrics

folder, name, requests = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
metrics = WorkerMetrics(folder, name)
for number in range(requests):
    metrics.count_request(200 if number % 2 else 503, 0.25)
metrics.count_predictions("7", "champion", [1] * requests, 0.25)
metrics.set_slots({"champion": name})
metrics.flush()
print("counted", flush=True)
if name == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.read()  # lives until the test is done with it
if name == "closed":
    metrics.close()
"""


def start_counting(folder: Path, name: str, requests: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", COUNT, str(folder), name, str(requests)]
    process = start_process(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "counted\n"
    return process


def test_totals_are_those_of_all_processes_living_and_dead(tmp_path):
    processes = [start_counting(tmp_path, name, n) for name, n in [("living", 10), ("killed", 200), ("closed", 3000)]]
    try:
        assert processes[1].wait() == -signal.SIGKILL
        for _ in range(2):
            page = read_page(tmp_path)
            assert page['prediction_requests_total{status="200"}'] == 1605
            assert page['prediction_requests_total{status="503"}'] == 1605
            assert page["prediction_request_latency_seconds_count"] == 3210
            assert page["prediction_request_latency_seconds_sum"] == 3210 / 4
            assert page['model_predictions_total{model_version="7",prediction_class="1",variant="champion"}'] == 3210
            assert 'model_slot_info{model_version="killed",variant="champion"}' not in page
            assert page['model_slot_info{model_version="living",variant="champion"}'] == 1
            assert sorted(path.name for path in tmp_path.glob("[!.]*.lock")) == ["closed.lock", "living.lock"]
    finally:
        for process in processes:
            process.communicate("")
    assert read_page(tmp_path)['prediction_requests_total{status="200"}'] == 1605
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["counter_retired.db", "histogram_retired.db"]
    make(tmp_path, "restarted").count_request(200, 0.25)
    assert read_page(tmp_path)['prediction_requests_total{status="200"}'] == 1606


FILE = "counter_one.db"


def test_a_file_whose_removal_was_cut_short_is_not_counted_again(tmp_path):
    metrics = make(tmp_path, "one")
    metrics.count_request(200, 0.1)
    close(metrics)
    kept = {path: path.read_bytes() for path in (tmp_path / FILE, tmp_path / "one.lock")}
    read_page(tmp_path)
    for path, content in kept.items():
        path.write_bytes(content)
    for _ in range(2):
        assert read_page(tmp_path)['prediction_requests_total{status="200"}'] == 1
        assert not (tmp_path / FILE).exists()


def test_totals_are_right_where_the_dead_cannot_be_taken_over(tmp_path, monkeypatch):
    def refuse(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics = make(tmp_path, "one")
    metrics.count_request(200, 0.1)
    close(metrics)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "write_bytes", refuse)
        for _ in range(2):
            assert read_page(tmp_path)['prediction_requests_total{status="200"}'] == 1
        assert (tmp_path / FILE).exists()
    assert read_page(tmp_path)['prediction_requests_total{status="200"}'] == 1
    assert not (tmp_path / FILE).exists()


def damage_length(content: bytes) -> bytes:
    return b"\xff\xff\xff\x7f" + content[4:]


def damage_key(content: bytes) -> bytes:
    return content.replace(b'["prediction_requests"', b'["prediction_requests ')


@pytest.mark.parametrize("damage", [damage_length, damage_key, lambda content: content[:100], lambda _: b""])
def test_a_damaged_file_is_left_out_and_reported(metrics, tmp_path, damage, caplog):
    metrics.count_request(200, 0.1)
    other = make(tmp_path, "other")
    other.count_request(200, 0.1)
    close(other)
    damaged = tmp_path / "counter_other.db"
    damaged.write_bytes(damage(damaged.read_bytes()))
    assert read_page(tmp_path)['prediction_requests_total{status="200"}'] == 1
    assert "counter_other.db" in caplog.text


def test_damaged_totals_of_the_dead_start_anew_and_are_reported(metrics, tmp_path, caplog):
    metrics.count_request(200, 0.1)
    (tmp_path / "counter_retired.db").write_bytes(b"\x7f" * 100)
    assert read_page(tmp_path)['prediction_requests_total{status="200"}'] == 1
    assert "counter_retired.db: cannot be read" in caplog.text


def test_what_another_release_counted_is_left_out(metrics, tmp_path):
    metrics.count_request(200, 0.1)
    retired = MmapedDict(str(tmp_path / "counter_retired.db"))
    retired.write_value(mmap_key("prediction_requests", "prediction_requests_total", ["status"], ["200"], ""), 5.0, 0.0)
    retired.write_value(mmap_key("gone", "gone_total", [], [], ""), 1.0, 0.0)
    retired.close()
    page = read_page(tmp_path)
    assert page['prediction_requests_total{status="200"}'] == 6
    assert not [key for key in page if key.startswith("gone")]


def test_more_features_than_a_new_file_has_room_for_are_all_counted(tmp_path):
    features = tuple(NumericFeature(name=f"f{number}") for number in range(3_000))
    metrics = make(tmp_path, "one", Contract(features, {}))
    metrics.observe_features(np.zeros((2, 3_000), dtype=np.float32))
    metrics.count_request(200, 0.1)
    page = read_page(tmp_path)
    shown = {key: value for key, value in page.items() if key.startswith("feature_distribution") and '"+Inf"' in key}
    assert page["prediction_request_latency_seconds_count"] == 1
    assert len(shown) == 3_000
    assert set(shown.values()) == {2}


def test_what_is_counted_is_written_down_by_itself(tmp_path):
    """A kill loses what was counted since the last time, and no more."""
    metrics = WorkerMetrics(tmp_path, "one")
    metrics.start()
    metrics.count_request(200, 0.1)
    deadline = time.monotonic() + 60
    while read_page(tmp_path).get('prediction_requests_total{status="200"}') != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    metrics.close()


def test_a_full_disk_is_seen_at_the_start_and_not_by_a_fatal_signal_later(tmp_path, monkeypatch):
    def refuse(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "metrics"
    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "write_bytes", refuse)
        with pytest.raises(ServiceUnavailable, match="metrics cannot be kept there"):
            WorkerMetrics(folder, "one")
    assert list(folder.iterdir()) == []
    make(folder, "one").count_request(200, 0.1)
    read_page(folder)
    for path in folder.glob("*.db"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size  # no holes


def test_a_worker_loads_none_of_the_reader(tmp_path):
    code = "import sys, closedloop.serving.metrics, closedloop.serving.log.spool; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"prometheus_client", "pandas", "sklearn", "mlflow", "sqlalchemy", "pydantic"}
    assert heavy & set(ran.stdout.split()) == set()
