"""A data set's YAML from a strange table: how it is written, what its columns are, what a run would stumble over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from closedloop.config.dataset import DatasetConfig, require_own_model_name
from closedloop.config.invalid import describe_invalid
from closedloop.config.sources import FileSource, SqlSource
from closedloop.config.yaml import format_yaml, read_yaml
from closedloop.core.features.profiles import Profile, profile_column
from closedloop.core.features.roles import guess_roles
from closedloop.errors import ConfigError
from closedloop.files import replace_file
from closedloop.tabular.describe.drafts import Draft
from closedloop.tabular.describe.log import fill_log
from closedloop.tabular.describe.sniff import read_table
from closedloop.tabular.describe.table import fill_table

HEADING = "# Written by `closedloop describe`: guesses, to be read and changed. docs/your-data.md explains every key."
CAST = "holds texts in place of numbers or times: cast it in the query"


def describe_source(place: str, name: str, notes: list[str], *, label: str | None = None) -> str:
    """Read a file, folder, pattern or ``VARIABLE#table``, and guess a data set's config; returns its YAML.

    Parameters
    ----------
    place
        Where the rows are.
    name
        Of the data set.
    notes
        Takes what is noticed, a sentence each, also where an error ends it.
    label
        The label's column, where the caller knows it.

    Raises
    ------
    DataError
        If it cannot be read as a table, or nothing in it can be the label.
    ConfigError
        If the variable of a database is not set, or its driver is missing.
    """
    source, frame = read_table(place, notes)
    profiles = {str(column): profile_column(frame[column]) for column in frame.columns}
    source, profiles = _settle_reading(source, profiles, notes)
    notes += [f"{column!r}: {note}" for column, one in profiles.items() for note in one.notes]
    roles = guess_roles(profiles, label=label)
    if roles.time is not None and isinstance(source, FileSource):
        source = source.model_copy(update={"time_format": profiles[roles.time].time_format})
    if words := {word for one in profiles.values() for word in one.words}:
        frame = frame.mask(frame.isin(words))
    draft = Draft(frame.drop(columns=[name for name, one in profiles.items() if not one.values]), profiles, roles)
    draft.content = {"name": name, "model_name": f"{name}_churn", "kind": roles.kind}
    draft.content["description"] = f"Rows of {Path(place).name}: say here what they are."
    draft.content["source"] = source.model_dump(exclude_defaults=True)
    try:
        (fill_log if roles.kind == "events" else fill_table)(draft)
    finally:
        notes += [f"{column!r} is left out: {why}" for column, why in roles.left_out.items()]
        notes += roles.notes
    return _write_text(draft)


def _settle_reading(
    source: FileSource | SqlSource, profiles: dict[str, Profile], notes: list[str]
) -> tuple[FileSource | SqlSource, dict[str, Profile]]:
    """One decimal mark and one list of missing words for the whole source, and trouble where a column has others."""
    if isinstance(source, SqlSource):
        odd = {name for name, one in profiles.items() if one.kind != "text" and (one.words or one.time_format)}
        odd |= {name for name, one in profiles.items() if one.decimal == ","}
        return source, {
            name: replace(one, words=(), trouble=one.trouble or (CAST if name in odd else ""))
            for name, one in profiles.items()
        }
    marks = [one.decimal for one in profiles.values() if one.decimal]
    mark = "," if marks.count(",") > 0 and marks.count(",") >= marks.count(".") else "."
    for name, one in profiles.items():
        if one.kind == "number" and one.decimal not in ("", mark) and not one.trouble:
            profiles[name] = replace(one, trouble=f"its decimal mark is not {mark!r} as in other columns")
    if mark == ",":
        notes.append("numbers have a decimal comma: source.decimal")
    words = sorted({word for one in profiles.values() for word in one.words})
    if words:
        notes.append(f"{', '.join(map(repr, words))}: taken for missing values (source.na_values)")
    return source.model_copy(update={"decimal": mark, "na_values": tuple(words)}), profiles


def _write_text(draft: Draft) -> str:
    """YAML, each key with its comment above it, and in the end the columns that have no role."""
    lines = [HEADING]
    for key, value in draft.content.items():
        lines += [f"# {draft.comments[key]}"] if key in draft.comments else []
        if key == "expectations":
            lines += [f"{key}:", *(f"  - {format_yaml(one, flow=True)}" for one in value)]
        else:
            lines.append(format_yaml({key: value}).rstrip("\n"))
    if draft.roles.left_out:
        lines.append("# Columns without a role:")
    # a control character would end the comment, or make YAML refuse the file
    texts = (f"{' '.join(name.split())}: {' '.join(why.split())}" for name, why in draft.roles.left_out.items())
    lines += ["#   " + "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text) for text in texts]
    return "\n".join(lines) + "\n"


def write_config(path: Path, text: str) -> None:
    """Write a data set's YAML, which must pass the config's checks.

    Raises
    ------
    ConfigError
        If it does not.
    """
    with replace_file(path) as beside:
        beside.write_text(text, encoding="utf-8")
        try:
            config = DatasetConfig.model_validate(read_yaml(beside))
        except ValidationError as error:
            raise ConfigError(f"{path}:\n  {describe_invalid(error)}") from error
        require_own_model_name(config, path)
