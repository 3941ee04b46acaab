"""doctor: asks every service of the profile whether it is there, lets us in, and is what this release needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from closedloop.errors import ClosedloopError

CLOCK_SECONDS_MAX = 5.0


@dataclass(frozen=True)
class Probe:
    """One question: ``ask`` returns what is well, and raises one of our errors else; ``remedy`` is what to do then."""

    name: str
    ask: Callable[[], str]
    remedy: str


@dataclass(frozen=True)
class Finding:
    """A probe's answer; ``remedy`` is empty where all is well."""

    name: str
    text: str
    remedy: str = ""


def examine(probes: Iterable[Probe]) -> Iterator[Finding]:
    """Ask one after the other; what is broken does not keep the rest from being asked."""
    for probe in probes:
        try:
            yield Finding(probe.name, probe.ask())
        except ClosedloopError as error:
            yield Finding(probe.name, " ".join(str(error).split()), probe.remedy)


def describe_skew(seconds: float) -> str:
    """A server's clock against ours.

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
