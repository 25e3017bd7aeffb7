"""The tables of a run directory: their columns, and how rows become a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = "4"

GROUP_ROWS, BATCH_ROWS = 100_000, 4_000
"""Rows that are written together; and those of them that are turned into columns together: of more, the processor's
cache does not hold the dictionaries, and turning them takes three times as long.
"""


def _schema(columns: str) -> pa.Schema:
    kinds = {"i": pa.int64(), "f": pa.float64(), "s": pa.string()}
    fields = [pa.field(name, kinds[kind]) for name, kind in (word.split(":") for word in columns.split())]
    return pa.schema(fields, metadata={"schema_version": SCHEMA_VERSION})


#: The tables of a run directory and their columns (i: int64, f: float64, s: string).
TABLES: dict[str, pa.Schema] = {
    "metrics": _schema(
        "seed:i round:i time_s:f device_id:s user_id:s arm:s task:s metric:s value:f n:i"
    ),
    "events": _schema(
        "seed:i round:i time_s:f event_id:s request_id:s attempt:i device_id:s arm:s kind:s outcome:s duration_s:f "
        "bytes_up:i bytes_down:i tokens_in:i tokens_out:i energy_j:f queued_s:f steps:i detail:s"
    ),
    "samples": _schema(
        "seed:i round:i sample_id:s request_id:s device_id:s user_id:s task:s form:s input:s output:s semantic:f "
        "diversity:f length_ratio:f verdict:s truth:s scores:s"
    ),
    "predictions": _schema(
        "seed:i round:i device_id:s user_id:s arm:s task:s query_id:s query_time_s:f answered_time_s:f input:s "
        "prediction:s gold:s score:f outcome:s answered_by:s adapter_version:s adapter_time_s:f data_until_s:f "
        "cluster:s"
    ),
    "ledger": _schema(
        "seed:i round:i time_s:f device_id:s request_id:s attempt:i kind:s item_id:s chars:i tokens:i masked:i"
    ),
    "training": _schema("seed:i round:i device_id:s arm:s step:i loss:f lr:f tokens:i"),
}

#: What one pass of a round leaves to the next, on the hosts' side; no table of the run directory.
STAGED: dict[str, pa.Schema] = {
    "answers": _schema("seed:i round:i device_id:s request_id:s query_id:s outcome:s text:s"),
}

#: Beside them, where users of the embedded world change: how far each has, by round.
TRUTH = _schema("seed:i round:i device_id:s user_id:s task:s progress:f changed_on_round:i")

#: The order of rows in a finished table: whatever the number of workers, the same file.
ORDER = ("device_id", "arm", "task", "request_id", "attempt", "sample_id", "query_id", "metric", "item_id", "step")


def table_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Returns a writer of the kind of file that all tables are."""
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


def write_rows(path: Path, schema: pa.Schema, same: Mapping[str, int], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as they come: they need not be in memory together. Missing columns become null.

    Args:
        path: Where to.
        schema: The columns.
        same: Those that are the same in all rows.
        rows: All others.
    """
    batches = _batches(schema, same, iter(rows))
    with table_writer(path, schema) as writer:
        while group := list(itertools.islice(batches, GROUP_ROWS // BATCH_ROWS)):
            writer.write_table(pa.Table.from_batches(group))


def _batches(
    schema: pa.Schema, same: Mapping[str, int], rows: Iterator[Mapping[str, Any]]
) -> Iterator[pa.RecordBatch]:
    """Rows as columns, a few at a time."""
    while some := list(itertools.islice(rows, BATCH_ROWS)):
        yield pa.RecordBatch.from_arrays([
            pa.array([same[field.name]] * len(some) if field.name in same else [row.get(field.name) for row in some],
                     type=field.type)
            for field in schema
        ], schema=schema)  # fmt: skip
