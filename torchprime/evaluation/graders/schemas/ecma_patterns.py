r"""Translation of ECMA-262 regular expressions, which JSON Schema uses, to the `regex` library.

The two languages look alike and differ. In ECMA-262 `$` is the very end of the text and never
before a last newline, `\d` and `\w` are ASCII, a dot does not match `\r`, `[]` matches nothing, a
reference to a group that did not take part matches the empty text, and `\A`, `(?i)` and `a++` do
not exist. A pattern is translated piece by piece. A part that ECMA-262 does not have, or that would
mean something else here, is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NoReturn

import regex

DIGIT, WORD = "0-9", "A-Za-z0-9_"
SPACE = r"\t\n\x0b\f\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
SETS = {"d": DIGIT, "w": WORD, "s": SPACE}
NOT_LINE_END = r"[^\n\r\u2028\u2029]"
EDGE = f"(?:(?<=[{WORD}])(?![{WORD}])|(?<![{WORD}])(?=[{WORD}]))"
NO_EDGE = f"(?:(?<=[{WORD}])(?=[{WORD}])|(?<![{WORD}])(?![{WORD}]))"
CONTROLS = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}
LOOKS = ("?=", "?!", "?<=", "?<!")
QUANTIFIER = regex.compile(r"\*|\+|\?|\{(?P<least>[0-9]+)(?:,(?P<most>[0-9]*))?\}")
NAME = regex.compile(r"[\p{ID_Start}$_][\p{ID_Continue}$\u200c\u200d]*")
PROPERTY = regex.compile(r"\{(\w+(?:=\w+)?)\}")


class PatternError(ValueError):
    """Error for a pattern that is not ECMA-262, or has a part that can't be translated."""


@lru_cache(maxsize=1024)
def compile_ecma(pattern: str) -> regex.Pattern[str]:
    """Compile an ECMA-262 pattern (in its unicode mode) for searching.

    Raises:
        PatternError: naming the part and its place.
    """
    translated = _Translation(pattern).whole()
    try:
        return regex.compile(translated, regex.V1)
    except regex.error as error:
        raise PatternError(f"it cannot be translated: {error}") from None


@dataclass
class _Group:
    """A capturing group."""

    number: int
    inside: tuple[int, ...]  # the positions of the groups of any kind around it
    closed: bool = False


