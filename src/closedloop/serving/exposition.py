"""The metrics page for Prometheus: the sum over the metrics files of all processes, living and dead.

The code counts under short names. A page shows each as ``closedloop_NAME`` with the label ``model_name``, since one
Prometheus may scrape other programs, and several models.
"""

from __future__ import annotations

import json
import logging
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from closedloop.errors import ClosedloopError, ConfigError
from closedloop.files import hold_lock, is_locked, replace_file
from closedloop.serving.metric_docs import METRICS, MetricDoc
from closedloop.serving.metric_files import KINDS, LOCK_SUFFIX

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric
    from prometheus_client.samples import Sample

    from closedloop.serving.http.asgi import Asgi
    from closedloop.serving.http.exchange import Answer

Document = Callable[[Mapping[str, str]], Any]
PREFIX, MODEL_LABEL = "closedloop_", "model_name"
RETIRED, NOTE, COLLECT_LOCK = "retired", "added", ".collect.lock"

logger = logging.getLogger(__name__)


def build_registry(folder: Path) -> CollectorRegistry:
    """The page of prometheus_client's HTTP server: the totals over all files of a folder, read at every scrape."""
    return register_page(lambda: _collect_files(folder))


class _Collector(NamedTuple):
    collect: Callable[[], Iterable[Metric]]


def register_page(collect: Callable[[], Iterable[Metric]]) -> CollectorRegistry:
    """A registry of all metric families that ``collect`` gives; it is called at every scrape, and not before."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(_Collector(collect))
    return registry


def name_registry(registry: CollectorRegistry, model_name: str, *, aliases: bool) -> CollectorRegistry:
    """The same metrics as a page shows them: with the prefix, and with the model's name as a label.

    With ``aliases`` each metric follows again under its short name and without that label, as pages had it before.
    """
    return register_page(lambda: _name_families(registry, model_name, aliases=aliases))


def serve_metrics(
    registry: CollectorRegistry, host: str, port: int, setting: str, documents: Mapping[str, Document] | None = None
) -> int:
    """Show a registry over HTTP from a thread of its own, with the limits that the service's connections have.

    Parameters
    ----------
    documents
        What is shown beside it, as JSON, by path: a function of the query's parameters.

    Returns
    -------
    int
        The port: where 0 is asked for, one that is free.

    Raises
    ------
    ServiceUnavailable
        If the port is taken, which ``setting`` says.
    """
    from prometheus_client import make_asgi_app

    from closedloop.serving.http.server import bind, run

    listener = bind(host, port, setting)
    listener.listen()  # who asks before the thread answers waits
    found: int = listener.getsockname()[1]
    page = _Pages(make_asgi_app(registry), documents or {})
    threading.Thread(target=run, args=(page, listener), kwargs={"lifespan": False}, name="metrics", daemon=True).start()
    return found


class _Pages:
    """Answers GET of a document with what its function returns; every other path is prometheus_client's."""

    def __init__(self, metrics: Asgi, documents: Mapping[str, Document]) -> None:
        self._metrics, self._documents = metrics, documents

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """One request."""
        read = self._documents.get(scope.get("path", ""))
        if read is None:
            await self._metrics(scope, receive, send)
            return
        from closedloop.serving.http.exchange import send_answer

        await send_answer(_answer(read, scope), send, method=scope["method"])


def _answer(read: Document, scope: dict[str, Any]) -> Answer:
    from urllib.parse import parse_qsl

    from closedloop.rules import RefusedRequest
    from closedloop.serving.http.answers import encode
    from closedloop.serving.http.exchange import Answer, refuse

    try:
        if scope["method"] not in ("GET", "HEAD"):
            raise RefusedRequest("method_not_allowed", f"{scope['path']} takes GET", status=405)
        return Answer(encode(read(dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)))))
    except ConfigError as error:
        return refuse(RefusedRequest("invalid_request", str(error)), "")
    except ClosedloopError as error:
        logger.error("%s: %s", scope["path"], error)
        return refuse(RefusedRequest("unavailable", "the release cannot be read; the log says why", status=503), "")
    except RefusedRequest as refused:
        return refuse(refused, "")


