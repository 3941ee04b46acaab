"""The customers of a campaign: the best customers up to a capacity, and a random part of them that is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from closedloop.core.release.assignment import hash_share
from closedloop.errors import DataError, count_noun

if TYPE_CHECKING:
    import pandas as pd

TREATED, HELD_OUT = "treated", "held_out"


def choose_customers(candidates: pd.DataFrame, *, capacity: int, holdout: float, salt: str) -> pd.DataFrame:
    """The customers of a campaign with their arms, the best first.

    So many are chosen that ``capacity`` of them can be treated beside the hold-out. The hold-out are those with the
    lowest salted hash of their id: a random sample without replacement of fixed size, which depends on nothing else
    that is known of a customer, and which is the same whenever it is drawn. The salt is no secret: whoever may choose
    ids may choose arms. By expected value or effect, only customers with one above 0 are chosen.

    Parameters
    ----------
    candidates : DataFrame
        ``customer_id`` (str, unique), ``probability`` of churn, ``expected_value`` and perhaps ``effect``. The first of
        value, effect and probability that is known ranks.
    capacity
        How many can be treated at most.
    holdout
        Share of the chosen that is left alone, from 0 to below 1.
    salt
        Of the campaign: another one draws another hold-out.

    Returns
    -------
    DataFrame
        Rows of ``candidates`` with ``place`` (from 1) and ``arm`` (treated or held_out).

    Raises
    ------
    DataError
        If there is no candidate, or nobody is worth an offer.

    Examples
    --------
    >>> import pandas as pd
    >>> people = pd.DataFrame({"customer_id": list("abcd"), "probability": [0.1, 0.9, 0.8, 0.3]})
    >>> people["expected_value"] = None
    >>> chosen = choose_customers(people, capacity=1, holdout=0.5, salt="s")
    >>> chosen["customer_id"].tolist(), chosen["arm"].tolist()
    (['b', 'c'], ['treated', 'held_out'])
    """
    import pandas as pd  # not in the serving image, whose agent opens the store

    if candidates.empty:
        raise DataError("there is no customer to choose: all who are active are in campaigns whose horizon is open")
    known = [name for name in ("expected_value", "effect") if name in candidates and candidates[name].notna().any()]
    ranked_by = known[0] if known else "probability"
    worthy = candidates[candidates[ranked_by] > 0] if known else candidates
    if worthy.empty:
        raise DataError(
            f"no customer is worth an offer: none of {count_noun(len(candidates), 'customer')} has an "
            f"{ranked_by.replace('_', ' ')} above 0"
            + ("; see `value` in the data set's config" if ranked_by == "expected_value" else "")
        )
    ordered = worthy.sort_values([ranked_by, "customer_id"], ascending=[False, True], ignore_index=True)
    chosen = ordered.head(capacity + round(capacity * holdout / (1 - holdout))).copy()
    left_alone = max(round(len(chosen) * holdout), len(chosen) - capacity)
    shares = pd.Series([hash_share(salt, name) for name in chosen["customer_id"]])
    chosen["place"] = range(1, len(chosen) + 1)
    chosen["arm"] = TREATED
    chosen.loc[shares.sort_values(kind="stable").index[:left_alone], "arm"] = HELD_OUT
    return chosen
