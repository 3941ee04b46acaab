"""The service while its neighbours are away: store, online store, registry, and room on the disk.

CLOSEDLOOP_OUTAGE_SECONDS says how long (default 3; `make soak-serving` takes 60).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
import sqlalchemy as sa

from closedloop.adapters.online_format import encode_key
from tests.http_service import HttpService, Load, run_service, wait_until
from tests.model_folders import ROWS, pack_value, write_model_folder
from tests.services import require, run_postgres, run_redis

pytestmark = pytest.mark.thorough

OUTAGE_SECONDS = float(os.environ.get("CLOSEDLOOP_OUTAGE_SECONDS", "3"))
NAME = "shop_churn"
SNAPSHOT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
ROOM_BYTES = 24_000_000


@pytest.fixture
def root(project, tmp_path):
    """A project folder and a small model of the shop's name."""
    write_model_folder(tmp_path / "model", model_name=NAME, feature_service=f"{NAME}_0")
    return project.root


def test_a_store_that_is_away_costs_no_answer(root, tmp_path):
    with run_postgres(tmp_path) as postgres:
        url = postgres.create_database().replace("postgresql://", "postgresql+psycopg://")
        engine = sa.create_engine(url, poolclass=sa.NullPool)

        def count_stored():
            with engine.connect() as connection:
                if not sa.inspect(connection).has_table("predictions"):
                    return Counter()
                return Counter(connection.execute(sa.text("SELECT request_id FROM predictions")).scalars())

        with run_service(root, "--model", str(tmp_path / "model"), CLOSEDLOOP_OPERATIONS__URL=url) as service:
            with Load(service) as load:
                load.wait_for(300)
                wait_until(count_stored, "the first rows in the store")
                postgres.stop("immediate")
                away_since = time.monotonic()
                load.wait_for(1_000)
                while time.monotonic() < away_since + OUTAGE_SECONDS:
                    load.wait_for(1)
                waiting = wait_until(lambda: service.read_metric("spool_depth_bytes") > 100_000, "a spool that fills")
                postgres.start()
                load.wait_for(300)
                wait_until(lambda: len(count_stored()) > 1_300, "a spool that drains under load")
            assert waiting
            assert load.failures == []
            wait_until(lambda: count_stored().total() >= len(load.answers), "all answers in the store")
            wait_until(lambda: service.read_metric("spool_depth_bytes") == 0, "an empty spool")
            stored = count_stored()
            assert stored == Counter(answer["request_id"] for answer in load.answers)  # each once, and no other
        log = service.read_log()
        assert "s3cret" not in log
        assert "Traceback" not in log
        print(f"{len(load.answers)} answers, {OUTAGE_SECONDS:g} s without the store")


def test_a_spool_that_is_full_while_the_store_is_away_is_answered_503_until_it_drains(root, tmp_path):
    with run_postgres(tmp_path) as postgres:
        url = postgres.create_database().replace("postgresql://", "postgresql+psycopg://")
        variables = {
            "CLOSEDLOOP_OPERATIONS__URL": url,
            "CLOSEDLOOP_SERVING__WORKERS": "2",
            "CLOSEDLOOP_SERVING__SPOOL_SEGMENT_BYTES": "10000",
            "CLOSEDLOOP_SERVING__SPOOL_BYTES_MAX": "100000",
        }
        answered = set()
        with run_service(root, "--model", str(tmp_path / "model"), **variables) as service:

            def ask():
                status, answer = service.call("POST", "/predict", {"features": ROWS[0]})
                if status == 200:
                    answered.add(answer["prediction_id"])
                    return True
                assert (status, answer["error"]["code"]) == (503, "unavailable")
                assert "bytes wait for the operations store, 100000 are allowed" in answer["error"]["message"]
                return False

            def read_stored():
                engine = sa.create_engine(url, poolclass=sa.NullPool)
                with engine.connect() as connection:
                    return Counter(connection.execute(sa.text("SELECT prediction_id FROM predictions")).scalars())

            for _ in range(2):
                wait_until(ask, "an answer")
                wait_until(lambda: service.read_metric("spool_depth_bytes") == 0, "an empty spool")
                postgres.stop("immediate")
                wait_until(lambda: sum(ask() for _ in range(50)) == 0, "a spool that is full for both workers")
                assert service.call("GET", "/health")[0] == 200
                postgres.start()
                wait_until(lambda: sum(ask() for _ in range(50)) == 50, "answers again")
            wait_until(lambda: len(read_stored()) >= len(answered), "all answers in the store")
            assert read_stored() == dict.fromkeys(answered, 1)
            assert len(answered) > 300
        assert "Traceback" not in service.read_log()


