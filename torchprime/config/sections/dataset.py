"""The dataset section: the sources of rows, and the settings that make packed blocks of them.

The names of its choices are types that torchprime/data uses too. A value outside of them is refused
here, so data/ does not check again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torchprime.config.checks import (
    at_least,
    fraction,
    iso_date,
    not_empty,
    one_source,
    positive,
    refuse,
    some_source,
)
from torchprime.config.paths import LocalFolder, NameOrFile, PathOrUrl, RowsNameOrFolder
from torchprime.errors import ConfigError

Format = Literal[
    "auto",
    "prompt_completion",
    "question_answer",
    "alpaca",
    "messages",
    "sharegpt",
    "text",
    "preference",
    "tree",
]
MixtureBy = Literal["rows", "tokens"]
ReplayShape = Literal["linear", "cosine", "constant"]
AnswerForm = Literal["as_is", "think_answer"]
Turns = Literal["whole", "branch", "auto"]
Reasoning = Literal["error", "drop", "inline"]
SpecialTokensInText = Literal["error", "answers"]
LossOn = Literal["auto", "all", "completion", "assistant", "last_assistant"]
Packing = Literal["none", "bfd", "bfd_split", "wrapped"]
Truncation = Literal["drop", "left", "right", "split", "error"]


@dataclass(frozen=True)
class MixturePart:
    """One of several sources, and its share of the mixture."""

    name: str
    hf_dataset_name: RowsNameOrFolder | None = None
    hf_dataset_config_name: str | None = None
    file_dataset_path: PathOrUrl | None = None
    split: str = "train"
    format: Format = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    weight: float | None = None  # share within its group; null for all: every row is used
    replay: bool = False  # general data, limited to dataset.replay_share or replay_schedule

    def check(self, key: str) -> None:
        not_empty(f"{key}.name", self.name)
        one_source(key, self.hf_dataset_name, self.hf_dataset_config_name, self.file_dataset_path)
        some_source(key, self.hf_dataset_name, self.file_dataset_path)
        positive(f"{key}.weight", self.weight)


@dataclass(frozen=True)
class ReplayScheduleConfig:
    """The share of the parts with `replay: true` among the supervised tokens, over the run."""

    start: float | None = None  # at the first step; null: no schedule
    end: float | None = None  # at the last step
    shape: ReplayShape = "linear"

    def __post_init__(self) -> None:
        key = "dataset.replay_schedule"
        for name in ("start", "end"):
            fraction(f"{key}.{name}", getattr(self, name), one_allowed=False)
        if self.start is None:
            if self.end is not None:
                refuse(f"{key}.start", None, "the share at the first step", f"Set {key}.start=0.2.")
            return
        if self.shape == "constant" and self.end not in (None, self.start):
            refuse(
                f"{key}.end",
                self.end,
                f"null, since {key}.shape=constant",
                f"Set {key}.end=null, or {key}.shape=linear.",
            )
        if self.shape != "constant" and self.end is None:
            refuse(
                f"{key}.end",
                None,
                "the share at the last step",
                f"Set {key}.end=0.05, or {key}.shape=constant.",
            )
        if not self.start and not self.end:
            refuse(f"{key}.start", self.start, "a share above 0", "Remove the schedule.")

    @property
    def enabled(self) -> bool:
        return self.start is not None


@dataclass(frozen=True)
class DatasetConfig:
    """The sources of rows, and the settings that make packed blocks of them."""

    hf_dataset_name: RowsNameOrFolder | None = None
    hf_dataset_config_name: str | None = None
    file_dataset_path: PathOrUrl | None = None  # a file, folder or glob
    split: str = "train"
    cache_dir: LocalFolder | None = None  # of the hub's downloads
    # Several sources instead of one; their rows have the part's name, and each has its own loss.
    mixture: list[MixturePart] = field(default_factory=list)
    mixture_by: MixtureBy = "rows"
    replay_share: float | None = None
    replay_schedule: ReplayScheduleConfig = field(default_factory=ReplayScheduleConfig)
    format: Format = "auto"
    columns: dict[str, str] = field(default_factory=dict)  # our field: the source's column
    answer_form: AnswerForm = "as_is"  # form of prompts' answers
    as_messages: bool = False  # prompt and completion become a user's and an assistant's turn
    chat_template: NameOrFile | None = None  # null: the tokenizer's own; a family; or a .jinja file
    template_options: dict[str, Any] = field(default_factory=dict)  # enable_thinking, ...
    template_date: str | None = None  # ISO date for templates that write one; null: today
    turns: Turns = "whole"
    reasoning: Reasoning = "error"  # if a template never writes it
    special_tokens_in_text: SpecialTokensInText = "error"
    response_marker: str | None = None  # for rows of text: the text before an answer
    # the text before an instruction, if a text has several turns
    instruction_marker: str | None = None
    block_size: int = 1024
    compute_loss_on: LossOn = "auto"
    packing: Packing = "bfd"
    truncation: Truncation = "drop"
    max_train_examples: int | None = None
    max_rejected_fraction: float = 0.05
    max_row_characters: int = 4_000_000  # a tokenizer needs some 300 bytes of memory for each
    max_unreadable_rows: int = 0  # lines that are no JSON at all: a damaged file
    id_key: str | None = None  # column of an id that may occur only once
    group_key: str | None = None  # column; rows of a group stay on one side of the split
    time_key: str | None = None  # column; the latest rows are held out
    weight_key: str | None = None  # column of a factor of a training row's loss
    eval_fraction: float | None = None
    leak_check: Literal["off", "warn", "error"] = "warn"
    leak_threshold: float = 0.8
    # folder of prepared data; null: the user's cache folder
    prepared_dir: LocalFolder | None = None
    num_proc: int | None = None  # processes that tokenize; null: one per core, 8 at most

    def __post_init__(self) -> None:
        one_source(
            "dataset", self.hf_dataset_name, self.hf_dataset_config_name, self.file_dataset_path
        )
        self._check_mixture()
        not_empty("dataset.split", self.split)
        not_empty("dataset.chat_template", self.chat_template)
        if self.format == "text" and self.compute_loss_on not in ("auto", "all"):
            refuse(
                "dataset.compute_loss_on",
                self.compute_loss_on,
                "all, since rows of dataset.format=text have no completion",
                "Set dataset.compute_loss_on=all.",
            )
        self._check_markers()
        if self.turns != "whole" and self.compute_loss_on in ("all", "completion"):
            refuse(
                "dataset.turns",
                self.turns,
                f"whole, since dataset.compute_loss_on={self.compute_loss_on} trains more than "
                "answers",
                "Set dataset.compute_loss_on=assistant or last_assistant.",
            )
        iso_date("dataset.template_date", self.template_date)
        at_least("dataset.block_size", self.block_size, 2)  # one target needs two tokens
        at_least("dataset.max_train_examples", self.max_train_examples, 1)
        fraction("dataset.max_rejected_fraction", self.max_rejected_fraction)
        at_least("dataset.max_unreadable_rows", self.max_unreadable_rows, 0)
        at_least("dataset.max_row_characters", self.max_row_characters, 1)
        for key in ("id_key", "group_key", "time_key", "weight_key", "prepared_dir"):
            not_empty(f"dataset.{key}", getattr(self, key))
        if self.weight_key in [p.columns.get("weight", "weight") for p in (self, *self.mixture)]:
            refuse(
                "dataset.weight_key",
                self.weight_key,
                "another column than the rows' `weight`, which is read in any case",
                "Set dataset.weight_key=null.",
            )
        at_least("dataset.num_proc", self.num_proc, 1)
        self._check_split()

    def _check_markers(self) -> None:
        not_empty("dataset.response_marker", self.response_marker)
        not_empty("dataset.instruction_marker", self.instruction_marker)
        if self.instruction_marker is not None and self.response_marker is None:
            refuse(
                "dataset.instruction_marker",
                self.instruction_marker,
                "null, since dataset.response_marker is null",
                "Set dataset.response_marker to the text in front of each answer.",
            )
        if self.response_marker is None:
            return
        if self.response_marker == self.instruction_marker:
            refuse(
                "dataset.instruction_marker",
                self.instruction_marker,
                "another text than dataset.response_marker",
                "Give the text in front of each instruction.",
            )
        if self.format not in ("auto", "text"):
            refuse(
                "dataset.response_marker",
                self.response_marker,
                f"null, since rows of dataset.format={self.format} say themselves where an answer "
                "begins",
                "Set dataset.format=text, or dataset.response_marker=null.",
            )
        if self.compute_loss_on == "all":
            refuse(
                "dataset.compute_loss_on",
                "all",
                "auto, since dataset.response_marker says what carries loss",
                "Set dataset.compute_loss_on=auto.",
            )

    def _check_mixture(self) -> None:
        if not self.mixture:
            some_source("dataset", self.hf_dataset_name, self.file_dataset_path)
            for key in ("replay_share", "replay_schedule.start"):
                given = self.replay_share if key == "replay_share" else self.replay_schedule.start
                if given is not None:
                    refuse(
                        f"dataset.{key}",
                        given,
                        "null, since dataset.mixture is empty",
                        "List the sources in dataset.mixture, the general one with replay: true.",
                    )
            return
        if self.hf_dataset_name is not None or self.file_dataset_path is not None:
            raise ConfigError(
                "dataset.mixture: given together with dataset.hf_dataset_name or "
                "dataset.file_dataset_path, expected one of them. Move that source into "
                "dataset.mixture and set the other two to null."
            )
        for place, part in enumerate(self.mixture):
            part.check(f"dataset.mixture[{place}]")
        names = [part.name for part in self.mixture]
        if len(set(names)) < len(names):
            refuse("dataset.mixture", names, "a name of its own for each part", "Rename one.")
        fraction("dataset.replay_share", self.replay_share, one_allowed=False)
        self._check_schedule()
        if self.max_train_examples is not None:
            refuse(
                "dataset.max_train_examples",
                self.max_train_examples,
                "null, since dataset.mixture's weights decide how many are used",
                "Set dataset.max_train_examples=null.",
            )

    def _check_schedule(self) -> None:
        if not self.replay_schedule.enabled:
            return
        if self.replay_share is not None:
            refuse(
                "dataset.replay_share",
                self.replay_share,
                "null, since dataset.replay_schedule gives the share",
                "Set dataset.replay_share=null, or both ends of the schedule to null.",
            )
        count = sum(part.replay for part in self.mixture)
        if count in (0, len(self.mixture)):
            refuse(
                "dataset.replay_schedule.start",
                self.replay_schedule.start,
                f"null, since {count} of {len(self.mixture)} parts of dataset.mixture have "
                "replay: true",
                "Mark the general data with replay: true, and not your own.",
            )

    def _check_split(self) -> None:
        fraction("dataset.eval_fraction", self.eval_fraction, one_allowed=False)
        if self.eval_fraction == 0:
            refuse("dataset.eval_fraction", 0.0, "a fraction above 0, or null", "Set it to null.")
        if self.time_key is not None and self.eval_fraction is None:
            refuse(
                "dataset.time_key",
                self.time_key,
                "null, since nothing is split",
                "Set dataset.eval_fraction=0.1 to hold out the latest tenth.",
            )
        if self.eval_fraction is not None and self.max_train_examples is not None:
            refuse(
                "dataset.max_train_examples",
                self.max_train_examples,
                "null together with dataset.eval_fraction",
                "Set dataset.max_train_examples=null.",
            )
        positive("dataset.leak_threshold", self.leak_threshold)
        fraction("dataset.leak_threshold", self.leak_threshold)
