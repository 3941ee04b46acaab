"""Where a customer is left after an erasure, each emptied by the runbook's own lines."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
from pathlib import Path

import pytest
from redis import Redis

from closedloop.adapters.erasure import erase_online
from closedloop.adapters.online import encode_key
from closedloop.adapters.store import Store
from closedloop.records import Prediction
from closedloop.serving.drain import drain_once
from closedloop.serving.spool import SpoolWriter
from tests.docs.test_docs import read_commands
from tests.http_service import wait_until
from tests.services import run_redis

pytestmark = pytest.mark.thorough

COMMANDS = read_commands("Erase a customer")
IDENTITY = ("-c", "user.name=tester", "-c", "user.email=tester@example.com")


def run_lines(lines: str, folder: Path, **environment: str) -> str:
    ran = subprocess.run(
        ["bash", "-euc", lines], cwd=folder, env=os.environ | environment, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def test_what_could_not_be_stored_is_forgotten(tmp_path: Path) -> None:
    spool = tmp_path / "state/serving/shop_churn/spool"
    at = dt.datetime(2024, 1, 2, tzinfo=dt.UTC)
    row = Prediction("p", "r", "shop_churn", "1", "champion", "http", at, (), 0.5, 0, 0.5, customer_id="Kassandra")
    writer = SpoolWriter(spool / "worker", 1_000_000)
    writer.append([row])
    writer.close()
    (segment,) = (spool / "worker").glob("[0-9]*.log")
    segment.write_bytes(segment.read_bytes().replace(b"Kassandra", b"Cassandra"))  # its checksum is wrong by that
    store = Store(f"sqlite:///{tmp_path / 'operations.db'}")
    store.upgrade()
    drain_once(spool, store, "shop_churn")
    store.close()

    def find() -> list[Path]:
        return [path for path in tmp_path.rglob("*") if path.is_file() and b"Cassandra" in path.read_bytes()]

    assert [path.suffix for path in find()] == [".quarantine"]
    run_lines(COMMANDS["forget what could not be stored"], tmp_path)
    assert find() == []


def test_an_append_only_file_has_nobody_who_was_erased_once_it_is_rewritten(tmp_path: Path) -> None:
    with run_redis(tmp_path, keeps=True) as server:
        programs = tmp_path / "bin"
        programs.mkdir()
        (programs / "redis-cli").write_text(f'#!/bin/sh\nexec /usr/bin/redis-cli -p {server.port} "$@"\n')
        (programs / "redis-cli").chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"

        with Redis(port=server.port) as client:
            for name in ("Kassandra", "Iphigenie"):
                client.hset(encode_key(name) + b"shop", "name", name)
        online = {"type": "redis", "connection_string": server.address}

        def count(name: bytes) -> int:
            return sum(one.read_bytes().count(name) for one in (tmp_path / "appendonlydir").iterdir())

        assert erase_online(online, "Kassandra") == 1
        assert count(b"Kassandra") > 0
        run_lines(COMMANDS["rewrite the append-only file"], tmp_path, PATH=path)
        wait_until(lambda: count(b"Kassandra") == 0, "a new append-only file")
        assert count(b"Iphigenie") > 0


def test_old_data_is_collected_from_cache_and_remote_and_listed_before(tmp_path: Path) -> None:
    root, remote = tmp_path / "project", tmp_path / "remote"
    root.mkdir()

    def run(*command: str) -> None:
        subprocess.run(command, cwd=root, check=True, capture_output=True)

    def commit(text: str) -> None:
        (root / "data.csv").write_text(text)
        run("dvc", "add", "data.csv")
        run("git", "add", "--all")
        run("git", *IDENTITY, "commit", "--quiet", "--message", text)
        run("dvc", "push")

    def list_kept() -> set[str]:
        kept = [{path.read_text() for path in place.rglob("files/md5/*/*")} for place in (root / ".dvc/cache", remote)]
        assert kept[0] == kept[1]
        return kept[0]

    run("git", "init", "--quiet", "--initial-branch=main")
    run("dvc", "init", "--quiet")
    run("dvc", "remote", "add", "--quiet", "--default", "data", str(remote))
    commit("Kassandra, Iphigenie")
    run("git", "checkout", "--quiet", "-b", "other")
    commit("of another branch")
    run("git", "checkout", "--quiet", "main")
    commit("Iphigenie")
    everything = {"Kassandra, Iphigenie", "of another branch", "Iphigenie"}
    assert list_kept() == everything

    dry, collect = COMMANDS["collect old data"].splitlines()
    run_lines(f"{dry} --all-branches", root)
    assert list_kept() == everything
    run_lines(f"{collect} --all-branches", root)
    assert list_kept() == everything - {"Kassandra, Iphigenie"}
    said = run_lines(dry, root)
    assert list_kept() == everything - {"Kassandra, Iphigenie"}
    assert "1 objects" in said, said
    run_lines(collect, root)
    assert list_kept() == {"Iphigenie"}
