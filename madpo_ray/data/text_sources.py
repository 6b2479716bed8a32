"""JSON Lines, JSON arrays and CSV files of preference pairs, plain or compressed."""

import csv
import io
import itertools
from collections.abc import Callable, Iterator
from typing import BinaryIO, ClassVar

from madpo_ray.config import is_remote
from madpo_ray.data import files
from madpo_ray.data.files import COMPRESSIONS, READ_BYTES, WHOLE, DataFile, Piece, Row
from madpo_ray.data.strict_json import ArrayParser, parse_json
from madpo_ray.errors import UserError

# Rows whose keys are the columns of a JSON file.
ROWS_WITH_KEYS = 100
# Of a file that several workers read.
PIECE_BYTES = 8 * 2**20
# How files begin that are not the text that their name says.
_OTHER_KINDS = {
    b"\x1f\x8b": "is compressed with gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: let its name end in .zst",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"PAR1": "is a Parquet file: name it .parquet",
    b"ARROW1": "is an Arrow file: name it .arrow",
    b"version https://git-lfs": "is a Git LFS pointer: fetch the file (git lfs pull)",
    b"\xff\xfe": "is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as UTF-8",
}
# What a compressed file that is damaged raises.
UNPACK_ERRORS = (*files.READ_ERRORS, EOFError)


def with_compressions(*suffixes: str) -> tuple[str, ...]:
    """Suffixes, and the same with those of compressed files."""
    return tuple(suffix + end for suffix in suffixes for end in ("", *COMPRESSIONS))


def _read_head(file: DataFile) -> bytes:
    """The beginning of a text file. Raises UserError for a file of another kind."""
    try:
        with file.open_text() as stream:
            head = stream.read(1024)
    except UNPACK_ERRORS as error:
        raise UserError(f"data.files: {file} cannot be read: {error}") from None
    for start, what in _OTHER_KINDS.items():
        if head.startswith(start):
            raise UserError(f"data.files: {file} {what}")
    return head


def _first_keys(found: Iterator[Row | str]) -> list[str] | None:
    """The keys of the first rows that are objects: a key may be left out of some."""
    objects = (row for row in found if isinstance(row, dict))
    first = list(itertools.islice(objects, ROWS_WITH_KEYS))
    return list(dict.fromkeys(key for row in first for key in row)) if first else None


def _count(file: DataFile, mark: bytes) -> int:
    """How often a byte is in a file, and one more if it does not end with it."""
    count = 0
    block = mark
    with file.open_text() as stream:
        while more := stream.read(READ_BYTES):
            block = more
            count += block.count(mark)
    return count + (not block.endswith(mark))


def _cut_at_lines(file: DataFile) -> Iterator[Piece]:
    """Pieces of about PIECE_BYTES that begin with a line."""
    start = 0
    row = 0
    with io.BufferedReader(file.open(), READ_BYTES) as stream:
        while block := stream.read(PIECE_BYTES):
            num_rows = block.count(b"\n")
            if not block.endswith(b"\n"):
                num_rows += _skip_line(stream)
            yield Piece(start, stream.tell(), row)
            start = stream.tell()
            row += num_rows


class JSONLinesSource:
    """One JSON object per line."""

    suffixes: ClassVar[tuple[str, ...]] = with_compressions(".jsonl", ".ndjson")
    has_types: ClassVar[bool] = True

    def __init__(self, file: DataFile) -> None:
        self._file = file

    def columns(self) -> list[str] | None:
        if _read_head(self._file).lstrip().startswith(b"["):
            raise UserError(
                f"data.files: {self._file} is a JSON array, not JSON Lines: name it .json"
            )
        return _first_keys(self.rows())

    def pieces(self) -> list[Piece]:
        """Of a compressed file, and of one that would have to be fetched for it, the whole."""
        if self._file.suffix in COMPRESSIONS or is_remote(self._file.name):
            return [WHOLE]
        return list(_cut_at_lines(self._file)) or [WHOLE]

    def rows(self, piece: Piece = WHOLE) -> Iterator[Row | str]:
        return _until_damage(lambda: self._rows(piece))

    def _rows(self, piece: Piece) -> Iterator[Row | str]:
        with self._file.open_text() as stream:
            if piece.start:
                stream.seek(piece.start)
            while piece.stop is None or stream.tell() < piece.stop:
                if not (line := stream.readline(files.MAX_LINE_BYTES)):
                    return
                if len(line) == files.MAX_LINE_BYTES and not line.endswith(b"\n"):
                    _skip_line(stream)
                    yield f"line is longer than {files.MAX_LINE_BYTES // 2**20} MiB"
                else:
                    yield _json_row(line) if line.strip() else files.BLANK

    def count(self) -> int:
        return _count(self._file, b"\n")


