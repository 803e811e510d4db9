"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cairn.catalog import register
from cairn.data.corpora import Document, FileCorpus
from cairn.errors import DamagedError, InputError


@register("corpus", "parquet")
class Parquet(FileCorpus):
    """Parquet files, read in batches of rows; one column is the text. Needs the extra `hf` (pyarrow)."""

    field: str = "text"
    keep: list[str] = []
    """Further columns that documents bring along, for metadata."""

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
            columns = [self.field, *self.keep]
            missing = next((column for column in columns if column not in file.schema_arrow.names), None)
            if missing is not None:
                raise InputError(f"{path} has no column '{missing}' (it has {', '.join(file.schema_arrow.names)}); set field=NAME, keep=[NAME].")
            kind = file.schema_arrow.field(self.field).type
            if not is_text(kind):
                raise InputError(f"The column '{self.field}' of {path} holds {kind}, not text; {_texts(file.schema_arrow)}.")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    if row[self.field]:
                        yield Document(row[self.field], f"{path}:{number}", row)
                    number += 1


def is_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds text, plain or as a dictionary."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _texts(schema: Any) -> str:
    names = [field.name for field in schema if is_text(field.type)]
    return f"columns of text: {', '.join(names)}; set field=NAME" if names else "it has no column of text"
