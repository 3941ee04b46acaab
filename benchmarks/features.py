"""Window features side by side: this engine, plain pandas, and hand-written SQL, on the same events.

    python benchmarks/features.py                 1 and 20 million events, all targets
    python benchmarks/features.py --quick         1 million only; checks equality, no target
    python benchmarks/features.py --json FILE     also write every figure

Each contender runs in a process of its own (peak memory is that process's), one after the other, and what it wrote is
compared with what pandas wrote before any time is printed. ``one_day`` adds one more day of events to the daily
aggregates; ``one_snapshot``, reported without a target, is the features of the newest of the 12 snapshots: its cost
goes with the customers and not with the day's events. Exit status 1 and the name of the first missed target.
"""

# ruff: noqa: S608 - the SQL is made of this file's own names and paths

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts.targets import Target, finish, show_targets

from closedloop.processes import exit_on_signals, run_process

CUSTOMERS, DAYS = 100_000, 730
FIRST_DAY = dt.date(2023, 12, 2)
AS_OF = dt.datetime(2025, 12, 1, tzinfo=dt.UTC)
SNAPSHOTS = [AS_OF - dt.timedelta(days=30 * k) for k in range(11, -1, -1)]
EVENT_TYPES = ("login", "purchase", "support_ticket")
WINDOW_DAYS = (7, 30, 90)
ACTIVE_DAYS = RECENCY_CAP_DAYS = 90
TENURE_CAP_DAYS = 365
ATTRIBUTES = {"age": "numeric", "segment": "categorical"}
SPEED_LIMIT, MEMORY_LIMIT, SQL_LIMIT, INCREMENT_LIMIT = 4.0, 0.5, 1.25, 0.05


# --- events -----------------------------------------------------------------------------------------------------------


def generate(folder: Path, events: int, events_a_visit: float) -> None:
    """Two years of visits: customers differ widely in how often they come, a visit has logins, lines and tickets."""
    import numpy as np
    import pyarrow as pa

    from closedloop.tabular.tables import UTC_TIME, write_table

    rng = np.random.default_rng(20_251_201)
    ids = pa.array([f"C{number:06d}" for number in range(CUSTOMERS)])
    reach = np.cumsum(rng.gamma(0.8, 1.0, CUSTOMERS))
    season = 1 + 0.3 * np.sin(np.arange(DAYS) * 2 * np.pi / 7)
    visits_a_day = rng.multinomial(round(events / events_a_visit), season / season.sum())
    (folder / "events").mkdir(parents=True)
    for number, visits in enumerate(visits_a_day):
        day = FIRST_DAY + dt.timedelta(days=number)
        customer = np.searchsorted(reach, rng.random(visits) * reach[-1]).astype(np.int32)
        extra = (events_a_visit - 1) / 2
        lines = rng.poisson(extra, visits)
        counts = {0: 1 + rng.poisson(extra * 0.9, visits), 1: lines, 2: rng.random(visits) < extra * 0.1}
        owner = np.concatenate([np.repeat(np.arange(visits), count) for count in counts.values()])
        kind = np.concatenate([np.full(count.sum(), code, np.int8) for code, count in counts.items()])
        start = rng.integers(0, 86_000_000_000, visits)
        # the lines of a purchase share their time; logins and tickets do not
        time_of_day = start[owner] + np.where(kind == 1, 0, rng.integers(0, 400_000_000, len(owner)))
        amount = np.round(rng.lognormal(3.3, 0.8, len(owner)), 2)
        order = np.lexsort((amount, time_of_day, customer[owner], kind))  # as ingest stores a day
        midnight = np.datetime64(day, "us").astype(np.int64)
        table = pa.table(
            {
                "customer_id": pa.DictionaryArray.from_arrays(customer[owner][order], ids).cast(pa.string()),
                "event_type": pa.DictionaryArray.from_arrays(kind[order], pa.array(EVENT_TYPES)).cast(pa.string()),
                "time": pa.array(midnight + time_of_day[order], UTC_TIME),
                "amount": pa.array(amount[order], mask=kind[order] != 1),
            }
        )
        write_table(folder / "events" / f"{day}.parquet", table)
    joined = np.datetime64(FIRST_DAY, "us") - rng.integers(0, 900 * 86_400, CUSTOMERS).astype("timedelta64[s]")
    customers = {
        "customer_id": ids,
        "age": rng.normal(45, 10, CUSTOMERS).round(),
        "segment": pa.array(rng.choice(["basic", "plus"], CUSTOMERS)),
        "since": pa.array(joined.astype(np.int64), UTC_TIME),
    }
    write_table(folder / "customers.parquet", pa.table(customers))


