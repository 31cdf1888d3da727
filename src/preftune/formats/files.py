"""Rows from files, directories, the bundled sample and the Hub, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.resources
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from preftune.errors import UserError
from preftune.formats.reasons import RowError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".tsv")
_BUNDLED = "sample:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\-+\[\]%:]+)?")
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


class Found(NamedTuple):
    """A row and its file:line; a RowError in its place where there is no object to read."""

    where: str
    row: Any


class Source(NamedTuple):
    """One file (or Hub data set): its name for messages, its rows, and its raw bytes in chunks, for the hash."""

    name: str
    rows: Callable[[], Iterator[Found]]
    chunks: Callable[[], Iterator[bytes]]


def sources(source: str | Path | Sequence[str | Path]) -> list[Source]:
    """Every file that the source names, directories in the order of their file names. Raises UserError for what is not there."""
    if isinstance(source, (str, Path)):
        return list(_resolve(source))
    return [one for part in source for one in _resolve(part)]


def sha256(found: Sequence[Source]) -> str:
    """Hash over the raw bytes of all sources in order, each ended by its length so that no two lists look alike."""
    digest = hashlib.sha256()
    for source in found:
        size = 0
        for chunk in source.chunks():
            digest.update(chunk)
            size += len(chunk)
        digest.update(f"|{size}|".encode())
    return digest.hexdigest()


def _resolve(source: str | Path) -> Iterator[Source]:
    text = str(source)
    if text.startswith(_BUNDLED):
        yield _file(_bundled(text), text)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_data(file, path))
        if not files:
            raise UserError("the directory holds no data file", where=text, fix=f"Known endings: {', '.join(SUFFIXES)}")
        yield from (_file(file, str(file)) for file in files)
    elif path.exists():
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError("unknown kind of file", where=text, fix=f"Known endings: {', '.join(SUFFIXES)}")
        yield _file(path, text)
    elif _HUB_ID.fullmatch(text) and not text.lower().endswith(SUFFIXES) and not path.parent.is_dir():
        yield _hub(text)
    else:
        raise UserError("no such file or directory", where=text, fix="Check the path")


def _is_data(file: Path, top: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(top).parts)
    return file.is_file() and not hidden and file.name.lower().endswith(SUFFIXES) and file.name not in _NOT_DATA


def _bundled(text: str) -> Path:
    folder = Path(str(importlib.resources.files("preftune") / "data" / "sample"))
    path = folder / f"{text.removeprefix(_BUNDLED)}.jsonl"
    if not path.is_file():
        names = ", ".join(f"{_BUNDLED}{file.stem}" for file in sorted(folder.glob("*.jsonl")))
        raise UserError("no such sample", where=text, fix=f"There are {names}")
    return path


def _file(path: Path, name: str) -> Source:
    """The reader by the file's ending; JSON is told apart from JSON lines by its content, since both endings are used for both."""
    ending = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    reader: Callable[[Path, str], Iterator[Found]]
    reader = {"parquet": _parquet, "csv": _delimited, "tsv": _delimited}.get(ending, _json)

    def rows() -> Iterator[Found]:
        try:
            yield from reader(path, name)
        except OSError as error:  # also a broken gzip stream
            raise UserError(f"cannot be read: {error.strerror or error}", where=name, fix="Check or fetch the file again") from error
        except (EOFError, zlib.error) as error:
            raise UserError(f"the compressed file is cut off or damaged: {error}", where=name, fix="Fetch or compress it again") from error

    def chunks() -> Iterator[bytes]:
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    yield chunk
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror or error}", where=name, fix="Check the file and its rights") from error

    return Source(name, rows, chunks)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _json(path: Path, name: str) -> Iterator[Found]:
    with _open(path) as file:
        start = file.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError("the file is UTF-16", where=name, fix="Save it as UTF-8")
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    lines_by_name = path.name.lower().removesuffix(".gz").endswith(".jsonl")
    if first == b"[" or (first == b"{" and not lines_by_name and not _is_object(start)):
        yield from _document(path, name)
    else:
        yield from _lines(path, name)


def _is_object(start: bytes) -> bool:
    """Whether the first line is a JSON object by itself, so that a file named .json holds JSON lines."""
    line, newline, _ = start.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    try:
        return bool(newline) and isinstance(json.loads(line), dict)
    except ValueError:
        return bool(newline) and len(line) > 1 and not line.rstrip().endswith((b"{", b"["))


