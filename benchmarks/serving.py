"""The HTTP service side by side with what is written today and with what the hardware gives, one worker each.

    python benchmarks/serving.py                        both models; 1, 16 and 64 connections; all targets
    python benchmarks/serving.py --json FILE            also write every figure
    python benchmarks/serving.py --seconds 1 --rounds 1 a quick look
    python benchmarks/serving.py --only service bare    some contenders; only the targets between them are judged

    tutorial   FastAPI and joblib: predict and predict_proba in an async handler
    mlflow     `mlflow models serve`
    bento      a plain BentoML service on the scikit-learn model
    service    `closedloop serve`: checks, metrics and durable log on; features in the request
    online     the same, features from the online store by customer id
    bare       one ASGI route with msgspec and ONNX Runtime, no checks, no log, no metrics
    constant   one ASGI route with a constant answer

The models are the project's own (`make run` first), the shipped default, and a random forest of 100 trees of depth 10
trained on the same rows. wrk sends the same 2,000 different rows to all, one server at a time, round after round, so
that a busy moment of the machine hits every contender; medians count. Each server has proved its scores against the
pipeline's before it is timed, and an answer other than 200 ends the run. "CPU" is the worker's user and system time
a request, which a busy machine changes little; the agent that stores what the service logs runs beside it on the same
cores, and its spool is empty again before the next is measured. "Ready" is the time from the start of the command to
the first right answer. Exit status 1 and the name of the first missed target.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts.models import DEFAULT, FOREST, draw_rows, prepare_models, require_project
from parts.targets import Target, finish, show_targets

from closedloop.processes import exit_on_signals, run_process, start_process

ROOT, PARTS = Path(__file__).parent.parent, Path(__file__).parent / "parts"
CONTENDERS = ("tutorial", "mlflow", "bento", "service", "online", "bare", "constant")
ROWS, CONNECTIONS, JUDGED = 2_000, (1, 16, 64), 16
# the service's requests a second of the other's at 16 connections, with micro-batching on
FOREST_TIMES = {"tutorial": 150, "mlflow": 120, "bento": 100}
BARE_SHARE, TAIL_TIMES, ONLINE_SHARE = 1.10, 3, 0.5
MEMORY_MB, READY_TIMES = 150, 3
SCORE_LIMIT = 1e-4  # the parity gate's
READY_SECONDS = 120


@dataclass
class Server:
    """A contender: how it is started, where it answers, and what it was seen to do."""

    name: str
    command: list[str]
    path: str
    port: int
    directory: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    ready_seconds: list[float] = field(default_factory=list)
    runs: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)

    def start(self, body: bytes) -> None:
        """Start it, and note how long it took to answer."""
        start = time.perf_counter()
        with (self.directory / f"{self.name}.log").open("wb") as log:
            environment = {**os.environ, **self.environment}
            self.process = start_process(
                self.command, stdout=log, stderr=log, cwd=self.directory, env=environment, start_new_session=True
            )
        while not self._is_ready(body):
            if self.process.poll() is not None or time.perf_counter() - start > READY_SECONDS:
                raise SystemExit(f"{self.name} does not answer; its log ends with:\n{self.read_log()[-2000:]}")
            time.sleep(0.005)
        self.ready_seconds.append(time.perf_counter() - start)

    def stop(self) -> None:
        """Stop it, and whatever it has started."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ask(self, body: bytes) -> Any:
        """The answer to one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", self.path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        if answer.status != 200:
            raise ConnectionError(f"{self.name} answers {answer.status}: {content[:500]!r}")
        return json.loads(content)

    def list_processes(self) -> tuple[list[int], list[int]]:
        """Those that answer, and the agent's."""
        assert self.process is not None
        workers, agents, waiting = [], [], [(self.process.pid, False)]
        while waiting:
            pid, of_agent = waiting.pop()
            of_agent = of_agent or b"serve-agent" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            (agents if of_agent else workers).append(pid)
            children = Path(f"/proc/{pid}/task").glob("*/children")
            waiting += [(int(child), of_agent) for path in children for child in path.read_text().split()]
        return workers, agents

    def read_log(self) -> str:
        return (self.directory / f"{self.name}.log").read_text(encoding="utf-8", errors="replace")

    def _is_ready(self, body: bytes) -> bool:
        try:
            self.ask(body)
        except (OSError, http.client.HTTPException):
            return False
        return True