class JSONSource:
    """A JSON array of objects; or JSON Lines, which often have this suffix, too."""

    suffixes: ClassVar[tuple[str, ...]] = with_compressions(".json")
    has_types: ClassVar[bool] = True

    def __init__(self, file: DataFile) -> None:
        self._file = file

    def columns(self) -> list[str] | None:
        return _first_keys(self.rows())

    def pieces(self) -> list[Piece]:
        return [WHOLE]

    def rows(self, piece: Piece = WHOLE) -> Iterator[Row | str]:
        if self._is_array():
            return _until_damage(self._rows)
        return JSONLinesSource(self._file).rows()

    def _is_array(self) -> bool:
        return _read_head(self._file).lstrip().startswith(b"[")

    def _rows(self) -> Iterator[Row | str]:
        with self._file.open_text() as stream:
            yield from ArrayParser(stream).elements()

    def count(self) -> int:
        if self._is_array():
            return sum(1 for _ in self._rows())
        return JSONLinesSource(self._file).count()


class CSVSource:
    """Comma- or tab-separated text with a header; every value is text."""

    suffixes: ClassVar[tuple[str, ...]] = with_compressions(".csv", ".tsv")
    has_types: ClassVar[bool] = False

    def __init__(self, file: DataFile) -> None:
        self._file = file
        is_tsv = file.ends_with(with_compressions(".tsv"))
        self._delimiter = "\t" if is_tsv else ","

    def columns(self) -> list[str] | None:
        _read_head(self._file)
        try:
            with self._file.open_text() as stream:
                names = next(self._records(stream), None)
        except (*UNPACK_ERRORS, csv.Error) as error:
            raise UserError(f"data.files: {self._file} cannot be read: {error}") from None
        for name in names or ():
            if names is not None and names.count(name) > 1:
                raise UserError(f"data.files: {self._file} has two columns {name!r}: rename one")
        return names

    def pieces(self) -> list[Piece]:
        return [WHOLE]  # a quoted value may hold line breaks

    def rows(self, piece: Piece = WHOLE) -> Iterator[Row | str]:
        return _until_damage(self._rows)

    def _rows(self) -> Iterator[Row | str]:
        with self._file.open_text() as stream:
            records = self._records(stream)
            names = next(records, [])
            for record in records:
                if len(record) == len(names):
                    yield dict(zip(names, record, strict=True))
                elif record:  # an empty line is none
                    yield f"row has not as many fields as the header: {len(record)}"

    def _records(self, stream: BinaryIO) -> Iterator[list[str]]:
        csv.field_size_limit(files.MAX_LINE_BYTES)
        # What is no UTF-8 spoils its own row only.
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        return csv.reader(text, delimiter=self._delimiter, strict=True)

    def count(self) -> int:
        return sum(1 for _ in self._rows())


def _until_damage(read: Callable[[], Iterator[Row | str]]) -> Iterator[Row | str]:
    """Rows up to where a file is damaged, and that as the last reason."""
    try:
        yield from read()
    except (*UNPACK_ERRORS, csv.Error, UnicodeDecodeError) as error:
        yield f"{files.DAMAGED}: {error}"


def _skip_line(stream: BinaryIO) -> bool:
    """Reads up to the end of a line; whether it has one."""
    while rest := stream.readline(files.MAX_LINE_BYTES):
        if rest.endswith(b"\n"):
            return True
    return False


def _json_row(line: bytes) -> Row | str:
    try:
        row, repeated = parse_json(line.decode("utf-8").rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        return f"line is not JSON: {error}"
    if repeated is not None:
        return f"a key appears twice: {repeated!r}"
    return row if isinstance(row, dict) else "line is not a JSON object"
