"""The config sections for held-out rows: metrics, early stopping, selection and export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torchprime.config.checks import (
    at_least,
    fraction,
    not_empty,
    one_source,
    positive,
    refuse,
    some_source,
)
from torchprime.config.paths import PathOrUrl, RowsNameOrFolder
from torchprime.config.sections.dataset import Format

LOSSES = ("eval_loss", "eval_perplexity")  # measured whenever rows are held out
# Names that graders can't have: the other fields of an evaluation's record, as displayed.
TAKEN = (*LOSSES, "loss", "perplexity", "supervised_tokens", "seconds", "train_loss",
         "generated_tokens", "generate_seconds", "share_of_run", "step")  # fmt: skip


def source_loss(source: str) -> str:
    """Return the name of the metric that is the held-out loss of one source."""
    return f"eval_loss[{source}]"


@dataclass(frozen=True)
class EvalSource:
    """One of several sources of held-out rows, which has a loss of its own."""

    name: str
    hf_dataset_name: RowsNameOrFolder | None = None
    hf_dataset_config_name: str | None = None
    file_dataset_path: PathOrUrl | None = None
    split: str | None = None
    format: Format = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    generate: bool = True  # its prompts are among those that are answered

    def check(self, key: str) -> None:
        not_empty(f"{key}.name", self.name)
        if set(self.name) & set("[]"):
            refuse(f"{key}.name", self.name, "a name without [ and ]", "Rename it.")
        one_source(key, self.hf_dataset_name, self.hf_dataset_config_name, self.file_dataset_path)
        some_source(key, self.hf_dataset_name, self.file_dataset_path)
        not_empty(f"{key}.split", self.split)
        _needs_split(key, self.hf_dataset_name, self.split)


def _needs_split(key: str, hub: str | None, split: str | None) -> None:
    if hub is not None and split is None:
        refuse(f"{key}.split", None, "a split of the hub's dataset", f"Set {key}.split=test.")


@dataclass(frozen=True)
class GenerateConfig:
    """Graded answers to held-out prompts, generated whenever the held-out loss is measured."""

    max_examples: int | None = 0  # number of held-out rows; null: all, 0: none
    max_new_tokens: int = 256
    batch_size: int = 32  # prompts at a time, over all devices
    temperature: float = 0.0  # 0: always the most likely token
    top_k: int | None = None
    top_p: float = 1.0
    every_steps: int | None = None  # a multiple of eval.every_steps; null: at every evaluation

    def __post_init__(self) -> None:
        key = "eval.generate"
        at_least(f"{key}.max_examples", self.max_examples, 0)
        at_least(f"{key}.max_new_tokens", self.max_new_tokens, 1)
        at_least(f"{key}.batch_size", self.batch_size, 1)
        at_least(f"{key}.temperature", self.temperature, 0)
        at_least(f"{key}.top_k", self.top_k, 1)
        positive(f"{key}.top_p", self.top_p)
        fraction(f"{key}.top_p", self.top_p)
        at_least(f"{key}.every_steps", self.every_steps, 1)

    @property
    def enabled(self) -> bool:
        return self.max_examples != 0


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out rows: their loss, and graded answers.

    It runs before the first step, every `every_steps` and at the end.
    """

    hf_dataset_name: RowsNameOrFolder | None = None
    hf_dataset_config_name: str | None = None
    file_dataset_path: PathOrUrl | None = None
    split: str | None = None
    # Several sources instead of one; each has its own loss.
    sources: list[EvalSource] = field(default_factory=list)
    max_examples: int | None = None
    every_steps: int | None = None
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    # Each has a name, a kind, and the kind's options (docs/evaluation.md).
    graders: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        one_source(
            "eval", self.hf_dataset_name, self.hf_dataset_config_name, self.file_dataset_path
        )
        not_empty("eval.split", self.split)
        _needs_split("eval", self.hf_dataset_name, self.split)
        self._check_sources()
        at_least("eval.max_examples", self.max_examples, 1)
        at_least("eval.every_steps", self.every_steps, 1)
        self._check_graders()
        between, every = self.generate.every_steps, self.every_steps
        if between is not None and (every is None or between % every):
            refuse(
                "eval.generate.every_steps",
                between,
                "null, since eval.every_steps is null"
                if every is None
                else f"a multiple of eval.every_steps={every}",
                "Set eval.every_steps too, or eval.generate.every_steps=null.",
            )

    def _check_sources(self) -> None:
        if not self.sources:
            return
        names = [source.name for source in self.sources]
        for place, source in enumerate(self.sources):
            source.check(f"eval.sources[{place}]")
        if len(names) == 1 or len(set(names)) < len(names):
            refuse(
                "eval.sources",
                names,
                "two or more sources, each with a name of its own",
                "Give one source as eval.file_dataset_path or eval.hf_dataset_name, or add "
                "another; rename equal ones.",
            )
        for key in ("hf_dataset_name", "file_dataset_path", "max_examples"):
            given = getattr(self, key)
            if given is not None:
                refuse(
                    f"eval.{key}",
                    given,
                    "null, since eval.sources lists the held-out rows",
                    f"Set eval.{key}=null, or eval.sources=[].",
                )

    def _check_graders(self) -> None:
        names = []
        for place, grader in enumerate(self.graders):
            key = f"eval.graders[{place}]"
            for part in ("name", "kind"):
                if not isinstance(grader.get(part), str) or not grader[part].strip():
                    refuse(
                        f"{key}.{part}",
                        grader.get(part),
                        f"a {part}",
                        f"Write each grader as {{name: answer_accuracy, kind: gsm8k_answer}}; "
                        f"add its {part}.",
                    )
            name = grader["name"]
            if not name.replace("_", "a").isalnum() or name[0].isdigit() or name in TAKEN:
                refuse(
                    f"{key}.name",
                    name,
                    f"letters, digits and _, not one of {', '.join(TAKEN)}",
                    "Rename it.",
                )
            names.append(name)
        if len(set(names)) < len(names):
            refuse("eval.graders", names, "a name of its own for each grader", "Rename one.")
        if self.graders and not self.generate.enabled:
            refuse(
                "eval.generate.max_examples",
                0,
                "how many held-out rows are answered, since eval.graders grade answers",
                "Set eval.generate.max_examples=200, or eval.graders=[].",
            )

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that an evaluation measures."""
        return [*LOSSES, *(grader["name"] for grader in self.graders)]

    @property
    def enabled(self) -> bool:
        given = (self.hf_dataset_name, self.file_dataset_path)
        return any(each is not None for each in given) or bool(self.sources)


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """End the run after `patience` evaluations without an improvement of more than `min_delta`."""

    metric: str | None = None  # null: never
    mode: Literal["min", "max"] = "min"
    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        not_empty("selection.early_stopping.metric", self.metric)
        at_least("selection.early_stopping.patience", self.patience, 1)
        at_least("selection.early_stopping.min_delta", self.min_delta, 0)


@dataclass(frozen=True)
class SelectionConfig:
    """Checkpoint selection: of the steps that pass every gate, the first by ranking is the best."""

    # "format_pass >= 0.98", "eval_loss[general] <= base + 0.05"
    gates: list[str] = field(default_factory=list)
    ranking: list[str] = field(default_factory=lambda: ["eval_loss asc"])
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)

    def __post_init__(self) -> None:
        if not self.ranking:
            refuse("selection.ranking", [], "at least one metric", 'Set ["eval_loss asc"].')


@dataclass(frozen=True)
class ExportConfig:
    """The export at the end of a run."""

    # best: by `selection`; an evaluated step that is the best so far is then saved as a checkpoint.
    which: Literal["best", "last"] = "last"
    # Under an adapter: its PEFT folder, a Hugging Face folder of base and adapter merged, or both.
    adapter: Literal["adapter", "merged", "both"] = "merged"
    # Of a model with a text model inside: the text model, or all parts, the others as in the base.
    parts: Literal["text", "all"] = "text"
