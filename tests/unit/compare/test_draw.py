"""The figure: what it says, that it is the same every time, and that odd runs can be drawn."""

from __future__ import annotations

import math
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.font_manager import FontEntry

from torchprime.compare import draw as drawing
from torchprime.compare import label_fonts
from torchprime.compare.captions import subtitle, title
from torchprime.compare.draw import MOST_RUNS, draw, spread
from torchprime.compare.judge import compare
from torchprime.compare.logs.run import LoggedStep, Run
from torchprime.compare.verdict import AGREE, Comparison
from torchprime.errors import ConfigError, RuntimeSetupError


def make(label: str, factor: float = 1.0, at: int = 0, steps: int = 12, **values: Any) -> Run:
    logged = {
        s: replace(
            LoggedStep(s, 3.0 / s * (factor if s >= at else 1), 1.0 + s, 1e-3, 900, f"{s}", 1000.0),
            **(values if s == at else {}),
        )
        for s in range(1, steps + 1)
    }
    facts = {"model": {"dtype": "float32"}}
    return Run(label, label, "metrics.jsonl", logged, facts=facts)


def drawn_text(comparison: Comparison) -> list[str]:
    """Every text of the figure."""
    with matplotlib.rc_context(drawing.SETTINGS):
        figure = drawing._figure(comparison)
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts] + [axes.get_title(loc="left")]
    return found


def test_the_title_says_the_verdict() -> None:
    agree = compare([make("one"), make("two")])
    assert title(agree) == "two agrees with one over 12 steps"
    three = compare([make("one"), make("two"), make("three")])
    assert title(three) == "2 runs agree with one over 12 steps"
    off = compare([make("one"), make("two"), make("three", 1.01, at=7)])
    assert title(off) == "three differs from one: loss, first at step 7"
    lr = compare([make("one"), make("two", at=4, lr=2e-3)])
    assert title(lr) == "two differs from one: learning rate, first at step 4"
    both = compare([make("one"), make("two", 2.0), make("three", 1.01, at=7)])
    assert title(both) == "2 of 2 runs differ from one"
    bf16 = [replace(make(name), facts={"model": {"dtype": "bfloat16"}}) for name in ("one", "two")]
    assert title(compare(bf16)).startswith("Not judged")


def test_the_line_below_says_how_far_apart() -> None:
    text = subtitle(compare([make("one"), make("two", 1.01, at=7)]))
    assert "loss 1.0e-02 (band 1e-04)" in text and "gradient norm 0 (band 1e-03)" in text
    assert "same batches" in text and "learning rate" not in text
    bare = replace(make("two"), steps={s: LoggedStep(s, loss=3.0 / s) for s in range(1, 13)})
    assert subtitle(compare([make("one"), bare, make("x")])).endswith("; no hashes of two")
    both = [bare, replace(bare, label="three")]
    assert subtitle(compare([make("one"), *both])).endswith("; no hashes of 2 runs")
    broken = compare([make("one"), make("two", at=4, loss=math.nan)])
    assert "loss not finite" in subtitle(broken)


def test_every_run_is_named_and_the_band_too() -> None:
    texts = drawn_text(compare([make("one"), make("two"), make("three", 1.01, at=7)]))
    for name in ("one", "two", "three", "band 1e-4", "step 7"):
        assert name in texts
    assert any("relative difference from one" in text for text in texts)
    for panel in ("Gradient norm", "Learning rate", "Supervised tokens per second"):
        assert panel in texts


def test_a_widening_band_is_told_from_end_to_end() -> None:
    bare = {s: LoggedStep(s, loss=3.0 / s, rounding={"loss": 0.003}) for s in range(1, 13)}
    texts = drawn_text(compare([make("one"), replace(make("two"), steps=bare)]))
    assert "band 1.1e-3 to 1.2e-2" in texts


@pytest.mark.parametrize("count", [2, 3, MOST_RUNS])
def test_files_are_the_same_every_time(count: int, tmp_path: Path) -> None:
    runs = [make(f"run{i}", 1 + i * 1e-6) for i in range(count)]
    first, second = (draw(compare(runs), tmp_path / name / "fig") for name in ("x", "y"))
    assert [path.name for path in first] == ["fig.png", "fig.svg"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert matplotlib.image.imread(first[0]).shape[1] == 1760
    root = ET.parse(first[1]).getroot()
    assert root.tag.endswith("svg") and b"<dc:date>" not in first[1].read_bytes()


def _bare(*losses: float | None) -> dict[int, LoggedStep]:
    return {step: LoggedStep(step, loss=loss) for step, loss in enumerate(losses, start=1)}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (_bare(1.0), _bare(1.0)),
        (_bare(1.0), _bare(2.0)),
        (_bare(0.0, 1.0), _bare(1.0, 0.0)),
        (_bare(1.0, math.nan), _bare(1.0, math.inf)),
        (_bare(math.nan, math.nan), _bare(math.nan, math.nan)),
        (_bare(1.0, None, 2.0), _bare(1.0, 2.0, None)),
        (_bare(1e30, 1e-30), _bare(1e-30, 1e30)),
    ],
)
def test_odd_runs_are_drawn(ours: dict, theirs: dict, tmp_path: Path) -> None:
    one = Run("a $x^2$ <b>", "a", "text log", ours)
    comparison = compare([one, Run("_b" * 30, "b", "text log", theirs)])
    for path in draw(comparison, tmp_path / "odd"):
        assert path.stat().st_size > 5_000
    assert "not logged" in drawn_text(comparison)


