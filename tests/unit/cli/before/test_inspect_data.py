"""`torchprime inspect`: what is shown is what the device gets, and nothing a row holds gets out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchprime.cli.main import main
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.inspection import Bin, count_rules, first_batches, length_bins
from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer
from torchprime.data.tokens.completions import ALL, ASSISTANT, BOS, CONTEXT, OFF, STOP, Example
from torchprime.text.visible import ESCAPE, NEWLINE, SPACE, TEXT, clean, visible
from torchprime.training.loop import DataOrder

ESC = "\x1b"


# Pieces -------------------------------------------------------------------------------------------


def piece_texts(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.pieces(tokenizer.encode_ids([text])[0])


def as_bytes(pieces: list[str]) -> bytes:
    return "".join(pieces).encode("utf-8", "surrogateescape")


def test_pieces_of_byte_level_tokens(byte_level: Tokenizer) -> None:
    pieces = piece_texts(byte_level, "go to €\n<|end|>é")
    assert [clean(piece) for piece in pieces] == [
        *("g", "o", " to", r" \xe2\x82", r"\xac", "\n", "<|end|>", r"\xc3", r"\xa9"),
    ]
    assert as_bytes(pieces) == "go to €\n<|end|>é".encode()


def test_pieces_of_sentencepiece_tokens_keep_their_spaces(sentencepiece: Tokenizer) -> None:
    assert piece_texts(sentencepiece, "go to €\n<|end|>") == [
        *(" ", "g", "o", " to", " ", "€", "\n", "<|end|>"),
    ]


def test_pieces_of_byte_fallback_tokens(byte_fallback: Tokenizer) -> None:
    pieces = piece_texts(byte_fallback, "to €\n")
    assert [clean(piece) for piece in pieces] == [" to", " ", r"\xe2", r"\x82", r"\xac", "\n"]
    assert as_bytes(pieces) == " to €\n".encode()


def test_an_id_without_a_token_has_a_piece(byte_level: Tokenizer) -> None:
    assert byte_level.pieces([5000, 0]) == ["<id 5000>", "<|start|>"]


@pytest.mark.parametrize("name", ["tokenizers/qwen3", "models/stories260K"])
def test_pieces_of_real_tokenizers_are_the_text(shared_dir: Path, name: str) -> None:
    text = "Naïve “quotes” – 你好, שלום 🧑‍🚀 😀\n\n    x = {'a': 1}\t# \ufffd end  "
    pieces = piece_texts(load_tokenizer(shared_dir / name), text)
    assert as_bytes(pieces).decode().strip(" ") == text.strip(" ")
    assert len(pieces) > 30


# Text that shows ----------------------------------------------------------------------------------


def test_visible_parts() -> None:
    assert visible("a b\n\n\tc") == [
        *((TEXT, "a"), (SPACE, " "), (TEXT, "b"), (NEWLINE, "\n\n"), (ESCAPE, r"\t"), (TEXT, "c")),
    ]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (f"{ESC}[31m", r"\x1b[31m"),
        ("\u202egnp.exe", r"\u202egnp.exe"),  # would show reversed
        ("\udce2", r"\xe2"),  # a byte, as pieces have it
        ("\u00e2\u00a0", "\u00e2\\u00a0"),  # a letter, and a space that is no space
        ("\ud800", r"\ud800"),
        ("\x9b2J\r\x00", r"\u009b2J\r\x00"),  # a terminal may take 9b for an escape
        ("你好 é 😀 שלום", "你好 é 😀 שלום"),
    ],
)
def test_what_does_not_show_is_written_out(given: str, shown: str) -> None:
    assert clean(given) == shown


# Batches ------------------------------------------------------------------------------------------


def example(row_id: str, text: str, weights: Sequence[float], rules: list[int], source: str = ""):
    ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
    assert len(ids) == len(weights) == len(rules)
    return Example(
        row_id,
        ids,
        np.asarray(weights, np.float32),
        np.asarray(rules, np.uint8),
        "joint",
        source=source,
    )


EXAMPLES = [
    example("one", "pqABe", [0, 0, 1, 1, 1], [BOS, CONTEXT, ASSISTANT, ASSISTANT, STOP], "web"),
    example("two", "rsCf", [0, 0, 0.5, 0.25], [CONTEXT, OFF, ASSISTANT, STOP], "book"),
    example("long", "xyzDEFGHIJK", [0, 0, 0] + [2] * 8, [CONTEXT] * 3 + [ASSISTANT] * 8, "web"),
]


def packed(examples: list[Example]) -> PackedDataset:
    return PackedDataset.from_examples(examples, block_size=10, pad_id=0, packing="bfd_split")


def shown(data: PackedDataset, tokenizer: Tokenizer, **options: Any):
    return first_batches(data, tokenizer, seed=3, global_batch_size=2, **options)


def test_batches_are_those_of_the_run(byte_level: Tokenizer) -> None:
    data = packed([example(str(i), "abcdef", [0] + [1] * 5, [ALL] * 6) for i in range(7)])
    order = DataOrder(data, seed=3, global_batch_size=2)
    batches = shown(data, byte_level, batches=5)
    for step, batch in enumerate(batches):
        wanted = order.batch(step)
        assert batch.hash == wanted.hash()
        ids = [t.id for block in batch.blocks for s in block.segments for t in s.tokens]
        assert ids == wanted.input_ids[wanted.segment_ids > 0].tolist()
        assert batch.supervised_tokens == wanted.supervised_tokens
        assert sum(block.supervised_tokens for block in batch.blocks) == wanted.supervised_tokens
    # 7 blocks in pairs: the fourth batch has an empty one.
    assert [block.number is None for block in batches[3].blocks] == [False, True]
    assert batches[3].blocks[1].padding == 10


def test_a_token_has_the_weight_with_which_it_is_predicted(byte_level: Tokenizer) -> None:
    (batch,) = first_batches(
        packed(EXAMPLES[:2]), byte_level, seed=0, global_batch_size=1, batches=1
    )
    (block,) = batch.blocks
    assert [s.number for s in block.segments] == [1, 2] and block.padding == 1
    one, two = block.segments
    assert (one.row_id, one.source, [t.weight for t in one.tokens]) == (
        "one",
        "web",
        [0, 0, 1, 1, 1],
    )
    assert [t.weight for t in two.tokens] == [0, 0, 0.5, 0.25]
    assert [t.rule for t in two.tokens] == ["context", "off", "assistant", "stop"]
    assert [t.position for t in two.tokens] == [0, 1, 2, 3]
    # The slot that predicts has the weight: law 4.
    assert [t.target and (t.target.id, t.target.weight) for t in two.tokens] == [
        *(None, (ord("C"), 0.5), (ord("f"), 0.25), None),
    ]
    assert two.source == "book" and not two.is_cut and two.beyond is None


def test_a_cut_example_says_what_it_predicts_beyond(byte_level: Tokenizer) -> None:
    (batch,) = shown(packed(EXAMPLES[2:]), byte_level, batches=1)
    first, rest = sorted(
        (s for block in batch.blocks for s in block.segments), key=lambda segment: segment.begin
    )
    assert (len(first.tokens), first.example_length, first.is_cut) == (10, 11, True)
    assert first.beyond is not None and first.beyond.id == ord("K") and first.beyond.weight == 2
    (last,) = rest.tokens
    # Its weight is counted where it is predicted, in the other block.
    assert (last.id, last.rule, last.weight) == (ord("K"), "assistant", 0)


def test_only_so_many_blocks_are_shown(byte_level: Tokenizer) -> None:
    data = packed(EXAMPLES * 4)
    (batch,) = shown(data, byte_level, batches=1, most_blocks=1)
    assert (batch.num_blocks, len(batch.blocks)) == (2, 1)
    assert batch.slot_tokens == 20


def test_rules_are_counted(byte_level: Tokenizer) -> None:
    data = packed(EXAMPLES[:2])
    (batch,) = first_batches(data, byte_level, seed=0, global_batch_size=1, batches=1)
    assert count_rules([batch]) == [
        *(("context", 2, 0), ("bos", 1, 0), ("assistant", 3, 3), ("stop", 2, 2), ("off", 1, 0)),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_in_one_bin(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 10 ** random.integers(1, 6), size=300)
    lengths[0] = 50 * lengths.max()  # a tail
    bins = length_bins(lengths)
    assert len(bins) <= 24
    for bin in bins:
        assert bin.count == sum(bin.first <= length <= bin.last for length in lengths)
    assert sum(bin.count for bin in bins) == 300
    assert [bin.open for bin in bins] == [False] * (len(bins) - 1) + [True]
    widths = {bin.last - bin.first + 1 for bin in bins[:-1]}
    assert len(widths) <= 1 and all(str(w).strip("0") in "125" for w in widths)


def test_one_length_is_one_bin() -> None:
    assert length_bins(np.array([7, 7, 7])) == [Bin(7, 7, 3)]


# The command --------------------------------------------------------------------------------------

HOSTILE = f'</b><script>alert(1)</script>" onclick="alert(2) {ESC}[31m \u202e €'
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"ask {i} {HOSTILE}"},
            {"role": "assistant", "content": f"skip {i}", "weight": 0},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": f"answer {i}"},
        ]
    }
    for i in range(6)
]


class Page(HTMLParser):
    """The page as a browser's parser reads it; elements must close in order."""

    VOID = {"meta", "br", "rect", "path"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[set[str], str]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs))
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)
        if tag == "b" and element[1].get("title"):
            self.tokens.append((set((element[1]["class"] or "").split()), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for tag, attributes in reversed(self.open):
            if tag == "b" and attributes.get("title"):
                classes, text = self.tokens[-1]
                self.tokens[-1] = (classes, text + data)
        name = self.open[-1][0] if self.open else ""
        self.texts[name] = self.texts.get(name, "") + data

    def text_of(self, *classes: str) -> str:
        return "".join(text for found, text in self.tokens if found.issuperset(classes))


def test_the_page_shows_what_is_learned(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ("task.max_steps=1", "task.global_batch_size=8")  # all blocks, once
    assert main(command(CHATS, *whole)) == 0
    path = tmp_path / "out" / "mine-inspect.html"
    assert f"page       {path}" in capsys.readouterr().out
    page = Page(path.read_text(encoding="utf-8"))
    learned = re.findall(r"answer \d<\|end\|>", page.text_of("s"))
    assert sorted(learned) == [f"answer {i}<|end|>" for i in range(6)]
    assert page.text_of("s") == "".join(learned)
    assert page.text_of("s", "stop", "x") == "<|end|>" * 6
    assert sorted(re.findall(r"skip \d", page.text_of("c", "off"))) == [
        f"skip {i}" for i in range(6)
    ]
    titles = [a["title"] for tag, a in page.elements if tag == "b" and a.get("title")]
    assert re.fullmatch(
        r"“a” · id \d+\nposition \d+ · segment 1\nassistant · weight 1\n"
        r"predicts “n” · id \d+ · weight 1",
        str(next(title for title in titles if "assistant" in str(title))),
    )


def test_the_page_is_one_file_that_no_row_can_break(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    # The same rows held out: leaked rows are quoted.
    argv = command(CHATS, f"eval.file_dataset_path={tmp_path / 'rows.jsonl'}")
    assert main(argv) == 0
    text = (tmp_path / "out" / "mine-inspect.html").read_text(encoding="utf-8")
    assert ESC not in text and "\u202e" not in text
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "srcset", "action", "onclick"} & set(attributes)
        assert str(attributes.get("href", "#")).startswith("#")
    assert "url(" not in page.texts["style"] and "@import" not in page.texts["style"]
    assert [tag for tag, _ in page.elements].count("script") == 1
    policy = next(a["content"] for t, a in page.elements if "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.texts["script"].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    # The rows' text is still shown, but not as markup.
    written = HOSTILE.replace(ESC, r"\x1b").replace("\u202e", r"\u202e")
    assert page.texts["small"].count(written) == 2 * len(CHATS)
    shown = "".join(text for _, text in page.tokens)
    assert '</b><script>alert(1)</script>" onclick="alert(2) \\x1b[31m' in shown
    titles = [str(attributes["title"]) for _, attributes in page.elements if "title" in attributes]
    assert any(title.startswith('“" onclick="alert(2)” · id ') for title in titles)


def test_the_terminal_marks_what_is_learned(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(CHATS)) == 0
    out = capsys.readouterr().out
    assert ESC not in out and "\u202e" not in out
    printed = re.findall("⟦([^⟧ ].*?)⟧", out)
    assert printed and all(re.fullmatch(r"answer \d<\|end\|>", run) for run in printed)
    assert out.count("block 1 of 2") == 1 and out.count("block 2 of 2") == 1
    assert r"\x1b[31m \u202e €" in out
    assert "tokenizer's own; its generation marks say what the assistant writes" in out
    assert "in <think> in the content it is kept in every turn" in out
    assert re.search(r"^stop +\d+ tokens, +\d+ supervised", out, re.MULTILINE)


def test_weights_are_told(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "completion": "b", "weight": weight} for weight in (2, 1, 0.5)]
    assert main(command(rows, "task.max_steps=1")) == 0
    out = capsys.readouterr().out
    assert all(run in out for run in ("a⟦×2 b<|end|>⟧", "a⟦b<|end|>⟧", "a⟦×0.5 b<|end|>⟧"))
    page = (tmp_path / "out" / "mine-inspect.html").read_text(encoding="utf-8")
    # Shades are shares of the largest weight.
    shades = re.findall(r'<b class="s[^"]*"(?: style="--w:([\d.]+)")? title=', page)
    assert sorted(shades) == ["", "", "0.25", "0.25", "0.5", "0.5"]
    assert "at lower weights" in page


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("", True), ("1", False)])
def test_colours_are_for_terminals(
    command: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_color: str | None,
    coloured: bool,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(command(CHATS)) == 0
    out = capsys.readouterr().out
    assert (ESC in out) == coloured
    assert ("⟦" in out) != coloured
    codes = set(re.findall(rf"{ESC}\[(\d+)m", out))
    assert codes == ({"0", "1", "2", "32"} if coloured else set())  # never the row's own 31


def test_rows_leaks_and_sources_are_accounted_for(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {}
    for name, rows in (
        ("web", [{"text": f"some words of text number {i}"} for i in range(8)]),
        ("book", [{"text": f"a page of the book, page {i}"} for i in range(3)] + [{"text": None}]),
    ):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    parts = ",".join(
        f"{{name:{name},file_dataset_path:{path},weight:1}}" for name, path in paths.items()
    )
    overrides = (
        f"dataset.mixture=[{parts}]",
        "dataset.file_dataset_path=null",
        "dataset.max_rejected_fraction=0.5",
        f"eval.file_dataset_path={paths['book']}",
    )
    assert main(command((), *overrides)) == 0
    out = capsys.readouterr().out
    assert re.search(r"web: 3 examples of \d+ tokens used, 5 not", out)
    assert re.search(r"book: 3 examples of \d+ tokens used, 0 not", out)
    assert re.search(r"rejected 1: .*book\.jsonl:4", out)
    assert "3 of 3 eval rows are in train (3 exact pairs" in out
    assert "book/book.jsonl:1 and book.jsonl:1 (1.00)" in out
    assert "not used: no row is a conversation" in out
    page = Page((tmp_path / "out" / "mine-inspect.html").read_text(encoding="utf-8"))
    assert "3 of 3 eval rows are in train" in page.texts["p"]
    assert "book/book.jsonl:2" in page.texts["td"] and "exact" in page.texts["td"]


def test_keys_that_are_not_used_are_shown(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = f"The text that question {{}} is about: {HOSTILE}"
    rows = [
        {"prompt": "q", "completion": "a", "id": i, "context": context.format(i)} for i in range(4)
    ]
    assert main(command(rows)) == 0
    captured = capsys.readouterr()
    assert ESC not in captured.out
    warned = "column context looks like input but is not used, e.g. 'The text that question 0 is"
    assert f"warning: {warned}" in captured.out
    assert f"note: {warned}" in captured.out + captured.err
    assert "not used 4: id (first rows.jsonl:1, e.g. 0)" in captured.out
    assert "not used 4: context (first rows.jsonl:1, e.g. 'The text" in captured.out
    page = Page((tmp_path / "out" / "mine-inspect.html").read_text(encoding="utf-8"))
    assert "Column context looks like input but is not used" in page.texts["p"]
    assert "context" in page.texts["td"] and "rows.jsonl:1" in page.texts["td"]
    assert "'The text that question 0 is about" in page.texts["small"]


def test_no_more_batches_than_steps(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(CHATS, "task.max_steps=1")) == 0
    assert re.findall("^step .", capsys.readouterr().out, re.MULTILINE) == ["step 1"]


def test_the_page_is_replaced_whole(command: Callable[..., list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine-inspect.html").write_text("an older page")
    assert main(command(CHATS)) == 0
    assert "an older page" not in (folder / "mine-inspect.html").read_text()
    assert [path.name for path in folder.iterdir()] == ["mine-inspect.html"]


def test_a_page_that_cannot_be_written_is_told(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(command(CHATS, f"output_dir={tmp_path / 'file'}")) == 2
    assert "error: output_dir: " in capsys.readouterr().err
