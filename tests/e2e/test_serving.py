"""The service as real processes: what was answered is stored once, whatever is killed or away; versions are swapped."""

from __future__ import annotations

import datetime as dt
import math
import os
import signal
import sqlite3
import time
import urllib.request
from contextlib import closing

import pytest

from closedloop.bootstrap import build_tracking, load_run, locate_serving_state
from closedloop.contract import MODEL_FILE, NumericFeature, digest_folder
from closedloop.serving.log.progress import measure_waiting, read_progress
from closedloop.serving.log.segments import list_spools
from closedloop.serving.slots.slots import Slot, Slots
from tests.deployments import deploy
from tests.http_service import FullLoad, HttpService, Load, OpenRequests, run_service, wait_until
from tests.model_folders import FEATURES, ROWS, expected_score, write_model_folder, write_slots
from tests.workers import WORKER, WorkerLoad, visit

pytestmark = pytest.mark.thorough

KILLS = 20
SWAPS = 20
NAME = "shop_churn"


@pytest.fixture
def root(project, tmp_path):
    """A project folder and a small model of the shop's name."""
    write_model_folder(tmp_path / "model", model_name=NAME)
    return project.root


@pytest.fixture
def state(root):
    """Where a test puts slots itself, in the agent's place: one whose store is there and names no release writes none.

    The service's own, over a store without a schema, would write its note of that into slots as it read them before.
    """
    run = load_run(root / "params.yaml", root=root)
    with closing(run.database) as database:
        database.upgrade()
    return locate_serving_state(run)


def read_stored(root):
    """Request ids in the SQLite operations store, in no order."""
    path = root / "state/operations.db"
    if not path.is_file():
        return []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
        try:
            return [request for (request,) in store.execute("SELECT request_id FROM predictions")]
        except sqlite3.OperationalError:  # not made yet
            return []


def test_what_was_answered_is_stored_once_however_often_the_server_is_killed(root, tmp_path):
    answered = []
    service = HttpService(root, arguments=("--model", str(tmp_path / "model")))
    for _ in range(KILLS):
        service.start()
        with FullLoad(service) as load:
            load.wait_for(500)
            service.kill()
        assert load.refused == []
        answered += load.answered
    service.start()
    missing = set(answered)
    spool_root = root / "state/serving" / NAME / "spool"
    try:
        wait_until(lambda: missing <= set(read_stored(root)), "all answers in the store", seconds=300)
        # the last server has its own; stopped before its agent is up, that one waits for the next start
        wait_until(lambda: len(list_spools(spool_root)) <= 1, "an end of the killed servers' spools")
    finally:
        service.stop()
    stored = read_stored(root)
    assert len(stored) == len(set(stored)) >= len(answered) >= KILLS * 500
    assert measure_waiting(spool_root, read_progress(spool_root)) == 0
    assert "Traceback" not in service.read_log()


def test_requests_that_were_open_at_the_end_are_answered_and_stored(root, tmp_path):
    """Each has sent its head and half of its body when the server is told to stop, and the rest only then."""
    service = HttpService(root, arguments=("--model", str(tmp_path / "model")))
    service.start()
    first = service.call("POST", "/predict", {"features": ROWS[0]})[1]["request_id"]
    wait_until(lambda: read_stored(root) == [first], "the agent")
    requests = OpenRequests(service)
    service.process.terminate()
    # it says so once it has told its connections, whether any is still open or not
    wait_until(lambda: "Waiting for" in service.read_log().partition("Shutting down")[2], "the server's end")
    answered = requests.finish()
    service.stop()
    assert sorted(read_stored(root)) == sorted([first, *answered])


def test_workers_end_with_the_server_that_started_them(root, tmp_path):
    """Else they would keep the port, without an agent, and no successor could start."""
    service = HttpService(root, {"CLOSEDLOOP_SERVING__WORKERS": "2"}, ("--model", str(tmp_path / "model")))
    service.start()
    with Load(service) as load:
        load.wait_for(300)
        service.kill()
        wait_until(lambda: len(load.failures) == load.clients, "an end of all workers")
    answered = {answer["request_id"] for answer in load.answers}
    service.start()
    try:
        wait_until(lambda: answered <= set(read_stored(root)), "all answers in the store")
    finally:
        service.stop()
    stored = read_stored(root)
    assert len(stored) == len(set(stored))


