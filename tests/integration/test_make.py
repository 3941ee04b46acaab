"""The real make: values that people give are text, and nothing that is in them runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each program of a recipe writes its name, what it was told, and what it reads of the environment. A question to the
# cluster fails, so that nothing waits for a Job.
PROGRAM = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" "$UV_DEFAULT_INDEX" END >> told
case "$1$2$3" in get*) exit 1;; -mpipconfig) echo "$OF_PIP";; esac
"""
PROGRAMS = ("aws", "closedloop", "docker", "dvc", "kubectl", "mlflow", "python", "uv", "python3.11")
ARMED = [
    "data/$(shell touch ran)/x", "$(shell touch ran)", "a'b", 'a"b', "a b", "$(touch ran)", "`touch ran`",
    "a; touch ran", "$HOME", "${HOME}", "$$", "a#b", "a\\", "*", "a\nb", "größer", "a|touch ran", "&touch ran",
]  # fmt: skip
# What hands each of the variables to which program, in which words.
USES = {
    "DATASET": ("run", "closedloop", "--dataset={}"),
    "SOURCE": ("run", "closedloop", "--source={}"),
    "INPUT": ("score", "closedloop", "--input={}"),
    "OUTPUT": ("score", "closedloop", "--output={}"),
    "METRICS_PORT": ("serve", "closedloop", "--metrics-port={}"),
    "AS_OF": ("run", "closedloop", "--as-of={}"),
    "FROM": ("loop", "closedloop", "--from={}"),
    "TO": ("loop", "closedloop", "--to={}"),
    "EVERY": ("loop", "closedloop", "--every={}"),
    "HORIZON": ("loop", "closedloop", "--horizon-days={}"),
    "SHARE": ("loop", "closedloop", "--share={}"),
    "REQUESTS_MIN": ("loop", "closedloop", "--requests-min={}"),
    "PORT": ("ui", "closedloop", "--port={}"),
    "TAG": ("images", "docker", "closedloop-serving:{}"),
    "COMMIT": ("images", "docker", "COMMIT={}"),
    "BASE_IMAGE": ("images", "docker", "PYTHON={}"),
    "REGISTRY": ("push-images", "docker", "{}/closedloop-jobs:7"),
    "CLUSTER": ("cluster-login", "aws", "{}"),
    "PROFILE": ("data-remote", "dvc", "{}"),
    "BASE": ("metrics-diff", "dvc", "{}"),
    "JOB": ("cluster-job", "kubectl", "{}-7"),
    "RUN": ("cluster-job", "kubectl", "monitor-{}"),
    "IMAGE": ("cluster-job", "kubectl", "*={}"),
    "MODEL_VERSION": ("cluster-job", "kubectl", "MODEL_VERSION={}"),
    "CUSTOMER": ("cluster-job", "kubectl", "CUSTOMER={}"),
    "PYTHON": ("install", "{}", "venv"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with the Makefile, whose programs only tell what they were told."""
    place = tmp_path / "checkout"
    programs = place / ".venv/bin"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        (programs / name).write_text(PROGRAM, encoding="utf-8")
        (programs / name).chmod(0o755)
    shutil.copy(ROOT / "Makefile", place)
    for name in ("requirements.lock", "pyproject.toml", ".venv/installed"):
        (place / name).touch()
    return place


def make(folder: Path, *words: str, **given: str) -> tuple[int, list[list[str]], list[str], str]:
    """What make ends with, the programs' words, the index that they see, and its output."""
    (folder / "told").unlink(missing_ok=True)
    environment = {"PATH": f"{folder}/.venv/bin:/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8", **given}
    ran = subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    written = (folder / "told").read_text(encoding="utf-8") if (folder / "told").is_file() else ""
    told = [one.split("\0") for one in written.split("\0END\0")[:-1]]
    return ran.returncode, [words for *words, _ in told], [index for *_, index in told], ran.stdout + ran.stderr


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("on_command_line", [True, False], ids=["command line", "environment"])
def test_a_value_that_is_given_is_one_word_of_a_program_and_runs_nothing(folder, name, on_command_line):
    target, program, word = USES[name]
    others = {"cluster-job": {"RUN": "7"}, "push-images": {"TAG": "7"}, "images": {"COMMIT": "7"}}.get(target, {})
    for value in ARMED:
        if name == "PYTHON":
            (folder / ".venv/bin/python").unlink(missing_ok=True)  # as before the first install
            (folder / ".venv/installed").unlink(missing_ok=True)
            value = "/".join((str(folder), "other", value.replace("/", "_")))
            Path(value).parent.mkdir(exist_ok=True)
            Path(value).write_text(PROGRAM, encoding="utf-8")
            Path(value).chmod(0o755)
        given = others | {name: value}
        words = [f"{key}={text}" for key, text in given.items()] if on_command_line else []
        _, told, _, output = make(folder, "--silent", target, *words, **({} if on_command_line else given))
        shown = value.replace("$", "$$") if name == "CUSTOMER" else value
        wanted = word.format(shown)
        asked = [one for one in told if one[0] == Path(program.format(value)).name]
        assert any(wanted in one for one in asked), (value, output, told)
        assert list(folder.rglob("ran")) == [], value


@pytest.mark.parametrize("target", ["demo", "serve", "score", "monitor", "backtest", "status"])
def test_a_target_goes_into_the_workspace_of_the_data_set_that_is_given(folder, target):
    for value in ARMED:
        _, told, _, output = make(folder, "--silent", target, f"DATASET={value}")
        assert [one[:3] for one in told] == [["closedloop", f"--dataset={value}", target]], output
        assert list(folder.rglob("ran")) == [], value
    assert make(folder, "--silent", target)[1][0][:2] == ["closedloop", target]


def test_our_messages_name_the_program_as_a_person_calls_it(folder):
    (folder / ".venv/bin/closedloop").write_text('#!/bin/sh\necho "$CLOSEDLOOP_PROGRAM"\n', encoding="utf-8")
    assert make(folder, "status", "--silent")[3] == ".venv/bin/closedloop\n"


def test_what_nobody_gives_has_its_default(folder):
    assert make(folder, "--silent", "run")[1] == [["closedloop", "run"]]
    assert make(folder, "--silent", "ui")[1] == [["closedloop", "ui"]]
    assert make(folder, "--silent", "cluster-login")[1][0][-1] == "closedloop"
    assert make(folder, "--silent", "metrics-diff")[1][0][-1] == "origin/main"
    assert make(folder, "--silent", "data-remote")[1][-1][-2] == "production"
    assert make(folder, "--silent", "push-images", "COMMIT=abc")[1][-1] == [
        "docker",
        "push",
        "registry.example.com/closedloop-jobs:abc",
    ]
    name = make(folder, "--silent", "cluster-job")[1][0][-1]
    assert name.startswith("monitor-20")
    assert len(name) == len("monitor-20250131-235959")


def test_an_image_without_a_commit_is_not_built_and_the_way_out_is_named(folder):
    status, told, _, output = make(folder, "images")
    assert (status, told) == (2, [])
    assert "make images COMMIT=" in output


def test_no_environment_is_made_where_mlflow_could_not_use_it(folder):
    moved = folder.rename(folder.with_name("a b%2Fc"))
    (moved / ".venv/installed").unlink()
    status, told, _, output = make(moved, "install")
    assert (status, told) == (2, [])
    assert "MLflow cannot run from an environment with % in its path: rename the folder" in output
    assert make(moved.rename(moved.with_name("a 'b' $HOME")), "--silent", "install")[0] == 0


def test_the_newest_python_is_taken_that_the_lock_is_resolved_for(folder):
    (folder / ".venv/bin/python").unlink()
    (folder / ".venv/installed").unlink()
    for name in ("python3.12", "python3.10", "python3.13", "python3.14"):
        taken = folder / ".venv/bin" / name
        taken.write_text(PROGRAM, encoding="utf-8")
        taken.chmod(0o755)
        told = make(folder, "--silent", "install")[1]
        newest = max(one for one in ("python3.11", "python3.12", "python3.13") if (folder / ".venv/bin" / one).exists())
        assert [newest, "-m", "venv"] in [words[:3] for words in told]
        (folder / ".venv/installed").unlink(missing_ok=True)
    (folder / ".venv/bin/python3.13").write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")  # a shim without a Python
    told = make(folder, "--silent", "install")[1]
    assert [words[0] for words in told if words[1:3] == ["-m", "venv"]] == ["python3.12"]


def test_without_any_of_them_the_ways_out_are_named(folder):
    (folder / ".venv/installed").unlink()
    status, told, _, output = make(folder, "install", "PYTHON=no/such/python")
    assert (status, told) == (2, [])
    assert "Python 3.11, 3.12 or 3.13 is needed (PYTHON=path/to/python3.13)" in output


def test_help_shows_each_target_with_its_text_behind_spaces(folder):
    lines = make(folder, "help")[3].splitlines()
    place = lines.index("  make run            the whole training workflow (DATASET=name SOURCE=path")
    assert lines[place + 1] == f"{'':22}AS_OF=date for other data)"
    assert max(map(len, lines)) <= 80
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings == ["Train, serve and watch", "Test and measure", "Deploy", "Maintain"]
    assert len([line for line in lines if line.startswith("  make ")]) > 25


@pytest.mark.parametrize(
    ("given", "index"),
    [
        ({}, ""),
        ({"OF_PIP": "https://mirror.example/simple"}, "https://mirror.example/simple"),
        ({"PIP_INDEX_URL": "https://second.example/simple", "OF_PIP": "x"}, "https://second.example/simple"),
        ({"UV_DEFAULT_INDEX": "https://own.example/simple", "OF_PIP": "x"}, "https://own.example/simple"),
    ],
    ids=["none", "pip.conf", "PIP_INDEX_URL", "UV_DEFAULT_INDEX"],
)
def test_uv_installs_from_the_index_that_pip_is_told_to_use(folder, given, index):
    (folder / ".venv/installed").unlink()
    status, told, indexes, output = make(folder, "--silent", "install", **given)
    assert status == 0, output
    found = [seen for words, seen in zip(told, indexes, strict=True) if words[0] == "uv"]
    assert found == [index, index]
