"""Features for training and for serving beside what Feast does alone: the join, and the rows that go online.

    python benchmarks/online.py                      1 million rows joined, 200,000 customers brought to Redis
    python benchmarks/online.py --rows 100000 --customers 20000
    python benchmarks/online.py --json FILE          also write every figure

``join``: as of a time, each customer with the newest snapshot before it: by a direct ASOF JOIN in DuckDB, by Feast's
DuckDB store as a training set uses it, and by the expression that Spark runs, here on DuckDB. ``online``: one snapshot
of 31 features to a Redis server of its own on loopback, by `feast materialize` and by this project's writer; Feast's
client reads both back. Each contender runs in a process of its own, its imports count, and what it gave is compared
before anything is printed. Exit status 1 and the name of the first missed target.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parts.targets import Target, finish, show, show_targets

from closedloop.processes import exit_on_signals, run_process, start_process

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.adapters.feast import Features

NUMERIC, TEXT = tuple(f"feature_{number}" for number in range(28)), ("plan", "region", "channel")
SNAPSHOTS = [dt.datetime(2024, 1, 1, tzinfo=dt.UTC) + dt.timedelta(days=30 * step) for step in range(4)]
MAX_AGE_DAYS, SEED = 31, 7
JOIN_LIMIT, ONLINE_LIMIT = 3.0, 3.0
PORT = "CLOSEDLOOP_BENCHMARK_REDIS_PORT"


def make_features(folder: Path, customers: int, *, snapshots: int) -> None:
    """Snapshots of every customer; a tenth of the values of each third column is missing."""
    import numpy as np
    import pandas as pd

    from closedloop.tabular.tables import write_table

    generator = np.random.default_rng(SEED)
    ids = [f"C{number:07d}" for number in range(customers)]
    for at in SNAPSHOTS[:snapshots]:
        values = generator.normal(size=(customers, len(NUMERIC)))
        values[:, ::3][generator.random(values[:, ::3].shape) < 0.1] = np.nan
        rows = pd.DataFrame(values, columns=list(NUMERIC))
        for name in TEXT:
            rows[name] = generator.choice(["one", "two", "three"], customers)
        rows.insert(0, "customer_id", ids)
        rows.insert(1, "event_timestamp", at)
        write_table(folder / f"{at:%Y-%m-%d}.parquet", rows)


def open_features(folder: Path) -> Features:
    """A project of the feature store whose rows lie in this folder."""
    from closedloop.adapters.feast import Features
    from closedloop.config.featureset import FeatureSet
    from closedloop.config.settings import load_settings

    settings = load_settings("local", folder=folder / "configs")
    if port := os.environ.get(PORT):
        online = {"type": "redis", "connection_string": f"127.0.0.1:{port}"}
        features = settings.features.model_copy(update={"overrides": {"online_store": online}})
        settings = settings.model_copy(update={"features": features})
    return Features(settings, project="bench", features=FeatureSet(NUMERIC, TEXT, "bench"), max_age_days=MAX_AGE_DAYS)


# --- contenders, each in a process of its own -------------------------------------------------------------------------


def read_asked(folder: Path) -> pd.DataFrame:
    """The rows that are asked for."""
    import pandas as pd

    return pd.read_parquet(folder / "asked.parquet")


def join_by_feast(folder: Path) -> pd.DataFrame:
    """As `closedloop training-set` does."""
    return open_features(folder).read_historical(read_asked(folder), folder / "features")


def join_directly(folder: Path) -> pd.DataFrame:
    """What DuckDB itself has for this."""
    import duckdb

    asked = read_asked(folder).reset_index(names="place")
    names = ", ".join(f'known."{name}"' for name in (*NUMERIC, *TEXT))
    with duckdb.connect() as connection:
        connection.register("asked", asked)
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"CREATE VIEW known AS FROM read_parquet('{folder / 'features' / '*.parquet'}')")
        query = f"""SELECT asked.customer_id, asked.event_timestamp, {names} FROM asked ASOF LEFT JOIN known
            ON asked.customer_id = known.customer_id AND asked.event_timestamp >= known.event_timestamp
            ORDER BY place"""  # noqa: S608 - this file's own names
        return connection.execute(query).df()


def join_by_expression(folder: Path) -> pd.DataFrame:
    """The expression of the join on Spark, on DuckDB."""
    import ibis

    from closedloop.core.features.as_of import ROW, join_as_of

    asked = read_asked(folder)
    connection = ibis.duckdb.connect()
    connection.raw_sql("SET TimeZone = 'UTC'")
    rows = connection.read_parquet(str(folder / "features" / "*.parquet"))
    numbered = connection.read_parquet(str(folder / "asked.parquet")).mutate(ibis.row_number().name(ROW))
    found = join_as_of(numbered, rows, max_age_days=MAX_AGE_DAYS)
    joined = found.order_by(ROW).to_pandas()
    return asked.join(joined[[*NUMERIC, *TEXT]])


def bring_by_feast(folder: Path) -> float:
    """`feast materialize`, its imports and the opening of its registry apart."""
    features = open_features(folder)
    features.publish(folder / "features")
    store, second = features.open_store(), dt.timedelta(seconds=1)
    began = time.perf_counter()
    store.materialize(SNAPSHOTS[0] - second, SNAPSHOTS[0] + second, feature_views=["bench"])
    return time.perf_counter() - began


def bring_by_writer(folder: Path) -> float:
    """As `closedloop training-set` and `closedloop refresh` do, the look at what is online included."""
    features = open_features(folder)
    features.publish(folder / "features")
    began = time.perf_counter()
    assert features.materialize(SNAPSHOTS[0])
    return time.perf_counter() - began


JOINS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "ASOF JOIN": join_directly,
    "Feast's DuckDB store": join_by_feast,
    "the expression on DuckDB": join_by_expression,
}
ONLINE: dict[str, Callable[[Path], float]] = {"feast materialize": bring_by_feast, "this project": bring_by_writer}


def work(name: str, folder: Path) -> None:
    """What a process does: join or bring online, and say what it took."""
    if name in JOINS:
        began = os.times()
        found = JOINS[name](folder)
        cpu = os.times()
        found.to_parquet(folder / f"{sorted(JOINS).index(name)}.parquet")
        cost = {"cpu_s": cpu.user - began.user + cpu.system - began.system}
    else:
        cost = {"wall_s": ONLINE[name](folder), "read_back": compare_online(folder)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({**cost, "peak_mb": peak}))


def compare_online(folder: Path) -> int:
    """Read a thousand customers by Feast's client and compare them with the file; returns how many were compared."""
    import pandas as pd

    features = open_features(folder)
    store = features.open_store()
    expected = pd.read_parquet(folder / "features" / f"{SNAPSHOTS[0]:%Y-%m-%d}.parquet").sample(
        1_000, random_state=SEED
    )
    asked = [{"customer_id": one} for one in expected["customer_id"]]
    found = store.get_online_features(store.get_feature_service("bench"), asked).to_df()
    found = found.set_index("customer_id").loc[expected["customer_id"], [*NUMERIC, *TEXT]]
    pd.testing.assert_frame_equal(
        found.astype(dict.fromkeys(NUMERIC, "float64")).reset_index(drop=True),
        expected[[*NUMERIC, *TEXT]].reset_index(drop=True),
        check_dtype=False,
    )
    return len(found)


