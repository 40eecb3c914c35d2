"""A JSON document of any size, read value by value."""

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
    """A document that cannot be read on from this line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class JsonText:
    """A JSON document seen through a window of text that moves along the file.

    Values are decoded by the standard library, so that one means here what it means on a line of
    JSON Lines. A value that does not decode may only be cut by the window's edge: the window grows
    until it does, or until the fault is known to lie before the edge.
    """

    # A fault this near to the edge may be the cut itself: "-Infinit", "\u00e", "1.".
    EDGE = 16
    SPACE = re.compile(r"[ \t\n\r]*")
    SCALAR_END = re.compile(r"[\s,\]}]")

    def __init__(self, name: str, stream: io.BufferedReader) -> None:
        self.name = name
        self.item = 0  # of an array: the one being read, or read last
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder().raw_decode
        self._window, self._pos = "", 0
        self._line, self._column = 1, 1  # of the window's first character
        self._bytes = 0  # read so far
        self._ended = False
        self._broken: tuple[str, int] | None = None  # a bad byte just after the window; its line

    def peek(self) -> str:
        """The next character that is no space, which is then the next to read; "" at the end."""
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
        """The value that begins here, decoded; raises JsonFault."""
        if self.peek() not in '{["':
            self._hold_scalar()
        while True:
            try:
                value, end = self._decode(self._window, self._pos)
            except json.JSONDecodeError as error:
                problem, ahead = error.msg, error.pos - self._pos
            except (ValueError, RecursionError) as error:  # numbers or nesting
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
        """Have a number in the window to its end: half of one decodes too."""
        while not self.SCALAR_END.search(self._window, self._pos) and self._more():
            self._check_size(len(self._window) - self._pos)

    def items(self) -> Iterator[Any]:
        """The items of the array that begins here."""
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
        """The keys of the object that begins here; at each the caller reads the value."""
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
        """Line and column of a position in the window, both from 1."""
        lines = self._window.count("\n", 0, pos)
        if not lines:
            return self._line, self._column + pos
        return self._line + lines, pos - self._window.rindex("\n", 0, pos)

    def _more(self) -> bool:
        """Move the window to here and make it longer; False at the end of the file."""
        if self._broken:
            raise JsonFault(*self._broken)
        if self._ended:
            return False
        self._line, self._column = self._place(self._pos)
        # As much again as is held: a large value is decoded a few times, not once a piece.
        raw = self._stream.read(max(READ_BYTES, len(self._window) - self._pos))
        self._ended = not raw
        piece = raw if self._bytes else raw.removeprefix(UTF8_BOM)
        kept = self._utf8.getstate()[0]
        try:
            text = self._utf8.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            # What stands before the bad byte is good, and may be all that is asked for.
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