def test_workers_without_a_processor_for_longer_than_a_health_check_allows_go_on(root, tmp_path):
    """As where the processors are busy: nothing asks a worker for a sign of life, so that none is ended for want of it.

    uvicorn's own supervisor would end one that says nothing for 5 seconds, and start the next, which is no faster.
    """
    with run_service(root, "--model", str(tmp_path / "model"), CLOSEDLOOP_SERVING__WORKERS="2") as service:
        workers = service.find_children(WORKER)
        assert len(workers) == 2
        for worker in workers:  # one of them, and then both
            os.kill(worker, signal.SIGSTOP)
            time.sleep(7)
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        for _ in range(20):
            assert service.call("POST", "/predict", {"features": ROWS[0]})[0] == 200
        assert service.find_children(WORKER) == workers
    assert "is started again" not in service.read_log()


def test_a_worker_that_lives_answers_all_its_clients_however_often_the_other_is_killed(root, tmp_path):
    """The next worker takes up the socket that they share: nothing that it does there may make the other one wait.

    New clients come until the next worker has answered one. After them no more do, so that a worker that waits for
    one in `accept` answers its own clients no more.
    """
    with run_service(root, "--model", str(tmp_path / "model"), CLOSEDLOOP_SERVING__WORKERS="2") as service:
        with WorkerLoad(service) as load:
            for number in range(KILLS):
                load.wait_for_each(3)
                workers = service.find_children(WORKER)
                assert len(workers) == 2
                victim = workers[number % 2]
                load.killed.add(victim)
                os.kill(victim, signal.SIGKILL)
                wait_until(lambda: visit(service) - {*workers, None}, "an answer of the next worker")  # noqa: B023
            load.wait_for_each(3)
        assert len(load.killed) == KILLS
    assert service.read_log().count("the worker ended with status -9 and is started again") == KILLS


def test_versions_are_swapped_under_load_and_no_answer_is_of_two(root, state, tmp_path):
    """The agent's part is played here: slots are written, and the workers take them up."""
    biases = {str(number): number / 10 for number in range(SWAPS + 1)}
    folders = {
        version: write_model_folder(tmp_path / "versions" / version, bias=bias, model_name=NAME)
        for version, bias in biases.items()
    }

    def deploy(version, revision):
        slot = Slot(version, str(folders[version]), digest_folder(folders[version]))
        write_slots(state, Slots(revision, "salt", slot))

    deploy("0", 1)
    with run_service(root) as service, Load(service) as load:
        for number in range(1, SWAPS + 1):
            deploy(str(number), number + 1)
            wait_until(
                lambda: service.call("GET", "/health")[1]["model_version"] == str(number),  # noqa: B023
                f"swap {number}",
            )
            load.wait_for(20)
    assert load.failures == []
    assert {answer["model_version"] for answer in load.answers} == set(biases)
    for answer in load.answers:
        expected = expected_score(answer["row"], biases[answer["model_version"]])
        assert answer["probability"] == pytest.approx(expected, abs=1e-6)


CHANGED = (NumericFeature(name="logins_30d", minimum=0.0, maximum=20.0), *FEATURES[1:])


def damage_model(folder):
    path = folder / MODEL_FILE
    path.write_bytes(path.read_bytes()[:-30])


