"""Draw docs/figures/journey.svg: the journey of a batch through the host, the device and back.

Run it after a change: `python docs/figures/journey.py`. A test compares the file with this drawing.
The SVG is written as text, so that a change of one box is a change of a few lines.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 1040, 620
BOX_WIDTH, BOX_HEIGHT, STEP, ROWS = 232, 52, 74, 6
TOP, MARGIN = 84, 12
LEFT, MIDDLE, RIGHT = 28, 404, 780
BOLD, ITALIC, GREY = 'font-weight="bold"', 'font-style="italic"', 'fill="#3c4043"'

# The boxes of each column from above: name and module.
BEFORE = [
    ("Rows", "data/files, data/rows"),
    ("Token ids and labels", "data/templates, data/tokens"),
    ("Packed blocks", "data/blocks/pack.py"),
    ("Order of the step", "data/blocks/order.py"),
    ("Batch and its hash", "data/blocks/batch.py"),
    ("Base checkpoint", "checkpoint/hf/read.py"),
]
DEVICE = [
    ("Forward of the model", "models/decoder.py"),
    ("Loss sums", "losses/cross_entropy.py"),
    ("Gradients, summed", "training/step.py"),
    ("One division, clipping", "training/step.py"),
    ("Optimizer's update", "training/optim/"),
    ("Weights and state", "torch_xla_models, torch_native"),
]
AFTER = [
    ("StepRecord", "metrics/record.py"),
    ("metrics.jsonl", "metrics/writers.py"),
    ("Held-out loss", "evaluation/heldout.py"),
    ("Answers and grades", "evaluation/behaviour.py"),
    ("Checkpoint", "checkpoint/run"),
    ("Export and certificate", "checkpoint/hf, checkpoint/proof"),
]
# The methods of Backend by which something leaves the device, by the row that they lead to.
GATES_OUT = {0: "read", 2: "read_eval", 3: "generate", 4: "checkpoint_tensors", 5: "weights"}


def text(x: float, y: float, content: str, size: int = 15, style: str = "") -> str:
    """Return a centered line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="middle" {style}>'
        f"{escape(content)}</text>"
    )


def arrow(*points: tuple[float, float]) -> str:
    path = " L ".join(f"{x:g} {y:g}" for x, y in points)
    return (
        f'<path d="M {path}" fill="none" stroke="#202124" stroke-width="2" marker-end="url(#a)"/>'
    )


def box(left: int, top: int, fill: str, name: str, module: str) -> list[str]:
    middle = left + BOX_WIDTH / 2
    return [
        f'<rect x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
        f'fill="{fill}" stroke="#5f6368"/>',
        text(middle, top + 22, name, style=BOLD),
        text(middle, top + 41, module, size=12, style=GREY),
    ]


def column(
    left: int, heading: str, fill: str, boxes: list[tuple[str, str]], chain: int
) -> list[str]:
    """Return a panel with its boxes; the first `chain` of them follow one another."""
    middle, height = left + BOX_WIDTH / 2, ROWS * STEP - (STEP - BOX_HEIGHT)
    drawn = [
        f'<rect x="{left - MARGIN}" y="{TOP - MARGIN}" width="{BOX_WIDTH + 2 * MARGIN}" '
        f'height="{height + 2 * MARGIN}" rx="10" fill="#f8f9fa" stroke="#dadce0"/>',
        text(middle, TOP - 32, heading, size=17, style=BOLD),
    ]
    for row, (name, module) in enumerate(boxes):
        drawn += box(left, TOP + row * STEP, fill, name, module)
    for row in range(chain - 1):
        bottom = TOP + row * STEP + BOX_HEIGHT
        drawn.append(arrow((middle, bottom), (middle, TOP + (row + 1) * STEP - 2)))
    return drawn


def center_of(row: int) -> float:
    return TOP + row * STEP + BOX_HEIGHT / 2


def gates() -> list[str]:
    """Return the arrows between the columns, each with its method of Backend."""
    out_of_host, into_device = LEFT + BOX_WIDTH, MIDDLE - 2
    gap = (out_of_host + MIDDLE) / 2
    batch, first, weights = center_of(4), center_of(0), center_of(5)
    drawn = [
        arrow((out_of_host, batch), (gap, batch), (gap, first), (into_device, first)),
        text(gap, first - 10, "put", size=12, style=ITALIC),
        arrow((out_of_host, weights), (into_device, weights)),
        text(gap, weights - 8, "place", size=12, style=ITALIC),
    ]
    edge = MIDDLE + BOX_WIDTH + MARGIN
    for row, method in GATES_OUT.items():
        drawn.append(arrow((edge, center_of(row)), (RIGHT - 2, center_of(row))))
        middle = (edge + RIGHT - MARGIN) / 2
        drawn.append(text(middle, center_of(row) - 8, method, size=12, style=ITALIC))
    return drawn


def drawing() -> str:
    """Return the SVG."""
    below = TOP + ROWS * STEP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" fill="#202124">',
        "<title>The journey of a batch</title>",
        '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M 0 0 L 10 5 L 0 10 z"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        *column(LEFT, "Host: before the step", "#e8f0fe", BEFORE, chain=5),
        *column(MIDDLE, "Device: one program", "#fef3e0", DEVICE, chain=6),
        *column(RIGHT, "Host: after the step", "#e6f4ea", AFTER, chain=2),
        *gates(),
        text(
            WIDTH / 2, below + 32, "Words on arrows are methods of Backend (training/backend.py)."
        ),
        text(WIDTH / 2, below + 56, "training/loop.py and its hooks call them, on every backend."),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(drawing(), encoding="utf-8")
