"""The untreated world: which rows a model is judged and trained by while campaigns go on, and for how many others.

The outcome of a customer who got an offer is no outcome of the world that the model describes. The held-out customers
of the same campaign are a random sample of those whom it chose: each stands for as many as were chosen for one of
them, by the inverse of the chance to be held out (Horvitz and Thompson 1952, "A generalization of sampling without
replacement from a finite universe"). A row stands for several by being there several times, and every figure whose
uncertainty counts customers keeps its level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from closedloop.core.actions.arms import TREATED
from closedloop.core.release.assignment import hash_share
from closedloop.errors import count_noun

if TYPE_CHECKING:
    import pandas as pd

ACTION_COLUMNS = ("customer_id", "acted_at", "horizon_days", "arm", "weight")


class Untreated(NamedTuple):
    """How often each row is taken, shape (n,); how many are left out as treated, and how many stand for others.

    ``blinded``: rows of snapshots at which a campaign without a hold-out went on, where these are left out.
    """

    repeats: npt.NDArray[np.int64]
    treated: int = 0
    held_out: int = 0
    blinded: int = 0

    def take(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows as often as they count, with ``repeats``, a row's count, and ``is_repeat`` on all but one."""
        places = np.repeat(np.arange(len(rows)), self.repeats)
        is_repeat = np.r_[False, places[1:] == places[:-1]][: len(places)]
        return rows.iloc[places].reset_index(drop=True).assign(repeats=self.repeats[places], is_repeat=is_repeat)

    def tell(self) -> dict[str, int]:
        """The figures, for records; empty where no action touches a row."""
        counts = {"treated": self.treated, "held_out": self.held_out, "blinded": self.blinded}
        return counts if any(counts.values()) else {}


def find_untreated(rows: pd.DataFrame, actions: pd.DataFrame, *, time: str, blind: bool = True) -> Untreated:
    """Find how often each row counts.

    An action touches a row where the row's horizon and the action's overlap: the action may have changed the outcome,
    or what the customer did before it. In several campaigns a customer stands for the product.

    Parameters
    ----------
    rows : DataFrame, shape (n, ...)
        ``customer_id`` (missing: nobody's action touches it) and ``time``, the snapshot (UTC); the index is unique.
    actions : DataFrame
        `ACTION_COLUMNS`: ``acted_at`` (UTC), ``horizon_days``, ``arm``, and ``weight``, for how many customers one who
        is held out stands (NaN: the campaign has no hold-out).
    time
        The name of the snapshot's column.
    blind
        Whether a snapshot at which a campaign without a hold-out went on is left out as a whole: nothing stands for the
        customers whom it chose, so its figures say nothing of all of them. A model that learns from the other customers
        of such a snapshot still learns the right thing about each.

    Examples
    --------
    >>> import pandas as pd
    >>> day = pd.Timestamp("2024-03-01", tz="UTC")
    >>> rows = pd.DataFrame({"customer_id": list("abc"), "at": day})
    >>> called = {"acted_at": day, "horizon_days": 30, "weight": 2.0}
    >>> actions = pd.DataFrame([{"customer_id": "a", "arm": "treated", **called}])
    >>> find_untreated(rows, actions, time="at").repeats.tolist()
    [0, 1, 1]
    """
    import pandas as pd  # not in the serving image, whose agent opens the store

    at = rows[[time, "customer_id"]].rename(columns={time: "at"}).assign(row=np.arange(len(rows)))
    pairs = at.merge(actions[list(ACTION_COLUMNS)], on="customer_id")
    reach = pd.to_timedelta(pairs["horizon_days"], unit="D")
    pairs = pairs[(pairs["acted_at"] < pairs["at"] + reach) & (pairs["at"] < pairs["acted_at"] + reach)]
    is_treated = pairs["arm"] == TREATED
    blinded = at["at"].isin(pairs.loc[pairs["weight"].isna(), "at"] if blind else []).to_numpy()
    treated = np.zeros(len(rows), dtype=bool)
    treated[pairs.loc[is_treated, "row"]] = True
    weights = np.ones(len(rows))
    np.multiply.at(weights, pairs.loc[~is_treated, "row"].to_numpy(), pairs.loc[~is_treated, "weight"].to_numpy())
    stands = (weights != 1) & ~treated & ~blinded
    weights[treated | blinded] = 0
    repeats = np.floor(weights).astype(np.int64)
    parts = weights - repeats
    for row, who, day in at.loc[parts > 0, ["row", "customer_id", "at"]].itertuples(index=False):
        # by chance, but the same one whenever it is asked for
        repeats[row] += hash_share("weight", f"{who} {day}") < parts[row]
    return Untreated(repeats, int((treated & ~blinded).sum()), int(stands.sum()), int(blinded.sum()))


def describe_untreated(counts: dict[str, int]) -> list[str]:
    """`Untreated.tell` in sentences, for people."""
    told = []
    if counts.get("treated") or counts.get("held_out"):
        left_out, stand = count_noun(counts["treated"], "row"), count_noun(counts["held_out"], "row")
        told.append(f"actions: {left_out} of treated customers left out, {stand} of held-out ones stand for them")
    if counts.get("blinded"):
        left_out = count_noun(counts["blinded"], "row")
        told.append(
            f"actions: {left_out} left out of snapshots of a campaign without a hold-out, whose figures cannot be told "
            "apart from the campaign"
        )
    return told
