"""doctor: check that every service of the profile answers, accepts our credentials, and fits this release."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from closedloop.errors import ClosedloopError, ConfigError

if TYPE_CHECKING:
    from closedloop.adapters.feast import Features
    from closedloop.adapters.mlflow import Tracking
    from closedloop.adapters.prometheus import ErrorCounts
    from closedloop.store.journal import Journal

CLOCK_SECONDS_MAX = 5.0
WINDOW_SECONDS = 3600.0


@dataclass(frozen=True)
class Probe:
    """One check: ``ask`` returns a sentence if all is well, else raises a `ClosedloopError`; ``remedy`` mends it."""

    name: str
    ask: Callable[[], str]
    remedy: str


@dataclass(frozen=True)
class Finding:
    """A probe's answer; ``remedy`` is empty if all is well."""

    name: str
    text: str
    remedy: str = ""


def probe_prometheus(model_name: str, journal: Journal, errors: ErrorCounts) -> Probe:
    """Check that Prometheus has the champion's error counts, which the release controller reads."""

    def ask() -> str:
        version = ""
        with contextlib.suppress(ClosedloopError):  # the store's own probe reports its errors
            row = journal.read_deployment(model_name)
            version = "" if row is None else row.champion_version
        errors.read_since({}, WINDOW_SECONDS if version else 0, version=version)
        return f"reachable, and knows version {version}" if version else "reachable"

    return Probe("Prometheus", ask, "start it, correct release.prometheus or _matchers, or let it scrape the service")


def list_probes(model_name: str, journal: Journal, tracking: Tracking, features: Features) -> list[Probe]:
    """The checks of the services that every profile has."""

    def ask_store() -> str:
        journal.read_deployment(model_name)
        return "reachable, and its schema is this release's"

    def ask_deployment() -> str:
        row = journal.read_deployment(model_name)
        if row is None:
            raise ConfigError(f"no version of {model_name} is deployed")
        return f"version {row.champion_version} is champion"

    return [
        Probe("operations store", ask_store, "start it, correct operations.url, or run `closedloop store upgrade`"),
        Probe("its clock", lambda: describe_skew(journal.database.read_clock_offset()), "let both machines follow NTP"),
        Probe(
            "MLflow",
            lambda: f"version {tracking.ask_server()[0]}",
            "start it, correct tracking.uri, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or upgrade it",
        ),
        Probe("MLflow's clock", lambda: describe_skew(tracking.ask_server()[1]), "let both machines follow NTP"),
        Probe("artifacts", tracking.find_artifacts, "correct tracking.artifacts or the bucket's credentials"),
        Probe(
            "Feast's registry",
            features.find_service,
            "start it, correct features.overrides, or run `closedloop refresh --as-of DATE`",
        ),
        Probe(
            "online store",
            features.describe_online,
            "start it, correct features.overrides, or run `closedloop refresh`",
        ),
        Probe("deployment", ask_deployment, "`closedloop release promote VERSION`"),
    ]


def examine(probes: Iterable[Probe]) -> Iterator[Finding]:
    """Run the probes one after the other; a probe that fails does not stop the rest."""
    for probe in probes:
        try:
            yield Finding(probe.name, probe.ask())
        except ClosedloopError as error:
            yield Finding(probe.name, " ".join(str(error).split()), probe.remedy)


def describe_skew(seconds: float) -> str:
    """Describe the difference between a server's clock and ours.

    Raises
    ------
    ClosedloopError
        If they are further apart than 5 seconds.
    """
    if abs(seconds) > CLOCK_SECONDS_MAX:
        raise ClosedloopError(
            f"the server's clock is {seconds:+.0f} s off ours, at most {CLOCK_SECONDS_MAX:.0f} are fine"
        )
    return f"within {CLOCK_SECONDS_MAX:.0f} s of ours"
