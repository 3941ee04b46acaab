"""Reasons in answers: computed in a thread of their own, after the prediction was logged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from closedloop.errors import DataError
from closedloop.records import Prediction
from closedloop.rules import Breach, RefusedRequest
from closedloop.serving.http.answers import Explanation, ReasonAnswer
from closedloop.serving.slots.slots import Serving

# One: reasons take a thousand times a score's time, and the others are not to wait for them.
_thread = ThreadPoolExecutor(1, thread_name_prefix="explain")


async def require_reasons(serving: Serving) -> None:
    """Refuse reasons before anything is scored, if a version that serves can give none.

    Raises
    ------
    RefusedRequest
        Naming the version.
    """
    for model in (serving.champion, serving.challenger):
        if model is None or "explainer" in vars(model):
            continue
        try:
            await asyncio.get_running_loop().run_in_executor(_thread, getattr, model, "explainer")
        except DataError:
            rule = f"version {model.version} gives no reasons: train and release a new version"
            raise RefusedRequest("no_reasons", "no reasons", (Breach("explain", None, rule),)) from None


async def explain(predictions: Sequence[Prediction], tops: Sequence[int], serving: Serving) -> list[Explanation]:
    """The explanation of each prediction, with ``tops`` reasons."""
    return await asyncio.get_running_loop().run_in_executor(_thread, _explain, predictions, tops, serving)


def _explain(predictions: Sequence[Prediction], tops: Sequence[int], serving: Serving) -> list[Explanation]:
    found: dict[int, Explanation] = {}
    for version in {prediction.model_version for prediction in predictions}:
        model = serving.select(version)
        assert model is not None  # noqa: S101 - it has just answered
        places = [place for place, prediction in enumerate(predictions) if prediction.model_version == version]
        rows = [predictions[place].features for place in places]
        explained = model.explainer.explain(model.pack(rows), rows, max(tops))
        for place, (raw_score, base, reasons) in zip(places, explained, strict=True):
            found[place] = Explanation(raw_score, base, [ReasonAnswer(*one) for one in reasons[: tops[place]]])
    return [found[place] for place in range(len(predictions))]
