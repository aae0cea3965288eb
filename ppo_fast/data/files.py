"""Read rows of data and prompts: from files, from folders, from names on the hub."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ppo_fast.data.examples import PROMPT_COLUMNS, Example, Stream, as_example
from ppo_fast.hub import why_not_on_hub

ENDINGS = (".txt", ".jsonl", ".csv", ".parquet")


def read_prompts(
    name: str | Path,
    *,
    column: str | None = None,
    split: str = "train",
    stream: bool = False,
    what: str = "prompts",
) -> list[Example] | Stream:
    """Read prompts and the other columns of their rows.

    Args:
        name: a .txt (a prompt a line, empty lines skipped), .jsonl, .csv or .parquet file, the
            folder of a data set, or its name on the hub.
        column: the column with the prompts; None: "prompt", or else "messages".
        split: of a data set that has several.
        stream: read a data set of the hub while it is trained on, in its own order.
        what: how errors name the argument.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, a row without a prompt, no prompts at all, or a library that is
            missing.
    """
    if stream and Path(name).is_file():
        raise ValueError(f"{what}: {name} is a file, which is read whole; leave stream out")
    if stream:
        return Stream(_data_set(str(name), split, what, stream=True), column)
    examples = []
    for where, row in _rows(str(name), split, what):
        if isinstance(row, dict) and column is not None and column not in row:
            raise ValueError(
                f'{what}: {where} has no "{column}"; it has the columns {", ".join(map(str, row))}'
            )
        try:
            examples.append(as_example(row, f"{what}: {where}", column))
        except TypeError as error:
            known = row if isinstance(row, dict) else ()
            named = column or next((c for c in PROMPT_COLUMNS if c in known), "prompt")
            raise ValueError(
                f'{what}: {where} has no "{named}" that is a string, a list of ids or messages'
            ) from error
    if not examples:
        raise ValueError(f"{what}: {name} holds no prompts")
    return examples


def read_rows(
    name: str | Path, split: str = "train", *, what: str = "data"
) -> list[dict[str, Any]]:
    """Read the rows of a file, folder or data set of the hub; the arguments are those above.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read; a row is no mapping; there are none.
    """
    rows = []
    for where, row in _rows(str(name), split, what):
        if not isinstance(row, dict):
            raise ValueError(f"{what}: {where} is a {type(row).__name__}, expected a mapping")
        rows.append(row)
    if not rows:
        raise ValueError(f"{what}: {name} holds no rows")
    return rows


def hold_out(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on and a share of them that is held out, at least one each.

    Those held out stand at equal distances: they depend on the data alone, not on a seed.

    Raises:
        ValueError: the share is not in (0, 1), or there are fewer than two examples.
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out: got {share}, expected a share in (0, 1)")
    if len(examples) < 2:
        raise ValueError(f"held_out: got {len(examples)} prompts, of which none can be held out")
    count = min(max(round(share * len(examples)), 1), len(examples) - 1)
    chosen = {(2 * i + 1) * len(examples) // (2 * count) for i in range(count)}
    return (
        [example for i, example in enumerate(examples) if i not in chosen],
        [example for i, example in enumerate(examples) if i in chosen],
    )


def hold_out_where(
    examples: list[Example], column: str, value: str
) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on, and those whose ``column`` reads ``value``.

    Raises:
        ValueError: one of the two parts is empty.
    """
    held_out = [e for e in examples if str(e.columns.get(column)) == value]
    rest = [e for e in examples if str(e.columns.get(column)) != value]
    if not held_out or not rest:
        columns = sorted({name for e in examples for name in e.columns})
        if column not in columns:
            raise ValueError(
                f"held_out: there is no column {column!r}; there are {', '.join(columns) or 'none'}"
            )
        known = sorted({str(e.columns.get(column)) for e in examples})[:8]
        raise ValueError(
            f"held_out: the column {column!r} reads {value!r} in {len(held_out)} of "
            f"{len(examples)} rows; it has {', '.join(known)}"
        )
    return rest, held_out


def _rows(name: str, split: str, what: str) -> Iterator[tuple[str, Any]]:
    """Yield each row of a file or a data set, and where it stands."""
    path = Path(name)
    if path.is_file():
        yield from _rows_of_file(path, what)
    elif path.is_dir() or _may_be_on_hub(name):
        for number, row in enumerate(_data_set(name, split, what)):
            yield f"{name} row {number}", row
    else:
        raise FileNotFoundError(f"{what}: no file {name}")


def _rows_of_file(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        for number, row in enumerate(_parquet(path, what)):
            yield f"{path} row {number}", row
        return
    if path.suffix not in ENDINGS:
        raise ValueError(f"{what}: {path} ends in {path.suffix!r}, expected {', '.join(ENDINGS)}")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: {path} cannot be read ({error})") from error
    if path.suffix == ".csv":
        yield from _csv(text, path, what)
        return
    # not splitlines: JSON strings may hold U+2028 and its like
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            is_text = path.suffix == ".txt"
            row = {"prompt": line} if is_text else _json(line, path, number, what)
            yield f"{path} line {number}", row


def _json(line: str, path: Path, number: int, what: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # digits and depth without end are not its own
        raise ValueError(f"{what}: {path} line {number} is not JSON: {error}") from error


def _csv(text: str, path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a table, however long its texts are; csv's own limit is 131,072 characters."""
    before = csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text), strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{what}: {path} has two columns of one name: {', '.join(header)}")
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{what}: {path} line {rows.line_num} has {len(row)} fields, expected "
                    f"{len(header)} ({', '.join(header)}); a text with commas or line breaks "
                    "needs quotes"
                )
            yield f"{path} line {rows.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{what}: {path} line {rows.line_num} cannot be read ({error}); look for a quote that "
            "does not end"
        ) from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, what: str) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{what}: {path} needs pyarrow: pip install 'ppo_fast[data]'") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{what}: {path} cannot be read ({error})") from error


def _may_be_on_hub(name: str) -> bool:
    """Return whether ``name`` can be one of the hub's: "name" or "organisation/name"."""
    path = Path(name)
    marked = name.startswith((".", "~", "/")) or name.endswith("/") or "\\" in name
    return not marked and path.suffix not in (*ENDINGS, ".json") and len(path.parts) in (1, 2)


def _data_set(name: str, split: str, what: str, *, stream: bool = False) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{what}: there is no file {name}; data sets need datasets: "
            "pip install 'ppo_fast[data]'"
        ) from error
    try:
        if (Path(name) / "state.json").is_file():
            return datasets.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(name)
            if split not in splits:
                raise ValueError(f"no split {split!r}; it has {', '.join(splits)}")
            return splits[split]
        if not Path(name).is_dir() and (reason := why_not_on_hub(name, "dataset")):
            raise FileNotFoundError(reason)
        return datasets.load_dataset(name, split=split, streaming=stream)
    except Exception as error:  # of the hub, the files' formats, and what is in them
        line = (str(error) or type(error).__name__).splitlines()[0]
        if Path(name).is_dir():
            raise ValueError(f"{what}: the folder {name} cannot be read ({line})") from error
        raise ValueError(
            f"{what}: no file {name}, and no data set of this name ({line})"
        ) from error
