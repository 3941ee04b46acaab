"""Load a version in a separate process before it may serve, so that a hang or lack of memory there harms no other."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from closedloop.contract import ModelContract, read_contract
from closedloop.errors import DataError
from closedloop.processes import end_with_parent
from closedloop.serving.models import OtherFeatures
from closedloop.serving.slots.slots import Slot, load_slot

PROOF_SECONDS = 120.0  # imports alone take long on a busy machine; the golden rows have their own limit
LOOK_SECONDS = 0.5


def prove_slot(slot: Slot, beside: Slot | None, is_wanted: Callable[[], bool], seconds: float = PROOF_SECONDS) -> bool:
    """Load a version and compare it with the one that it has to fit; return False once it is no longer wanted.

    Raises
    ------
    DataError
        If it may not serve, or the checks took too long; `OtherFeatures` if only its features differ.
    """
    command = [sys.executable, "-m", __name__, str(os.getpid())]
    end = time.monotonic() + seconds
    given: bytes | None = msgspec.json.encode((slot, beside))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    found = process.communicate(given, LOOK_SECONDS)[0]
                    break
                given = None
                if not is_wanted():
                    return False
                if time.monotonic() > end:
                    raise DataError(f"loading: version {slot.version} is not loaded within {seconds:g} s")
        finally:
            process.kill()
    if process.returncode != 0:
        raise DataError(f"loading: the process that loaded version {slot.version} ended with {process.returncode}")
    reason, only_features_differ = msgspec.json.decode(found, type=tuple[str, bool])
    if reason:
        raise (OtherFeatures if only_features_differ else DataError)(reason)
    return True


def read_fitting(slot: Slot | None) -> ModelContract | None:
    """The contract that a new version has to fit; None where there is none, or this release cannot read it."""
    if slot is None:
        return None
    with contextlib.suppress(OSError, DataError):
        return read_contract(Path(slot.folder))
    return None


def main() -> None:
    """Run the process: read slots from standard input, write why the version may not serve to standard output."""
    end_with_parent(int(sys.argv[1]))
    slot, beside = msgspec.json.decode(sys.stdin.buffer.read(), type=tuple[Slot, Slot | None])
    found = "", False
    try:
        load_slot(slot, read_fitting(beside))
    except DataError as error:
        found = str(error), isinstance(error, OtherFeatures)
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
