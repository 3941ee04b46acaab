"""What can go wrong, sorted by what the operator does next."""

import re


class ClosedloopError(Exception):
    """Base class: the message names the offending place, what was found and what is allowed."""

    exit_status = 1


class ConfigError(ClosedloopError):
    """A setting, parameter or data set config is wrong: edit it and run again."""


class DataError(ClosedloopError):
    """The input cannot be read or does not hold what its config says: fix the data."""


class GateFailed(ClosedloopError):
    """A gate said no: the line stops, and the report says which figure missed which limit."""

    exit_status = 2


class ServiceUnavailable(ClosedloopError):
    """Something this process talks to is not there: start it, or try again later."""


def hide_passwords(text: str) -> str:
    """A message without the users and passwords of the addresses in it."""
    return re.sub(r"password=[^,;&\s'\"]+", "password=***", re.sub(r"//[^/\s]*@", "//***@", text))
