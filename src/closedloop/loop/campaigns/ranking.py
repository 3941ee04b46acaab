"""The ranking of a campaign's customers: by the churn model, or by uplift where closed campaigns show its gain."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pandas as pd

from closedloop.contract import CategoricalFeature, Feature, ModelContract
from closedloop.core.actions.effect import ALPHA, Estimate
from closedloop.core.actions.uplift import describe_trial, learn_effect, predict_effect, try_uplift
from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.evaluation.profit import expected_profit
from closedloop.core.training.estimators import describe_features
from closedloop.errors import DataError, count_noun
from closedloop.loop.campaigns.report import has_outcomes
from closedloop.store.actions import Actions, Campaign

if TYPE_CHECKING:
    from closedloop.config.params import Params
    from closedloop.core.evaluation.value import CustomerValue

RankBy = Literal["score", "uplift"]


class RankedCustomers(NamedTuple):
    """Those who may be chosen, with the figure that ranks them, and the record of what ranked and why."""

    candidates: pd.DataFrame
    record: dict[str, Any]


class ArmsEvidence(NamedTuple):
    """Customers of closed campaigns, as `try_uplift` takes them, and what was taken of which campaign."""

    rows: pd.DataFrame
    inputs: pd.DataFrame
    campaigns: list[dict[str, Any]]


class Contracts(NamedTuple):
    """The version that scores now, and how to read the contract of any version."""

    version: str
    read: Callable[[str], ModelContract]


def rank_by_score(candidates: pd.DataFrame, asked: RankBy = "score") -> RankedCustomers:
    """Rank by what `choose_customers` finds in the rows: the expected value, else the probability of churn."""
    by = "expected value" if candidates["expected_value"].notna().any() else "probability"
    return RankedCustomers(candidates, {"asked": asked, "by": by})


def rank_by_uplift(
    candidates: pd.DataFrame,
    params: Params,
    value: CustomerValue | None,
    actions: Actions,
    contracts: Contracts,
) -> RankedCustomers:
    """Rank by the effect of an offer, if a list by it did better in closed campaigns; else by score.

    Only customers whose score figure (expected value, else probability) is as high as the lowest of these campaigns are
    ranked then: nobody below was ever called, so nothing is known of an effect on them.

    Parameters
    ----------
    candidates : DataFrame
        ``customer_id``, ``prediction_id``, ``probability``, ``kept_value`` and ``expected_value``; features are in the
        log. A customer whose prediction is no longer there was erased meanwhile, and is left out.
    """
    contract = contracts.read(contracts.version)
    found = gather_evidence(actions, contract, contracts.read, as_of=params.as_of_at, value=value)
    features = _describe(contract, found.inputs)
    customers, samples = found.rows["customer_id"], params.evaluation.bootstrap_samples
    bootstrap = Bootstrap(params.seed, samples, 1 - ALPHA, customers=customers)
    trial = try_uplift(found.rows, found.inputs, features, seed=params.seed, bootstrap=bootstrap)
    by_score = rank_by_score(candidates, "uplift")
    record = by_score.record | {"reason": describe_trial(trial), "campaigns": found.campaigns}
    record |= {name: one._asdict() for name, one in trial._asdict().items() if isinstance(one, Estimate)}
    if not trial.wins:
        return RankedCustomers(candidates, record)
    people = _weigh(candidates.assign(score=candidates["probability"]), value)
    is_tried = people["before"] >= found.rows["before"].min()
    name, version, at = contract.model_name, contracts.version, params.as_of_at
    ids = frozenset(people["prediction_id"])
    logged = actions.read_features(name, version, at, contract.feature_names, prediction_ids=ids)
    people = people[is_tried & people["customer_id"].isin(logged["customer_id"])]
    if people.empty:
        unlike = "nobody has a score as high as those whom these campaigns chose"
        return RankedCustomers(candidates, record | {"reason": f"{record['reason']}; {unlike}"})
    inputs = people[["customer_id", "score"]].merge(logged, on="customer_id")
    people = people.assign(effect=predict_effect(learn_effect(found.rows, found.inputs, features), inputs))
    if value is not None:
        people["expected_value"] = people["effect"] * people["kept_value"] - value.offer_cost
    untried, before = int((~is_tried).sum()), record["by"]
    told = f"left out, with a lower {before} than anybody in these campaigns: {count_noun(untried, 'customer')}"
    return RankedCustomers(
        people, record | {"by": "uplift", "untried": untried, "reason": f"{record['reason']}; {told}"}
    )


def _describe(contract: ModelContract, inputs: pd.DataFrame) -> tuple[Feature, ...]:
    if inputs.empty:
        return ()
    categories = [one.name for one in contract.features if isinstance(one, CategoricalFeature)]
    numbers = [name for name in contract.feature_names if name not in categories]
    return describe_features(inputs, [*numbers, "score"], categories)


def gather_evidence(
    actions: Actions,
    contract: ModelContract,
    read_contract: Callable[[str], ModelContract],
    *,
    as_of: dt.datetime,
    value: CustomerValue | None,
) -> ArmsEvidence:
    """Read the customers of campaigns whose outcomes are known, with the features by which they were scored.

    A feature that the version of a campaign did not have is missing there.
    """
    rows, inputs, told = [pd.DataFrame(columns=["customer_id", "campaign", "arm", "outcome"])], [pd.DataFrame()], []
    for campaign in reversed(actions.list_campaigns(contract.model_name, until=as_of)):
        results = actions.read_results(campaign)
        reason = _find_fault(campaign, results, as_of, value)
        used, its_own = 0, contract
        if reason is None:
            try:
                its_own = read_contract(campaign.model_version)
            except DataError as error:
                reason = f"its model is not to be had: {error}"
        if reason is None:
            features = _read_features(actions, campaign, contract, its_own)
            known = results[results["outcome"].notna() & results["customer_id"].isin(features["customer_id"])]
            share = campaign.treated / (campaign.treated + campaign.held_out)
            known = known.assign(score=known["probability"], treated_share=share, campaign=f"{campaign.as_of:%Y-%m-%d}")
            rows.append(_weigh(known, value))
            inputs.append(known[["customer_id", "score"]].merge(features, on="customer_id"))
            used = len(known)
        day = f"{campaign.as_of:%Y-%m-%d}"
        sizes = {"treated": campaign.treated, "held_out": campaign.held_out}
        told.append({"campaign": day, **sizes, "used": used, "left_out": reason})
    whole = [pd.concat(parts[1:] or parts, ignore_index=True) for parts in (rows, inputs)]
    return ArmsEvidence(whole[0], whole[1], told)


def _find_fault(
    campaign: Campaign, results: pd.DataFrame, as_of: dt.datetime, value: CustomerValue | None
) -> str | None:
    if as_of < campaign.closes_at:
        return f"its horizon is open until {campaign.closes_at:%Y-%m-%d}"
    if not campaign.held_out:
        return "it has no hold-out"
    if not has_outcomes(results):
        return "outcomes are missing"
    if value is not None and results["kept_value"].isna().any():
        return "it knew no value of a kept customer"
    return None


def _read_features(
    actions: Actions, campaign: Campaign, contract: ModelContract, its_own: ModelContract
) -> pd.DataFrame:
    fixed = (campaign.model_name, campaign.model_version, campaign.as_of)
    logged = actions.read_features(*fixed, its_own.feature_names, campaign.campaign_id)
    kinds = {one.name: type(one) for one in its_own.features}
    known = [one.name for one in contract.features if kinds.get(one.name) is type(one)]
    return logged[["customer_id", *known]].reindex(columns=["customer_id", *contract.feature_names])


def _weigh(rows: pd.DataFrame, value: CustomerValue | None) -> pd.DataFrame:
    """The worth of a kept customer, and the figure by which the churn model ranks."""
    if value is None:
        return rows.assign(worth=1.0, before=rows["score"])
    return rows.assign(worth=rows["kept_value"], before=expected_profit(rows["score"], rows["kept_value"], value))


def describe_ranking(ranking: Mapping[str, Any] | None) -> str | None:
    """The ranking of a campaign's customers and its reason, in a sentence; None where it is not recorded."""
    if ranking is None:
        return None
    reason = f": {ranking['reason']}" if "reason" in ranking else ""
    return f"ranked by {ranking['by']}{reason}"
