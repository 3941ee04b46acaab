"""Batch scoring takes as much memory for a large file as for a small one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tests.integration.test_batch import make_rows
from tests.model_folders import write_model_folder

pytestmark = pytest.mark.thorough

GROWTH_MB_MAX = 40
MEASURE = """
import resource, sys
from pathlib import Path
from closedloop.tabular import csv_files
from closedloop.scoring.batch import BatchOptions, score_batch
from closedloop.serving.slots.slots import Slot

csv_files.BLOCK_BYTES = 1 << 18  # PyArrow reads several ahead: 60 MB of 8 MB blocks, which a small file has not
source, model = Path(sys.argv[1]), sys.argv[2]
options = BatchOptions(0.5, b"a secret")
found = score_batch(str(source), str(source.with_name("out" + source.suffix)), Slot("7", model, ""), options,
                    state_dir=source.parent / "state")
print(found.scored, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def measure_mb(source: Path, model: Path, rows: int) -> float:
    """The most memory that a process held which scored a file."""
    command = [sys.executable, "-c", MEASURE, str(source), str(model)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    scored, megabytes = ran.stdout.split()
    assert int(scored) == rows
    return float(megabytes)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    model = write_model_folder(tmp_path / "model")
    rows = pa.Table.from_pandas(make_rows(50_000), preserve_index=False)
    found = {}
    for copies in (2, 40):
        source = tmp_path / f"{copies}{suffix}"
        with (pa.csv.CSVWriter if suffix == ".csv" else pq.ParquetWriter)(source, rows.schema) as writer:
            for _ in range(copies):
                writer.write_table(rows)
        found[copies] = measure_mb(source, model, copies * rows.num_rows)
    assert 38 * rows.nbytes / 1e6 > 1.5 * GROWTH_MB_MAX  # as a table, the rows in between would be seen
    assert found[40] < found[2] + GROWTH_MB_MAX, found
