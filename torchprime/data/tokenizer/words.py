"""Byte-level BPE with a word cache: each distinct word of a data set is encoded once.

A byte-level tokenizer first splits a text by a pattern, then merges inside each piece alone, so the
ids of a text are those of its pieces, one after the other. The pieces of a data set come from a
small vocabulary: with a cache of each piece's ids, tokenizing needs only the split and a
dictionary. The pattern, the added tokens and the merges are those of tokenizer.json, and the
tokenizers library itself makes the merges. A text is encoded this way only if the result is sure to
equal the library's:

- every character is one that Unicode settled long ago and that normalization does not change, so
  the library's regex engine and ours see the same classes of characters;
- the tokenizer has only known parts, and both engines read its pattern alike;
- the texts most likely to differ, `PROBES`, come out equal when the encoder is made.

The library encodes every other text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import Any

import regex
import tokenizers

from torchprime.data.tokenizer.encoded import Encoded

# Characters that exclude a text from being split here: all but printable ASCII, tab and line
# breaks, Latin letters and signs up to U+017E without those that change under case folding or
# normalization, and common punctuation.
UNSETTLED = re.compile(
    "[^\t\n\r -~\u00a1-\u00ac\u00ae-\u012f\u0132-\u013e\u0141-\u0148\u014a-\u017e"
    "\u2010-\u2015\u2018-\u2022\u2026\u20ac]"
)
# Constructs that Oniguruma (the library's engine) and the regex module read alike.
_CLASS_PART = r"\\[rnsS]|\\p\{[LMNPSZ][a-z]?\}"
KNOWN_PATTERN = re.compile(
    rf"(?:{_CLASS_PART}|\[\^?(?:{_CLASS_PART}|[ '/A-Za-z0-9_.-])+\]"
    r"|\(\?(?:i:|:|!)|[|)?+* '/A-Za-z]|\{\d+(?:,\d*)?\})*"
)
# The pattern that ByteLevel has built in, as its documentation gives it.
BYTE_LEVEL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PROBES = (
    "Tom's 3 apples cost $1,234.50; they'LL say it's 100% fine\n\n\n  and  \t go on...\r\n",
    " a  b   c\n \n\n d\t\te \n", "x=[1,2]; y={'k': \"v\"}  # <<3+4=7>>7\n#### 7", "\n", " ", "  ",
    "déjà-vu Straße «¿Qué?» 5€ – “so” it’s… ½ x² ŒUVRE", "HELLO'S I'D'VE don'T 'tis ''''",
    "https://example.org/a_b?c=d&e=1 ~!@#$%^&*()_+|", "12345678 1 22 333\n4444\n\n",
)  # fmt: skip
# Patterns whose every alternative is a run of like characters, so that one more character shows the
# end of a run. Before a space that follows a non-space they always split, whatever else surrounds
# it.
RUN_PATTERNS = (
    BYTE_LEVEL_PATTERN,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # Qwen
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # Llama 3
)
MAX_KEPT_WORDS = 300_000
MAX_KEPT_LENGTH = 128
# Long stretches between added tokens, such as the tools that many conversations share.
SHARED_STRETCH, MAX_KEPT_STRETCHES = 256, 512


@lru_cache(maxsize=1)
def byte_characters() -> list[str]:
    """Return for each byte its character in byte-level vocabularies (GPT-2's table).

    Printable ones stand for themselves, the others are moved to U+0100 and up, in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class WordEncoder:
    """An encoder that gives the same ids as one tokenizer; `of` makes it for a supported one."""

    def __init__(
        self,
        raw: tokenizers.Tokenizer,
        patterns: Sequence[regex.Pattern[str]],
        added: Mapping[str, int],
    ) -> None:
        self._raw, self._patterns = raw, patterns
        self._added = {text: (number,) for text, number in added.items()}
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self._find_added = re.compile(f"({'|'.join(longest_first)})") if added else None
        self._splits_before_space = len(patterns) == 1 and patterns[0].pattern in RUN_PATTERNS
        self._ascii = _ascii_pattern(patterns)
        self._split_again = lru_cache(MAX_KEPT_STRETCHES)(self._split)
        self._characters = byte_characters()
        self.ids_of = _KeptIds(self._merge)
        self.ids_of.update(self._added)

    @classmethod
    def of(cls, raw: tokenizers.Tokenizer) -> WordEncoder | None:
        """Return a word encoder for this tokenizer; None if it has an unsupported part."""
        patterns = _patterns(raw)
        added = raw.get_added_tokens_decoder()
        plain = not any(t.lstrip or t.rstrip or t.single_word for t in added.values())
        alphabet = all(raw.token_to_id(c) is not None for c in byte_characters())
        if not patterns or not plain or not alphabet:
            return None
        encoder = cls(raw, patterns, {token.content: number for number, token in added.items()})
        probes = [*PROBES, " ".join(PROBES), "".join(map("{} x".format, encoder._added))]
        for probe in probes:
            found = encoder.encode(probe)
            expected = raw.encode(probe, add_special_tokens=False).ids
            if found is not None and found.ids != expected:
                return None
        return encoder

    def encode(self, text: str) -> WordEncoded | None:
        """Return ids and spans; None for a text that the library must encode."""
        if UNSETTLED.search(text):
            return None
        return WordEncoded(self, self.words(text))

    def joint_ids(self, prompt: str, completion: str) -> tuple[list[int], list[int]] | None:
        """Return the ids of prompt and completion in their joint text, or None.

        No token may cross the boundary, and the prompt's ids must be those it has alone. None means
        that this is false or that the fast check could not show it.
        """
        place = prompt.rfind(" ")
        if place < 1 or prompt[place - 1].isspace() or not self._splits_before_space:
            return None
        text = prompt + completion
        if UNSETTLED.search(text) or (self._find_added and self._find_added.search(text)):
            return None
        # Before this space the words are the same, whatever follows: only those after it are split
        # twice.
        alone, joint = self._split(prompt[place:]), self._split(text[place:])
        if joint[: len(alone)] != alone:
            return None
        head = self._split(prompt[:place])
        return self.ids([*head, *alone]), self.ids(joint[len(alone) :])

    def ids(self, words: Sequence[str]) -> list[int]:
        """Return the ids of all words, one after the other."""
        return list(chain.from_iterable(map(self.ids_of.__getitem__, words)))

    def words(self, text: str) -> list[str]:
        """Return the separately encoded pieces, with added tokens; joined they are the text."""
        if self._find_added is None or not self._find_added.search(text):
            return self._split(text)
        words: list[str] = []
        for place, part in enumerate(self._find_added.split(text)):
            again = len(part) >= SHARED_STRETCH
            words += [part] if place % 2 else (self._split_again if again else self._split)(part)
        return words

    def _split(self, text: str) -> list[str]:
        if self._ascii is not None and text.isascii():
            return self._ascii.findall(text)
        words = [text] if text else []
        for pattern in self._patterns:
            words = [piece for word in words for piece in _isolated(pattern, word)]
        return words

    def _merge(self, word: str) -> tuple[int, ...]:
        return tuple(token.id for token in self._tokens(word))

    def _tokens(self, word: str) -> list[Any]:
        written = "".join([self._characters[byte] for byte in word.encode()])
        return self._raw.model.tokenize(written)

    def spans(self, word: str) -> list[tuple[int, int]]:
        """Return the characters of a word that each of its tokens covers."""
        if word in self._added:
            return [(0, len(word))]
        owner = [place for place, c in enumerate(word) for _ in c.encode()]
        spans, end = [], 0
        for token in self._tokens(word):
            begin, end = end, end + len(token.value)
            spans.append((owner[begin], owner[end - 1] + 1))
        return spans


class _KeptIds(dict[str, tuple[int, ...]]):
    """A cache of words' ids; long words, which rarely repeat, are not stored."""

    def __init__(self, merge: Callable[[str], tuple[int, ...]]) -> None:
        super().__init__()
        self._merge = merge

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._merge(word)
        if len(word) <= MAX_KEPT_LENGTH and len(self) < MAX_KEPT_WORDS:
            self[word] = ids
        return ids


class WordEncoded(Encoded):
    """A text encoded by its words; spans are computed on request."""

    def __init__(self, encoder: WordEncoder, words: list[str]) -> None:
        self._encoder, self._words = encoder, words
        self.ids = encoder.ids(words)

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """The number of characters and of tokens up to the end of each word."""
        counts = map(len, map(self._encoder.ids_of.__getitem__, self._words))
        return list(accumulate(map(len, self._words))), list(accumulate(counts))

    def span(self, index: int) -> tuple[int, int]:
        characters, tokens = self._ends
        word = bisect_right(tokens, index)
        begin, first = (characters[word - 1], tokens[word - 1]) if word else (0, 0)
        start, end = self._encoder.spans(self._words[word])[index - first]
        return begin + start, begin + end

    def before(self, position: int) -> int:
        characters, tokens = self._ends
        word = bisect_right(characters, position)
        begin, count = (characters[word - 1], tokens[word - 1]) if word else (0, 0)
        if begin == position or word == len(self._words):
            return count
        spans = self._encoder.spans(self._words[word])
        return count + sum(begin + end <= position for _, end in spans)


def _ascii_pattern(patterns: Sequence[regex.Pattern[str]]) -> re.Pattern[str] | None:
    """Return the same pattern for ASCII texts in Python's own, faster engine.

    Return None if the pattern cannot be written for it.
    """
    if len(patterns) != 1 or patterns[0].pattern not in RUN_PATTERNS:
        return None
    inside_class = re.sub(
        r"\[[^\]]*\]",
        lambda found: found[0].replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9"),
        patterns[0].pattern,
    )
    source = inside_class.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")
    return re.compile(source, re.ASCII)


def _isolated(pattern: regex.Pattern[str], text: str) -> list[str]:
    """Split a text so that every match is a piece, and so is the text between matches."""
    found = pattern.findall(text)
    if sum(map(len, found)) == len(text):
        return found
    pieces, begin = [], 0
    for match in pattern.finditer(text):
        pieces += [text[begin : match.start()], match.group()]
        begin = match.end()
    return [piece for piece in [*pieces, text[begin:]] if piece]


def _patterns(raw: tokenizers.Tokenizer) -> list[regex.Pattern[str]] | None:
    """Return the patterns that split a text, in order; None if a part is unsupported."""
    steps = _described(raw.pre_tokenizer)
    steps = steps.get("pretokenizers", [steps])
    model = raw.model
    if not isinstance(model, tokenizers.models.BPE) or model.byte_fallback or model.dropout:
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if _described(raw.normalizer) not in ({}, {"type": "NFC"}):
        return None
    # Steps after ByteLevel would see bytes; without it the vocabulary holds characters.
    if [step.get("type") == "ByteLevel" for step in steps] != [False] * (len(steps) - 1) + [True]:
        return None
    sources = [_pattern(step) for step in steps]
    if not all(source is not None and KNOWN_PATTERN.fullmatch(source) for source in sources):
        return None
    compiled = [regex.compile(source) for source in sources if source]
    return None if any(pattern.groups for pattern in compiled) else compiled


def _described(part: Any) -> dict[str, Any]:
    """Return a part of a tokenizer as in its file; the library gives it as its pickled state."""
    return {} if part is None else json.loads(part.__getstate__())


def _pattern(step: Mapping[str, Any]) -> str | None:
    """Return a pre-tokenizer's pattern: "" if it does not split, None if unsupported."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return BYTE_LEVEL_PATTERN if step.get("use_regex", True) else ""
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex")
    return None