def _lines(path: Path, name: str) -> Iterator[Found]:
    """JSON lines, cut at \\n alone: U+2028 and its like are text. Blank lines are no rows."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{name}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Found(where, _parsed(line))


def _parsed(line: bytes) -> Any:
    try:
        return as_row(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return RowError("bad_utf8", f"byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return RowError("broken_json", f"{error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return RowError("broken_json", str(error))


def as_row(value: Any) -> Any:
    """The value if it can be a row: an object whose strings are all Unicode text; else a RowError that says why not."""
    if not isinstance(value, dict):
        return RowError("not_an_object", f"found {type(value).__name__}")
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return RowError("bad_unicode")
    return value


def _document(path: Path, name: str) -> Iterator[Found]:
    """One JSON document: an array of rows, an object with such an array in "data", or a single row."""
    text = _text(path, name)
    if text.lstrip().startswith("["):
        yield from _array(text, name)
        return
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(error, text, name) from None
    rows = document.get("data") if isinstance(document.get("data"), list) else [document]
    for number, row in enumerate(rows, 1):
        yield Found(f"{name}:row {number}", as_row(row))


def _text(path: Path, name: str) -> str:
    with _open(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError("not UTF-8 text", where=f"{name}:{line}", fix="Save the file as UTF-8") from None


def _array(text: str, name: str) -> Iterator[Found]:
    """The rows of an array with the line each starts on; decoded one by one, so that a broken end names its place."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]  # the pattern matches everywhere

    at, line, counted = skip(skip(0) + 1), 1, 0
    closed = text[at : at + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _broken(error, text, name) from None
        yield Found(f"{name}:{line}", as_row(row))
        at = skip(at)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            raise _broken(json.JSONDecodeError("Expecting ',' or ']'", text, at), text, name)
        at = skip(at + 1)
    if at < len(text) and text[at:].strip(" \t\r\n]"):
        raise _broken(json.JSONDecodeError("Extra data", text, at), text, name)


def _broken(error: Exception, text: str, name: str) -> UserError:
    if not isinstance(error, json.JSONDecodeError):
        return UserError(f"broken JSON: {error}", where=name, fix="Repair the file")
    cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
    what = "the JSON is cut off" if cut else f"broken JSON: {error.msg}"
    return UserError(f"{what} (column {error.colno})", where=f"{name}:{error.lineno}", fix="Repair the file or fetch it again")


def _delimited(path: Path, name: str) -> Iterator[Found]:
    """CSV or TSV with a header. A cell that holds a JSON array of objects, or the K lists of K-wise data, is read as JSON."""
    text = _text(path, name)
    delimiter = "\t" if path.name.lower().endswith((".tsv", ".tsv.gz")) else ","
    csv.field_size_limit(1 << 30)  # a response may well exceed the 128 kB that csv allows
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{name}:{reader.line_num - sum(cell.count(chr(10)) for cell in cells)}"
            if not header:
                header = cells
            elif len(cells) == len(header):
                yield Found(where, as_row({key: _cell(key, value) for key, value in zip(header, cells)}))
            elif cells:
                yield Found(where, RowError("broken_csv", f"{len(cells)} cells where the header has {len(header)}"))
    except csv.Error as error:
        yield Found(f"{name}:{reader.line_num}", RowError("broken_csv", str(error)))


def _cell(key: str, value: str) -> Any:
    if value.startswith("[{") or (key in ("responses", "scores") and value.startswith("[")):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _parquet(path: Path, name: str) -> Iterator[Found]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=512):
            for row in batch.to_pylist():
                number += 1
                yield Found(f"{name}:row {number}", as_row(_jsonable(row)))
    except pyarrow.ArrowException as error:
        raise UserError(f"not a readable Parquet file: {error}", where=name, fix="Fetch or write it again") from error


def _jsonable(value: Any) -> Any:
    """Arrow and Hub values as JSON data: dates and decimals as text, bytes as text where they are UTF-8."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _hub(text: str) -> Source:
    """A data set of the Hugging Face Hub, `owner/name` or `owner/name:split` (default split: train)."""
    name, _, split = text.partition(":")
    loaded: list[Any] = []

    def rows() -> Iterator[Found]:
        if not loaded:
            loaded.append(_load_hub(name, split or "train", text))
        for number, row in enumerate(loaded[0], 1):
            yield Found(f"{text}:row {number}", as_row(_jsonable(row)))

    def chunks() -> Iterator[bytes]:
        for _, row in rows():
            yield json.dumps(row, ensure_ascii=True, sort_keys=True, default=str).encode() + b"\n"

    return Source(text, rows, chunks)


def _load_hub(name: str, split: str, text: str) -> Any:
    try:
        import datasets

        return datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets raises errors of many libraries; each means that the data cannot be had
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"no such file, and no data set of the Hugging Face Hub could be loaded: {reason}",
            where=text,
            fix="Check the path or the owner/name, the network, and owner/name:split",
        ) from error
