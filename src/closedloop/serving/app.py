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

from closedloop.errors import ServiceUnavailable
from closedloop.records import Prediction
from closedloop.serving.config import CONFIG_VARIABLE, read_config
from closedloop.serving.exchange import (
    Answer,
    Call,
    ClientGone,
    Receive,
    describe,
    describe_item,
    encode,
    error_of,
    read_body,
    refuse,
)
from closedloop.serving.openapi import PAGE, describe_service
from closedloop.serving.outcomes import OutcomeIntake
from closedloop.serving.requests import Breach, RefusedRequest, parse_json, shorten
from closedloop.serving.slots import Serving
from closedloop.serving.worker import Worker, end_with_parent

logger, access_logger = logging.getLogger(__name__), logging.getLogger("closedloop.access")
Send = Callable[[dict[str, Any]], Awaitable[None]]
Handler = Callable[[Call], Awaitable[Answer]]
HTML = b"text/html; charset=utf-8"
# What is counted as a request: probes would hide how slow the others are, and fail before a model is there.
PREDICTING = frozenset({"/predict", "/predict/batch"})


class Application:
    """Routes requests, checks tokens and limits, and turns every refusal into one documented shape."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._config = worker.config
        self._outcomes = OutcomeIntake(worker.log, worker.config.outcomes_per_minute, worker.id_key)
        self._open_requests = 0
        self._tokens = {token.encode(): frozenset(scopes) for token, scopes in worker.tokens.items()}
        self._routes: dict[str, tuple[str, str | None, Handler]] = {
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
        head = [(b"content-type", answer.kind), (b"content-length", b"%d" % len(answer.body)), *answer.headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": head})
        await send({"type": "http.response.body", "body": answer.body if scope["method"] != "HEAD" else b""})
        seconds = time.perf_counter() - call.arrived
        if path in PREDICTING:
            self._worker.metrics.count_request(answer.status, seconds)
        if self._config.access_log:
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
            logger.info("%s %s refused: %s", method, path[:80], refused.code, extra={"request_id": call.request_id})
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
        route = self._routes.get(path)
        scope = "" if route is None else route[1]  # health alone has none
        if self._tokens and scope is not None:
            self._authorise(call, scope)
        if route is None:
            raise RefusedRequest("not_found", f"there is no {path[:80]}", status=404)
        if method != route[0] and not (method == "HEAD" and route[0] == "GET"):
            answer = RefusedRequest("method_not_allowed", f"{path} takes {route[0]}", status=405)
            return msgspec.structs.replace(refuse(answer, call.request_id), headers=((b"allow", route[0].encode()),))
        if self._open_requests >= self._config.queue_max and route[1] is not None:
            raise RefusedRequest("queue_full", "too many requests are waiting", status=429, retry_after=1)
        self._open_requests += 1
        try:
            return await route[2](call)
        finally:
            self._open_requests -= 1

    def _authorise(self, call: Call, scope: str) -> None:
        """Refuse a call without a token, or with one that lacks the scope ("" asks for any token)."""
        given = call.headers.get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        scopes: frozenset[str] | None = None
        for known, known_scopes in self._tokens.items():  # all are compared, so that time tells nothing
            if hmac.compare_digest(known, token.strip()):
                scopes = known_scopes
        if kind.lower() != b"bearer" or scopes is None:
            raise RefusedRequest("unauthorised", "a valid token is required", status=401)
        if scope and scope not in scopes and "admin" not in scopes:
            raise RefusedRequest("forbidden", f"the token lacks the scope {scope}", status=403)

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
        request = serving.checker.read(await read_body(call, self._config.body_bytes_max), call.request_id)
        call.request_id = request.request_id
        prediction = await self._worker.batcher.submit(request, serving, arrived=call.arrived, version=version)
        body = encode(describe(prediction, call.arrived))
        return Answer(body, request_id=prediction.request_id, prediction_id=prediction.prediction_id)

    async def _predict_batch(self, call: Call) -> Answer:
        serving = self._require_serving()
        version = self._read_version(call)
        items = parse_json(await read_body(call, self._config.body_bytes_max))
        if type(items) is not list or not 0 < len(items) <= self._config.batch_items_max:
            found = len(items) if type(items) is list else shorten(items)
            rule = f"array of 1 to {self._config.batch_items_max} requests"
            raise RefusedRequest("invalid_request", "a batch is an array", (Breach("", found, rule),))
        futures: list[asyncio.Future[Prediction] | RefusedRequest] = []
        for number, item in enumerate(items):
            try:
                request = serving.checker.check(item, f"{call.request_id}-{number}")
                futures.append(self._worker.batcher.submit(request, serving, arrived=call.arrived, version=version))
            except RefusedRequest as refused:
                futures.append(refused)
        waited = [future for future in futures if not isinstance(future, RefusedRequest)]
        if waited:
            await asyncio.wait(waited)
        errors = [None if isinstance(future, RefusedRequest) else future.exception() for future in futures]
        if isinstance(errors[0], ServiceUnavailable) and all(isinstance(one, ServiceUnavailable) for one in errors):
            raise errors[0]
        answers = [describe_item(future, call.arrived) for future in futures]
        milliseconds = (time.perf_counter() - call.arrived) * 1e3
        return Answer(encode({"predictions": answers, "count": len(answers), "total_latency_ms": milliseconds}))

    async def _report_outcomes(self, call: Call) -> Answer:
        body = parse_json(await read_body(call, self._config.body_bytes_max))
        items = body if type(body) is list else [body]
        if not 0 < len(items) <= self._config.batch_items_max:
            rule = f"1 to {self._config.batch_items_max} outcomes"
            raise RefusedRequest("invalid_request", "too many or no outcomes", (Breach("", len(items), rule),))
        refused = self._outcomes.take(items)
        self._worker.metrics.count_outcomes(accepted=len(items) - len(refused), refused=len(refused))
        if refused and len(items) == 1:
            raise refused[0][1]
        details = [{"item": number, "error": error_of(error)} for number, error in refused]
        return Answer(encode({"accepted": len(items) - len(refused), "refused": details}), 202)

    async def _health(self, _: Call) -> Answer:
        serving = self._worker.slots.serving
        version = serving.champion.version if serving else None
        return Answer(encode({"status": "ok", "model_loaded": serving is not None, "model_version": version}))

    async def _ready(self, _: Call) -> Answer:
        self._require_serving()
        return Answer(b'{"status":"ready"}')

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
            range_margin=self._config.range_margin,
            batch_items_max=self._config.batch_items_max,
            with_tokens=bool(self._tokens),
        )
        return Answer(encode(described))

    async def _docs(self, _: Call) -> Answer:
        return Answer(PAGE, kind=HTML)


def create_application() -> Application:
    """The application of the file that the environment names: what the server's processes call."""
    end_with_parent()
    return Application(Worker(read_config(Path(os.environ[CONFIG_VARIABLE]))))