# --- what is compared -------------------------------------------------------------------------------------------------


def build_servers(names: Sequence[str], model: Path, work: Path, project: Path) -> list[Server]:
    """The contenders on free ports."""
    programs = Path(sys.executable).parent
    servers = []
    for name in names:
        directory = work / "servers" / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        port, path, environment = find_free_port(), "/predict", {}
        if name == "mlflow":
            command = [str(programs / "mlflow"), "models", "serve", "-m", str(model / "mlflow"), "-p", str(port)]
            command += ["--env-manager", "local", "--workers", "1"]
            path = "/invocations"
        elif name == "bento":
            command = [str(programs / "bentoml"), "serve", "bento:Churn", "--port", str(port)]
            command += ["--working-dir", str(PARTS)]
            environment = {"MODEL_FOLDER": str(model), "BENTOML_HOME": str(directory / "bentoml")}
        elif name in ("service", "online"):
            # in the project's folder, whose online store it reads; all that it writes goes elsewhere
            command = [str(programs / "closedloop"), "serve", "--model", str(model)]
            environment = {
                "CLOSEDLOOP_SERVING__PORT": str(port),
                "CLOSEDLOOP_SERVING__METRICS_PORT": str(find_free_port()),
                "CLOSEDLOOP_SERVING__STATE": str(directory / "state"),
                "CLOSEDLOOP_OPERATIONS__URL": f"sqlite:///{directory / 'operations.db'}",
            }
            for entry in ("configs", "params.yaml"):
                (directory / entry).symlink_to(project / entry)
        else:
            command = [sys.executable, str(PARTS / "servers.py"), name, str(model), str(port)]
        servers.append(Server(name, command, path, port, directory, environment))
    return servers


