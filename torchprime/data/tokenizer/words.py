"""Byte-level BPE by words: each distinct word of a data set is encoded once.

A byte-level tokenizer first splits a text by a pattern, then merges inside each piece alone, so
the ids of a text are those of its pieces, one after the other. The pieces of a data set come from
a small vocabulary: with the merges of each kept, what remains of tokenizing is the split and a
dictionary. The pattern, the added tokens and the merges are those of tokenizer.json, the merges
are made by the tokenizers library itself, and a text takes this way only if the outcome is sure to
be the library's:

- every character is one that Unicode has long settled and that normalization leaves alone, so the
  library's expression engine and ours see the same classes of characters;
- the tokenizer is made of parts known here, its pattern of constructs that mean the same to both;
- the first texts it could be wrong about, `PROBES`, come out equal when it is made.

Everything else goes to the library, text by text.
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

# What a text may not contain to be split here: all but printable ASCII, tab and line breaks, Latin
# letters and signs up to U+017E without those that change under case folding or normalization,
# and common punctuation.
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
# Patterns whose every alternative is a run of like characters, for which the end of a run is seen
# by looking at one more. Where a space follows something that is none, they always split, whatever
# else is in front of it or behind.
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
    """For each byte, the character that byte-level vocabularies write it with (GPT-2's table):
    printable ones stand for themselves, the others are moved to U+0100 and up, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class WordEncoder:
    """Encodes texts as one tokenizer does; `of` says whether it can."""

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
        """An encoder by words for this tokenizer; None if it has a part not known here."""
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
        """Ids and spans; None for a text that is the library's to encode."""
        if UNSETTLED.search(text):
            return None
        return WordEncoded(self, self.words(text))

    def joint_ids(self, prompt: str, completion: str) -> tuple[list[int], list[int]] | None:
        """The ids of both sides in their joint text, if no token crosses and the prompt's are
        those it has alone; None where that is not so, or not seen at a glance."""
        place = prompt.rfind(" ")
        if place < 1 or prompt[place - 1].isspace() or not self._splits_before_space:
            return None
        text = prompt + completion
        if UNSETTLED.search(text) or (self._find_added and self._find_added.search(text)):
            return None
        # In front of this space the words are the same, whatever follows: only those behind it
        # are split twice.
        alone, joint = self._split(prompt[place:]), self._split(text[place:])
        if joint[: len(alone)] != alone:
            return None
        head = self._split(prompt[:place])
        return self.ids([*head, *alone]), self.ids(joint[len(alone) :])

    def ids(self, words: Sequence[str]) -> list[int]:
        """Those of all words, one after the other."""
        return list(chain.from_iterable(map(self.ids_of.__getitem__, words)))

    def words(self, text: str) -> list[str]:
        """The pieces that are encoded apart, added tokens among them; joined they are the text."""
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
        """The characters of a word that each of its tokens stands for."""
        if word in self._added:
            return [(0, len(word))]
        owner = [place for place, c in enumerate(word) for _ in c.encode()]
        spans, end = [], 0
        for token in self._tokens(word):
            begin, end = end, end + len(token.value)
            spans.append((owner[begin], owner[end - 1] + 1))
        return spans


class _KeptIds(dict[str, tuple[int, ...]]):
    """The ids of words seen before; long ones, hardly seen twice, are not kept."""

    def __init__(self, merge: Callable[[str], tuple[int, ...]]) -> None:
        super().__init__()
        self._merge = merge

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._merge(word)
        if len(word) <= MAX_KEPT_LENGTH and len(self) < MAX_KEPT_WORDS:
            self[word] = ids
        return ids


class WordEncoded(Encoded):
    """A text by its words; spans are worked out when they are asked for."""

    def __init__(self, encoder: WordEncoder, words: list[str]) -> None:
        self._encoder, self._words = encoder, words
        self.ids = encoder.ids(words)

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """Behind each word: how many characters, how many tokens."""
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
    """The same pattern for ASCII texts, for Python's own engine, which is faster; None for one
    it cannot be written for."""
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
    """Every match a piece of its own, and what lies between matches."""
    found = pattern.findall(text)
    if sum(map(len, found)) == len(text):
        return found
    pieces, begin = [], 0
    for match in pattern.finditer(text):
        pieces += [text[begin : match.start()], match.group()]
        begin = match.end()
    return [piece for piece in [*pieces, text[begin:]] if piece]


def _patterns(raw: tokenizers.Tokenizer) -> list[regex.Pattern[str]] | None:
    """The patterns that split a text, one after the other; None where a part is not known."""
    steps = _described(raw.pre_tokenizer)
    steps = steps.get("pretokenizers", [steps])
    model = raw.model
    if not isinstance(model, tokenizers.models.BPE) or model.byte_fallback or model.dropout:
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if _described(raw.normalizer) not in ({}, {"type": "NFC"}):
        return None
    # What comes behind ByteLevel would see bytes; without it the vocabulary's are characters.
    if [step.get("type") == "ByteLevel" for step in steps] != [False] * (len(steps) - 1) + [True]:
        return None
    sources = [_pattern(step) for step in steps]
    if not all(source is not None and KNOWN_PATTERN.fullmatch(source) for source in sources):
        return None
    compiled = [regex.compile(source) for source in sources if source]
    return None if any(pattern.groups for pattern in compiled) else compiled


def _described(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as its file has it; the library gives it as its pickled state."""
    return {} if part is None else json.loads(part.__getstate__())


def _pattern(step: Mapping[str, Any]) -> str | None:
    """The pattern by which one pre-tokenizer splits, "" for none; None for one not known."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return BYTE_LEVEL_PATTERN if step.get("use_regex", True) else ""
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex")
    return None