def test_a_panel_without_numbers_says_so() -> None:
    bare = Run("two", "two", "text log", _bare(*(3.0 / s for s in range(1, 13))))
    texts = drawn_text(compare([make("one"), bare]))
    assert texts.count("not logged: two") == 3  # gradient norm, learning rate, speed
    nan = {s: replace(x, grad_norm=math.nan, lr=None) for s, x in make("x").steps.items()}
    texts = drawn_text(compare([Run("x", "x", "", nan), Run("y", "y", "", nan)]))
    assert "no finite number" in texts and "not logged" in texts
    empty = drawing._figure(compare([Run("x", "x", "", nan), Run("y", "y", "", nan)])).axes[3]
    assert not len(empty.get_yticks())
    nothing = [Run(name, name, "text log", _bare(math.nan)) for name in ("x", "y")]
    assert "no finite difference" in drawn_text(compare(nothing))


def test_means_are_bars_over_their_steps(tmp_path: Path) -> None:
    means = {
        s: LoggedStep(s, sum(3.0 / each for each in range(s - 3, s + 1)) / 4, mean_over=4)
        for s in (4, 8, 12)
    }
    comparison = compare([make("one"), Run("hf", "hf", "trainer_state.json", means)])
    assert comparison.verdict == AGREE
    figure = drawing._figure(comparison)
    for axes in figure.axes[:2]:  # losses and differences
        (bars,) = [c for c in axes.collections if isinstance(c, LineCollection)]
        spans = [[float(x) for x, _ in np.asarray(path.vertices)] for path in bars.get_paths()]
        assert spans == [[0.5, 4.5], [4.5, 8.5], [8.5, 12.5]]
    loss = figure.axes[0]
    heights = [np.asarray(path.vertices)[0, 1] for path in loss.collections[0].get_paths()]
    assert heights == [means[s].loss for s in (4, 8, 12)]
    assert any("bars: means over steps" in text for text in drawn_text(comparison))
    late = {4: replace(means[4], mean_over=None), 8: means[8], 12: means[12]}
    assert draw(compare([make("one"), Run("hf", "hf", "", late)]), tmp_path / "late")


# A character that another font of matplotlib has, and characters that hardly any font has.
STRANGE = "\u8fd0\u884c-\uac00-\U0001f680-\u200b\u202e-\t"


def test_names_in_any_script_are_drawn_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    comparison = compare([make(f"one {STRANGE}"), make(f"two {STRANGE}")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(draw(comparison, tmp_path / "fig")) == 2
    assert not caplog.records


def test_a_font_is_found_or_the_character_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = label_fonts.fontManager.ttflist
    only = [entry for entry in entries if entry.name in ("DejaVu Sans", "Last Resort")]
    monkeypatch.setattr(label_fonts.fontManager, "ttflist", only)
    families, missing = label_fonts.families_for(["run \u8fd0", "\u202e\u00e9"])
    assert families == ["DejaVu Sans"] and missing == {"\u8fd0", "\u202e"}
    assert label_fonts.legible("run \u8fd0\U0001f680", {"\u8fd0", "\U0001f680"}) == (
        r"run \u8fd0\U0001f680"
    )
    # Another font that has it is taken, whatever is installed here: a stand-in for its charmap.
    monkeypatch.setattr(label_fonts.fontManager, "ttflist", [*only, FontEntry(name="Stand-in")])
    has = {"DejaVu Sans": set("run "), "Stand-in": {"\u8fd0"}}
    monkeypatch.setattr(label_fonts, "_has", lambda family, chars: chars & has[family])
    assert label_fonts.families_for(["run \u8fd0"]) == (["DejaVu Sans", "Stand-in"], set())


def test_dollars_in_a_name_are_no_formula(tmp_path: Path) -> None:
    # As a formula each of these would be an error.
    assert draw(compare([make("a$\\frac$"), make("b$\\frac$")]), tmp_path / "fig")


def test_more_runs_than_can_be_told_apart(tmp_path: Path) -> None:
    runs = [make(f"run{i}") for i in range(MOST_RUNS + 1)]
    with pytest.raises(ConfigError, match="--figure none"):
        draw(compare(runs), tmp_path / "fig")
    assert len({str(drawing._look(i)) for i in range(MOST_RUNS)}) == MOST_RUNS


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeSetupError, match="--out"):
        draw(compare([make("one"), make("two")]), tmp_path / "file" / "fig")


@pytest.mark.parametrize(
    "wanted", [[0.5] * 9, [0.0] * 4, [1.0] * 4, [0.1, 0.11, 0.9], [0.0, 0.98, 0.99, 1.0], [0.3], []]
)
def test_names_do_not_overlap_and_stay_inside(wanted: list[float]) -> None:
    places = spread(wanted, 0.1)
    assert all(b - a > 0.1 - 1e-9 for a, b in zip(places, places[1:], strict=False))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    if len(wanted) == 3:
        assert max(abs(a - b) for a, b in zip(wanted, places, strict=True)) < 0.15