def test_versions_that_do_not_hold_are_refused_and_the_old_one_goes_on(root, state, tmp_path):
    good = write_model_folder(tmp_path / "good", model_name=NAME)
    first = Slot("1", str(good), digest_folder(good))
    write_slots(state, Slots(1, "salt", first))
    bad = {
        "truncated": (write_model_folder(tmp_path / "truncated", model_name=NAME), "SHA-256"),
        "golden": (write_model_folder(tmp_path / "golden", model_name=NAME, golden_shift=0.01), "golden rows"),
        "major": (write_model_folder(tmp_path / "major", model_name=NAME, contract_version="2.0"), "contract_version"),
        "other": (write_model_folder(tmp_path / "other", model_name="other_churn"), "cannot take the place"),
        "feature": (write_model_folder(tmp_path / "feature", model_name=NAME, features=CHANGED), "features differ"),
        "missing": (write_model_folder(tmp_path / "missing", model_name=NAME, missing=math.nan), "has no score"),
    }
    damage_model(bad["truncated"][0])
    with run_service(root) as service, Load(service) as load:
        for revision, (version, (folder, words)) in enumerate(bad.items(), start=2):
            write_slots(state, Slots(revision, "salt", Slot(version, str(folder), digest_folder(folder))))
            info = wait_until(
                lambda: (found := service.call("GET", "/model/info")[1])["refused"].get(version) and found,  # noqa: B023
                f"refusal of {version}",
            )
            assert words in info["refused"][version]
            assert info["model_version"] == "1"
            load.wait_for(20)
        tampered = Slot("tampered", str(good), "f" * 64)
        write_slots(state, Slots(9, "salt", tampered))
        wait_until(lambda: "tampered" in service.call("GET", "/model/info")[1]["refused"], "refusal of a wrong digest")
        expected = {"digest": 2, "golden rows": 1, "contract": 4}

        def count_refused():
            return {reason: service.read_metric(f'models_refused_total{{reason="{reason}"}}') for reason in expected}

        wait_until(lambda: count_refused() == expected, "the last refusal in the metric")
    assert load.failures == []
    assert {answer["model_version"] for answer in load.answers} == {"1"}


def test_the_registered_champion_serves_customers_of_the_online_store_and_a_release_is_taken_up(shop_copy):
    import pandas as pd

    from closedloop.core.release.entries import Deployment
    from closedloop.serving.exposition import PREFIX
    from closedloop.serving.metric_docs import METRICS

    run = load_run(shop_copy.root / "params.yaml", root=shop_copy.root)
    tracking = build_tracking(run)
    snapshots = list((shop_copy.root / "data/features").glob("*.parquet"))
    customers = pd.read_parquet(shop_copy.root / "data/features/2024-01-01.parquet")["customer_id"]
    with run_service(shop_copy.root) as service:
        status, answer = service.call("POST", "/predict", {"customer_id": customers[0]})
        assert (status, answer["model_version"], answer["features_as_of"]) == (200, "1", "2024-01-01T00:00:00+00:00")
        status, refused = service.call("POST", "/predict", {"customer_id": "nobody"})
        assert (status, refused["error"]["details"][0]["field"]) == (400, "customer_id")
        first = tracking.client.get_model_version(NAME, "1")
        tracking.register(first.source, first.run_id, first.tags)
        deploy(run.database, Deployment(NAME, 0, "2", "salt-2", dt.datetime.now(dt.UTC)))
        wait_until(lambda: service.call("GET", "/health")[1]["model_version"] == "2", "the release")
        again = service.call("POST", "/predict", {"customer_id": customers[0]})[1]
        assert again["probability"] == pytest.approx(answer["probability"], abs=1e-6)
        gone = shop_copy.run("store", "erase", "--customer-id", customers[0]).output
        published = sum(customers[0] in set(pd.read_parquet(path)["customer_id"]) for path in snapshots)
        assert f"deleted rows of features: online 1, published {published}, in" in gone
        status, refused = service.call("POST", "/predict", {"customer_id": customers[0]})
        assert (status, refused["error"]["details"][0]["value"]) == (400, customers[0])
        assert service.call("POST", "/predict", {"customer_id": customers[1]})[0] == 200
        wait_until(
            lambda: "alias champion names version 1, served is 2" in service.call("GET", "/model/info")[1]["notes"],
            "the note on the alias",
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{service.metrics_port}/metrics") as page:
            shown = page.read().decode()
        names = {line.split()[2] for line in shown.splitlines() if line.startswith("# TYPE")}
        assert names == {PREFIX + name for name in METRICS} | set(METRICS)
    run.database.close()
