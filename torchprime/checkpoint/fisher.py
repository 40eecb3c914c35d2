"""A folder with the diagonal Fisher information of a base, as `torchprime fisher` writes it.

fisher.json         the base and the rows that it is of, the count of examples, the formula
*.safetensors       one fp32 tensor for each weight, under the weight's Hugging Face name
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from torchprime.checkpoint.export import write_weights
from torchprime.checkpoint.field_kinds import NUMBER, SHA256, TEXT, Table, check_fields, count
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.write import WeightLayout, hash_of_all, weight_hashes
from torchprime.errors import CheckpointError
from torchprime.files.atomic import atomic_folder, write_json
from torchprime.files.json_files import read_json

MANIFEST = "fisher.json"
FORMAT_VERSION = 1
# L_n is the summed loss of example n's supervised tokens, W_n the sum of their weights.
FORMULA = "sum over examples n of (dL_n/dw)^2, divided by the sum over n of W_n"
FIELDS: Table = {
    "format_version": count(1),
    "formula": TEXT,
    "base": SHA256,
    "data": TEXT,
    "examples": count(1),
    "supervised_weight": NUMBER,
    "weights": SHA256,
}
KEY = "regularization.ewc.fisher"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class FisherFacts:
    """The base and the rows of a Fisher information.

    Attributes:
        base: the fingerprint of the base's weights.
        data: the fingerprint of the packed rows that the examples are from.
        examples: their number.
        supervised_weight: the sum of their tokens' weights.
    """

    base: str
    data: str
    examples: int
    supervised_weight: float


class FisherFolder:
    """An opened folder, whose manifest is right; its values are read on each call."""

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            CheckpointError: there is no such folder, or it is damaged or of another format.
        """
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{KEY}: given {str(folder)!r}, expected a folder with {MANIFEST}. Make one: "
                "torchprime fisher --config-name NAME --out DIR."
            )
        content = read_json(folder / MANIFEST)
        try:
            check_fields(content, FIELDS)
        except ValueError as error:
            raise CheckpointError(f"{folder / MANIFEST}: {error}. Make the folder again.") from None
        if (content["format_version"], content["formula"]) != (FORMAT_VERSION, FORMULA):
            raise CheckpointError(
                f"{folder / MANIFEST} has format {content['format_version']} and the formula "
                f"{content['formula']!r:.100}; this torchprime reads format {FORMAT_VERSION} with "
                f"{FORMULA!r}. Make the folder again: torchprime fisher."
            )
        given = ("base", "data", "examples", "supervised_weight")
        self.facts = FisherFacts(**{name: content[name] for name in given})
        self.sha256: str = content["weights"]
        self._reader = SafetensorsReader(folder)

    def get(self, name: str) -> Tensor:
        """Return the values of one weight, a view of the mapped file."""
        return self._reader.get(name)

    def check_shapes(self, expected: Mapping[str, Shape]) -> None:
        """Raise a CheckpointError if it is of a model with other weights; only headers are read."""
        found = {name: shape for name, (shape, _) in self._reader.names().items()}
        wrong = [
            f"{name} (model {_shown(expected, name)}, file {_shown(found, name)})"
            for name in sorted({*expected, *found})
            if expected.get(name) != found.get(name)
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"{KEY}: {self.folder} is of another model; these weights differ: "
                f"{', '.join(wrong[:3])}{more}. Run torchprime fisher with this run's config."
            )

    def check_values(self, base: str) -> None:
        """Compare the fingerprint of a run's base with this one's, and read all values once.

        Raises:
            CheckpointError: it is of another base, or its files have changed.
        """
        if self.facts.base != base:
            raise CheckpointError(
                f"{KEY}: {self.folder} is of a base with the fingerprint {self.facts.base[:16]}, "
                f"and this run's base has {base[:16]}. Run torchprime fisher with this run's "
                "config, or name the base that it was made of."
            )
        if hash_of_all(weight_hashes(self._reader)) != self.sha256:
            raise CheckpointError(
                f"{KEY}: the files in {self.folder} have changed since they were written: their "
                f"sha256 is not that of {MANIFEST}. Make the folder again: torchprime fisher."
            )


def _shown(shapes: Mapping[str, Shape], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "none"


def write_fisher(
    out: Path, values: Iterable[tuple[str, Tensor]], layout: WeightLayout, facts: FisherFacts
) -> None:
    """Write a folder, whole or not at all.

    Args:
        out: must be new or empty.
        values: (name, fp32 tensor) in any order; taken one at a time.

    Raises:
        CheckpointError: used target, values missing or not finite.
    """
    with atomic_folder(out) as folder:
        hashes = write_weights(folder, values, layout)
        content = {"format_version": FORMAT_VERSION, "formula": FORMULA, **asdict(facts)}
        write_json(folder / MANIFEST, {**content, "weights": hash_of_all(hashes)})