# --- contenders -------------------------------------------------------------------------------------------------------


def run_pandas(data: Path, out: Path) -> None:
    """What one writes first: read everything, then filter and group for each snapshot and window."""
    import pandas as pd

    events = pd.read_parquet(data / "events")
    customers = pd.read_parquet(data / "customers.parquet").set_index("customer_id")
    events["day"] = events["time"].dt.floor("D")
    out.mkdir()
    for snapshot in map(pd.Timestamp, SNAPSHOTS):
        reach = pd.Timedelta(days=max(*WINDOW_DAYS, ACTIVE_DAYS, RECENCY_CAP_DAYS))
        past = events[(events["time"] >= snapshot - reach) & (events["time"] < snapshot)]
        recent = past[past["time"] >= snapshot - pd.Timedelta(days=ACTIVE_DAYS)]
        active = recent.loc[recent["event_type"] == "purchase", "customer_id"].unique()
        table = pd.DataFrame(index=pd.Index(sorted(active), name="customer_id"))
        for event_type in EVENT_TYPES:
            typed = past[past["event_type"] == event_type]
            if event_type == "purchase":
                typed = typed.sort_values(["time", "amount"])
            for days in WINDOW_DAYS:
                groups = typed[typed["time"] >= snapshot - pd.Timedelta(days=days)].groupby("customer_id")
                table[f"{event_type}_count_{days}d"] = groups.size()
                table[f"{event_type}_days_{days}d"] = groups["day"].nunique()
                if event_type == "purchase":
                    amounts = groups["amount"].agg(["sum", "mean", "min", "max", "last"])
                    for name in amounts:
                        table[f"{event_type}_{name}_{days}d"] = amounts[name]
            last_day = typed.groupby("customer_id")["day"].max()
            table[f"{event_type}_recency_days"] = (snapshot - last_day).dt.days
        zeros = [name for name in table if "_count_" in name or "_days_" in name or "_sum_" in name]
        table[zeros] = table[zeros].fillna(0.0)
        ages = [f"{event_type}_recency_days" for event_type in EVENT_TYPES]
        table[ages] = table[ages].fillna(RECENCY_CAP_DAYS).clip(upper=RECENCY_CAP_DAYS)
        since = customers["since"].dt.floor("D").reindex(table.index)
        table["tenure_days"] = (snapshot - since).dt.days.clip(0, TENURE_CAP_DAYS)
        table = table.astype("float64").join(customers[list(ATTRIBUTES)])
        table.insert(0, "event_timestamp", snapshot)
        table.reset_index().to_parquet(out / f"{snapshot:%Y-%m-%d}.parquet", index=False)


def run_engine(data: Path, daily: Path, out: Path, snapshots: list[dt.datetime], memory: str, threads: int) -> None:
    """Bring the daily aggregates up to date, then compute the features."""
    from closedloop.adapters.duckdb import DuckEngine
    from closedloop.config.layout import Layout
    from closedloop.core.features.windows import AGGREGATIONS, WindowSpec
    from closedloop.stages.features import write_window_features
    from closedloop.stages.parts.daily import update_daily

    spec = WindowSpec(
        event_types=EVENT_TYPES,
        amount_types=("purchase",),
        label_event_type="purchase",
        window_days=WINDOW_DAYS,
        aggregations=AGGREGATIONS,
        active_days=ACTIVE_DAYS,
        recency_cap_days=RECENCY_CAP_DAYS,
        tenure_cap_days=TENURE_CAP_DAYS,
    )
    with DuckEngine(memory_limit=memory, threads=threads, temp_directory=out.parent / "spill") as engine:
        if not snapshots:
            update_daily(data / "events", daily, engine=engine)
            return
        write_window_features(
            Layout(raw=data, daily=daily, features=out),
            engine,
            spec=spec,
            snapshots=snapshots,
            attributes=ATTRIBUTES,  # type: ignore[arg-type]
            since_column="since",
        )


def run_sql(data: Path, daily: Path, out: Path, memory: str, threads: int) -> None:
    """The windows as one would write them by hand for DuckDB, over the same daily aggregates."""
    import duckdb

    connection = duckdb.connect(config={"memory_limit": memory, "threads": threads})
    out.mkdir()
    for snapshot in SNAPSHOTS:
        sql = write_sql(snapshot.date(), data / "customers.parquet", daily)
        target = out / f"{snapshot:%Y-%m-%d}.parquet"
        connection.execute(f"COPY ({sql} ORDER BY customer_id) TO '{target}' (FORMAT parquet)")


