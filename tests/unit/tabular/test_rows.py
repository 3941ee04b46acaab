"""Files of rows, whoever reads them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from closedloop.errors import ConfigError, DataError
from closedloop.tabular.rows import RowFile, require_file


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text("customer_id,outcome,customer_id\n1,0,9\n", encoding="utf-8")
    else:
        columns = [pa.array([value]) for value in ("1", "0", "9")]
        pq.write_table(pa.Table.from_arrays(columns, names=["customer_id", "outcome", "customer_id"]), path)
    with pytest.raises(DataError, match=rf"rows\{suffix}: more than one column 'customer_id'; rename all but one"):
        list(RowFile(path).read_chunks(["customer_id", "outcome"], 10))
    [table] = RowFile(path).read_chunks(["outcome"], 10)
    assert table.to_pydict() == {"outcome": ["0"]}


@pytest.mark.parametrize("target", ["gs://bucket/scores.parquet", "az://bucket/scores.csv", "S3://bucket/scores.csv"])
def test_an_address_is_no_file_to_write(target):
    """It made a folder of that name, here, and called that a success."""
    with pytest.raises(ConfigError, match=f"{target}: it is an address"):
        require_file(target)
    assert require_file("out/scores.csv") == Path("out/scores.csv")
