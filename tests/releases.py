"""A release desk without MLflow: real journal and row on SQLite, a registry and evidence as a test says."""

from __future__ import annotations

import datetime as dt
import itertools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from closedloop.bootstrap import build_releases, load_run
from closedloop.contract import CONTRACT_FILE, MODEL_FILE, REFERENCE_FILE, digest_folder
from closedloop.core.release.types import ArmEvidence
from closedloop.errors import DataError, ServiceUnavailable
from closedloop.release.evidence import Evidence
from closedloop.release.moves import Releases, deploy_champion
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from closedloop.store.predictions import OUTCOME_COLUMNS
from closedloop.store.release_queries import Arm
from tests.model_folders import write_model_folder

NAME = "shop_churn"
NOW = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)
SCORES = (3_000, *[0] * 18, 1_000)


def write_folder(folder: Path, number: int) -> Path:
    """What a release reads of a version's folder."""
    pd.DataFrame({"score": [0.025] * SCORES[0] + [0.975] * SCORES[-1]}).to_parquet(folder / REFERENCE_FILE)
    for name in (MODEL_FILE, CONTRACT_FILE):
        (folder / name).write_text(f"{number}", encoding="utf-8")
    return folder


def digest_number(number: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return digest_folder(write_folder(Path(folder), number))


DIGESTS = [digest_number(number) for number in range(7)]


class Registry:
    """Aliases and tags of versions 1 to 6, each of which won against the one before; 5 never passed its gates."""

    model_name = NAME

    def __init__(self) -> None:
        self.champion: str | None = None
        self.challenger: str | None = None
        self.rejected: dict[str, str] = {}
        self.mark: str | None = None
        self.away = False
        self.tags = {
            str(number): {
                "closedloop.feature_service": "shop_churn_a",
                "closedloop.folder_sha256": DIGESTS[number],
                "closedloop.comparison": "win",
                "closedloop.compared_with": DIGESTS[number - 1],
            }
            for number in range(1, 7)
        }

    def read_version(self, version: str) -> Any:
        if self.away:
            raise ServiceUnavailable("the registry is away")
        if version not in self.tags:
            raise DataError(f"no version {version}")
        return SimpleNamespace(version=version, tags=self.tags[version])

    def require_passed(self, version: str) -> Any:
        if version == "5":
            raise DataError("version 5: no passed evaluation")
        return self.read_version(version)

    def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
        return write_folder(folder, int(version)), self.tags[version]["closedloop.folder_sha256"]

    def set_challenger(self, version: str) -> None:
        self.challenger = version

    def read_journal_mark(self) -> str | None:
        return self.mark

    def mirror_release(self, champion: str, *, rejected: str | None, reason: str, mark: str | None) -> None:
        if self.away:
            raise ServiceUnavailable("the registry is away")
        self.champion, self.mark = champion, mark or self.mark
        if rejected:
            self.rejected[rejected] = reason


@dataclass
class Traffic:
    """What the service has done, for `Evidence`: arms by (version, shadow), errors, outcomes, customers by client.

    ``arms_without`` are those without the requests of a client.
    """

    arms: dict[tuple[str, bool], ArmEvidence] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    asked: list[dt.datetime] = field(default_factory=list)
    clients: dict[str | None, int] = field(default_factory=dict)
    arms_without: dict[str, dict[tuple[str, bool], ArmEvidence]] = field(default_factory=dict)
    requests_a_day: float | None = None

    def summarise(self, name: str, arm: Arm, *, since: dt.datetime, without: str | None = None) -> ArmEvidence:
        self.asked.append(since)
        arms = self.arms_without[without] if without else self.arms
        return arms.get((arm.version, arm.shadow), ArmEvidence())

    def count_clients(self, name: str, arm: Arm, *, since: dt.datetime) -> dict[str | None, int]:
        return self.clients

    def measure_traffic(self, name: str, *, since: dt.datetime, until: dt.datetime) -> float | None:
        return self.requests_a_day

    def read_totals(self) -> dict[str, float]:
        return dict(self.errors)

    def read_since(self, before: dict[str, float], seconds: float, *, version: str) -> dict[str, float]:
        return {name: value - before.get(name, 0.0) for name, value in self.errors.items()}

    def list_outcomes(self, name: str, **_: Any) -> pd.DataFrame:
        columns = {column.name: kind for column, kind in OUTCOME_COLUMNS.items()}
        return pd.DataFrame(self.rows, columns=list(columns)).astype(columns)

    def flow(self, version: str, *, shadow: bool = False, share: float = 1.0, **changes: Any) -> None:
        """An arm as it should be, with its share of 120,000 requests of 30,000 customers."""
        values = {
            "requests": int(120_000 * share),
            "customers": int(30_000 * share),
            "latency_p95_ms": 8.0,
            "scores": SCORES,
        }
        self.arms[version, shadow] = ArmEvidence(**(values | changes))


SHARES = {"canary_5": 0.05, "canary_25": 0.25, "canary_50": 0.5}


def flow(traffic: Traffic, step: str, **changes: Any) -> None:
    """Traffic as it should be in a step of version 2 against 1; ``changes`` of version 2's arm."""
    traffic.arms.clear()
    share = SHARES.get(step, 1.0)
    traffic.flow("2", shadow=step == "shadow", share=share, **changes)
    traffic.flow("1", shadow=step == "champion", share=1 - share if share < 1 else 1.0)


def register_folder(releases: Releases, folder: Path, number: str, service: str, before: str = "") -> str:
    """Register a model folder, which won against the one with the digest ``before``; returns its own digest."""
    digest = digest_folder(folder)
    with releases.tracking.start_run(f"train {number}") as run_id:
        releases.tracking.log_files({"contract": folder})
    tags = {"closedloop.folder_sha256": digest, "closedloop.gates": "passed", "closedloop.comparison": "win"}
    tags |= {"closedloop.feature_service": service, "closedloop.compared_with": before}
    assert str(releases.tracking.register(f"runs:/{run_id}/contract", run_id, tags).version) == number
    return digest


def register_versions(root: Path, biases: Mapping[str, float], service: str = f"{NAME}_0", **model: Any) -> None:
    """Versions in a project's real registry, each of which won against the one before; the first one serves.

    ``model``: more of what `write_model_folder` takes.

    One whose bias is below 0 answers otherwise than it did when it was evaluated.
    """
    run = load_run(root / "params.yaml", root=root)
    releases, names = build_releases(run), {"model_name": NAME, "feature_service": service, **model}
    before = ""
    for number, bias in biases.items():
        with tempfile.TemporaryDirectory() as place:
            folder = write_model_folder(Path(place), bias=bias, reference_bias=max(bias, 0.0), **names)
            before = register_folder(releases, folder, number, service, before)
    deploy_champion(releases, "1", now=NOW, actor="a test", reason="for the test")
    releases.journal.database.close()


@contextmanager
def open_desk(folder: Path) -> Iterator[tuple[Releases, Evidence, Traffic]]:
    """Releases of an empty store, and evidence that a test makes up."""
    url = f"sqlite:///{folder / 'operations.db'}"
    database, traffic = Database(url), Traffic()
    database.upgrade()
    salts = (f"salt {number}" for number in itertools.count(1))
    try:
        yield (
            Releases(Registry(), Journal(database), draw_salt=salts.__next__),  # type: ignore[arg-type]
            Evidence(traffic, traffic, traffic, "customer", 30),
            traffic,
        )
    finally:
        database.close()