def write_redis_row(server, customer):
    """A customer with the first row's features, as Feast writes it."""
    import mmh3
    from redis import Redis

    seconds, stamp = int(SNAPSHOT.timestamp()), b"\x08"
    while seconds > 0x7F:
        stamp, seconds = stamp + bytes([seconds & 0x7F | 0x80]), seconds >> 7
    view = f"{NAME}_0"
    fields = {mmh3.mmh3_32_digest(f"{view}:{name}".encode()): pack_value(value) for name, value in ROWS[0].items()}
    with Redis(port=server.port) as client:
        client.hset(encode_key(customer) + NAME.encode(), mapping={**fields, f"_ts:{view}": stamp + bytes([seconds])})


def test_an_online_store_that_is_away_stops_requests_by_id_alone(root, tmp_path):
    with run_redis(tmp_path) as redis:
        write_redis_row(redis, "anna")
        online = json.dumps({"online_store": {"type": "redis", "connection_string": redis.address}})
        arguments = ("--model", str(tmp_path / "model"), "--as-of", "2024-01-01")
        with run_service(root, *arguments, CLOSEDLOOP_FEATURES__OVERRIDES=online) as service:

            def ask():
                return service.call("POST", "/predict", {"customer_id": "anna"})

            with Load(service) as load:
                wait_until(lambda: ask()[0] == 200, "a connection to Redis")
                status, before = ask()
                assert (status, before["features_as_of"]) == (200, SNAPSHOT.isoformat())
                redis.stop()
                for _ in range(20):
                    status, answer = ask()
                    assert (status, answer["error"]["code"]) == (503, "unavailable")
                    assert answer["error"]["message"] == "online store: no rows in 250 ms"
                items = [{"customer_id": "anna"}, {"features": ROWS[0]}]
                found = service.call("POST", "/predict/batch", items)[1]["predictions"]
                assert found[0]["error"]["code"] == "unavailable"
                assert found[1]["probability"] == before["probability"]
                assert service.call("GET", "/readyz")[0] == 200
                load.wait_for(300)
                redis.start()
                assert wait_until(lambda: ask()[0] == 400, "an answer of the empty store")
                write_redis_row(redis, "anna")
                status, after = ask()
                assert (status, after["probability"]) == (200, before["probability"])
            write_redis_row(redis, "ben")
            erase = [sys.executable, "-m", "closedloop.cli.main", "store", "erase", "--customer-id", "anna"]
            environment = os.environ | {"CLOSEDLOOP_FEATURES__OVERRIDES": online}
            ran = subprocess.run(erase, cwd=root, env=environment, capture_output=True, text=True, check=False)
            assert ran.returncode == 1, ran.stderr  # nobody published what is online here
            assert "deleted rows of features: online 1; nothing is published in " in ran.stderr
            assert ask()[0] == 400
            assert service.call("POST", "/predict", {"customer_id": "ben"})[0] == 200
        assert load.failures == []
        assert "Traceback" not in service.read_log()


def test_the_last_good_model_serves_while_registry_and_store_are_gone(shop_copy):
    with run_service(shop_copy.root) as service:
        assert service.call("GET", "/health")[1]["model_version"] == "1"
    with run_service(shop_copy.root, CLOSEDLOOP_TRACKING__URI="http://127.0.0.1:1") as service:
        assert service.call("GET", "/health")[1]["model_version"] == "1"
        notes = wait_until(lambda: service.call("GET", "/model/info")[1]["notes"], "a registry's note", seconds=300)
        assert [note.split(":")[0] for note in notes] == ["registry"]
        assert service.call("POST", "/predict", {"customer_id": "nobody"})[0] == 400
    (shop_copy.root / "mlflow.db").unlink()
    shutil.rmtree(shop_copy.root / "state/mlflow")
    away = {"CLOSEDLOOP_OPERATIONS__URL": "postgresql+psycopg://127.0.0.1:1/operations"}
    with run_service(shop_copy.root, **away) as service:
        assert service.call("GET", "/health")[1]["model_version"] == "1"
        # the note of the time before stands there until the agent has looked

        def is_noted():
            notes = service.call("GET", "/model/info")[1]["notes"]
            return any(note.startswith("operations store: ") for note in notes)

        wait_until(is_noted, "a note on the outage", seconds=300)


