"""Records of data sets in files and on the Hub, each with its place for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rolltune.data.jsonl import read_jsonl

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

Located = tuple[str, Any]  # ("train.jsonl:3" or "train.parquet, record 2", the record)


def file_records(file: Path) -> Iterator[Located]:
    """Yield the records of a .jsonl or .parquet file.

    Raises:
        ValueError: another suffix, or a file that cannot be parsed.
    """
    if file.suffix == ".jsonl":
        return ((f"{file}:{line}", record) for line, record in read_jsonl(file))
    if file.suffix == ".parquet":
        return _numbered(str(file), _parquet_records(file))
    raise ValueError(f"{file}: must be a .jsonl or .parquet file")


def hub_records(
    path: str, split: str, *, config: str | None = None, loader: str, without_network: str
) -> list[Located]:
    """Load the records of one split of a data set on the Hub.

    Args:
        path: Hub id.
        split: "train", "test" or another split of the data set.
        config: configuration of the data set; None for its default.
        loader: name of the calling function, for the error message.
        without_network: advice for the error message: what to use without the Hub.

    Raises:
        ValueError: the data set cannot be found or reached.
    """
    import datasets

    try:
        records = datasets.load_dataset(path, config, split=split)
    # datasets raises OSError or a subclass (not found, not reachable) or ValueError (no such configuration or split, or
    # not in the cache when offline).
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{loader}: path={path!r} is neither a local file nor a data set that loads from the Hub "
            f"({type(error).__name__}: {error}).\n{without_network}"
        ) from error
    return list(_numbered(f"{path}, split {split}", records))


def _numbered(source: str, records: Iterable[Any]) -> Iterator[Located]:
    return ((f"{source}, record {number}", record) for number, record in enumerate(records))


def _parquet_records(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file ({error})") from None
