"""What clients may do to the real server: 5,000 generated requests, raw bytes, tokens on every route.

Whatever comes in, nothing is answered 5xx, nothing hangs, no answer tells of the machine, the log has no traceback.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
import json
import random
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from closedloop.errors import ClosedloopError
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from tests.http_service import run_service, wait_until
from tests.model_folders import ROWS, write_model_folder, write_online_rows

pytestmark = pytest.mark.thorough

NAME = "shop_churn"
GENERATED, FUZZED = 5_000, 3_000
GOOD = json.dumps({"features": ROWS[0]}).encode()
LEAKS = re.compile(
    rb"(?i:Traceback|File \"|line \d+|\.py\b|site-packages|/home/|/tmp/|/usr/|state/|"
    rb"uvicorn|httptools|llhttp|msgspec|onnx|sqlite|sqlalchemy|redis|numpy|python|codec|recursion)|[a-z]Error\b"
)


@pytest.fixture(scope="module")
def service(make_project, tmp_path_factory):
    """The service with two known customers, without tokens; it must be well at the end of all tests."""
    folder = tmp_path_factory.mktemp("input")
    root = make_project(folder / "project").root
    write_model_folder(folder / "model", model_name=NAME, feature_service=f"{NAME}_0")
    snapshot = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    write_online_rows(folder / "online.db", NAME, {"fresh": snapshot, "stale": snapshot - dt.timedelta(days=400)})
    online = {"online_store": {"type": "sqlite", "path": str(folder / "online.db")}}
    arguments = ("--model", str(folder / "model"), "--as-of", "2024-01-01")
    variables = {"CLOSEDLOOP_FEATURES__OVERRIDES": json.dumps(online), "CLOSEDLOOP_SERVING__OUTCOMES_PER_MINUTE": "60"}
    variables["CLOSEDLOOP_SERVING__ACCESS_LOG"] = "true"
    with run_service(root, *arguments, **variables) as service:
        yield service
        assert service.call("POST", "/predict", {"customer_id": "fresh"})[0] == 200
        log = service.read_log()
        assert "Traceback" not in log
        lines = [json.loads(line) for line in log.splitlines()]  # not one of them is no JSON
        assert not [line for line in lines if line["level"] == "error"]
        assert [line for line in lines if line["message"].startswith("POST /predict 200")]
        for line in lines:
            if line["logger"] == "closedloop.access":
                assert line["request_id"]
                assert ("prediction_id" in line) == line["message"].startswith("POST /predict 200 ")
        assert service.read_metric("spool_depth_bytes") >= 0  # the agent, whose page it is, comes after the workers
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.metrics_port)) as connection:
            connection.request("GET", "/metrics")
            page = connection.getresponse().read().decode()
        statuses = set(re.findall(r'closedloop_prediction_requests_total\{model_name="\w+",status="(\d+)"\}', page))
        assert statuses >= {"200", "400"}
        assert not [status for status in statuses if status >= "500"]


def count_descriptors(service):
    return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))


def exchange(service, *pieces, seconds=10.0):
    """Statuses and all that is answered to these bytes until the server closes, or says nothing for ``seconds``."""
    found = b""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        with contextlib.suppress(ConnectionError):  # an answer may be there before all has been sent
            for piece in pieces:
                client.sendall(piece)
        client.settimeout(seconds)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while piece := client.recv(65_536):
                found += piece
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", found) if status != b"100"], found


def make_post(body, *fields, path=b"/predict"):
    head = b"".join(b"%b\r\n" % field for field in (b"Connection: close", b"Content-Length: %d" % len(body), *fields))
    return b"POST %b HTTP/1.1\r\n%b\r\n%b" % (path, head, body)


def with_age(text):
    return make_post(b'{"features": {"visits_30d": 6, "plan": "plus", "age": %b}}' % text)


CHUNKED = b"POST /predict HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
TWICE = b'{"customer_id": 1, "customer_id": 2}'
CASES = {
    "NaN": (with_age(b"NaN"), 400, "invalid_json"),
    "Infinity": (with_age(b"-Infinity"), 400, "invalid_json"),
    "a float out of range": (with_age(b"1e999"), 400, "invalid_json"),
    "an integer of 400 digits": (with_age(b"9" * 400), 400, "invalid_request"),
    "an integer of 900,000 digits": (with_age(b"9" * 900_000), 400, "invalid_json"),
    "the smallest float": (with_age(b"4e-400"), 200, None),
    "a leading zero": (with_age(b"040"), 400, "invalid_json"),
    "a comment": (with_age(b"40 // years"), 400, "invalid_json"),
    "a name twice": (with_age(b'40, "age": 41'), 400, "invalid_json"),
    "a name twice in a batch": (make_post(b"[%b, %b]" % (GOOD, TWICE), path=b"/predict/batch"), 400, "invalid_json"),
    "an outcome twice": (make_post(b'{"outcome": 0, "outcome": 1}', path=b"/outcomes"), 400, "invalid_json"),
    "invalid UTF-8": (make_post(b'{"customer_id": "\xff"}'), 400, "invalid_json"),
    "UTF-16": (make_post('{"customer_id": "C1"}'.encode("utf-16")), 400, "invalid_json"),
    "a byte order mark": (make_post(b"\xef\xbb\xbf" + GOOD), 400, "invalid_json"),
    "half of a surrogate pair": (make_post(b'{"customer_id": "\\ud800"}'), 400, "invalid_json"),
    "a NUL": (make_post(b'{"customer_id": "a\\u0000"}'), 400, "invalid_request"),
    "lists in lists": (make_post(b"[" * 400_000 + b"]" * 400_000), 400, "invalid_json"),
    "objects in objects": (make_post(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), 400, "invalid_json"),
    "many unknown names": (make_post(json.dumps({f"k{n}": n for n in range(50_000)}).encode()), 400, "invalid_request"),
    "a long unknown name": (make_post(json.dumps({"k" * 900_000: 1}).encode()), 400, "invalid_request"),
    "nothing": (make_post(b""), 400, "invalid_json"),
    "a form": (make_post(b"a=b", b"Content-Type: application/x-www-form-urlencoded"), 415, "unsupported_type"),
    "text": (make_post(GOOD, b"Content-Type: text/plain"), 415, "unsupported_type"),
    "JSON with a parameter": (make_post(GOOD, b"Content-Type: Application/JSON; charset=utf-8"), 200, None),
    "gzip": (make_post(b"\x1f\x8b\x08\x00", b"Content-Encoding: gzip"), 400, "invalid_json"),
    "a declared body too large": (make_post(b"")[:-2] + b"Content-Length: 1000001\r\n\r\n", 400, "invalid_http"),
    "a body too large": (make_post(b"[" * 1_000_001), 413, "too_large"),
    "two lengths": (make_post(GOOD, b"Content-Length: 1"), 400, "invalid_http"),
    "a negative length": (b"POST /predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400, "invalid_http"),
    "chunks": (CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD), 200, None),
    "chunks of a byte": (CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD) + b"0\r\n\r\n", 200, None),
    "chunks too large": (CHUNKED + b"10000\r\n%b\r\n" % (b"[" * 65_536) * 20 + b"0\r\n\r\n", 413, "too_large"),
    "a chunk without a length": (CHUNKED + b"zz\r\n", 400, "invalid_http"),
    "chunks and a length": (make_post(GOOD, b"Transfer-Encoding: chunked"), 400, "invalid_http"),
    "another expectation": (make_post(GOOD, b"Expect: a miracle"), 200, None),
    "a header bomb": (make_post(GOOD, *[b"a: b"] * 10_000), 400, "invalid_http"),
    "a folded header": (make_post(GOOD, b"a: b\r\n c"), 400, "invalid_http"),
    "a version that is no text": (make_post(GOOD, b"X-Model-Version: \xff\xfe"), 400, "unknown_version"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_http"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_http"),
    "a path with a NUL": (b"GET /%00%ff%0d%0aa HTTP/1.1\r\nConnection: close\r\n\r\n", 404, "not_found"),
    "a path up": (b"GET /../../etc/passwd HTTP/1.1\r\nConnection: close\r\n\r\n", 404, "not_found"),
    "an unknown method": (b"DELETE /predict HTTP/1.1\r\nConnection: close\r\n\r\n", 405, "method_not_allowed"),
    "another word": (b"BREW /predict HTTP/1.1\r\n\r\n", 400, "invalid_http"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_oddity_has_one_answer(service, name):
    request, status, code = CASES[name]
    statuses, found = exchange(service, request)
    assert statuses == [status]
    body = found.partition(b"\r\n\r\n")[2]
    assert len(body) < 5_000
    assert not LEAKS.search(body)
    answer = json.loads(body)
    assert answer["error"]["code"] == code if code else "prediction_id" in answer


def test_requests_in_one_piece_are_answered_in_order(service):
    one = b"POST /predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b"
    bodies = [json.dumps({"features": ROWS[n % 3], "request_id": f"r{n}"}).encode() for n in range(50)]
    statuses, found = exchange(service, b"".join(one % (len(b), b) for b in bodies) + make_post(b"{"))
    assert statuses == [200] * 50 + [400]
    assert re.findall(rb'"request_id":"(r\d+)"', found) == [b"r%d" % n for n in range(50)]


def test_clients_that_leave_before_their_answers_are_no_fault(service):
    one = b"POST /predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(GOOD), GOOD)
    for count in range(1, 60):
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
            client.sendall(one * count + (b"\0" if count % 2 else b""))


def test_a_body_is_asked_for_unless_it_is_refused(service):
    head = b"POST /predict HTTP/1.1\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        client.sendall(head % len(GOOD))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(GOOD)
        assert client.recv(1_000).startswith(b"HTTP/1.1 200 OK\r\n")
    statuses, found = exchange(service, head % 1_000_001)
    assert statuses == [413]
    assert b"Continue" not in found


def test_a_body_that_drips_is_refused_in_time(service):
    """After ten seconds; the connection cannot be kept open by a byte now and then."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=1) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nContent-Length: 100\r\n\r\n")

        def drip():
            client.sendall(b"[")
            with contextlib.suppress(TimeoutError):
                return client.recv(1_000)

        assert wait_until(drip, "a refusal").startswith(b"HTTP/1.1 408 ")


