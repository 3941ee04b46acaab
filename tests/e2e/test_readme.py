"""What the README lets people type works."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from tests.conftest import SOURCE_ROOT
from tests.http_service import run_service

README = (SOURCE_ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.thorough
def test_the_request_of_the_readme_is_answered(small_shop, tmp_path):
    (command,) = re.findall(r"^curl .*$", README, re.MULTILINE)
    assert "http://127.0.0.1:3000/" in command
    shop = small_shop.copy(tmp_path / "project")
    with run_service(shop.root) as service:
        sent = command.replace(":3000/", f":{service.port}/")
        ran = subprocess.run(sent, shell=True, capture_output=True, text=True, check=True)  # noqa: S602 - our own page
    answer = json.loads(ran.stdout)
    assert 0 <= answer["probability"] <= 1, answer
    assert answer["model_version"] == "1"
