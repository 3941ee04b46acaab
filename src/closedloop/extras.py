"""Which extra of the package brings a module that is not installed: read from the package's own metadata."""

from __future__ import annotations

import re
from importlib.metadata import requires
from importlib.util import find_spec

from closedloop.errors import ConfigError

# Modules that are not called as their distribution is, and drivers that SQLAlchemy names by the database.
DISTRIBUTIONS = {
    "fsspec": "dvc",
    "kfp_server_api": "kfp",
    "sklearn": "scikit-learn",
    "vl_convert": "vl-convert-python",
    "xgboost": "xgboost-cpu",
    "yaml": "pyyaml",
    "bigquery": "sqlalchemy-bigquery",
    "snowflake": "snowflake-sqlalchemy",
    "psycopg2": "psycopg",
}
# Modules without which a command that we print as next would fail, perhaps after half of its work.
NEEDED = {
    "demo": ("httptools", "feast"),  # it asks by customer id
    "retrain": ("kfp",),
    "serve": ("httptools",),  # MLflow brings uvicorn, and not that
}
COLLECTIONS = ("all", "dev", "serving")  # extras that repeat what others bring


def find_extra(module: str) -> str | None:
    """The extra that brings a module (or a database's driver); None if no extra does.

    >>> find_extra("confluent_kafka.admin"), find_extra("psycopg"), find_extra("json")
    ('kafka', 'postgres', None)
    """
    top = module.partition(".")[0]
    wanted = DISTRIBUTIONS.get(top, top).replace("_", "-").lower()
    for requirement in requires("closedloop") or ():
        found = re.match(r"([\w.-]+).*;.*\bextra == ['\"]([\w-]+)['\"]", requirement)
        if found and found[1].replace("_", "-").lower() == wanted and found[2] not in COLLECTIONS:
            return found[2]
    return None


def has_module(name: str) -> bool:
    """Whether a module is installed, without importing it."""
    return find_spec(name) is not None


def find_missing() -> dict[str, str]:
    """The commands of `NEEDED` that cannot run here, each with the extras that it needs, as pip takes them."""
    missing = {command: list_missing(command) for command in NEEDED}
    return {
        command: ",".join(str(find_extra(one)) for one in modules) for command, modules in missing.items() if modules
    }


def list_missing(command: str) -> list[str]:
    """The modules that a command of `NEEDED` needs and that are not installed."""
    return [module for module in NEEDED[command] if not has_module(module)]


def require_modules(command: str) -> None:
    """Raise a ConfigError that names the extras, before a command does half of its work without them."""
    if modules := list_missing(command):
        raise ConfigError(
            f"this command needs Python packages that are not installed ({', '.join(modules)}): "
            f"install closedloop[{find_missing()[command]}]"
        )


def explain_missing(error: ModuleNotFoundError, place: str = "this command") -> ConfigError:
    """The error to show for a module that is not installed: it names the extra that brings it."""
    module = error.name or str(error)
    extra = find_extra(module)
    remedy = f"install closedloop[{extra}]" if extra else "install it"
    return ConfigError(f"{place} needs the Python package {module.partition('.')[0]}, which is not installed: {remedy}")
