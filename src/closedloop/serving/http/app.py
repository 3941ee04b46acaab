"""The HTTP service as one plain ASGI application: what BentoML mounts, and what production starts without its stack."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from closedloop.errors import ServiceUnavailable, count_noun
from closedloop.records import Prediction, name_client
from closedloop.rules import Breach, RefusedRequest, ScoringRequest, shorten
from closedloop.serving.config import CONFIG_VARIABLE, read_config
from closedloop.serving.http.answers import (
    BatchAnswer,
    Explanation,
    Health,
    OutcomesAnswer,
    Ready,
    RefusedOutcome,
    describe,
    describe_item,
    encode,
    error_of,
)
from closedloop.serving.http.exchange import (
    Answer,
    Call,
    ClientGone,
    Receive,
    Send,
    read_body,
    refuse,
    send_answer,
)
from closedloop.serving.http.openapi import PAGE, describe_service
from closedloop.serving.http.outcomes import OutcomeIntake
from closedloop.serving.requests import parse_json
from closedloop.serving.slots.slots import Serving
from closedloop.serving.worker import Worker

logger, access_logger = logging.getLogger(__name__), logging.getLogger("closedloop.access")
Handler = Callable[[Call], Awaitable[Answer]]
HTML = b"text/html; charset=utf-8"
# What is counted as a request: probes would hide how slow the others are, and fail before a model is there.
PREDICTING = frozenset({"/predict", "/predict/batch"})


class Application:
    """Routes requests, checks tokens and limits, and turns every refusal into one documented shape."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._settings = worker.config.settings
        self._outcomes = OutcomeIntake(worker.log, self._settings.outcomes_per_minute, worker.id_key)
        self._open_requests = 0
        self._tokens = {
            token.encode(): (name_client(token, worker.id_key), frozenset(scopes))
            for token, scopes in worker.tokens.items()
        }
        self.routes: dict[str, tuple[str, str | None, Handler]] = {
            "/predict": ("POST", "predict", self._predict),
            "/predict/batch": ("POST", "predict", self._predict_batch),
            "/outcomes": ("POST", "outcomes", self._report_outcomes),
            "/health": ("GET", None, self._health),
            "/readyz": ("GET", None, self._ready),
            "/model/info": ("GET", "", self._model_info),
            "/openapi.json": ("GET", "", self._openapi),
            "/docs": ("GET", "", self._docs),
        }

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """One request, or the server's start and stop."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            return
        self._worker.start()  # a mounted application hears of no start
        call = Call(dict(scope["headers"]), receive, time.perf_counter(), os.urandom(8).hex())
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            answer = await self._answer(scope["method"], path, call)
        except ClientGone:
            return
        await send_answer(answer, send, method=scope["method"])
        seconds = time.perf_counter() - call.arrived
        if path in PREDICTING:
            self._worker.metrics.count_request(answer.status, seconds)
        if self._settings.access_log:
            ids = {"request_id": answer.request_id or call.request_id, "prediction_id": answer.prediction_id or None}
            where = scope["method"], scope["path"][:80], answer.status, seconds * 1e3
            access_logger.info("%s %s %d %.2f ms", *where, extra=ids)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._worker.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self._worker.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _answer(self, method: str, path: str, call: Call) -> Answer:
        try:
            return await self._route(method, path, call)
        except RefusedRequest as refused:
            # who has no right may not fill the disk with lines; prediction_requests_total counts the refusals
            level = logging.DEBUG if refused.status in (401, 403) else logging.INFO
            logger.log(
                level, "%s %s refused: %s", method, path[:80], refused.code, extra={"request_id": call.request_id}
            )
            return refuse(refused, call.request_id)
        except ServiceUnavailable as error:
            cause = repr(error.__cause__) if error.__cause__ else ""  # for the log alone: it may name an address
            logger.warning("%s %s: %s %s", method, path, error, cause, extra={"request_id": call.request_id})
            unavailable = RefusedRequest("unavailable", str(error), status=503, retry_after=1)
            return refuse(unavailable, call.request_id)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("%s %s failed", method, path, extra={"request_id": call.request_id})
            return refuse(RefusedRequest("internal", "an error of this service", status=500), call.request_id)

    async def _route(self, method: str, path: str, call: Call) -> Answer:
        route = self.routes.get(path)
        scope = "" if route is None else route[1]  # health alone has none
        if self._tokens and scope is not None:
            call.client = self._authorise(call, scope)
        if route is None:
            raise RefusedRequest("not_found", f"there is no {path[:80]}", status=404)
        if method != route[0] and not (method == "HEAD" and route[0] == "GET"):
            answer = RefusedRequest("method_not_allowed", f"{path} takes {route[0]}", status=405)
            return msgspec.structs.replace(refuse(answer, call.request_id), headers=((b"allow", route[0].encode()),))
        if self._open_requests >= self._settings.queue_max and route[1] is not None:
            raise RefusedRequest("queue_full", "too many requests are waiting", status=429, retry_after=1)
        self._open_requests += 1
        try:
            return await route[2](call)
        finally:
            self._open_requests -= 1

    def _authorise(self, call: Call, scope: str) -> str:
        """The client of a call; one without a token is refused, or whose token lacks the scope ("": any will do)."""
        given = call.headers.get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        scopes, client = None, ""
        for known, (name, known_scopes) in self._tokens.items():  # all are compared, so that time tells nothing
            if hmac.compare_digest(known, token.strip()):
                scopes, client = known_scopes, name
        if kind.lower() != b"bearer" or scopes is None:
            raise RefusedRequest("unauthorised", "a valid token is required", status=401)
        if scope and scope not in scopes and "admin" not in scopes:
            raise RefusedRequest("forbidden", f"the token lacks the scope {scope}", status=403)
        return client

    def _require_serving(self) -> Serving:
        serving = self._worker.slots.serving
        if serving is None:
            raise ServiceUnavailable("no model is ready")
        return serving

    def _read_version(self, call: Call) -> str | None:
        """The version that the header asks for, which only an administrator may."""
        found = call.headers.get(b"x-model-version")
        if found is None:
            return None
        if self._tokens:
            self._authorise(call, "admin")
        return found.decode("latin-1")

    async def _predict(self, call: Call) -> Answer:
        serving = self._require_serving()
        version = self._read_version(call)
        request = serving.checker.read(await read_body(call, self._settings.body_bytes_max), call.request_id)
        call.request_id = request.request_id
        if request.explain:
            from closedloop.serving.http import explaining

            await explaining.require_reasons(serving)
        prediction = await self._worker.batcher.submit(
            request, serving, arrived=call.arrived, version=version, client=call.client
        )
        explanation: Explanation | msgspec.UnsetType = msgspec.UNSET
        if request.explain:
            (explanation,) = await explaining.explain([prediction], [request.explain], serving)
        body = encode(describe(prediction, call.arrived, explanation))
        return Answer(body, request_id=prediction.request_id, prediction_id=prediction.prediction_id)

    async def _predict_batch(self, call: Call) -> Answer:
        serving = self._require_serving()
        version = self._read_version(call)
        items = parse_json(await read_body(call, self._settings.body_bytes_max))
        if type(items) is not list or not 0 < len(items) <= self._settings.batch_items_max:
            found = len(items) if type(items) is list else shorten(items)
            rule = f"array of 1 to {count_noun(self._settings.batch_items_max, 'request')}"
            raise RefusedRequest("invalid_request", "a batch is an array", (Breach("", found, rule),))
        requests = [_check_item(serving, item, f"{call.request_id}-{number}") for number, item in enumerate(items)]
        if any(isinstance(one, ScoringRequest) and one.explain for one in requests):
            from closedloop.serving.http.explaining import require_reasons

            await require_reasons(serving)
        futures: list[asyncio.Future[Prediction] | RefusedRequest] = []
        for request in requests:
            try:
                if isinstance(request, RefusedRequest):
                    raise request
                futures.append(
                    self._worker.batcher.submit(
                        request, serving, arrived=call.arrived, version=version, client=call.client
                    )
                )
            except RefusedRequest as refused:
                futures.append(refused)
        waited = [future for future in futures if not isinstance(future, RefusedRequest)]
        if waited:
            await asyncio.wait(waited)
        errors = [None if isinstance(future, RefusedRequest) else future.exception() for future in futures]
        if isinstance(errors[0], ServiceUnavailable) and all(isinstance(one, ServiceUnavailable) for one in errors):
            raise errors[0]
        explanations = await _explain_items(requests, futures, serving)
        answers = [
            describe_item(future, call.arrived, explanations.get(place, msgspec.UNSET))
            for place, future in enumerate(futures)
        ]
        milliseconds = (time.perf_counter() - call.arrived) * 1e3
        return Answer(encode(BatchAnswer(answers, len(answers), milliseconds)))

    async def _report_outcomes(self, call: Call) -> Answer:
        body = parse_json(await read_body(call, self._settings.body_bytes_max))
        items = body if type(body) is list else [body]
        if not 0 < len(items) <= self._settings.batch_items_max:
            rule = f"1 to {count_noun(self._settings.batch_items_max, 'outcome')}"
            raise RefusedRequest("invalid_request", "too many or no outcomes", (Breach("", len(items), rule),))
        refused = self._outcomes.take(items, call.client)
        self._worker.metrics.count_outcomes(accepted=len(items) - len(refused), refused=len(refused))
        if refused and len(items) == 1:
            raise refused[0][1]
        details = [RefusedOutcome(number, error_of(error)) for number, error in refused]
        return Answer(encode(OutcomesAnswer(len(items) - len(refused), details)), 202)

    async def _health(self, _: Call) -> Answer:
        serving = self._worker.slots.serving
        champion = serving.champion if serving else None
        found = (champion.version, champion.folder_sha256 or None) if champion else (None, None)
        return Answer(encode(Health("ok", champion is not None, found[0], self._worker.config.model_name, found[1])))

    async def _ready(self, _: Call) -> Answer:
        self._require_serving()
        return Answer(encode(Ready("ready")))

    async def _model_info(self, _: Call) -> Answer:
        refused = [Breach("model_version", *found) for found in self._worker.slots.refused.items()]
        if self._worker.slots.serving is None and refused:
            raise RefusedRequest("unavailable", "no model is ready", tuple(refused), status=503, retry_after=1)
        serving = self._require_serving()
        info = self._worker.describe_slots(serving)
        contract = serving.champion.contract.model_dump_json(exclude={"golden_rows"}).encode()
        return Answer(encode({**info, "contract": msgspec.Raw(contract)}))

    async def _openapi(self, _: Call) -> Answer:
        serving = self._require_serving()
        described = describe_service(
            serving.champion.contract,
            range_margin=self._settings.range_margin,
            batch_items_max=self._settings.batch_items_max,
            with_tokens=bool(self._tokens),
        )
        return Answer(encode(described))

    async def _docs(self, _: Call) -> Answer:
        return Answer(PAGE, kind=HTML)


def _check_item(serving: Serving, item: Any, request_id: str) -> ScoringRequest | RefusedRequest:
    try:
        return serving.checker.check(item, request_id)
    except RefusedRequest as refused:
        return refused


async def _explain_items(
    requests: list[ScoringRequest | RefusedRequest],
    futures: list[asyncio.Future[Prediction] | RefusedRequest],
    serving: Serving,
) -> dict[int, Explanation]:
    """The explanations of a batch's items that asked for one and have an answer, by their place."""
    tops: dict[int, int] = {}
    predictions: list[Prediction] = []
    for place, (request, future) in enumerate(zip(requests, futures, strict=True)):
        if isinstance(request, RefusedRequest) or isinstance(future, RefusedRequest) or future.exception():
            continue
        if request.explain:
            tops[place] = request.explain
            predictions.append(future.result())
    if not tops:
        return {}
    from closedloop.serving.http.explaining import explain

    return dict(zip(tops, await explain(predictions, list(tops.values()), serving), strict=True))


def create_application() -> Application:
    """The application of the file that the environment names: what a worker answers with."""
    return Application(Worker(read_config(Path(os.environ[CONFIG_VARIABLE]))))
