"""The campaign of a replay."""

from __future__ import annotations

import datetime as dt
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from closedloop import bootstrap
from closedloop.errors import DataError
from closedloop.replay.calls import Calls


def test_a_replay_goes_on_where_no_customer_is_worth_an_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise DataError("no customer is worth an offer")

    monkeypatch.setattr(bootstrap, "hold_working_files", nullcontext)
    monkeypatch.setattr(bootstrap, "open_slot", lambda *_: nullcontext())
    monkeypatch.setattr(bootstrap, "build_campaign_start", lambda *_, **__: start)
    shop = cast(Any, SimpleNamespace(dataset=SimpleNamespace(columns=SimpleNamespace(categorical=()))))
    calls = Calls()
    event = calls.start(shop, dt.datetime(2024, 4, 2, tzinfo=dt.UTC))
    assert event == ("no campaign", "the shop calls nobody", "no customer is worth an offer")
    assert calls.report(shop) is None
    assert calls.tell() is None
