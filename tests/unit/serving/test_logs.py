"""What the service's processes write for log collectors."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import logging.config
from closedloop.cli.main import configure_logging
from closedloop.serving.logs import LOG_CONFIG

configure_logging()
logging.config.dictConfig(LOG_CONFIG)
logging.getLogger("closedloop.serving.process.agent").warning("version %s is refused", "3", extra={"request_id": "r1"})
logging.getLogger("uvicorn").info("started")
logging.getLogger("alembic").info("not of interest")
"""


def test_every_line_is_json_once_although_the_command_line_writes_for_people():
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    assert [line["message"] for line in lines] == ["version 3 is refused", "started"]
    assert (lines[0]["level"], lines[0]["request_id"]) == ("warning", "r1")
