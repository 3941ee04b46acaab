"""Messages of the webhook, taken by a receiver that checks them as Standard Webhooks 1.0 says."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any, ClassVar

import pytest

from closedloop.adapters.webhook import Webhook
from closedloop.config.settings import load_settings
from closedloop.errors import ConfigError
from closedloop.release.moves import Releases, deploy_champion
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from tests.conftest import Project
from tests.releases import NAME, NOW, Registry
from tests.services import find_free_port

KEY = bytes(range(32))
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
SENT_AT = 1_700_000_000


class Receiver(http.server.BaseHTTPRequestHandler):
    """Keeps (headers, body) of what it takes."""

    taken: ClassVar[list[tuple[dict[str, str], bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.taken.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(500 if self.path == "/broken" else 204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    Receiver.taken.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read_messages() -> list[dict[str, Any]]:
    """What was taken, each with the signature that its receiver computes by itself."""
    for headers, body in Receiver.taken:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
    return [json.loads(body) for _, body in Receiver.taken]


def test_a_message_is_signed_and_a_repeat_has_its_id(address: str) -> None:
    webhook = Webhook(address, SECRET, clock=lambda: SENT_AT + 0.9)
    for identity in ("1", "1", "2"):
        webhook.tell("release.moved", identity, {"name": "élan"}, now=NOW)
    assert read_messages() == [{"type": "release.moved", "timestamp": NOW.isoformat(), "data": {"name": "élan"}}] * 3
    headers = [headers for headers, _ in Receiver.taken]
    assert {one["webhook-timestamp"] for one in headers} == {str(SENT_AT)}
    ids = [one["webhook-id"] for one in headers]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("place", ["away", "broken"])
def test_a_receiver_that_fails_stops_nothing_and_its_password_is_not_told(
    address: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    port = find_free_port() if place == "away" else address.rpartition(":")[2]
    Webhook(f"http://ann:s3cr3t@127.0.0.1:{port}/{place}", SECRET).tell("gate.failed", "1", {}, now=NOW)
    assert "did not take gate.failed" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_without_an_address_nothing_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    Webhook("", "").tell("gate.failed", "1", {}, now=NOW)
    assert caplog.text == ""


def test_a_release_that_moved_is_told_without_its_salt(address: str, tmp_path: Any) -> None:
    with closing(Database(f"sqlite:///{tmp_path / 'operations.db'}")) as database:
        database.upgrade()
        tell = Webhook(address, SECRET).tell
        releases = Releases(Registry(), Journal(database), draw_salt=lambda: "salt 1", tell=tell)  # type: ignore[arg-type]
        for version in ("1", "1", "2"):  # what serves already does not move
            deploy_champion(releases, version, now=NOW, actor="ann", reason="for the test")
    told = read_messages()
    assert [(one["data"]["sequence"], one["data"]["champion_version"]) for one in told] == [(1, "1"), (2, "2")]
    assert told[0]["data"] == {
        "model_name": NAME,
        "champion_version": "1",
        "challenger_version": None,
        "challenger_mode": None,
        "canary_percent": 0,
        "sequence": 1,
        "rejected": None,
        "action": "promote",
        "actor": "ann",
        "reason": "for the test",
    }


@pytest.mark.parametrize(
    "secret", ["", "whsec_", "whsec_dG9vc2hvcnQ=", "whsec_!" + "A" * 43, SECRET.removeprefix("whsec_")]
)
def test_an_address_without_a_usable_secret_is_refused(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("CLOSEDLOOP_WEBHOOK__URL", "https://example.com/hook")
    monkeypatch.setenv("CLOSEDLOOP_WEBHOOK__SECRET", secret)
    with pytest.raises(
        ConfigError, match=r"webhook\.secret: whsec_ and what `openssl rand -base64 32` prints"
    ) as refused:
        load_settings()
    assert not secret or secret not in str(refused.value).replace("whsec_ and", "")


@pytest.mark.thorough
def test_a_verdict_a_refusal_and_a_release_are_told_by_their_commands(
    address: str, small_shop: Project, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = small_shop.copy(tmp_path / "project")
    monkeypatch.setenv("CLOSEDLOOP_WEBHOOK__URL", address)
    monkeypatch.setenv("CLOSEDLOOP_WEBHOOK__SECRET", SECRET)
    (shop.root / "state/operations.db").unlink()
    shop.run("release", "promote", "1")
    shop.run("monitor", "--as-of", "2024-01-02")
    expectation = {"table": "customers", "type": "expect_table_row_count_to_be_between", "kwargs": {"max_value": 1}}
    shop.change_dataset("shop", {"expectations": [expectation]})
    refused = shop.run("validate", status=2)
    told = {one["type"]: one["data"] for one in read_messages()}
    assert set(told) == {"release.moved", "monitor.verdict", "gate.failed"}
    assert told["release.moved"]["champion_version"] == "1"
    assert (told["monitor.verdict"]["verdict"], told["monitor.verdict"]["as_of"]) == ("none", "2024-01-02")
    assert told["gate.failed"]["stage"] == "validate"
    assert told["gate.failed"]["message"] in refused.output
    assert dt.datetime.fromisoformat(read_messages()[-1]["timestamp"]).tzinfo is not None
