"""The short form of the soak with hostile clients: honest requests are answered, and memory stays where it was."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.thorough


def test_hostile_clients_harm_nobody():
    """In processes of its own, since it limits its descriptors; how quick it is, is not asked on a busy machine."""
    command = [sys.executable, "-m", "tests.soak.hostile", "0.5", "--busy"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "none failed" in ran.stdout
