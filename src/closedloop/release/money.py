"""The money at stake in a release: fixed as it begins, and paired on customers with closed outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from closedloop.core.evaluation.bootstrap import Floats
from closedloop.core.evaluation.profit import choose_offers, count_profit, read_kept
from closedloop.core.evaluation.value import CustomerValue
from closedloop.core.release.entries import OfferTerms
from closedloop.core.release.sequential import LOSS_GAP_MAX, PairedLosses, sum_paired_profits

if TYPE_CHECKING:
    from closedloop.store.predictions import Predictions

# Of the reference rows' values: one customer who is worth more than nearly all others must not decide a release.
LIMIT_QUANTILE = 0.99


def fix_stake(value: CustomerValue, reference: pd.DataFrame, places: Sequence[int]) -> OfferTerms | None:
    """Costs and returns of offers in a release; None if nothing can be won or lost.

    Parameters
    ----------
    reference : DataFrame, shape (n, ...)
        The version's reference rows, with the features that give the value, in the order of ``places``.
    places
        Of these features among the model's.
    """
    columns = [column for column in reference.columns if column != "score"]
    highest = float(np.quantile(read_kept(value.kept, reference, columns), LIMIT_QUANTILE))
    limit = max(value.save_rate * highest - value.offer_cost, value.offer_cost)
    return OfferTerms(value.model_dump(), tuple(places), limit) if limit > 0 else None


def find_unit(stake: OfferTerms | None) -> float:
    """The money that one nat of `sum_paired_profits` stands for; 0 without a stake."""
    return 0.0 if stake is None else stake.limit / LOSS_GAP_MAX


def pair_profits(stake: OfferTerms, paired: pd.DataFrame) -> PairedLosses:
    """The profits of both models' offers to customers with closed outcomes; a capacity is not asked about.

    Parameters
    ----------
    paired : DataFrame
        With ``score`` of the stable model, ``score_of_version``, ``outcome`` and ``kept`` (`read_values`).
    """
    value = CustomerValue.model_validate({**stake.value, "capacity": None})
    kept = paired["kept"].to_numpy()
    offers = (choose_offers(paired[name].to_numpy(), kept, value) for name in ("score", "score_of_version"))
    return sum_paired_profits(count_profit(paired["outcome"], kept, value), *offers, limit=stake.limit)


def read_values(stake: OfferTerms, predictions: Predictions, model_name: str, ids: Sequence[str]) -> Floats:
    """The worth, if kept, of the customers of these predictions, shape (n,), from the features that were scored."""
    found = {}
    if stake.places:
        chunks = predictions.read_predictions(model_name, ids=ids)
        found = {one.prediction_id: [one.features[place] for place in stake.places] for some in chunks for one in some}
    columns = list(map(str, stake.places))
    rows = pd.DataFrame([found.get(one, [None] * len(columns)) for one in ids], columns=columns, dtype="float64")
    return read_kept(CustomerValue.model_validate(stake.value).kept, rows, columns)