def test_without_a_store_the_bundled_version_serves(small_shop, project):
    away = {"CLOSEDLOOP_OPERATIONS__URL": "postgresql+psycopg://127.0.0.1:1/operations"}
    built = small_shop.root / "models/bento"
    row = json.loads((built / "src/models/candidate/contract.json").read_text(encoding="utf-8"))["golden_rows"][0]
    with run_service(project.root, "--bento", str(built), **away) as service:
        status, answer = service.call("POST", "/predict", {"features": row["features"]})
        assert (status, answer["model_version"]) == (200, "1")
        assert answer["probability"] == pytest.approx(row["score"], abs=1e-6)
        info = service.call("GET", "/model/info")[1]
        assert (info["source"], info["revision"], info["slots"]["champion"]["version"]) == ("bundled", 0, "1")
        wait_until(lambda: service.read_metric("spool_depth_bytes") > 0, "an answer that waits for a store")
    assert "Traceback" not in service.read_log()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with little room."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "closedloop-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        require(os.geteuid() != 0 and not os.environ.get("CI"), "the right to mount a file system")
        pytest.skip("a file system is mounted by root alone")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(path):
    """Write until there is no room."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as stream:
        for size in (1_000_000, 4096, 1):
            with contextlib.suppress(OSError):
                while stream.write(bytes(size)):
                    pass


@pytest.mark.parametrize("free_bytes_min", [0, 2_000_000])
def test_a_full_disk_is_answered_503_until_there_is_room(root, tmp_path, small_disk, free_bytes_min):
    """Whether the kernel says so at the write, or the limit was kept; the answers say no more than was logged."""
    variables = {
        "CLOSEDLOOP_SERVING__STATE": str(small_disk / "serving"),
        "CLOSEDLOOP_SERVING__DISK_FREE_BYTES_MIN": str(free_bytes_min),
        "CLOSEDLOOP_SERVING__SPOOL_SEGMENT_BYTES": "100000",
    }
    answered, refused = set(), []
    with run_service(root, "--model", str(tmp_path / "model"), **variables) as service:

        def ask():
            body = {"features": ROWS[0], "request_id": f"r{len(answered) + len(refused)}"}
            status, answer = service.call("POST", "/predict", body)
            if status == 200:
                answered.add(answer["request_id"])
                return True
            assert status == 503
            refused.append(body["request_id"])
            assert answer["error"]["message"].startswith("prediction log: ")
            assert str(small_disk) not in json.dumps(answer)
            return False

        def is_refused():
            fill(small_disk / "full")  # again and again: the agent makes room by storing what the spool holds
            return not ask()

        for _ in range(3):
            wait_until(ask, "an answer")
            for _ in range(200):
                ask()
            for _ in range(100):
                wait_until(is_refused, "a refusal")
            assert service.call("GET", "/health")[0] == 200
            (small_disk / "full").unlink()
            wait_until(ask, "recovery")
        assert len(refused) >= 300
        assert len(answered) > 600

        def read_stored():
            engine = sa.create_engine(f"sqlite:///{root / 'state/operations.db'}", poolclass=sa.NullPool)
            with engine.connect() as connection:
                if not sa.inspect(connection).has_table("predictions"):  # the agent needs some room for itself
                    return Counter()
                return Counter(connection.execute(sa.text("SELECT request_id FROM predictions")).scalars())

        wait_until(lambda: len(read_stored()) >= len(answered), "all answers in the store")
        assert read_stored() == dict.fromkeys(answered, 1)  # and nothing of what was refused
    assert "Traceback" not in service.read_log()


def test_a_server_that_starts_on_a_full_disk_says_so_and_serves_once_there_is_room(root, tmp_path, small_disk):
    variables = {
        "CLOSEDLOOP_SERVING__STATE": str(small_disk / "serving"),
        "CLOSEDLOOP_SERVING__DISK_FREE_BYTES_MIN": "0",
    }
    fill(small_disk / "full")
    service = HttpService(root, variables, ("--model", str(tmp_path / "model")))
    with pytest.raises(AssertionError, match="No space left on device"):
        service.start()
    assert service.process is not None
    assert service.process.returncode == 1
    assert "Traceback" not in service.read_log()
    (small_disk / "full").unlink()
    service.start()
    assert service.call("POST", "/predict", {"features": ROWS[0]})[0] == 200
    service.stop()