@pytest.mark.timeout(1800)  # 5,000 requests and what makes them
def test_generated_requests_find_no_fault(service):
    """Schemathesis from the page that is served: right and wrong requests, answers as the page describes them."""
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode, checks

    checks.load_all_checks()
    base = f"http://127.0.0.1:{service.port}"
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    # of right requests most name customers that nobody knows, which is a 400
    left_out = [checks.CHECKS.get_one("positive_data_acceptance")]
    session, statuses = requests.Session(), {}
    operations = [found.ok() for found in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    assert len(operations) == 6  # it leaves out the page itself
    assert len(posts) == 3

    def run(operation, mode, examples):
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def send(case):
            answer = case.call(base, session=session, timeout=30)
            sent = repr((answer.request.url, case.headers, answer.request.body)).lower().encode()
            told = LEAKS.findall(answer.content.replace(b"application/json", b""))
            assert [words for words in told if words.lower() not in sent] == [], answer.content  # an echo tells nothing
            key = operation.path, answer.status_code
            statuses[key] = statuses.get(key, 0) + 1
            lists = [] if operation.path == "/predict" else [checks.CHECKS.get_one("negative_data_rejection")]
            case.validate_response(answer, excluded_checks=[*left_out, *lists])  # a list refuses item by item

        send()

    for operation in posts:
        run(operation, GenerationMode.POSITIVE, GENERATED // 5)
        run(operation, GenerationMode.NEGATIVE, GENERATED // 5)
    for operation in operations:
        run(operation, GenerationMode.POSITIVE, 20)
    assert sum(statuses.values()) >= GENERATED, statuses
    assert {statuses.get(("/predict", 200), 0) > 100, statuses.get(("/predict", 400), 0) > 1_000} == {True}, statuses


def mutate(draw, requests):
    """Whole requests with bytes changed, cut, doubled or put in, now and then several in one connection."""
    data = bytearray(b"".join(draw.choices(requests, k=draw.choice((1, 1, 1, 2, 4)))))
    for _ in range(draw.choice((0, 1, 1, 2, 5, 30))):
        place = draw.randrange(len(data) + 1)
        kind = draw.randrange(5)
        if kind == 0 and place < len(data):
            data[place] = draw.randrange(256)
        elif kind == 1:
            data[place:place] = draw.randbytes(draw.choice((1, 2, 8, 300)))
        elif kind == 2:
            del data[place : place + draw.choice((1, 2, 8, 100))]
        elif kind == 3:
            data[place:place] = data[place : place + draw.choice((1, 8, 100))]
        else:
            data[place:place] = draw.choice(
                (b"\r\n", b"\n", b"\0", b"\r\n\r\n", b": ", b"chunked", b"%", b"\xff", b"{")
            )
    return bytes(data)


def test_random_bytes_find_no_fault(service):
    draw = random.Random(20_240_101)  # noqa: S311 - a fixed fuzz
    valid = [request for request, *_ in CASES.values() if len(request) < 5_000]
    valid += [request.replace(b"Connection: close\r\n", b"") for request in valid]
    sent = [mutate(draw, valid) if n % 10 else draw.randbytes(draw.randrange(2_000)) for n in range(FUZZED)]
    before = count_descriptors(service)
    sent[::50] = [make_post(GOOD)] * len(sent[::50])  # whoever asks rightly meanwhile is answered
    with ThreadPoolExecutor(16) as pool:
        found = list(
            pool.map(lambda data: exchange(service, data, seconds=30 if data == make_post(GOOD) else 0.1), sent)
        )
    assert [some for some, _ in found[::50]] == [[200]] * len(found[::50])
    statuses = {status for some, _ in found for status in some}
    assert statuses >= {200, 400, 404, 405}
    assert max(statuses) < 500
    assert not [content for _, content in found if LEAKS.search(content.replace(b"application/json", b""))]
    assert sum(bool(some) for some, _ in found) > FUZZED // 2  # most were answered while the client was there
    wait_until(lambda: count_descriptors(service) <= before + 2, "an end of all connections")


TOKENS = {"p-token": ["predict"], "o-token": ["outcomes"], "a-token": ["admin"]}
PATHS = (
    "/predict",
    "/predict/batch",
    "/outcomes",
    "/model/info",
    "/openapi.json",
    "/docs",
    "/metrics",
    "/",
    "/nowhere",
)
TRICKS = ("//health", "/health/", "/health/../predict", "/HEALTH", "/health%2f", "/readyz;a", "*", "/predict?a=/health")
WRONG = (
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    "Basic p-token",
    "p-token",
    "Bearer p-token2",
    "Bearer \xff",
    "bearer p",
)


def test_without_a_token_nothing_but_health_answers(make_project, tmp_path):
    root = make_project(tmp_path / "project").root
    write_model_folder(tmp_path / "model", model_name=NAME, feature_service=f"{NAME}_0")
    tokens = {"CLOSEDLOOP_SERVING__TOKENS": json.dumps(TOKENS)}
    with run_service(root, "--model", str(tmp_path / "model"), **tokens) as service, contextlib.ExitStack() as closing:
        connection = closing.enter_context(
            contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=30))
        )

        def ask(method, path, authorization, body=None):
            fields = {"authorization": authorization.encode("latin-1")} if authorization else {}
            connection.request(method, path, body, fields)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers

        for path in (*PATHS, *TRICKS):
            for method in ("GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE"):
                for wrong in WRONG:
                    status, content, fields = ask(method, path, wrong, b"{}" if method == "POST" else None)
                    assert (status, fields["www-authenticate"]) == (401, "Bearer"), (method, path, wrong)
                    if method != "HEAD":
                        assert json.loads(content)["error"]["message"] == "a valid token is required"
        # an unread body is refused for want of a token, not for its size
        assert ask("POST", "/predict", "", b"[" * 2_000_000)[0] == 401
        connection.close()
        described = json.loads(ask("GET", "/openapi.json", "Bearer p-token")[1])
        assert set(described["paths"]) == {*PATHS[:5], "/health", "/readyz"}
        for path in ("/health", "/readyz", "/health?a=b"):
            assert ask("GET", path, "")[0] == ask("HEAD", path, "Bearer wrong")[0] == 200
        allowed = {"p": {200, 400}, "a": {200, 400}, "o": {403}}
        for token, statuses in allowed.items():
            for path, body in (("/predict", GOOD), ("/predict", b"{}"), ("/predict/batch", b"[%b]" % GOOD)):
                assert ask("POST", path, f"Bearer {token}-token", body)[0] in statuses, (token, path)
        assert [ask("POST", "/outcomes", f"Bearer {token}-token", b"{}")[0] for token in "poa"] == [403, 400, 400]
        assert ask("GET", "/metrics", "Bearer a-token")[0] == 404
        assert "p-token" not in service.read_log()
        assert all(token not in path.read_text(errors="replace") for token in TOKENS for path in root.rglob("*.json"))


def test_poisoned_outcomes_never_reach_the_store(make_project, tmp_path):
    """Ids made up, turned, or sealed by another service; without the scope; a second opinion; more than the limit."""
    write_model_folder(tmp_path / "model", model_name=NAME, feature_service=f"{NAME}_0")
    roots = [make_project(tmp_path / name).root for name in ("own", "other")]
    variables = {
        "CLOSEDLOOP_SERVING__TOKENS": json.dumps(TOKENS),
        "CLOSEDLOOP_SERVING__OUTCOMES_PER_MINUTE": "300",
    }
    arguments = ("--model", str(tmp_path / "model"))
    with run_service(roots[0], *arguments, **variables) as own, run_service(roots[1], *arguments, **variables) as other:
        source = random.Random(7)  # noqa: S311

        def call(service, scope, path, body):
            service.headers = {"authorization": f"Bearer {scope}-token"}
            return service.call("POST", path, body)

        def predict(service):
            return call(service, "p", "/predict", {"features": ROWS[0]})[1]["prediction_id"]

        known = [predict(own) for _ in range(20)]
        made_up = [f"{source.getrandbits(192):048x}" for _ in range(50)]
        turned = [one[:-1] + ("0" if one[-1] != "0" else "1") for one in known]
        foreign = [predict(other) for _ in range(20)]
        assert call(own, "p", "/outcomes", [{"prediction_id": known[0], "outcome": 0}])[0] == 403
        for wrong in (made_up, turned, foreign):
            status, answer = call(own, "o", "/outcomes", [{"prediction_id": one, "outcome": 0} for one in wrong])
            assert (status, answer["accepted"], len(answer["refused"])) == (202, 0, len(wrong))
        for outcome in (1, 0):  # the first value counts
            items = [{"prediction_id": one, "outcome": outcome} for one in known]
            assert call(own, "o", "/outcomes", items)[1]["accepted"] == len(known)
        statuses = {call(own, "o", "/outcomes", {"prediction_id": made_up[0], "outcome": 0})[0] for _ in range(400)}
        assert statuses == {404, 429}

        store = Predictions(Database(f"sqlite:///{roots[0] / 'state/operations.db'}"))
        later = dt.datetime.now(dt.UTC) + dt.timedelta(days=40)

        def read_outcomes():
            with contextlib.suppress(ClosedloopError):  # there are no tables yet
                found = store.list_outcomes(NAME, as_of=later, horizon_days=30)
                return dict(zip(found["prediction_id"], found["outcome"], strict=True))
            return {}

        wait_until(lambda: len(read_outcomes()) == len(known), "the outcomes")
        wait_until(lambda: own.read_metric("spool_depth_bytes") == 0, "an empty spool")
        assert read_outcomes() == dict.fromkeys(known, 1)  # corrections are kept, and count for nothing
        store.database.close()
    assert "Traceback" not in own.read_log()
