"""Where an erased customer is left in files and copies: the runbook's own lines take it away, and nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from closedloop.config.settings import load_settings
from closedloop.serving.log.drain import QUARANTINE_SUFFIX
from tests.docs.test_docs import ROOT, read_commands, read_inline
from tests.http_service import wait_until
from tests.services import run_redis

pytestmark = pytest.mark.thorough


def run(commands: str, folder: Path, **environment: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    git = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    ran = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, env={**os.environ, **git, "PATH": path, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def commit_data(checkout: Path, customer: str) -> None:
    (checkout / "data/customers.csv").write_text(f"{customer}\n", encoding="utf-8")
    run("dvc add --quiet data && git add . && git commit --quiet --message data && dvc push --quiet", checkout)
    run("git push --quiet origin HEAD", checkout)


def list_customers(store: Path) -> set[str]:
    """Whose data lie in a cache or a remote, which has descriptions of folders too."""
    return {path.read_text(encoding="utf-8").strip() for path in store.glob("files/md5/??/*") if path.suffix != ".dir"}


def test_dvc_forgets_what_no_branch_of_anybody_uses_any_more(tmp_path: Path) -> None:
    """Another person's branch was never in this checkout: with --workspace, or without the fetch, its data would go."""
    mine, theirs, remote = tmp_path / "mine", tmp_path / "theirs", tmp_path / "remote"
    run("git init --quiet --bare --initial-branch=main origin && git clone --quiet origin mine", tmp_path)
    run(f"git switch --quiet --create main && dvc init --quiet && dvc remote add --quiet --default kept {remote}", mine)
    for checkout in (mine, theirs):
        if checkout == theirs:
            run("git clone --quiet origin theirs && cd theirs && git switch --quiet --create try", tmp_path)
        (checkout / "data").mkdir()
        commit_data(checkout, "Kassandra")
        commit_data(checkout, f"nobody-of-{checkout.name}")
    left = {"nobody-of-mine", "nobody-of-theirs"}
    commands = read_commands("Erase a customer")["look at what DVC would forget"]
    assert "Removing" in run(commands, mine)
    assert list_customers(remote) == {"Kassandra", *left}
    run(commands.replace(" --dry", " --force"), mine)
    assert list_customers(remote) == left
    assert list_customers(mine / ".dvc/cache") == {"nobody-of-mine"}
    run("rm -r .dvc/cache data && dvc pull --quiet", theirs)
    assert (theirs / "data/customers.csv").read_text(encoding="utf-8") == "nobody-of-theirs\n"


def test_redis_forgets_what_was_erased_once_its_file_is_rewritten(tmp_path: Path) -> None:
    def count() -> int:
        found = 0
        for path in (tmp_path / "appendonlydir").iterdir():
            with contextlib.suppress(FileNotFoundError):  # Redis puts new files in the place of old ones
                found += path.read_bytes().count(b"Kassandra")
        return found

    with run_redis(tmp_path, keeps=True) as server:
        url = f"redis://{server.address}"
        run('redis-cli -u "$REDIS_URL" HSET Kassandra spent 1', tmp_path, REDIS_URL=url)
        run('redis-cli -u "$REDIS_URL" SET Kleopatra 1', tmp_path, REDIS_URL=url)
        run('redis-cli -u "$REDIS_URL" DEL Kassandra', tmp_path, REDIS_URL=url)
        assert count() > 0
        assert "started" in run(read_inline("redis-cli"), tmp_path, REDIS_URL=url)
        wait_until(lambda: count() == 0, "an append-only file without the customer")
        assert run('redis-cli -u "$REDIS_URL" GET Kleopatra', tmp_path, REDIS_URL=url) == "1\n"


def test_quarantine_is_emptied_and_what_waits_for_the_store_is_not(tmp_path: Path) -> None:
    settings = load_settings("local", folder=ROOT / "configs")
    spool = tmp_path / settings.serving.state / "shop_churn/spool"
    kept = {spool / "worker/00000001.log"}
    gone = {spool / f"worker-00000001.log{QUARANTINE_SUFFIX}", spool / f"worker-00000002.log{QUARANTINE_SUFFIX}"}
    (spool / "worker").mkdir(parents=True)
    for path in kept | gone:
        path.touch()
    run(read_inline("rm -f"), tmp_path)
    assert {path for path in spool.rglob("*") if path.is_file()} == kept
