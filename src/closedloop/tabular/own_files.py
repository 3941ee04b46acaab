"""Files that are written as a data set's own source is, under the names that its config gives."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from closedloop.config.sources import FileSource, Source
from closedloop.errors import DataError
from closedloop.tabular.csv_files import TextFormat
from closedloop.tabular.rows import RowFile, find_format
from closedloop.tabular.sources import name_columns, read_words

NO_COMMA = "(the decimal mark is ',')"


class OwnFile(RowFile):
    """A file as a source's config describes it: encoding, delimiter, sheet, words for a blank, names.

    Parameters
    ----------
    source
        How it is written.
    rename
        Names in the file, and those that they have here.
    needed
        The columns that are read, by their names here.
    numeric
        The columns, by their names here, in which a decimal comma becomes a point. A value that has a point already
        is no number, and gets words that say so.
    """

    def __init__(
        self,
        path: Path,
        source: FileSource,
        rename: Mapping[str, str],
        *,
        needed: Collection[str],
        numeric: Collection[str],
    ) -> None:
        text = TextFormat(source.delimiter, source.encoding)
        super().__init__(path, format_=source.type, text=text, sheet=source.sheet)
        self.time_format = source.time_format
        self._source, self._commas = source, numeric if source.decimal == "," else ()
        names = name_columns(self.schema.names, rename, needed)
        self._written = dict(zip(names, self.schema.names, strict=True))
        self.schema = pa.schema([one.with_name(name) for one, name in zip(self.schema, names, strict=True)])

    def read_chunks(self, columns: list[str], chunk_rows: int) -> Iterator[pa.Table]:
        """As `RowFile.read_chunks`."""
        self._require_once(columns)
        written = [self._written[name] for name in columns]
        for table in self._read(written, chunk_rows):
            yield self._translate(read_words(table.rename_columns(columns), self._source))

    def _translate(self, table: pa.Table) -> pa.Table:
        for place, name in enumerate(table.column_names):
            if name in self._commas:
                written = table.column(place)
                wrong = pc.binary_join_element_wise(written, NO_COMMA, " ")
                point = pc.replace_substring(written, ",", ".")
                found = pc.if_else(pc.match_substring(written, "."), wrong, point)
                table = table.set_column(place, name, found)
        return table


def open_rows(
    path: Path,
    source: Source | None,
    rename: Mapping[str, str],
    *,
    needed: Collection[str],
    numeric: Collection[str] = (),
) -> RowFile:
    """Open a file as the data set's own if its header has the ``needed`` columns then, else as it is."""
    if isinstance(source, FileSource) and source.type == find_format(path):
        try:
            own = OwnFile(path, source, rename, needed=needed, numeric=numeric)
        except DataError:
            return RowFile(path)
        if set(needed) <= set(own.schema.names):
            return own
    return RowFile(path)
