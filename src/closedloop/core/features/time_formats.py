"""How times are written that are not ISO 8601."""

from __future__ import annotations

import re

UNIX_UNITS = {"unix_seconds": "s", "unix_milliseconds": "ms"}  # counted from 1970 in UTC
NAMES_A_DAY = re.compile(r"(?s)(?=.*%[yY])(?=.*%[mbB])(?=.*%d)")
# Those that are looked for in a strange file. Where two fit, the first is taken.
DAYS = (
    "%d.%m.%Y", "%d.%m.%y", "%Y/%m/%d", "%Y.%m.%d", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%d/%m/%y",
    "%m/%d/%y",
    "%d-%b-%Y", "%d %b %Y", "%b %d, %Y", "%d-%b-%y", "%B %d, %Y", "%d %B %Y",
    "%Y年%m月%d日",
)  # fmt: skip
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", "T%H:%M:%S", ", %H:%M", ", %H:%M:%S")