def find_free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def write_bodies(work: Path, rows: list[dict[str, Any]], customers: list[str]) -> dict[str, list[bytes]]:
    """One request a row for each contender, also as files for wrk."""
    shapes: dict[str, list[Any]] = {
        "mlflow": [{"dataframe_records": [row]} for row in rows],
        "bento": [{"features": row} for row in rows],
        "service": [{"features": row} for row in rows],
        "online": [{"customer_id": customer} for customer in customers],
    }
    bodies = {name: [json.dumps(body).encode() for body in shapes.get(name, rows)] for name in CONTENDERS}
    for name, lines in bodies.items():
        (work / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return bodies


def draw_requests(contract: Any, training: Any, project: Path) -> tuple[list[dict[str, Any]], list[str], Any]:
    """Rows, customers that the online store knows, and those customers' features as they were written to it."""
    import numpy as np
    import pandas as pd

    columns = draw_rows(contract, training, ROWS, np.random.default_rng(20_250_101))
    frame = pd.DataFrame(columns).astype(object)
    rows = frame.where(frame.notna(), None).to_dict("records")
    newest = pd.read_parquet(max((project / "data/features").glob("*.parquet"))).head(ROWS)
    return rows, newest["customer_id"].tolist(), newest[list(contract.feature_names)]


def require_right_scores(server: Server, bodies: list[bytes], expected: Any) -> None:
    """End the run where a contender does not score as the pipeline does."""
    for body, score in zip(bodies, expected, strict=False):
        answer = server.ask(body)
        found = answer["predictions"][0][1] if server.name == "mlflow" else answer["probability"]
        if not abs(found - score) <= SCORE_LIMIT:
            raise SystemExit(f"{server.name} scores {found}, the pipeline {score}, for {body.decode()}")


# --- measuring --------------------------------------------------------------------------------------------------------


def load(server: Server, work: Path, connections: int, seconds: int) -> dict[str, float]:
    """Figures of one run of wrk, whose one thread stays on the last core."""
    core = max(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(core), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-s", str(PARTS / "load.lua"), f"http://127.0.0.1:{server.port}{server.path}"]
    workers, agents = server.list_processes()
    before = [read_cpu_seconds(pids) for pids in (workers, agents)]
    environment = {**os.environ, "BODIES": str(work / f"{server.name}.jsonl")}
    done = run_process(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    after = [read_cpu_seconds(pids) for pids in (workers, agents)]
    run: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if run["errors"] or not run["requests"]:
        raise SystemExit(f"{server.name} at {connections} connections: {run}\n{server.read_log()[-2000:]}")
    run["rate"] = run["requests"] / run["seconds"]
    run["cpu_us"], run["agent_cpu_us"] = (
        (end - start) * 1e6 / run["requests"] for start, end in zip(before, after, strict=True)
    )
    wait_for_drain(server)
    return run


def read_cpu_seconds(pids: list[int]) -> float:
    """User and system time of living processes."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def read_memory_mb(pids: list[int]) -> float:
    """Proportional set size: pages that several processes share are divided among them."""
    found = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        found += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found / 1024


def wait_for_drain(server: Server) -> None:
    """Until the agent has stored what was logged, else it would take time from the next contender."""
    port = server.environment.get("CLOSEDLOOP_SERVING__METRICS_PORT")
    end = time.monotonic() + READY_SECONDS
    while port:
        totals = {"closedloop_model_predictions_total": 0.0, "closedloop_prediction_rows_total": 0.0}
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/metrics")
            for line in connection.getresponse().read().decode().splitlines():
                name = line.partition("{")[0]
                if name in totals:
                    totals[name] += float(line.split()[-1])
            if totals["closedloop_prediction_rows_total"] == totals["closedloop_model_predictions_total"] > 0:
                return
        if time.monotonic() > end:
            raise SystemExit(f"{server.name}: of what it logged, {totals}, not all was stored in {READY_SECONDS} s")
        time.sleep(0.2)


@contextlib.contextmanager
def run_servers(servers: Sequence[Server], bodies: dict[str, list[bytes]]) -> Iterator[None]:
    """All of them, for the length of the block."""
    try:
        for server in servers:
            tell(f"  {server.name}: starting")
            server.start(bodies[server.name][0])
        yield
    finally:
        for server in servers:
            if server.process is not None:
                server.stop()


def measure_model(model: Path, work: Path, requests: Any, arguments: argparse.Namespace) -> list[Server]:
    """All contenders with one model."""
    import joblib
    import pandas as pd

    rows, customers, online_rows = requests
    bodies = write_bodies(work, rows, customers)
    pipeline = joblib.load(model / "pipeline.joblib")
    expected = {name: pipeline.predict_proba(pd.DataFrame(rows[:200]))[:, 1] for name in CONTENDERS}
    expected["online"] = pipeline.predict_proba(online_rows[:200])[:, 1]
    servers = build_servers(arguments.only, model, work, arguments.project)
    with run_servers(servers, bodies):
        for server in servers:
            if server.name != "constant":
                require_right_scores(server, bodies[server.name], expected[server.name])
            load(server, work, JUDGED, min(arguments.seconds, 2))  # warms it
        for number in range(arguments.rounds):
            for connections in CONNECTIONS:
                for server in servers:
                    tell(f"  {model.name}: {server.name}, {connections} connections, round {number + 1}")
                    server.runs.setdefault(connections, []).append(load(server, work, connections, arguments.seconds))
        for server in servers:
            workers, agents = server.list_processes()
            server.memory = {"workers_mb": read_memory_mb(workers), "agent_mb": read_memory_mb(agents)}
    again = [server for server in servers if server.name in ("service", "bare")]
    for _ in range(arguments.starts - 1):  # by turns
        for server in again:
            with run_servers([server], bodies):
                pass
    return servers


def tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def summarise(servers: Sequence[Server]) -> dict[str, Any]:
    """Medians of the rounds."""
    return {
        server.name: {
            "connections": {
                connections: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                for connections, runs in server.runs.items()
            },
            "ready_seconds": statistics.median(server.ready_seconds),
            **server.memory,
            "runs": server.runs,
        }
        for server in servers
    }


def judge(figures: dict[str, Any]) -> list[Target]:
    """The targets between the contenders that ran."""
    targets: list[Target] = []
    for model, found in figures.items():
        runs = {name: contender["connections"][JUDGED] for name, contender in found.items()}
        service = runs.get("service")
        if service is None:
            continue
        if model == FOREST:
            targets += [
                Target(f"{model}: requests/s, times {name}'s", service["rate"] / runs[name]["rate"], ">=", times)
                for name, times in FOREST_TIMES.items()
                if name in runs
            ]
        if "bare" in runs:
            share = service["rate"] / runs["bare"]["rate"]
            targets.append(Target(f"{model}: requests/s of bare's", share, ">=", BARE_SHARE))
        targets.append(Target(f"{model}: p99 of its p50", service["p99_ms"] / service["p50_ms"], "<=", TAIL_TIMES))
        if "online" in runs:
            share = runs["online"]["rate"] / service["rate"]
            targets.append(Target(f"{model}: online's requests/s of service's", share, ">=", ONLINE_SHARE))
        targets.append(Target(f"{model}: worker's memory, MB", found["service"]["workers_mb"], "<=", MEMORY_MB))
        if "bare" in found:
            times = found["service"]["ready_seconds"] / found["bare"]["ready_seconds"]
            targets.append(Target(f"{model}: ready, times bare's", times, "<=", READY_TIMES))
    return targets


def show(figures: dict[str, Any], targets: list[Target]) -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    heads = ("contender", *(f"req/s at {count}" for count in CONNECTIONS), f"p50/p99 ms at {JUDGED}", "CPU us")
    for model, found in figures.items():
        table = Table(*heads, "of service", "of bare", "PSS MB", "agent MB", "ready s", title=f"{model} model")
        for name, contender in found.items():
            runs = contender["connections"]
            run = runs[JUDGED]
            ratios = [
                f"{run['rate'] / found[other]['connections'][JUDGED]['rate']:.3g}" if other in found else ""
                for other in ("service", "bare")
            ]
            agent = f"{contender['agent_mb']:.0f}" if contender["agent_mb"] else ""
            table.add_row(
                name,
                *(f"{runs[count]['rate']:,.0f}" for count in CONNECTIONS),
                f"{run['p50_ms']:.2f} / {run['p99_ms']:.2f}",
                f"{run['cpu_us']:.0f}",
                *ratios,
                f"{contender['workers_mb']:.0f}",
                agent,
                f"{contender['ready_seconds']:.2f}",
            )
        console.print(table)
    show_targets(targets)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--seconds", type=int, default=4, help="of one run of wrk")
    parser.add_argument("--rounds", type=int, default=3, help="medians count")
    parser.add_argument("--starts", type=int, default=5, help="of service and bare, to see how soon they are ready")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS, metavar="CONTENDER")
    parser.add_argument("--models", nargs="+", choices=(FOREST, DEFAULT), default=(FOREST, DEFAULT))
    parser.add_argument("--project", type=Path, default=ROOT, help="a project folder in which `make run` has run")
    parser.add_argument("--temp-directory", type=Path)
    arguments = parser.parse_args()
    require_project(parser, arguments.project)
    if shutil.which("wrk") is None:
        parser.error("wrk is not there: install the Debian package of that name")
    from closedloop.config.environment import set_environment

    # one thread for whoever scores one row: twice the threads would double the CPU time and gain nothing
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # mlflow starts uvicorn by name
    exit_on_signals()
    set_environment()
    with tempfile.TemporaryDirectory(prefix="serving-", dir=arguments.temp_directory) as folder:
        work = Path(folder)
        tell("preparing both models")
        contract, training = prepare_models(arguments.project, work, threads=1)
        requests = draw_requests(contract, training, arguments.project)
        figures = {
            model: summarise(measure_model(work / model, work, requests, arguments)) for model in arguments.models
        }
    targets = judge(figures)
    show(figures, targets)
    return finish(arguments, ("seconds", "rounds", "starts", "only", "models"), {"models": figures}, targets)


if __name__ == "__main__":
    sys.exit(main())
