"""Patterns of ECMA-262: translated, or refused by name.

What they match is written down here; where node is installed, it is asked too.
"""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from torchprime.evaluation.graders.schemas.ecma_patterns import PatternError, compile_ecma

# pattern, texts in which it is found, texts in which it is not
CASES = [
    ("a", ["a", "bab"], ["", "A"]),
    ("^a$", ["a"], ["a\n", "\na", "aa"]),
    ("a$", ["ba"], ["a\n", "a\r\n"]),
    ("^$", [""], ["\n"]),
    ("^a|b$", ["ac", "cb"], ["cab\n"]),
    (r"^\d+$", ["0", "12"], ["", "\u0663", "1\n"]),
    (r"^\D$", ["a", "\u0663"], ["1"]),
    (r"^\w+$", ["aZ_9"], ["\u00e9", "-"]),
    (r"^\W$", ["\u00e9", "\U0001f680"], ["a"]),
    (r"^\s$", ["\u00a0", "\ufeff", "\u2028", "\u3000", "\t"], ["\u200b", "\u0085", "\x1c"]),
    (r"^\S$", ["\u0085", "a"], [" "]),
    ("^.$", ["a", "\U0001f680", "\u0085"], ["\n", "\r", "\u2028", "\u2029"]),
    (r"\bfoo\b", ["foo", "a foo.", "\u00e9foo"], ["afoo", "foo_"]),
    (r"a\Bb", ["ab"], ["a b"]),
    (r"^\p{Lu}$", ["A", "\u00c9", "\u0414"], ["a", "1"]),
    (r"^\P{Lu}$", ["a"], ["A"]),
    (r"^\p{Script=Greek}+$", ["\u03b1\u03b2"], ["a"]),
    (r"^\p{L}[\p{L}\p{N}_]*$", ["\u00e9a1_"], ["1a"]),
    (r"^[^\p{L}]$", ["1"], ["\u00e9"]),
    (r"^(?<year>\d{4})-(?<month>\d\d)$", ["2026-11"], ["26-11", "2026-11\n"]),
    ("^(?<q>['\"]).*\\k<q>$", ["'a'", '"a"'], ["'a\""]),
    (r"^(?<$a>x)\1$", ["xx"], ["x"]),
    (r"^(a)?\1b$", ["b", "aab"], ["ab"]),
    ("^(?:(['\"])\\w\\1,?)+$", ["'a','b'"], ["'a\""]),
    (r"^[\dx-]$", ["1", "x", "-"], ["a"]),
    ("^[^]$", ["\n", "a"], [""]),
    ("^a[]", [], ["a", ""]),
    (r"^[\b]$", ["\b"], ["b"]),
    (r"^[^\W_]$", ["a", "1"], ["_", "\u00e9"]),
    (r"^[\s\S]$", ["\n", "a"], [""]),
    (r"^[\D]$", ["a"], ["1"]),
    ("^[&&|~~||^a]$", ["&", "a", "|", "~", "^"], ["e"]),
    (r"^[[a]$", ["[", "a"], ["]"]),
    (r"^[\]^]$", ["]", "^"], ["a"]),
    ("^[a-c]{2,3}$", ["ab", "abc"], ["a", "abcd"]),
    ("^a{2}$", ["aa"], ["a"]),
    ("^a{2,}?b", ["aaab"], ["ab"]),
    (r"^\u00e9\u{1F680}\uD83D\uDE80\x41\t\cJ\0$", ["\u00e9\U0001f680\U0001f680A\t\n\0"], [""]),
    (r"^\.\*\/\$\^\(\)\[\]\{\}\|\\$", [".*/$^()[]{}|\\"], ["a"]),
    ("(?=.*[A-Z])(?=.*[0-9])^.{4,}$", ["aB3d"], ["abcd"]),
    ("(?<=a)b(?!c)", ["ab", "abd"], ["b", "abc"]),
    ("(?<!a)b", ["b"], ["ab"]),
    (r"^#([0-9a-fA-F]{3}){1,2}$", ["#fff", "#A1b2C3"], ["#ff", "#fff\n"]),
    ("^ #x$", [" #x"], ["x"]),
]
REFUSED = {
    "(": "a missing ) for the (",
    ")": "a ) that closes nothing at position 0",
    "[a": "a missing ] for the [ at position 0",
    "*a": "nothing to repeat at position 0",
    "a**": "nothing to repeat at position 2",
    "a++": "nothing to repeat at position 2",
    "a{2,1}": "a quantifier out of order at position 1",
    "[b-a]": "a range out of order at position 2",
    r"[\d-z]": "a range from or to a set of characters at position 3",
    "^*": "a repeated assertion at position 1",
    r"\b+": "a repeated assertion at position 2",
    "(?=a)*": "a repeated assertion at position 5",
    r"\A": r"the escape \A, which ECMA-262 lacks at position 0",
    r"a\Z": r"the escape \Z, which ECMA-262 lacks at position 1",
    r"[\z]": r"the escape \z, which ECMA-262 lacks at position 1",
    r"\x4": r"the escape \x, which ECMA-262 lacks",
    r"\u12": r"a \u without a character's number",
    r"\u{110000}": r"a \u without a character's number",
    r"\pL": r"\p without the name of a property in braces",
    r"\p{Nonsense}": "the property Nonsense, which is not known at position 0",
    "(?i)a": "(?i, which ECMA-262 lacks at position 0",
    "(?P<n>a)": "(?P, which ECMA-262 lacks at position 0",
    "(?>a)": "(?>, which ECMA-262 lacks at position 0",
    "(?#a)": "(?#, which ECMA-262 lacks at position 0",
    "(?<1>a)": "a bad name of a group at position 0",
    "(?<n>a)(?<n>b)": "the name n for a second group at position 7",
    r"\1(a)": "a reference to group 1, which is not closed before it at position 0",
    r"(a\1)": "a reference to group 1, which is not closed before it at position 2",
    r"\k<n>": "a reference to a name that no group before it has at position 0",
    r"(?:(a)|b)*\1": "a reference to group 1 from outside of the repeated group around it",
    "a\\": "a backslash at the end at position 1",
}


