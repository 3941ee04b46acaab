"""BentoML: the Bento that holds model, contract and source, and the service that `bentoml serve` starts from it."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from closedloop.config.yaml import read_yaml
from closedloop.contract import check_digest, digest_file
from closedloop.errors import ConfigError, DataError
from closedloop.files import replace_folder
from closedloop.processes import run_process

SERVICE = "closedloop.serving.bento:service"
MODEL_DIR = Path("models/candidate")  # the same path in a Bento's sources as in the project
DIGEST_LABEL = "folder_sha256"
ITS_OWN_PATHS = ("/livez", "/healthz")
AsgiApplication = Callable[[Any, Any, Any], Awaitable[None]]


def create_service(start: Callable[[], tuple[AsgiApplication, Callable[[], Awaitable[None]]]]) -> Any:
    """A BentoML service that answers with an ASGI application at the application's own addresses.

    The application comes before BentoML's routes and takes over ``/readyz``; of BentoML's probes ``/livez`` and
    ``/healthz`` remain.

    Parameters
    ----------
    start
        Makes the application, and returns it with a coroutine function that ends it. Called once in each worker, not at
        import: the supervisor imports the service too, and a mounted application gets no startup event.
    """
    import bentoml

    class Closedloop:
        def __init__(self) -> None:
            running["application"], self._stop = start()

        @bentoml.on_shutdown  # type: ignore[untyped-decorator]
        async def stop(self) -> None:
            await self._stop()

    class Front:
        def __init__(self, app: AsgiApplication) -> None:
            self._app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            ours = scope["type"] == "http" and scope["path"] not in ITS_OWN_PATHS
            await (running["application"] if ours else self._app)(scope, receive, send)

    running: dict[str, AsgiApplication] = {}
    image = bentoml.images.Image(lock_python_packages=False).python_packages(*list_requirements())
    options: dict[str, Any] = {"metrics": {"enabled": False}, "logging": {"access": {"enabled": False}}}
    service = bentoml.service(name="closedloop", image=image, **options)(Closedloop)
    service.add_asgi_middleware(Front)
    return service


def build_bento(
    context: Path, target: Path, *, name: str, version: str, labels: Mapping[str, str], created_at: dt.datetime
) -> None:
    """Build a Bento of all files of a folder, in a process and a store of its own, and put it at ``target``.

    The same folder and arguments give the same bytes: the time of building is replaced by ``created_at``.

    Raises
    ------
    DataError
        If BentoML cannot build it; the message is BentoML's.
    """
    described = {
        "service": SERVICE,
        "name": name,
        "labels": dict(labels),
        "include": ["*"],
        "description": f"{name}, version {labels['version']} of the registry",
    }
    with tempfile.TemporaryDirectory(prefix="closedloop-bento-") as work:
        bentofile = Path(work) / "bentofile.yaml"
        bentofile.write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "bentoml", "build", "--bentofile", str(bentofile), "--version", version]
        environment = {**os.environ, "BENTOML_HOME": f"{work}/home", "PYTHONDONTWRITEBYTECODE": "1"}
        paths = (_pretend_uv(Path(work)), environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        ran = run_process(
            [*command, str(context)], env=environment, cwd=context, capture_output=True, text=True, check=False
        )
        if ran.returncode != 0:
            raise DataError(f"bentoml build: {(ran.stderr or ran.stdout).strip()[-2000:]}")
        built = Path(work) / "home/bentos" / name / version
        path = built / "bento.yaml"
        info = yaml.safe_load(path.read_text(encoding="utf-8"))
        info["creation_time"] = created_at
        path.write_text(yaml.safe_dump(info, sort_keys=False), encoding="utf-8")
        with replace_folder(target) as beside:
            shutil.copytree(built, beside, dirs_exist_ok=True)
            beside.chmod(0o755)  # BentoML lets only its user read the folder, but an image serves as another user


def _pretend_uv(work: Path) -> str:
    """Make a folder whose metadata claim that uv is installed.

    BentoML (1.4) would install uv before it checks whether there is anything to lock, and there is not. With this
    folder an image without an installer can build too.
    """
    folder = work / "pretended"
    (folder / "uv-0.dist-info").mkdir(parents=True)
    (folder / "uv-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: uv\nVersion: 0\n", encoding="utf-8")
    return str(folder)


def list_requirements() -> list[str]:
    """The requirements of a Bento's image: the extra ``serving``, in the versions of this environment."""
    try:
        declared = metadata.requires("closedloop") or ()
    except metadata.PackageNotFoundError:  # inside that image, which holds the source but no installed package
        return []
    found = [re.match(r"([\w.-]+)(\[[\w,]+\])?", text) for text in declared if "extra == 'serving'" in text]
    return sorted(f"{one[0]}=={metadata.version(one[1])}" for one in found if one)


def digest_tree(folder: Path) -> str:
    """SHA-256 over names and contents of all files below a folder, as hexadecimal digits.

    BentoML's own ``bentofile.yaml`` is left out, so that a Bento's ``src`` has the digest of what it was built from.
    """
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "bentofile.yaml"):
        total.update(f"{path.relative_to(folder).as_posix()} {digest_file(path)}\n".encode())
    return total.hexdigest()


def open_bento(folder: Path) -> Path:
    """Return the model folder in a Bento; its digest must equal the one in the Bento's labels.

    Raises
    ------
    ConfigError
        If the folder is no Bento that `closedloop package` built.
    DataError
        If the digests differ.
    """
    try:
        said = read_yaml(folder / "bento.yaml")["labels"][DIGEST_LABEL]
    except (ConfigError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: is no Bento that 'closedloop package' built ({error})") from error
    model_dir = folder / "src" / MODEL_DIR
    check_digest(model_dir, said)
    return model_dir