@dataclass
class _Translation:
    """A pattern that is being translated; `at` is the position of the next character."""

    pattern: str
    at: int = 0
    groups: list[_Group] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    around: list[int] = field(default_factory=list)  # positions of the open groups of any kind
    repeated: set[int] = field(default_factory=set)  # positions of groups with a quantifier
    references: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)

    def whole(self) -> str:
        """Return the translation of the whole pattern."""
        text = self._alternatives()
        if self.at < len(self.pattern):
            self._refuse("a ) that closes nothing")
        for place, number, around in self.references:
            group = self.groups[number - 1]
            if any(each in self.repeated and each not in around for each in group.inside):
                self._refuse(
                    f"a reference to group {number} from outside of the repeated group around it",
                    place,
                )
        return text

    def _refuse(self, what: str, place: int | None = None) -> NoReturn:
        raise PatternError(f"{what} at position {self.at if place is None else place}")

    def _next(self, text: str) -> bool:
        """Return True and skip the text if it comes next."""
        if not self.pattern.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    # Terms ----------------------------------------------------------------------------------------

    def _alternatives(self) -> str:
        parts = []
        while self.at < len(self.pattern) and self.pattern[self.at] != ")":
            parts.append("|" if self._next("|") else self._term())
        return "".join(parts)

    def _term(self) -> str:
        start = self.at
        char = self.pattern[start]
        self.at += 1
        repeatable = True
        if char == "(":
            atom, repeatable = self._group(start)
        elif char == "[":
            atom = self._class(start)
        elif char == "\\":
            atom, repeatable = self._escape(start)
        elif char in "^$":
            atom, repeatable = (r"\A" if char == "^" else r"\Z"), False
        elif char == ".":
            atom = NOT_LINE_END
        elif QUANTIFIER.match(self.pattern, start):
            self._refuse("nothing to repeat", start)
        else:
            atom = _literal(char)
        quantifier = QUANTIFIER.match(self.pattern, self.at)
        if quantifier is None:
            return atom
        if not repeatable:
            self._refuse("a repeated assertion", quantifier.start())
        self.at = quantifier.end()
        if quantifier["most"] and int(quantifier["most"]) < int(quantifier["least"]):
            self._refuse("a quantifier out of order", quantifier.start())
        if char == "(":
            self.repeated.add(start)
        return atom + quantifier.group() + ("?" if self._next("?") else "")

    def _group(self, start: int) -> tuple[str, bool]:
        """Return the group that begins at `start`, and True if it may be repeated."""
        opening, group = "(", None
        look = next((look for look in reversed(LOOKS) if self._next(look)), None)
        if look is not None:
            opening = f"({look}"
        elif self._next("?:"):
            opening = "(?:"
        else:
            if self._next("?<"):
                self._name(start)
            elif self.pattern.startswith("?", self.at):
                self._refuse(f"({self.pattern[self.at : self.at + 2]}, which ECMA-262 lacks", start)
            group = _Group(len(self.groups) + 1, tuple(self.around))
            self.groups.append(group)
        self.around.append(start)
        inner = self._alternatives()
        self.around.pop()
        if not self._next(")"):
            self._refuse("a missing ) for the ( ", start)
        if group is not None:
            group.closed = True
        return f"{opening}{inner})", look is None

    def _name(self, start: int) -> None:
        """Read the name of the group that comes next."""
        name = NAME.match(self.pattern, self.at)
        if name is None or not self.pattern.startswith(">", name.end()):
            self._refuse("a bad name of a group", start)
        if name.group() in self.names:
            self._refuse(f"the name {name.group()} for a second group", start)
        self.names[name.group()] = len(self.groups) + 1
        self.at = name.end() + 1

    def _reference(self, number: int, start: int) -> str:
        if number > len(self.groups) or not self.groups[number - 1].closed:
            self._refuse(f"a reference to group {number}, which is not closed before it", start)
        self.references.append((start, number, tuple(self.around)))
        return f"(?:(?({number})\\g<{number}>|))"  # of a group that took no part: the empty text

    # Escapes and classes --------------------------------------------------------------------------

    def _escape(self, start: int) -> tuple[str, bool]:
        """Return the translation of an escape outside of a class, and True if it may be
        repeated."""
        if self._next("b") or self._next("B"):
            return (EDGE if self.pattern[self.at - 1] == "b" else NO_EDGE), False
        if digits := regex.compile("[1-9][0-9]*").match(self.pattern, self.at):
            self.at = digits.end()
            return self._reference(int(digits.group()), start), True
        if self._next("k"):
            name = NAME.match(self.pattern, self.at) if self._next("<") else None
            closed = name is not None and self.pattern.startswith(">", name.end())
            if name is None or not closed or name.group() not in self.names:
                self._refuse("a reference to a name that no group before it has", start)
            self.at = name.end() + 1
            return self._reference(self.names[name.group()], start), True
        found = self._set(start)
        return (found if found is not None else _literal(self._character(start))), True

    def _set(self, start: int) -> str | None:
        r"""Return the set of a \d, \W or \p{..}; None if it is a single character."""
        letter = self.pattern[self.at : self.at + 1]
        if letter.lower() in SETS:
            self.at += 1
            return f"[{'^' if letter.isupper() else ''}{SETS[letter.lower()]}]"
        if letter not in ("p", "P"):
            return None
        name = PROPERTY.match(self.pattern, self.at + 1)
        if name is None:
            self._refuse(rf"\{letter} without the name of a property in braces", start)
        self.at = name.end()
        text = rf"\{letter}{{{name[1]}}}"
        try:
            regex.compile(text, regex.V1)
        except regex.error:
            self._refuse(f"the property {name[1]}, which is not known", start)
        return text

    def _character(self, start: int) -> str:
        """Return the single character that an escape stands for."""
        if self.at >= len(self.pattern):
            self._refuse("a backslash at the end", start)
        char = self.pattern[self.at]
        self.at += 1
        if char in CONTROLS:
            return CONTROLS[char]
        if char == "0" and not self.pattern[self.at : self.at + 1].isdigit():
            return "\0"
        if char == "c" and (letter := self._taken("[A-Za-z]")):
            return chr(ord(letter) % 32)
        if char == "x" and (digits := self._taken("[0-9A-Fa-f]{2}")):
            return chr(int(digits, 16))
        if char == "u":
            return self._unicode(start)
        if char.isalnum() or char == "_":
            self._refuse(rf"the escape \{char}, which ECMA-262 lacks", start)
        return char

    def _unicode(self, start: int) -> str:
        if pair := self._taken("[dD][89abAB][0-9A-Fa-f]{2}\\\\u[dD][c-fC-F][0-9A-Fa-f]{2}"):
            high, low = int(pair[:4], 16), int(pair[6:], 16)
            return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))
        if digits := self._taken("[0-9A-Fa-f]{4}"):
            return chr(int(digits, 16))
        braced = self._taken(r"\{[0-9A-Fa-f]+\}")
        if not braced or int(braced[1:-1], 16) > 0x10FFFF:
            self._refuse(r"a \u without a character's number", start)
        return chr(int(braced[1:-1], 16))

    def _taken(self, pattern: str) -> str:
        """Skip the text that the pattern matches here, and return it."""
        found = regex.compile(pattern).match(self.pattern, self.at)
        if found is None:
            return ""
        self.at = found.end()
        return found.group()

    def _class(self, start: int) -> str:
        r"""Return a class such as [^a-z\d], whose [ has been read."""
        negated = self._next("^")
        items: list[str] = []
        while not self._next("]"):
            if self.at >= len(self.pattern):
                self._refuse("a missing ] for the [", start)
            first = self._class_item()
            dash = self.pattern[self.at : self.at + 1] == "-"
            if not dash or self.pattern[self.at + 1 : self.at + 2] in ("]", ""):
                items.append(first if len(first) > 1 else _in_class(first))
                continue
            place = self.at
            self.at += 1
            last = self._class_item()
            if len(first) > 1 or len(last) > 1:
                self._refuse("a range from or to a set of characters", place)
            if first > last:
                self._refuse("a range out of order", place)
            items.append(f"{_in_class(first)}-{_in_class(last)}")
        if not items:
            return r"(?s:.)" if negated else r"(?!)"
        return f"[{'^' if negated else ''}{''.join(items)}]"

    def _class_item(self) -> str:
        """Return one character, or a set of several as the text of one."""
        start = self.at
        self.at += 1
        if self.pattern[start] != "\\":
            return self.pattern[start]
        if self._next("b"):
            return "\b"
        found = self._set(start)
        return found if found is not None else self._character(start)


def _literal(char: str) -> str:
    return regex.escape(char)


def _in_class(char: str) -> str:
    return char if char.isascii() and char.isalnum() else f"\\U{ord(char):08x}"
