"""The deployment row and the journal's entries, as plain values.

They stand in the core because whoever uses them may import it: the store, which lies below the room ``release``, the
controller, and the service. They import no policy, so that the stage `register`, which writes an entry, depends on no
release policy.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, Literal

import msgspec

from closedloop.records import Version


class Deployment(msgspec.Struct, frozen=True):
    """The deployment: ``weight`` is the challenger's share of answers (0 to 1), ``salt`` deals customers to variants.

    ``digests`` are those of the model folders by version, as the registry said them when each was first released; the
    table of rows does not hold them, the journal does.
    """

    model_name: str
    revision: int
    champion_version: Version
    salt: str
    updated_at: dt.datetime
    challenger_version: Version | None = None
    challenger_mode: Literal["shadow", "canary"] | None = None
    weight: float = 0.0
    digests: dict[str, str] = {}

    @property
    def canary_percent(self) -> int:
        """The challenger's share of answers, as a proxy takes it: 0 to 100."""
        return round(100 * self.weight) if self.challenger_version is not None else 0


class OfferTerms(msgspec.Struct, frozen=True):
    """Costs and returns of offers, fixed as a release began, so that no outcome of it can move the test of profit.

    ``value`` is the section of the data set's config, and ``places`` those of its features among the model's; ``limit``
    is the largest profit of a customer that counts.
    """

    value: dict[str, Any]
    places: tuple[int, ...]
    limit: float


class Rollout(msgspec.Struct, frozen=True):
    """A version on its way: ``step`` is a `closedloop.core.release.policy.StepName`, and began at ``step_at``.

    ``predecessor`` is whom it is compared with, since ``started_at``; ``errors_before`` is what was counted of errors
    before the step, by "version/variant" (None: the next pass reads it); ``reference_scores`` are those that the
    version was evaluated by, counted in bins, and ``predecessor_scores`` those of its predecessor. ``routed_at``: since
    when requests count, where that is not the step's beginning. ``requests_a_day``: the traffic that the steps were
    worked out for, None where none was known. ``stake``: None where the data set has no value.
    """

    version: Version
    predecessor: Version
    step: str
    started_at: dt.datetime
    step_at: dt.datetime
    errors_before: dict[str, float] | None = {}
    reference_scores: tuple[int, ...] = ()
    routed_at: dt.datetime | None = None
    requests_a_day: float | None = None
    stake: OfferTerms | None = None
    predecessor_scores: tuple[int, ...] = ()


class Entry(msgspec.Struct, frozen=True):
    """One move: ``row`` is what serves from here on, ``rollout`` what is still to be decided about it.

    ``rejected`` is the version that lost with this move and is not released again by itself; ``feature_service`` is
    the champion's.
    """

    action: str
    actor: str
    recorded_at: dt.datetime
    reason: str
    row: Deployment
    rollout: Rollout | None = None
    rejected: Version | None = None
    feature_service: str | None = None
    evidence: dict[str, Any] = {}
