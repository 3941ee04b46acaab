"""The faults of a config in words: each wrong key with its rule and what was found."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from pydantic import BaseModel, ValidationError

from closedloop.config.sources import WORKBOOK_RULE
from closedloop.errors import hide_passwords

# pydantic's own words name types of Python
MAPPING_RULE, LIST_RULE = "must hold keys and values", "must be a list, such as [a, b]"
RULES = {
    "extra_forbidden": "unknown key",
    "missing": "is required",
    "dict_type": MAPPING_RULE,
    "model_type": MAPPING_RULE,
    "model_attributes_type": MAPPING_RULE,
    "list_type": LIST_RULE,
    "tuple_type": LIST_RULE,
    "string_type": "must be text; YAML reads a bare number, yes, no or null as something else: put it in quotes",
    "union_tag_not_found": "needs the key 'type'",
}


def describe_invalid(error: ValidationError, secrets: Mapping[str, Collection[str]] | None = None) -> str:
    """Say every wrong key of a config in one line each: the place, the rule and what was found.

    Of ``secrets``, names of keys by section, nothing is shown: not what was found, nor what stands below.
    """
    lines = []
    for problem in error.errors():
        section, *keys = problem["loc"] or ("",)
        hidden = (secrets or {}).get(str(section), ())
        secret = bool(hidden) and (not keys or keys[0] in hidden)
        # pydantic names the branches of a union in the place: constrained-float, literal['a','b']
        keys_of_file = [str(part) for part in problem["loc"] if re.fullmatch(r"[\w. ]+", str(part))]
        place = ".".join(keys_of_file[: 2 if secret else None]) or "the file"
        shown = problem["loc"] and problem["type"] not in ("missing", "extra_forbidden") and not secret
        shown = shown and not isinstance(problem["input"], dict | BaseModel)  # a rule of several keys names them itself
        found = f", found {hide_passwords(repr(problem['input'])):.80}" if shown else ""
        rule = RULES.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "union_tag_invalid":
            rule = f"type must be one of {problem['ctx']['expected_tags']}, found {problem['ctx']['tag']!r}"
            rule += (
                f"; {WORKBOOK_RULE}" if re.search("xls|excel|sheet", str(problem["ctx"]["tag"]), re.IGNORECASE) else ""
            )
        lines.append(f"{place}: {rule}{found}")
    return "\n  ".join(lines)
