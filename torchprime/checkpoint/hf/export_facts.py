"""The facts that an export needs besides the weights and the small files (hf/export.json).

An export at the end of a run writes the small files beside the weights (hf/folder.py). A checkpoint
stores the same files and these facts (`hf/`), so that it can be exported later without the run, its
rows or a device. The result is the same, byte for byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from torchprime.adapters.spec import AdapterSpec, BaseType, Init, Scaling
from torchprime.checkpoint.field_kinds import (
    MOST_COUNT,
    OBJECT,
    TEXT,
    Kind,
    Table,
    check_fields,
    count,
    list_of,
    or_null,
    texts_to,
)
from torchprime.checkpoint.hf.card import CardFacts, model_card
from torchprime.checkpoint.hf.served_template import TrainedTemplate
from torchprime.checkpoint.hf.whole import Parts
from torchprime.checkpoint.hf.write import CODES, WeightLayout
from torchprime.errors import CheckpointError
from torchprime.files.json_files import read_json

FACTS = "export.json"
FACTS_VERSION = 1

MOST_DIMS = 16
SHAPE = list_of(count(), "sizes")
FIELDS: Table = {
    "spec": texts_to(Kind("a shape", lambda v: SHAPE.holds(v) and len(v) <= MOST_DIMS)),
    "dtype": Kind(
        "a type of weights", lambda v: v in [str(t).removeprefix("torch.") for t in CODES]
    ),
    "max_shard_bytes": count(1),
    "stop_ids": list_of(count(), "a list of ids"),
    "unused_rows": list_of(count(), "a list of rows"),
    "base_model": or_null(TEXT),
    "base_folder": or_null(TEXT),
    "step": or_null(count()),
    "template": or_null(TEXT),
    "tools_template": or_null(TEXT),
    "template_options": OBJECT,
    "card": OBJECT,
    "metrics": OBJECT,
    "fingerprints": texts_to(or_null(TEXT)),
    "adapter": or_null(OBJECT),
    "base_sha256": or_null(TEXT),
    "parts": Kind("text or all", lambda v: v in get_args(Parts)),
}
NAMES = list_of(TEXT, "a list of names")
NUMBER = Kind("a number from 0", lambda v: type(v) in (int, float) and 0 <= v < MOST_COUNT)
ADAPTER: Table = {
    "rank": count(1),
    "alpha": NUMBER,
    "scaling": Kind("lora or rslora", lambda v: v in get_args(Scaling)),
    "dropout": NUMBER,
    "targets": NAMES,
    "layers": or_null(list_of(count(), "a list of numbers")),
    "modules_to_train": NAMES,
    "init": Kind("kaiming or gaussian", lambda v: v in get_args(Init)),
    "dora": Kind("true or false", lambda v: isinstance(v, bool)),
    "base_type": Kind("run, int8 or nf4", lambda v: v in get_args(BaseType)),
}


@dataclass(frozen=True)
class ExportFacts:
    """The facts that an export needs, in JSON types.

    Attributes:
        spec: name -> shape of every weight, in the order wanted in the files. Tied: no lm_head.
        dtype: of the exported weights.
        max_shard_bytes: the limit above which files are split.
        stop_ids: the ids that were trained to end an answer.
        template: sha256 of the chat template that was trained with; None without conversations.
        tools_template: sha256 of the one that rendered conversations with tools; None: the same.
        template_options: what else the template was given.
        base_model: as the config names it; None when training began from random weights.
        base_folder: where its weights lay.
        unused_rows: rows of the base's embeddings that were initialized for new tokens.
        step: updates made; None if unknown.
        card: facts for the model card.
        metrics: the last values.
        fingerprints: of data, config, tokenizer, ...
        adapter: what was trained, if not all weights: then `spec` is of the model without it.
        base_sha256: of the weights that an adapter's run began with; None if not computed.
        parts: of a wrapper that are exported.
    """

    spec: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    max_shard_bytes: int
    stop_ids: tuple[int, ...]
    template: str | None = None
    tools_template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    base_folder: str | None = None
    unused_rows: tuple[int, ...] = ()
    step: int | None = None
    card: CardFacts = field(default_factory=CardFacts)
    metrics: Mapping[str, object] = field(default_factory=dict)
    fingerprints: dict[str, str | None] = field(default_factory=dict)
    adapter: AdapterSpec | None = None
    base_sha256: str | None = None
    parts: Parts = "text"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def layout(self) -> WeightLayout:
        """The weights and their split into files."""
        return WeightLayout(self.spec, self.dtype, self.max_shard_bytes)

    @property
    def source(self) -> str:
        """The run, named by its base model and its updates, for people."""
        made = "random weights" if self.base_model is None else self.base_model
        return f"a run from {made}" + ("" if self.step is None else f" after {self.step} updates")

    def trained_template(self) -> TrainedTemplate | None:
        """Return the chat template that was used in training, for the check of the export."""
        if self.template is None:
            return None
        with_tools = self.tools_template or self.template
        return TrainedTemplate(self.template, with_tools, self.template_options)

    def card_text(self) -> str:
        """Return the text of README.md."""
        return model_card(
            self.card,
            steps=self.step,
            dtype=self.dtype_name,
            metrics=self.metrics,
            template_options=self.template_options,
            whole=self.parts == "all",
        )

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["spec"] = {name: list(shape) for name, shape in self.spec.items()}
        return {"format_version": FACTS_VERSION, **content, "dtype": self.dtype_name}


def read_facts(path: Path) -> ExportFacts:
    """Read the facts that a checkpoint stores.

    Raises:
        CheckpointError: missing, malformed or of another format.
    """
    content = read_json(path)
    version = content.pop("format_version", None)
    if version != FACTS_VERSION:
        raise CheckpointError(
            f"{path} has format {version}; this torchprime reads format {FACTS_VERSION}. Use the "
            "version that wrote it."
        )
    try:
        content = {**_defaults(), **content}  # older versions wrote fewer fields
        check_fields(content, FIELDS)
        content["spec"] = {name: tuple(shape) for name, shape in content["spec"].items()}
        content["dtype"] = getattr(torch, content["dtype"])
        content["stop_ids"] = tuple(content["stop_ids"])
        content["unused_rows"] = tuple(content["unused_rows"])
        content["card"] = CardFacts.from_json(content["card"], "card")
        if content["adapter"] is not None:
            content["adapter"] = _adapter(content["adapter"])
        return ExportFacts(**content)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold an export's facts: {error}.") from error


def _adapter(content: Mapping[str, Any]) -> AdapterSpec:
    """Return the description of an adapter; a ValueError is raised for wrong fields."""
    check_fields(content, ADAPTER, "adapter")
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    return AdapterSpec(**fields)


def _defaults() -> dict[str, Any]:
    """Return the default values of the optional fields, in JSON types."""
    needed = dict.fromkeys(("spec", "dtype", "max_shard_bytes", "stop_ids"), ())
    found = dataclasses.asdict(ExportFacts(**needed))  # type: ignore[arg-type]
    return {n: list(v) if isinstance(v, tuple) else v for n, v in found.items() if n not in needed}
