"""`inspect`: the first batches and the account of the data, in the terminal and as a page.

torchprime/data/inspection.py collects the content; this file draws it. Rows may contain anything,
so no text of them is written unchanged: control characters, marks of direction and stray bytes are
made visible (torchprime/text/visible.py), and on the page all other text is escaped.

The page (torchprime/assets/inspect) is one file that loads nothing (torchprime/data/page.py).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path

from markupsafe import Markup, escape

from torchprime.cli.shared.data import Offline, load
from torchprime.config.schema import TrainConfig
from torchprime.data.blocks.budget import Spread
from torchprime.data.inspection import (
    SHOWN_BATCHES,
    Bin,
    Block,
    Inspection,
    Segment,
    ShownTemplate,
    Token,
    count_rules,
    first_batches,
    length_bins,
)
from torchprime.data.page import SHOWN_IDS, by_count, first_of, render_page
from torchprime.data.report import DataReport
from torchprime.data.shared.notes import most_first, noted_first
from torchprime.errors import RuntimeSetupError
from torchprime.files.atomic import write_text
from torchprime.text.terminal import print_lines
from torchprime.text.visible import ESCAPE, NEWLINE, SPACE, TEXT, clean, visible
from torchprime.training.setup.plan import data_order, plan_steps

PRINTED_BLOCKS = 2
BAR = 40  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉█"

RULE_MEANINGS = {
    "context": "context, not learned",
    "bos": "begins a text; never learned",
    "completion": "the answer to a prompt",
    "assistant": "an assistant's turn",
    "stop": "ends an answer or a turn",
    "all": "a text, or any token where compute_loss_on is all",
    "off": "a turn that its row excludes (weight 0 or train: false)",
}


def inspect_data(config: TrainConfig) -> int:
    """Prepare the config's data, write the page and print the rest; return the exit code."""
    inspection = _look(config, load(config))
    path = Path(config.output_dir) / f"{inspection.name}-inspect.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page(inspection))
    except OSError as error:
        raise RuntimeSetupError(
            f"output_dir: {path} cannot be written ({error.strerror}). Set output_dir to a folder "
            "that can be written."
        ) from error
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print_lines([*terminal(inspection, colours), "", f"page       {path}"], "replace", colours)
    return 0


def _look(config: TrainConfig, offline: Offline) -> Inspection:
    data, template = offline.data, offline.template
    plan = plan_steps(config, data.train)
    batches = first_batches(
        data.train,
        offline.tokenizer,
        seed=config.seed,
        global_batch_size=config.task.global_batch_size,
        replay=data_order(config, data.train, plan.total_steps).replay,
        batches=min(plan.total_steps, SHOWN_BATCHES),
    )
    reports = [data.report] + ([data.heldout_report] if data.heldout_report else [])
    return Inspection(
        name=config.run_name or config.task.name,
        reports=reports,
        leaks=data.leaks,
        template=template and ShownTemplate.of(template, any(r.has_chats for r in reports)),
        fingerprints=data.fingerprints(),
        budget=plan.budget,
        bins=length_bins(data.train.store.lengths),
        batches=batches,
        rules=count_rules(batches),
        special=offline.tokenizer.special_tokens,
    )


# Both ---------------------------------------------------------------------------------------------


def _spread(summary: Spread) -> str:
    return f"mean {summary['mean']:,.0f}, min {summary['min']:,}, max {summary['max']:,}"


def _bin_name(bin: Bin) -> str:
    if bin.open:
        return f"{bin.first:,} and more"
    return f"{bin.first:,}" if bin.first == bin.last else f"{bin.first:,}–{bin.last:,}"


def _template_lines(template: ShownTemplate | None) -> list[str]:
    if template is None:
        return ["none"]
    if not template.used:
        return [f"{template.name}, not used: no row is a conversation"]
    marks = "its generation marks say" if template.marks else "found out, as it has no marks,"
    return [f"{template.name}; {marks} what the assistant writes", template.reasoning]


def _cut(segment: Segment) -> str:
    if not segment.is_cut:
        return ""
    last = segment.begin + len(segment.tokens) - 1
    return f"tokens {segment.begin:,}–{last:,} of {segment.example_length:,}"