# --- the run ----------------------------------------------------------------------------------------------------------


def run_apart(name: str, folder: Path, **variables: str) -> dict[str, Any]:
    """Run one contender in a process of its own."""
    print(f"  {name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--work", name, "--folder", str(folder)]
    done = run_process(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed with status {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make_project(folder: Path) -> None:
    """The configuration of a project in a folder of its own."""
    for name in ("configs", "feature_repo"):
        shutil.copytree(name, folder / name)


def measure_joins(folder: Path, rows: int) -> dict[str, Any]:
    """CPU and memory of each join of this many rows, after their results were compared."""
    import numpy as np
    import pandas as pd

    make_project(folder)
    customers = max(rows // len(SNAPSHOTS), 1)
    make_features(folder / "features", customers, snapshots=len(SNAPSHOTS))
    generator = np.random.default_rng(SEED)
    days = pd.to_timedelta(generator.integers(0, MAX_AGE_DAYS, len(SNAPSHOTS) * customers), unit="D")
    ids = np.tile([f"C{number:07d}" for number in range(customers)], len(SNAPSHOTS))
    times = pd.DatetimeIndex(SNAPSHOTS).repeat(customers) + days
    asked = pd.DataFrame({"customer_id": ids, "event_timestamp": times.astype("datetime64[us, UTC]")})
    asked.to_parquet(folder / "asked.parquet")
    figures = {name: run_apart(name, folder) for name in JOINS}
    results = [pd.read_parquet(folder / f"{place}.parquet") for place in range(len(JOINS))]
    for other in results[1:]:
        pd.testing.assert_frame_equal(
            results[0].reset_index(drop=True), other[results[0].columns].reset_index(drop=True), check_dtype=False
        )
    return figures


@contextmanager
def run_redis(folder: Path) -> Iterator[int]:
    """An empty Redis server on a free port of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    server = start_process(["redis-server", *options], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        if not any("Ready to accept connections" in line for line in server.stdout):
            raise SystemExit("redis-server did not start")
        yield port
    finally:
        server.terminate()
        server.wait()


def measure_online(folder: Path, customers: int) -> dict[str, Any]:
    """Customers a second to an empty server, by each writer."""
    figures = {}
    for place, name in enumerate(ONLINE):
        own = folder / str(place)
        make_project(own)
        make_features(own / "features", customers, snapshots=1)
        with run_redis(own) as port:
            figures[name] = run_apart(name, own, **{PORT: str(port)})
        figures[name]["customers_a_second"] = customers / figures[name]["wall_s"]
    return figures


def judge(joins: dict[str, Any], online: dict[str, Any]) -> list[Target]:
    """The targets of both parts."""
    direct, feast = joins["ASOF JOIN"], joins["Feast's DuckDB store"]
    speed = online["this project"]["customers_a_second"] / online["feast materialize"]["customers_a_second"]
    return [
        Target("rows brought online, times feast materialize", speed, ">=", ONLINE_LIMIT),
        Target("CPU of the join, times an ASOF JOIN", feast["cpu_s"] / direct["cpu_s"], "<=", JOIN_LIMIT),
        Target("memory of the join, times an ASOF JOIN", feast["peak_mb"] / direct["peak_mb"], "<=", JOIN_LIMIT),
    ]


def main() -> int:
    exit_on_signals()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the join")
    parser.add_argument("--customers", type=int, default=200_000, help="brought online")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.folder)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        joins = measure_joins(Path(folder) / "join", options.rows)
        online = measure_online(Path(folder) / "online", options.customers)
    cells = {name: [f"{one['cpu_s']:.2f}", f"{one['peak_mb']:.0f}"] for name, one in joins.items()}
    show(f"{options.rows:,} rows joined as of a time", ["join", "CPU s", "peak MB"], cells)
    cells = {name: [f"{one['customers_a_second']:,.0f}", f"{one['wall_s']:.1f}"] for name, one in online.items()}
    show(f"{options.customers:,} customers to Redis", ["writer", "customers a second", "s"], cells)
    targets = judge(joins, online)
    show_targets(targets)
    return finish(options, ("rows", "customers"), {"join": joins, "online": online}, targets)


if __name__ == "__main__":
    sys.exit(main())
