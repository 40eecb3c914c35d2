"""A reader for a JSON document of any size, one value at a time."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from torchprime.data.files.record import MAX_ROW_BYTES, bad_byte
from torchprime.data.files.streams import READ_BYTES, UTF8_BOM
from torchprime.errors import DataError


class JsonFault(DataError):
    """A fault in a document, after which nothing can be read."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class JsonText:
    """A JSON document read through a window of text that moves along the file.

    The standard library decodes each value, so values are read as on a line of JSON Lines. If a
    value does not decode, the window's end may have truncated it. The window then grows until the
    value decodes, or until the fault is known to lie before the window's end.
    """

    # A fault this near to the window's end may be a truncated token: "-Infinit", "\u00e", "1.".
    EDGE = 16
    SPACE = re.compile(r"[ \t\n\r]*")
    SCALAR_END = re.compile(r"[\s,\]}]")

    def __init__(self, name: str, stream: io.BufferedReader) -> None:
        self.name = name
        self.item = 0  # index in an array: of the item being read, or read last
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder().raw_decode
        self._window, self._pos = "", 0
        self._line, self._column = 1, 1  # of the window's first character
        self._bytes = 0  # read so far
        self._ended = False
        # a bad byte directly after the window; its line
        self._broken: tuple[str, int] | None = None

    def peek(self) -> str:
        """Return the next character that is no space, to be read next; "" at the end."""
        while True:
            self._pos = self.SPACE.match(self._window, self._pos).end()  # type: ignore[union-attr]
            if self._pos < len(self._window):
                return self._window[self._pos]
            if not self._more():
                return ""

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise self.fault(f"expecting '{expected}'")
        self._pos += 1

    def value(self) -> Any:
        """Decode the value that begins here; raises JsonFault."""
        if self.peek() not in '{["':
            self._hold_scalar()
        while True:
            try:
                value, end = self._decode(self._window, self._pos)
            except json.JSONDecodeError as error:
                problem, ahead = error.msg, error.pos - self._pos
            except (ValueError, RecursionError) as error:  # too many digits or too deep nesting
                raise self.fault(f"it is beyond the parser's limits ({error})") from None
            else:
                self._check_size(end - self._pos)
                self._pos = end
                return value
            held = len(self._window) - self._pos
            cut = problem.startswith("Unterminated") or ahead >= held - self.EDGE
            if not cut or not self._more():
                raise self.fault(problem[:1].lower() + problem[1:], self._pos + ahead)
            self._check_size(held)

    def _hold_scalar(self) -> None:
        """Extend the window to the end of a number: half of one decodes too."""
        while not self.SCALAR_END.search(self._window, self._pos) and self._more():
            self._check_size(len(self._window) - self._pos)

    def items(self) -> Iterator[Any]:
        """Yield the items of the array that begins here."""
        self.take("[")
        self.item = 0
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            self.item += 1
            yield self.value()
            if self.peek() == "]":
                self.take("]")
                return
            if self.peek() != ",":
                raise self.fault("expecting ',' delimiter")
            self.take(",")

    def fields(self) -> Iterator[str]:
        """Yield the keys of the object that begins here; the caller reads each value."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                raise self.fault("expecting property name enclosed in double quotes")
            key = self.value()
            self.take(":")
            yield key
            if self.peek() == "}":
                self.take("}")
                return
            if self.peek() != ",":
                raise self.fault("expecting ',' delimiter")
            self.take(",")

    def line(self) -> int:
        return self._place(self._pos)[0]

    def fault(self, problem: str, at: int | None = None) -> JsonFault:
        line, column = self._place(self._pos if at is None else at)
        item = f", item {self.item}" if self.item else ""
        return JsonFault(
            f"{self.name}: malformed JSON: {problem}: line {line}, column {column}{item}. "
            f"Expected one array of objects (.json) or one object per line (.jsonl); "
            f"correct the file there",
            line,
        )

    def _check_size(self, size: int) -> None:
        if size <= MAX_ROW_BYTES:
            return
        line, column = self._place(self._pos)
        item = f"item {self.item}" if self.item else "the value"
        raise JsonFault(
            f"{self.name}: {item} at line {line}, column {column} is larger than "
            f"{MAX_ROW_BYTES:,} bytes, the largest row. Split it, or take it out",
            line,
        )

    def _place(self, pos: int) -> tuple[int, int]:
        """Return line and column of a position in the window, both from 1."""
        lines = self._window.count("\n", 0, pos)
        if not lines:
            return self._line, self._column + pos
        return self._line + lines, pos - self._window.rindex("\n", 0, pos)

    def _more(self) -> bool:
        """Move the window's start to here and extend it; return False at the end of the file."""
        if self._broken:
            raise JsonFault(*self._broken)
        if self._ended:
            return False
        self._line, self._column = self._place(self._pos)
        # Double the window: a large value is then decoded a few times, not once for each piece
        # read.
        raw = self._stream.read(max(READ_BYTES, len(self._window) - self._pos))
        self._ended = not raw
        piece = raw if self._bytes else raw.removeprefix(UTF8_BOM)
        kept = self._utf8.getstate()[0]
        try:
            text = self._utf8.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            # The text before the bad byte is valid and may be all that the caller needs.
            text = error.object[: error.start].decode("utf-8")
            line = self._place(len(self._window))[0] + text.count("\n")
            where = self._bytes + len(raw) - len(piece) - len(kept) + error.start
            message = (
                f"{self.name}: not valid UTF-8: {bad_byte(error, where)}, line {line}. "
                f"Save the file as UTF-8"
            )
            self._broken = message, line
        self._bytes += len(raw)
        self._window, self._pos = self._window[self._pos :] + text, 0
        return not self._ended or bool(self._broken)