# The terminal -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Style:
    """Escape codes for colours, or plain marks if colours are off."""

    colours: bool

    def __call__(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours and text else text

    def supervised(self, text: str, weight: float) -> str:
        """Mark a run of tokens that carry loss; a weight other than 1 is shown."""
        told = "" if weight == 1 else f"×{weight:g} "
        if not self.colours:
            return f"⟦{told}{text}⟧"
        # Line by line: pagers lose a colour that crosses lines.
        return "\n".join(self("32", line) for line in (told + text).split("\n"))


def terminal(inspection: Inspection, colours: bool) -> Iterator[str]:
    """Yield the printed lines."""
    style = _Style(colours)
    yield ""
    yield style("1", clean(inspection.name))
    for name, text in _account(inspection):
        lines = clean(text).split("\n")
        yield f"{style('2', f'{name:<10}')} {lines[0]}"
        yield from (f"{'':<10} {line}" for line in lines[1:])
    yield ""
    yield style("1", "lengths of the examples, in tokens")
    yield from _histogram(inspection.bins, style)
    yield from _batches(inspection, style)


def _account(inspection: Inspection) -> Iterator[tuple[str, str]]:
    budget = inspection.budget
    for report in inspection.reports:
        yield from _report_lines(report)
    yield (
        "updates",
        f"{budget['steps_per_epoch']:,} per epoch, {budget['blocks_per_update']:,} blocks each; "
        f"supervised tokens: {_spread(budget['supervised_tokens_per_update'])}",
    )
    lines = _template_lines(inspection.template)
    warnings = inspection.template.warnings if inspection.template else ()
    yield "template", "\n".join([*lines, *(f"warning: {text}" for text in warnings)])
    if inspection.leaks is not None:
        pairs = [
            f"{pair.train_id} and {pair.eval_id} ({pair.similarity:.2f})"
            for pair in inspection.leaks.pairs[:SHOWN_IDS]
        ]
        yield "leaks", "\n".join([inspection.leaks.summary(), *pairs])
    shown = (f"{name} {value[:16]}" for name, value in inspection.fingerprints.items() if value)
    yield "prints", ", ".join(shown)


def _report_lines(report: DataReport) -> Iterator[tuple[str, str]]:
    yield report.section, f"{report.rows:,} rows from {report.source}"
    yield "", f"as {report.format}: {report.format_why}"
    yield (
        "",
        f"{report.examples:,} examples in {report.num_blocks:,} blocks of {report.block_size:,}, "
        f"{report.packing_efficiency:.1%} of slots real ({report.packing}); "
        f"{report.supervised_tokens:,} of {report.real_tokens:,} tokens supervised",
    )
    if len(report.sources) > 1:
        for name, source in report.sources.items():
            unused = source["examples"] - source["used_examples"]
            yield (
                "",
                f"{name}: {source['used_examples']:,} examples of {source['used_tokens']:,} "
                f"tokens used, {unused:,} not",
            )
    for reason, ids in by_count(report.rejected):
        detail = report.rejected_details.get(reason)
        first = f"{first_of(ids)}" + (f"; the first: {detail}" if detail else "")
        yield "", f"rejected {len(ids):,}: {reason} ({first})"
    if not report.rejected:
        yield "", "rejected 0"
    for column, example in report.like_input.items():
        yield "", f"warning: column {column} looks like input but is not used, e.g. {example}"
    for path, noted in most_first(report.unused_keys):
        yield "", f"not used {noted['count']:,}: {path}{noted_first(noted)}"
    for text, noted in most_first(report.noticed):
        yield "", f"noticed {noted['count']:,}: {text}{noted_first(noted)}"
    if report.truncated:
        yield "", f"truncated {len(report.truncated):,} ({first_of(report.truncated)})"
    yield "", "boundaries: " + ", ".join(f"{n} {c:,}" for n, c in report.boundaries.items())


def _histogram(bins: list[Bin], style: _Style) -> Iterator[str]:
    most = max(bin.count for bin in bins)
    names = [_bin_name(bin) for bin in bins]
    width = max(map(len, names))
    for bin, name in zip(bins, names, strict=True):
        eighths = math.ceil(bin.count / most * BAR * 8)
        bar = EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        yield f"{name:>{width}}  {style('32', bar)} {bin.count:,}"


def _batches(inspection: Inspection, style: _Style) -> Iterator[str]:
    mark = "green" if style.colours else "in ⟦ ⟧"
    yield ""
    yield style("1", "labels, by the rule that set them")
    for rule, count, supervised in inspection.rules:
        yield f"{rule:<10} {count:>8,} tokens, {supervised:>8,} supervised   {RULE_MEANINGS[rule]}"
    yield f"Below, {mark}: tokens that are predicted, and so carry loss."
    left = PRINTED_BLOCKS
    for batch in inspection.batches:
        yield ""
        yield style("1", f"step {batch.step + 1}, batch {batch.hash}") + (
            f": {batch.num_blocks:,} blocks; of {batch.slot_tokens:,} slots {batch.real_tokens:,} "
            f"real, {batch.supervised_tokens:,} supervised"
        )
        for place, block in enumerate(batch.blocks[:left], start=1):
            yield ""
            yield f"block {place} of {batch.num_blocks:,}"
            yield from _block_text(block, style)
        left = max(0, left - len(batch.blocks))


def _block_text(block: Block, style: _Style) -> Iterator[str]:
    for segment in block.segments:
        told = [f"segment {segment.number}", segment.row_id, segment.source, _cut(segment)]
        told.append(f"{len(segment.tokens):,} tokens")
        line = " · ".join(clean(text) for text in told if text)
        yield style("2", f"── {line} ──")
        yield "".join(_runs(segment, style)).removesuffix("\n")
    if block.padding:
        yield style("2", f"── {block.padding:,} padding ──")


def _runs(segment: Segment, style: _Style) -> Iterator[str]:
    for weight, run in groupby(segment.tokens, key=lambda token: token.weight):
        text = "".join(token.text for token in run)
        # Characters of several tokens become whole again; other bytes stay unchanged.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
        shown = "".join(_in_terminal(kind, part) for kind, part in visible(text))
        yield style.supervised(shown, weight) if weight > 0 else shown
    if segment.beyond is not None:
        told = f" → {clean(segment.beyond.text)} (in the example's next piece)"
        yield style("2", told)


def _in_terminal(kind: str, run: str) -> str:
    if kind == NEWLINE:
        return "↵\n" * len(run)
    return "·" * len(run) if kind == SPACE and len(run) > 1 else run


# The page -----------------------------------------------------------------------------------------


def page(inspection: Inspection) -> str:
    """Return one HTML document that needs no other file."""
    return render_page(
        "inspect",
        at=inspection,
        meanings=RULE_MEANINGS,
        cut=_cut,
        strip=_strip,
        borders=_borders,
        tokens=lambda segment: _tokens(segment, inspection),
        chart=_chart(inspection.bins),
        template_lines=_template_lines(inspection.template),
    )


def _strip(block: Block) -> list[tuple[str, int, int]]:
    """Return a block in small: (class, first slot, slots) of its runs."""
    runs: list[tuple[str, int, int]] = []
    slot = 0
    for segment in block.segments:
        for supervised, run in groupby(segment.tokens, key=lambda token: token.weight > 0):
            length = len(list(run))
            runs.append(("s" if supervised else "c", slot, length))
            slot += length
    return [*runs, ("p", slot, block.padding)] if block.padding else runs


def _borders(block: Block) -> list[int]:
    """Return the slots at which a segment begins, without the first."""
    sizes = [len(segment.tokens) for segment in block.segments]
    return list(accumulate(sizes))[:-1]


def _tokens(segment: Segment, inspection: Inspection) -> Markup:
    """Return the tokens of a segment as elements; their titles hold the details."""
    most, special = max(inspection.weights, default=1.0), inspection.special
    parts = []
    for token in segment.tokens:
        classes = ["s" if token.weight > 0 else "c"]
        if token.rule in ("stop", "off", "bos"):
            classes.append(token.rule)
        if token.text in special:
            classes.append("x")
        shade = f' style="--w:{token.weight / most:.2g}"' if 0 < token.weight < most else ""
        title = escape(_title(token, segment.number))
        parts.append(
            f'<b class="{" ".join(classes)}"{shade} title="{title}">{_glyphs(token.text)}</b>'
        )
    if segment.beyond is not None:
        parts.append(f"<em>predicts <u>{_glyphs(segment.beyond.text)}</u> in another block</em>")
    return Markup("".join(parts))


def _title(token: Token, segment: int) -> str:
    told = f"{clean(token.text)!r}" if token.text.isspace() else f"“{clean(token.text)}”"
    lines = [f"{told} · id {token.id}", f"position {token.position} · segment {segment}"]
    learned = f"weight {token.weight:g}" if token.weight > 0 else "carries no loss"
    lines.append(f"{token.rule} · {learned}")
    if token.target is None:
        lines.append("its slot predicts nothing")
    else:
        target = token.target
        lines.append(f"predicts “{clean(target.text)}” · id {target.id} · weight {target.weight:g}")
    return "\n".join(lines)


def _glyphs(text: str) -> str:
    """Return a token's text with visible white space."""
    drawn = {
        TEXT: lambda run: str(escape(run)),
        SPACE: lambda run: f"<i>{run}</i>",
        NEWLINE: lambda run: "<i class=nl>↵</i>\n" * len(run),
        ESCAPE: lambda run: f"<i class=e>{escape(run)}</i>",
    }
    return "".join(drawn[kind](run) for kind, run in visible(text))


@dataclass(frozen=True)
class _Bar:
    """A bar of the chart, in percent of its width and height."""

    name: str
    count: int
    left: float
    width: float
    height: float


def _chart(bins: list[Bin]) -> list[_Bar]:
    most, width = max(bin.count for bin in bins), 100 / len(bins)
    return [
        _Bar(_bin_name(bin), bin.count, place * width, width, 100 * bin.count / most)
        for place, bin in enumerate(bins)
    ]