def _name_families(registry: CollectorRegistry, model_name: str, *, aliases: bool) -> Iterator[Metric]:
    from prometheus_client import Metric

    for family in registry.collect():
        named = Metric(PREFIX + family.name, family.documentation, family.type)
        named.samples = [
            one._replace(name=PREFIX + one.name, labels={**one.labels, MODEL_LABEL: model_name})
            for one in family.samples
        ]
        yield named
        if aliases:
            family.documentation = f"Deprecated name of {named.name}"
            yield family


def _collect_files(folder: Path) -> Iterator[Metric]:
    """`METRICS`; one without a series yet shows its name, type and help."""
    from prometheus_client import Metric
    from prometheus_client.multiprocess import MultiProcessCollector

    found = {family.name: family for family in MultiProcessCollector.merge(list_files(folder))}
    for name, doc in METRICS.items():
        family = Metric(name.removesuffix("_total") if doc.type == "counter" else name, doc.help, doc.type)
        if family.name in found:
            # a slot that a version has left is no series
            family.samples = [one for one in found[family.name].samples if _is_shown(one, doc)]
        yield family


def _is_shown(sample: Sample, doc: MetricDoc) -> bool:
    return bool(sample.value) or doc.type != "gauge" or not sample.labels


def list_files(folder: Path) -> list[str]:
    """The files of all processes that can be read; what the dead have counted is in one file of each kind.

    Their gauges are gone.
    """
    with hold_lock(folder / COLLECT_LOCK):
        for held in sorted(folder.glob(f"[!.]*{LOCK_SUFFIX}")):
            if not is_locked(held):
                _retire(folder, held)
        return [str(path) for path in sorted(folder.glob("[!.]*.db")) if _read_file(path) is not None]


def _retire(folder: Path, held: Path) -> None:
    """Add what a dead process has counted to what others before it have, and remove its files."""
    name = held.name.removesuffix(LOCK_SUFFIX)
    try:
        for kind in (KINDS["counter"], KINDS["histogram"]):
            path = folder / f"{kind}_{name}.db"
            if path.exists():
                _add(folder / f"{kind}_{RETIRED}.db", path)
                path.unlink()
        (folder / f"{KINDS['gauge']}_{name}.db").unlink(missing_ok=True)
        held.unlink()
    except OSError as error:  # a full disk, which is when metrics are looked at
        logger.error("%s: the totals of a dead process stay in its files (%s)", held, error)


def _add(path: Path, dead: Path) -> None:
    """Add a dead process's file to the totals, and note its name there, since it may outlive this process."""
    from prometheus_client.mmap_dict import MmapedDict, mmap_key

    totals = (_read_file(path) or {}) if path.exists() else {}
    note = mmap_key(NOTE, dead.name, [], [], "")
    if note in totals:
        return
    totals = {key: value for key, value in totals.items() if json.loads(key)[0] != NOTE} | {note: 1.0}
    for key, value in (_read_file(dead) or {}).items():
        totals[key] = totals.get(key, 0.0) + value
    with replace_file(path) as beside:
        size = sum(len(key.encode()) + 32 for key in totals) + 16
        beside.write_bytes(bytes(size))  # no holes: see `closedloop.serving.metric_files`
        written = MmapedDict(str(beside))
        for key, value in totals.items():
            written.write_value(key, value, 0.0)
        written.close()


def _read_file(path: Path) -> dict[str, float] | None:
    """The content of a file; None where it is damaged, or no file of this kind."""
    from prometheus_client.mmap_dict import MmapedDict

    try:
        return {key: value for key, value, *_ in MmapedDict.read_all_values_from_file(str(path)) if json.loads(key)}
    except (OSError, RuntimeError, ValueError, struct.error) as error:
        logger.error("%s: cannot be read (%s), it is left out", path, error)
        return None
