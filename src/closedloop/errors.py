"""Error classes, one for each thing that the operator does next, and the formatting of counts in messages."""

import re


class ClosedloopError(Exception):
    """Base class: the message names the offending place, what was found and what is allowed."""

    exit_status = 1


class ConfigError(ClosedloopError):
    """A setting, parameter or data set config is wrong: edit it and run again."""


class DataError(ClosedloopError):
    """The input cannot be read or does not hold what its config says: fix the data."""


class GateFailed(ClosedloopError):
    """A gate said no: the run stops, and the report says which figure missed which limit."""

    exit_status = 2


class Undecided(ClosedloopError):
    """Too little is known to say yes or no: see what keeps the rows away, or wait for more."""

    exit_status = 3


class StageFailed(ClosedloopError):
    """A stage ended with an error, which it has already printed."""


class ServiceUnavailable(ClosedloopError):
    """A service that this process needs does not answer: start it, or try again later."""


def count_noun(number: float, noun: str, plural: str = "") -> str:
    """A number with its noun, which is plural unless the number is 1.

    >>> count_noun(1, "row"), count_noun(1200, "row"), count_noun(2, "entry")
    ('1 row', '1,200 rows', '2 entries')
    """
    if not plural:
        plural = re.sub(r"(?<![aeou])y$", "ie", noun) if noun.endswith("y") else re.sub(r"(ch|s|x)$", r"\1e", noun)
        plural += "s"
    return f"{number:,} {noun if number == 1 else plural}"


def hide_passwords(text: str) -> str:
    """A message without the users and passwords of the addresses in it."""
    return re.sub(r"password=[^,;&\s'\"]+", "password=***", re.sub(r"//[^/\s]*@", "//***@", text))
