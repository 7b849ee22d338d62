"""Bounds what stored bytes may expand to, before they are decoded: some kilobytes can claim gigabytes.

Headers are asked first. What they tell is allowed up to a constant, and beyond it in proportion to what is stored.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import UserError

FREE = 1 << 28  # bytes that may be decoded however few are stored
EXPANSION = 1000  # most bytes per stored byte beyond FREE; embeddings expand 1 to 3 times
PLACE = 16  # least bytes of a row with two coordinates


def most(stored: int) -> int:
    """Returns the bytes that so many stored bytes may expand to."""
    return max(FREE, EXPANSION * stored)


def check_expansion(name: str, stored: int, decoded: int) -> None:
    """Refuses what claims to be out of proportion with what is stored of it.

    Raises:
        UserError: It names the file.
    """
    if decoded > most(stored):
        raise UserError(
            f"{name} has {stored:,} bytes and says that they hold {decoded:,}, which no such file does: it is damaged "
            "or forged. Take it anew from where it was made"
        )


def open_parquet(source: Any, name: str, stored: int, **options: Any) -> pq.ParquetFile:
    """Opens a Parquet file whose columns fit what is stored of it; pages that have a checksum are held to it.

    Args:
        source: A path or a file of bytes.
        name: What it is called, for messages.
        stored: Its size in bytes.
        options: Of `pyarrow.parquet.ParquetFile`.

    Raises:
        UserError: It claims to hold out of proportion to its size.
    """
    file = pq.ParquetFile(source, page_checksum_verification=True, **options)
    about = file.metadata
    check_size(about, name, stored)
    for i in range(about.num_row_groups):
        check_texts(source, about, i, name, stored)
    return file


def check_size(about: pq.FileMetaData, name: str, stored: int) -> None:
    """Refuses a Parquet file whose footer claims rows or columns out of proportion to its size.

    Raises:
        UserError: It names the file.
    """
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    check_expansion(name, stored, max(PLACE * about.num_rows, sum(group.total_byte_size for group in groups)))


def check_texts(source: Any, about: pq.FileMetaData, group: int, name: str, stored: int) -> None:
    """Refuses a row group of a Parquet file whose texts, stored once, exceed a bound once each row has its own.

    Raises:
        UserError: It names the file.
    """
    texts = [j for j in range(about.num_columns) if about.schema.column(j).physical_type == "BYTE_ARRAY"]
    for text in _repeated(about.row_group(group), texts, most(stored)):
        check_expansion(name, stored, _length(source, group, text, most(stored)))


def _repeated(group: Any, texts: list[int], most: int) -> list[str]:
    """Returns the columns of a row group whose texts, stored once, could exceed a bound once each row has its own."""
    if group.num_rows * group.total_byte_size <= most:
        return []
    columns = [group.column(j) for j in texts]  # texts alone: asking a damaged footer for others can end the process
    return [
        column.path_in_schema
        for column in columns
        if column.has_dictionary_page and column.num_values * column.total_uncompressed_size > most
    ]


def _length(source: Any, group: int, column: str, most: int) -> int:
    """Returns the bytes of all values of a column of texts, or a number beyond `most`, without holding so many."""
    if "." not in column:  # read as it is stored, each text once
        table = pq.ParquetFile(source, read_dictionary=[column]).read_row_group(group, columns=[column])
        return sum(map(_length_of, table[column].chunks))
    file, length = pq.ParquetFile(source), 0
    about = file.metadata.row_group(group)
    largest = max(about.column(j).total_uncompressed_size for j in range(about.num_columns))
    for batch in file.iter_batches(max(8, FREE // largest), row_groups=[group], columns=[column]):
        length += batch.nbytes
        if length > most:
            break
    return length


def _length_of(values: pa.Array) -> int:
    if not isinstance(values, pa.DictionaryArray):
        return int(values.nbytes)
    lengths = pc.binary_length(values.dictionary).cast(pa.int64())
    return int(pc.sum(lengths.take(values.indices)).as_py() or 0)
