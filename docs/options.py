"""Write docs/options.md from the code: `make options`. Every option, parameter, setting and key, with its default."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import typer
from pydantic import BaseModel, SecretStr
from pydantic_core import PydanticUndefined
from typer.core import TyperGroup

from closedloop.cli.main import app
from closedloop.config.dataset import DatasetConfig
from closedloop.config.params import Params
from closedloop.config.settings import Settings

PAGE = Path(__file__).parent / "options.md"
BEGIN = """# Options

Written from the code by `make options`; a test fails where the two differ. [The reference](reference.md) says what the
parameters, settings and gates mean, and [your data](your-data.md#every-key) what the keys of a data set are for.
"""
NAMES = {str: "text", int: "number", float: "number", bool: "true or false", type(None): "null", SecretStr: "secret"}


def list_commands(group: TyperGroup, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The commands that a person types, with the groups that they stand in."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from list_commands(command, f"{prefix}{name} ")
        elif not command.hidden:
            yield f"{prefix}{name}", command


def describe_command(name: str, command: Any) -> Iterator[str]:
    """A heading, what the command does, and a row for each of its options."""
    yield f"\n### `closedloop {name}`\n\n{inspect.cleandoc(command.help or '').partition(chr(12))[0].strip()}\n"
    yield "| option | default | meaning |\n|---|---|---|"
    for one in command.params:
        names = [one.name.upper()] if one.param_type_name == "argument" else [*one.opts, *one.secondary_opts]
        spelled = " or ".join(f"`{text}`" for text in names)
        default = "required" if one.required else "" if one.default is None else f"`{spell(one.default)}`"
        yield f"| {spelled} | {default} | {(one.help or '').replace('|', chr(92) + '|')} |"


def spell(value: Any) -> str:
    """A value as it stands in a YAML file."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {spell(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return f"[{', '.join(map(spell, value))}]"
    return '""' if value == "" else str(value)


def spell_type(kind: Any) -> str:
    """What may stand there, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return spell_type(inner[0])
    if origin is Literal:
        return ", ".join(f"`{spell(one)}`" for one in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(spell_type, inner)))
    if origin in (list, tuple, set, frozenset):
        return f"list of {spell_type(inner[0])}" if inner else "list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    return NAMES.get(kind) or re.sub(r"(?<!^)(?=[A-Z])", " ", getattr(kind, "__name__", str(kind))).lower()


def list_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A row for each key, those of sections behind the section's name; of what may be left out, its keys follow."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if name in ("profile", "root"):
            continue  # no file has them
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from list_keys(kind, f"{prefix}{field.alias or name}.")
            continue
        value = field.get_default(call_default_factory=True)
        default = "required" if value is PydanticUndefined else f"`{spell(value)}`"
        if isinstance(value, BaseModel | SecretStr):
            default = ""
        yield f"| `{prefix}{field.alias or name}` | {spell_type(kind)} | {default} |"
        for section in find_sections(kind):
            yield from list_keys(section, f"{prefix}{field.alias or name}.")


def find_sections(kind: Any) -> list[type[BaseModel]]:
    """The models among the types that a key may have."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [section for one in get_args(kind) for section in find_sections(one)]


def write_page() -> str:
    """The page as the code is now."""
    lines = [BEGIN, "## Commands"]
    for name, command in list_commands(cast(TyperGroup, typer.main.get_command(app))):
        lines += describe_command(name, command)
    for title, model in (
        ("Parameters (`params.yaml`)", Params),
        ("Settings (`configs/<profile>.yaml`)", Settings),
        ("A data set (`configs/datasets/<name>.yaml`)", DatasetConfig),
    ):
        lines += [f"\n## {title}\n", "| key | value | default |\n|---|---|---|", *list_keys(model)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
