"""Write the golden losses again, from new runs of the quickstart and the parity experiment.

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
sys.path.insert(0, str(HERE.parent))  # of the modules that tests share

from load_script import load_script  # noqa: E402

QUICKSTART, PARITY, PARITY_STEPS = "quickstart.txt", "parity.txt", 40
MATRIX = REPO / "experimental" / "parity_matrix" / "run.py"


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


def run_parity(folder: Path) -> Path:
    """Train the parity experiment on one native process; return its metrics.jsonl."""
    matrix = load_script(MATRIX)
    name = "native, 1 process"
    overrides = [*matrix.on_shipped(PARITY_STEPS), *matrix.CURVES_ALONE]
    place = matrix.run_case(name, matrix.CASES[name], overrides, folder)
    return Path(place.partition("=")[2]) / "metrics.jsonl"


def write(name: str, losses: Sequence[float]) -> None:
    """Write one loss a line."""
    (HERE / name).write_text("".join(f"{loss!r}\n" for loss in losses))


def read(name: str) -> list[float]:
    """Return the losses that `write` wrote."""
    return [float(line) for line in (HERE / name).read_text().splitlines()]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="torchprime-golden-") as place:
        write(QUICKSTART, losses_of(run_quickstart(Path(place))))
        write(PARITY, losses_of(run_parity(Path(place))))
