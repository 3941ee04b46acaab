"""Files of rows, whoever reads them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from closedloop.errors import DataError
from closedloop.tabular.rows import RowFile


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