def write_sql(day: dt.date, customers: Path, daily: Path) -> str:
    """One snapshot's query: a grouping for each event type, joined to those who purchased."""
    reach_days = max(*WINDOW_DAYS, ACTIVE_DAYS, RECENCY_CAP_DAYS)
    parts, columns = [], [f"p.customer_id, TIMESTAMP '{day}' AS event_timestamp"]
    for name in EVENT_TYPES:
        short = name[0]
        inner = ["customer_id", "min(age) AS age"]
        if name == "purchase":
            inner += ["arg_min(amount_last, age) FILTER (amount_count > 0) AS last"]
            inner += ["min(age) FILTER (amount_count > 0) AS last_age"]
        for days in WINDOW_DAYS:
            inner += [f"sum(CASE WHEN age <= {days} THEN event_count::DOUBLE END) AS n{days}"]
            inner += [f"count(CASE WHEN age <= {days} THEN 1 END) AS d{days}"]
            columns += [f"coalesce({short}.n{days}, 0) AS {name}_count_{days}d"]
            columns += [f"coalesce({short}.d{days}, 0)::DOUBLE AS {name}_days_{days}d"]
            if name == "purchase":
                inner += [f"sum(CASE WHEN age <= {days} THEN amount_count::DOUBLE END) AS a{days}"]
                inner += [f"sum(CASE WHEN age <= {days} THEN amount_whole END) AS w{days}"]
                inner += [f"sum(CASE WHEN age <= {days} THEN amount_fraction END)::DOUBLE AS f{days}"]
                inner += [f"min(CASE WHEN age <= {days} THEN amount_min END) AS l{days}"]
                inner += [f"max(CASE WHEN age <= {days} THEN amount_max END) AS h{days}"]
                total = f"(p.w{days} + p.f{days} / {2**40})"
                columns += [f"coalesce({total}, 0) AS {name}_sum_{days}d, {total} / p.a{days} AS {name}_mean_{days}d"]
                columns += [f"p.l{days} AS {name}_min_{days}d, p.h{days} AS {name}_max_{days}d"]
                columns += [f"CASE WHEN p.last_age <= {days} THEN p.last END AS {name}_last_{days}d"]
        columns += [
            f"least(coalesce({short}.age, {RECENCY_CAP_DAYS}), {RECENCY_CAP_DAYS})::DOUBLE AS {name}_recency_days"
        ]
        parts.append(
            f"{short} AS (SELECT {', '.join(inner)} FROM (SELECT *, DATE '{day}' - day AS age "
            f"FROM read_parquet('{daily}/*.parquet') WHERE event_type = '{name}' AND day < DATE '{day}' "
            f"AND day >= DATE '{day}' - {reach_days}) GROUP BY customer_id)"
        )
    origin = "make_timestamp(epoch_us(c.since))::DATE"
    columns += [
        f"greatest(0, least({TENURE_CAP_DAYS}, DATE '{day}' - {origin}))::DOUBLE AS tenure_days, c.age, c.segment"
    ]
    return (
        f"WITH {', '.join(parts)} SELECT {', '.join(columns)} FROM p LEFT JOIN l USING (customer_id) "
        f"LEFT JOIN s USING (customer_id) LEFT JOIN '{customers}' c USING (customer_id) WHERE p.age <= {ACTIVE_DAYS}"
    )


# --- measuring --------------------------------------------------------------------------------------------------------


def run_contender(arguments: argparse.Namespace) -> None:
    """In the child: import first, then time the work alone."""
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    name, data, work = arguments.contender, arguments.data, arguments.work
    out, memory, threads = work / name, arguments.memory_limit, arguments.threads
    shutil.rmtree(out, ignore_errors=True)
    actions: dict[str, Callable[[], None]] = {
        "pandas": lambda: run_pandas(data, out),
        "full": lambda: run_engine(data, work / "daily", out, SNAPSHOTS, memory, threads),
        "windows": lambda: run_engine(data, work / "daily", out, SNAPSHOTS, memory, threads),
        "sql": lambda: run_sql(data, work / "daily", out, memory, threads),
        "one_day": lambda: run_engine(data, work / "daily", out, [], memory, threads),
        "one_snapshot": lambda: run_engine(data, work / "daily", out, SNAPSHOTS[-1:], memory, threads),
    }
    if name != "pandas":
        import duckdb  # noqa: F401
        import ibis

        ibis.duckdb.connect().disconnect()
    wall, cpu = time.perf_counter(), time.process_time()
    actions[name]()
    figures = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    unit = 1024**2 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(json.dumps(figures))


