"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator

from cairn.catalog import register
from cairn.data.corpora import Document, FileCorpus
from cairn.errors import DamagedError, InputError


@register("corpus", "parquet")
class Parquet(FileCorpus):
    """Parquet files, read in batches of rows; one column is the text. Needs the extra `hf` (pyarrow)."""

    field: str = "text"

    def documents(self) -> Iterator[Document]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise InputError("Reading Parquet needs pyarrow: pip install 'cairn-lm[hf]'.") from None
        for path in self.files():
            try:
                file = parquet.ParquetFile(path)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise DamagedError(f"{path} is not a Parquet file: {error}") from None
            if self.field not in file.schema_arrow.names:
                raise InputError(f"{path} has no column '{self.field}' (it has {', '.join(file.schema_arrow.names)}); set field=NAME.")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[self.field]):
                for text in batch.column(0).to_pylist():
                    if text:
                        yield Document(str(text), f"{path}:{number}")
                    number += 1
