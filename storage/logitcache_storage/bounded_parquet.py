"""Parquet that is not unpacked before it is known how much it unpacks to.

A few hostile bytes can fill any memory: a page of zeros that is compressed to nothing, one long word that every row
repeats by its number in a dictionary. What the footer says of sizes is not what Arrow goes by: it unpacks what the
header of each page says, so it is page headers that are looked at here, and dictionaries before they are spelled out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_BYTES_AT_ONCE = 1 << 28
MAX_BYTES_PER_BYTE = 1024
"""What is read at once may unpack to so many bytes, or to so many for each byte of the object."""
MAX_VALUES_AT_ONCE = 1 << 24
MAX_VALUES_PER_BYTE = 1024
"""What a column of a row group may hold: so many values, or so many for each byte of the object."""

_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_PLAIN_DICTIONARY, _DELTA_BYTE_ARRAY, _RLE_DICTIONARY = 2, 7, 8
_I32, _STRUCT = 5, 12
_ABOUT = {_DATA_PAGE: (5, 2), _DICTIONARY_PAGE: (7, 2), _DATA_PAGE_V2: (8, 4)}
"""Kind of a page to the field of its header that describes it, and the field of that which holds its encoding."""
_VALUE_BYTES = 8
_DEPTH = 8


class BoundedParquet:
    """One Parquet object.

    Raises (in every method, besides what Arrow raises):
        ValueError: it says that it holds more than any writer puts into so few bytes.
    """

    def __init__(self, open_file: Callable[[], Any], size: int, footer: pq.FileMetaData | None = None) -> None:
        """Read the footer, or take it as it was read before.

        Args:
            open_file: gives the object as a file that can be read and sought in.
            size: its bytes.
            footer: `metadata` of an earlier one.
        """
        self._open_file, self._size = open_file, size
        self._most = max(MAX_BYTES_AT_ONCE, MAX_BYTES_PER_BYTE * size)
        # Without Arrow's threads: one that lets go of our bytes while the interpreter ends, ends the process.
        self._file = pq.ParquetFile(pa.PythonFile(open_file(), mode="r"), metadata=footer, pre_buffer=False)
        self.metadata: Any = self._file.metadata
        self.schema_arrow: pa.Schema = self._file.schema_arrow
        if footer is None:
            groups = (self.metadata.row_group(i) for i in range(self.metadata.num_row_groups))
            found = max((group.column(i).num_values for group in groups for i in range(group.num_columns)), default=0)
            self._refuse_values(found)

    def read(self, names: Sequence[str] | None = None) -> pa.Table:
        """All row groups: the columns of these names, or every one."""
        tables, num_bytes = [], 0
        for group in range(self.metadata.num_row_groups):
            tables.append(self.read_group(group, names))
            num_bytes += tables[-1].nbytes
            self._refuse_bytes(num_bytes)
        schema = self.schema_arrow
        empty = schema.empty_table() if names is None else schema.empty_table().select(list(names))
        return pa.concat_tables(tables) if tables else empty

    def read_group(self, group: int, names: Sequence[str] | None = None) -> pa.Table:
        """One row group: the columns of these names, or every one."""
        num_bytes = 0
        by_number: list[tuple[str, int]] = []
        for number, path in self._leaves(names):
            pages = self._pages(self.metadata.row_group(group).column(number))
            about = self._file.schema.column(number)
            num_values = sum(page.num_values for page in pages if page.kind != _DICTIONARY_PAGE)
            self._refuse_values(num_values)
            num_bytes += sum(page.num_bytes for page in pages) + num_values * max(about.length or 0, _VALUE_BYTES)
            if about.physical_type == "BYTE_ARRAY":
                num_bytes += _bytes_by_difference(pages)
                by_number.append((path, _bytes_by_number(pages)))
            self._refuse_bytes(num_bytes)
        if num_bytes + sum(most for _, most in by_number) > self._most:  # as with long words that occur but once each
            for path, most in by_number:
                num_bytes += self._spelled_out(group, path) if most else 0
                self._refuse_bytes(num_bytes)
        return self._file.read_row_group(group, None if names is None else list(names), use_threads=False)

    def byte_range(self, group: int) -> tuple[int, int]:
        """Where the bytes of a row group stand."""
        columns = (self.metadata.row_group(group).column(i) for i in range(self.metadata.num_columns))
        starts, stops = zip(*map(self._chunk_range, columns), strict=True)
        return min(starts), max(stops)

    def _chunk_range(self, column: Any) -> tuple[int, int]:
        """Where the bytes of a column of a row group stand, as Arrow finds them."""
        start, dictionary = column.data_page_offset, column.dictionary_page_offset
        if dictionary is not None and 0 < dictionary < start:
            start = dictionary
        stop = start + column.total_compressed_size
        if not 0 <= start <= stop <= self._size:
            raise ValueError(f"a column from byte {start} to {stop} of {self._size}")
        return start, stop

    def _leaves(self, names: Sequence[str] | None) -> Iterator[tuple[int, str]]:
        """Number and path of the columns as they are stored, of those that are nested one for each part."""
        for number in range(len(self._file.schema)):
            path = self._file.schema.column(number).path
            if names is None or any(path == name or path.startswith(f"{name}.") for name in names):
                yield number, path

    def _pages(self, column: Any) -> list[_Page]:
        if column.num_values == 0:  # Arrow reads none, and where they should be may stand anything
            return []
        start, stop = self._chunk_range(column)
        file = self._open_file()
        file.seek(start)
        return _pages(file.read(stop - start))

    def _spelled_out(self, group: int, path: str) -> int:
        """Bytes of the words of a column, each as often as it occurs."""
        source = pa.PythonFile(self._open_file(), mode="r")
        file = pq.ParquetFile(source, metadata=self.metadata, read_dictionary=[path], pre_buffer=False)
        column = file.read_row_group(group, [path], use_threads=False).column(0)
        return sum(_word_bytes(chunk) for chunk in column.chunks)

    def _refuse_values(self, found: int) -> None:
        if found > max(MAX_VALUES_AT_ONCE, MAX_VALUES_PER_BYTE * self._size):
            raise ValueError(f"{found} values in {self._size} bytes, which no writer makes")

    def _refuse_bytes(self, found: int) -> None:
        if found > self._most:
            raise ValueError(f"{self._size} bytes that unpack to {found} or more, which no writer makes")


class _Page(NamedTuple):
    """What the header of a page says."""

    kind: int
    num_bytes: int
    """Unpacked."""
    num_values: int
    encoding: int


def _pages(chunk: bytes) -> list[_Page]:
    """The pages of a column, from the struct `PageHeader` that stands before each."""
    pages, reader = [], _Compact(chunk)
    while reader.at < len(chunk):
        header = reader.struct()
        kind, num_bytes, packed = (_count(header, number) for number in (1, 2, 3))
        if kind in _ABOUT:
            field, encoding = _ABOUT[kind]
            about = header[field, _STRUCT]
            pages.append(_Page(kind, num_bytes, _count(about, 1), _count(about, encoding)))
        reader.at += packed
    return pages


def _count(struct: dict[tuple[int, int], Any], number: int) -> int:
    value = struct[number, _I32]
    if not 0 <= value < 1 << 31:
        raise ValueError(f"a page header that says {value}")
    return int(value)


def _bytes_by_number(pages: Sequence[_Page]) -> int:
    """Most bytes of the strings that are told by their number in a dictionary, once they are spelled out."""
    longest = max((page.num_bytes for page in pages if page.kind == _DICTIONARY_PAGE), default=0)
    return longest * sum(page.num_values for page in pages if page.encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY))


def _bytes_by_difference(pages: Sequence[_Page]) -> int:
    """Most bytes of the strings of which is told what differs from the one before; no writer of ours does that."""
    return sum(page.num_values * page.num_bytes for page in pages if page.encoding == _DELTA_BYTE_ARRAY)


def _word_bytes(array: Any) -> int:
    """Of all entries of a dictionary array that stands alone in lists and structs."""
    while not pa.types.is_dictionary(array.type):
        array = array.field(0) if pa.types.is_struct(array.type) else array.flatten()
    lengths = pc.binary_length(array.dictionary).take(array.indices.drop_null())
    return pc.sum(lengths).as_py() or 0


class _Compact:
    """Structs in the compact protocol of Thrift, as far as page headers need it: no lists, sets and maps."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, depth: int = 0) -> dict[tuple[int, int], Any]:
        """(number, kind) of each field to its value; strings and doubles are passed over."""
        fields, number = {}, 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            if not 0 < number < 1 << 15 or depth > _DEPTH:
                raise ValueError(f"a page header with a field {number} at depth {depth}")
            fields[number, head & 15] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, _I32, 6):
            return self._integer()
        if kind in (7, 8):
            length = 8 if kind == 7 else self._varint()
            self.at += length
            return None
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"a page header with a field of kind {kind}")

    def _integer(self) -> int:
        zigzag = self._varint()
        return zigzag >> 1 ^ -(zigzag & 1)

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) >= 128 and shift < 63:
            value, shift = value | (byte & 127) << shift, shift + 7
        return value | byte << shift

    def _byte(self) -> int:
        byte = self._data[self.at]
        self.at += 1
        return byte
