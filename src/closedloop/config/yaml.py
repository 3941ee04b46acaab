"""The one reader of YAML files: settings, parameters, data sets, the feature store's configuration."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from closedloop.errors import ConfigError

ALIASES_MAX = 100
DEPTH_MAX = 50
# YAML 1.1, which PyYAML reads, takes 1e-1 for text since it has no dot; YAML 1.2, which DVC reads, for a number.
NUMBER = re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")
# To YAML 1.1 010 is eight and 1:30 is ninety; to YAML 1.2 they are ten and text.
AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|.*[:_].*")
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.CSafeLoader):
    """PyYAML's safe loader that refuses a repeated key, and reads numbers with an exponent as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if is_merge else self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable):
                if key in lines:
                    raise ConfigError(f"lines {lines[key]} and {line}: both have the key {key!r}; keep one of them")
                lines[key] = line
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def _read_number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    if AMBIGUOUS.fullmatch(node.value):
        raise ConfigError(
            f"line {node.start_mark.line + 1}: {node.value} is one number to YAML 1.1, and another or text to YAML "
            "1.2: write digits alone, or put it in quotes"
        )
    is_float = node.tag.endswith("float")
    return loader.construct_yaml_float(node) if is_float else loader.construct_yaml_int(node)


class _Dumper(yaml.CSafeDumper):
    """PyYAML's safe dumper that quotes what `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


for _tag in NUMBER_TAGS:
    _Loader.add_constructor(_tag, _read_number)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises
    ------
    ConfigError
        If the file is missing, is not UTF-8, is not YAML or is not a mapping; if a key is repeated, an alias stands
        inside what another alias may repeat, or values lie in each other deeper than any config of ours.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _require_bounded(text)
        content = yaml.load(text, _Loader)  # noqa: S506  a safe loader
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date such as 2025-13-01
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values, found {type(content).__name__}")
    return content


def format_yaml(content: dict[str, Any], *, flow: bool = False) -> str:
    """A mapping as the YAML text that `read_yaml` reads as the same mapping, keys in their order.

    ``flow`` writes it on one line, as a part of a larger text.
    """
    if flow:
        line: str = yaml.dump(
            content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=1e6
        )
        return line.rstrip("\n")
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _require_bounded(text: str) -> None:
    """Refuse a text whose value would be far larger than itself, before anything is built from it.

    An alias inside an anchored value doubles with each level (a file of 1 kB becomes gigabytes), or holds itself.
    """
    aliases, open_values = 0, [False]  # of each open list or mapping: whether it, or one around it, has an anchor
    for event in yaml.parse(text, yaml.CSafeLoader):
        place = f"line {event.start_mark.line + 1}"  # type: ignore[union-attr]  # the C parser sets it always
        if isinstance(event, yaml.CollectionStartEvent):
            open_values.append(open_values[-1] or event.anchor is not None)
            if len(open_values) > DEPTH_MAX:
                raise ConfigError(f"{place}: values lie in each other more than {DEPTH_MAX} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            open_values.pop()
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if open_values[-1]:
                raise ConfigError(
                    f"{place}: the alias *{event.anchor} stands inside a value with an anchor; write it out"
                )
            if aliases > ALIASES_MAX:
                raise ConfigError(f"{place}: more than {ALIASES_MAX} aliases; write the values out")
