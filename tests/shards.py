"""One shard: an input file, its parts and its output, without a job around them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.merging import publish
from pipeline.parts import Stamp, result_fields, result_table
from pipeline.records import Counts, Unit
from pipeline.storage import Folder

SHARD = "news.parquet"
FIELDS = result_fields("ko", pa.string())
ROWS = 60


class Shard:
    """An input file, its output folder, and what a job does to both."""

    def __init__(self, folder: Path, commit: Callable[..., bool], outputs: Callable[..., Any]):
        self.source, self.output = Folder(str(folder / "in")), Folder(str(folder / "out"))
        self._commit, self._outputs = commit, outputs

    def write(self, table: pa.Table | None = None, **options: Any) -> pa.Table:
        table = pa.table({"id": range(ROWS)}) if table is None else table
        path = Path(self.source.url) / SHARD
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, **options)
        return table

    def commit(
        self, start: int, stop: int, identity: str = "job", fingerprint: str = "1:a"
    ) -> bool:
        return self._commit(self.output, Unit(SHARD, start, stop), identity, fingerprint)

    def publish(self, rows: int = ROWS) -> Counts:
        stamp = Stamp("job", SHARD, "1:a", 0, rows, Counts(), "run")
        return publish(self.source, SHARD, self.output, stamp, SHARD, FIELDS, lambda: None)

    def published(self) -> pa.Table:
        return pq.read_table(Path(self.output.url) / SHARD)

    def expected(self, rows: int = ROWS) -> pa.Table:
        return result_table(self._outputs(SHARD, 0, rows), "ko", pa.string())


def flip_bit_in_a_page(path: Path, column: int) -> None:
    """Change one bit of the data of `column`: the last one of its last page."""
    chunk = pq.read_metadata(path).row_group(0).column(column)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