@pytest.mark.parametrize(("pattern", "found", "missed"), CASES)
def test_a_pattern_matches_what_it_means(pattern: str, found: list, missed: list) -> None:
    compiled = compile_ecma(pattern)
    assert [text for text in found if not compiled.search(text)] == []
    assert [text for text in missed if compiled.search(text)] == []


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_cannot_be_translated_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(PatternError) as error:
        compile_ecma(pattern)
    assert str(error.value).startswith(REFUSED[pattern])


@pytest.mark.skipif(shutil.which("node") is None, reason="node, the reference, is not installed")
def test_the_cases_are_javascripts() -> None:
    script = (
        "const cases = JSON.parse(require('fs').readFileSync(0));"
        "console.log(JSON.stringify(cases.map(([pattern, texts]) => {"
        "  try { const compiled = new RegExp(pattern, 'u');"
        "        return texts.map(text => compiled.test(text)); }"
        "  catch (error) { return null; } })))"
    )
    cases = [[pattern, found + missed] for pattern, found, missed in CASES]
    cases += [[pattern, []] for pattern in REFUSED]
    done = subprocess.run(
        ["node", "-e", script], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    for (pattern, found, missed), results in zip(CASES, told[: len(CASES)], strict=True):
        assert results == [True] * len(found) + [False] * len(missed), pattern
    # Valid there, and refused here: what would mean something else.
    accepted = [p for p, results in zip(REFUSED, told[len(CASES) :], strict=True) if results == []]
    assert accepted == [r"\1(a)", r"(a\1)", r"(?:(a)|b)*\1"]
