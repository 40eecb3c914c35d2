"""Write the golden losses again, from a new run of the quickstart.

    python tests/golden/write.py

Do so only if a change is meant to change losses, and say why in CHANGELOG.md. README.md beside this
says how the tolerance was measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
QUICKSTART = "quickstart.txt"


def losses_of(metrics: Path) -> list[float]:
    """Return the losses of all steps in their order."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == list(range(1, len(trained) + 1))
    return [record["loss"] for record in trained]


def run_quickstart(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Train the quickstart as `make quickstart` does; return its metrics.jsonl."""
    script = REPO / "torchprime" / "torch_xla_models" / "train.py"
    argv = ["--config-name", "quickstart", "logging_steps=1", f"output_dir={folder}"]
    argv += ["run_name=quickstart", *overrides]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    subprocess.run([sys.executable, str(script), *argv], check=True, env=environment)
    return folder / "quickstart" / "metrics.jsonl"


def write(name: str, losses: Sequence[float]) -> None:
    """Write one loss a line."""
    (HERE / name).write_text("".join(f"{loss!r}\n" for loss in losses))


def read(name: str) -> list[float]:
    """Return the losses that `write` wrote."""
    return [float(line) for line in (HERE / name).read_text().splitlines()]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="torchprime-golden-") as place:
        write(QUICKSTART, losses_of(run_quickstart(Path(place))))
