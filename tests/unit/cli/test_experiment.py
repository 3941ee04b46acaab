from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

from closedloop.cli.experiment import app
from closedloop.errors import DataError, GateFailed


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["experiment", *arguments])


def test_size_says_what_each_arm_needs() -> None:
    found = run("size", "--baseline", "0.05", "--mde", "0.005")
    assert found.exit_code == 0
    assert found.stdout.split() == ["control", "31,231", "treatment", "31,231"]


def test_analyze_reports_figures_and_verdict() -> None:
    found = run("analyze", "--control", "520/10000", "--treatment", "580/10000", "--min-sample", "1000")
    assert found.exit_code == 3
    for text in (
        "5.2000%",
        "+0.6000%  (-0.0322% to +1.2331%, Newcombe)",
        "1.861",
        "0.0627",
        "undecided: no difference",
    ):
        assert text in found.stdout


def test_each_verdict_has_its_status() -> None:
    adopt = run("analyze", "--control", "500/10000", "--treatment", "620/10000")
    assert (adopt.exit_code, adopt.exception) == (0, None)
    keep = run("analyze", "--control", "500/10_000", "--treatment", "620/10_000", "--lower-is-better")
    assert isinstance(keep.exception, GateFailed)
    broken = run("analyze", "--control", "500/10000", "--treatment", "620/11000")
    assert isinstance(broken.exception, DataError)
    assert "broken: the arms are not as 1 to 1" in broken.stdout
    margin = run("analyze", "--control", "520/10000", "--treatment", "510/10000", "--margin", "0.01")
    assert margin.exit_code == 0
    assert "not worse   p 0.0" in margin.stdout


def test_a_program_reads_the_same_as_json_with_the_same_status(tmp_path: Path) -> None:
    size = run("size", "--baseline", "0.05", "--mde", "0.005", "--json")
    assert json.loads(size.stdout) == {"control": 31231, "treatment": 31231}
    analyzed = run("analyze", "--control", "520/10000", "--treatment", "580/10000", "--min-sample", "1000", "--json")
    assert analyzed.exit_code == 3
    found = json.loads(analyzed.stdout)
    assert (found["verdict"], round(found["p_value"], 4)) == ("undecided", 0.0627)
    table = pd.DataFrame({"label": [0, 1] * 200, "champion": [0.4, 0.6] * 200, "challenger": [0.1, 0.9] * 200})
    table.to_csv(tmp_path / "scores.csv", index=False)
    paired = run("paired", str(tmp_path / "scores.csv"), "--json")
    assert (paired.exit_code, json.loads(paired.stdout)["verdict"]) == (0, "adopt")


@pytest.mark.parametrize("text", ["520", "520/", "a/b", "-1/100", "5.5/10", "520/10000/3", "inf/10"])
def test_counts_that_are_none_are_refused(text: str) -> None:
    error = run("analyze", "--control", text, "--treatment", "580/10000").exception
    assert isinstance(error, DataError)
    assert str(error) == f"--control: found {text!r}, allowed is events/total as 520/10000"


def test_paired_compares_two_models_on_the_same_customers(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    sharp = generator.beta(1, 2, 800)
    table = pd.DataFrame({"label": (generator.random(800) < sharp).astype(int), "champion": 0.33, "challenger": sharp})
    table.to_csv(tmp_path / "scores.csv", index=False)
    found = run("paired", str(tmp_path / "scores.csv"))
    assert found.exit_code == 0
    assert "adopt: the challenger is better" in found.stdout
    assert "McNemar's p 0.0" in found.stdout
    table.rename(columns={"champion": "challenger", "challenger": "champion"}).to_csv(tmp_path / "b.csv", index=False)
    assert isinstance(run("paired", str(tmp_path / "b.csv")).exception, GateFailed)


def test_paired_names_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("label,champion\n1,.5\n", encoding="utf-8")
    assert "no column challenger; found label, champion" in str(run("paired", str(path)).exception)
    assert "cannot be read as csv" in str(run("paired", str(tmp_path / "none.csv")).exception)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("C1,1,.5,.4\nC2,0,.5,.4\n", "line 2: the number of cells is 4, but 3 in the header"),
        ("1,.5,.4\n0,.5\n", "line 3: the number of cells is 2, but 3 in the header; is the file cut off?"),
        ("1,.5,.4\nyes,.5,.4\n", "row 2, column 'label': must be '1' or 'True' (churned)"),
    ],
)
def test_paired_reads_no_shifted_columns(tmp_path: Path, rows: str, said: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(f"label,champion,challenger\n{rows}", encoding="utf-8")
    assert said in str(run("paired", str(path)).exception)


@pytest.mark.thorough
@pytest.mark.parametrize(("treatment", "status"), [("380/10000", 2), ("510/10000", 3), ("5", 1)])
def test_statuses_of_the_program(treatment: str, status: int) -> None:
    command = [sys.executable, "-m", "closedloop.cli.main", "experiment", "analyze", "--control", "500/10000"]
    ran = subprocess.run([*command, "--treatment", treatment], capture_output=True, text=True)
    assert (ran.returncode, "Traceback" in ran.stderr) == (status, False)