def measure(name: str, data: Path, work: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run a contender once, in a process of its own."""
    if name == "full":
        shutil.rmtree(work / "daily", ignore_errors=True)
    if name == "one_day":
        max((work / "daily").glob("*.parquet")).unlink()
    print(f"  {name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--contender", name, "--data", str(data), "--work", str(work)]
    command += ["--memory-limit", arguments.memory_limit, "--threads", str(arguments.threads)]
    done = run_process(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def require_equal(expected: Path, found: Path) -> None:
    """Stop unless two contenders wrote the same features; sums may differ in their last digits."""
    import pandas as pd

    for path in sorted(found.glob("*.parquet")):
        table, other = pd.read_parquet(expected / path.name), pd.read_parquet(path)
        other["event_timestamp"] = pd.to_datetime(other["event_timestamp"], utc=True)
        pd.testing.assert_frame_equal(table, other[table.columns], check_dtype=False, rtol=1e-9, atol=1e-9)


def measure_size(events: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders at one size."""
    data, work = folder / "data", folder / "work"
    work.mkdir(parents=True)
    print(f"{events:,} events: generating", file=sys.stderr, flush=True)
    generate(data, events, arguments.events_a_visit)
    figures: dict[str, dict[str, float]] = {}
    # by turns, so that a busy minute of the machine hits every contender
    for names, repeats in (
        (("pandas", "full"), 2),
        (("windows", "sql", "one_snapshot", "one_day"), arguments.repeats),
    ):
        for _ in range(repeats):
            for name in names:
                run = measure(name, data, work, arguments)
                best = min(figures.get(name, run), run, key=lambda figure: figure["wall_seconds"])
                peak_mb = max(figures.get(name, run)["peak_mb"], run["peak_mb"])
                figures[name] = {**best, "peak_mb": peak_mb}
    for name in ("full", "windows", "sql", "one_snapshot"):
        require_equal(work / "pandas", work / name)
    written = sum(1 for _ in (data / "events").iterdir())
    rows = _count_rows(work / "daily"), _count_rows(data / "events")
    return {"events": rows[1], "daily_rows": rows[0], "event_files": written, "contenders": figures}


def _count_rows(folder: Path) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in folder.glob("*.parquet"))


def judge(figures: dict[str, dict[str, float]]) -> list[Target]:
    """The targets at 20 million events."""

    def ratio(top: str, bottom: str, key: str = "wall_seconds") -> float:
        return figures[top][key] / figures[bottom][key]

    return [
        Target("full build: times faster than pandas", ratio("pandas", "full"), ">=", SPEED_LIMIT),
        Target("full build: peak memory of pandas'", ratio("full", "pandas", "peak_mb"), "<=", MEMORY_LIMIT),
        Target("windows: time of hand-written SQL", ratio("windows", "sql"), "<=", SQL_LIMIT),
        Target("one more day of events: of the full build", ratio("one_day", "full"), "<=", INCREMENT_LIMIT),
    ]


def show(sizes: list[dict[str, Any]], targets: list[Target]) -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for size in sizes:
        table = Table("contender", "wall s", "CPU s", "peak MB", title=f"{size['events']:,} events")
        for name, run in size["contenders"].items():
            table.add_row(
                name, *(f"{run[key]:.2f}" for key in ("wall_seconds", "cpu_seconds")), f"{run['peak_mb']:.0f}"
            )
        console.print(table)
        console.print(f"daily aggregates: {size['daily_rows']:,} rows; all outputs equal")
    show_targets(targets)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 million events only, no targets")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--memory-limit", default="1GB")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3, help="of the short contenders; the fastest run counts")
    parser.add_argument(
        "--events-a-visit", type=float, default=2.5, help="1: no two events of a customer belong together"
    )
    parser.add_argument("--temp-directory", type=Path)
    for hidden in ("--contender", "--data", "--work"):
        parser.add_argument(hidden, type=str if hidden == "--contender" else Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        run_contender(arguments)
        return 0
    sizes = []
    for events in (1_000_000,) if arguments.quick else (1_000_000, 20_000_000):
        with tempfile.TemporaryDirectory(prefix="features-", dir=arguments.temp_directory) as folder:
            sizes.append(measure_size(events, Path(folder), arguments))
    targets = [] if arguments.quick else judge(sizes[-1]["contenders"])
    show(sizes, targets)
    settings = ("memory_limit", "threads", "repeats", "events_a_visit")
    return finish(arguments, settings, {"sizes": sizes}, targets)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
