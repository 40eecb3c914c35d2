"""The description of one source of rows, and the config keys that a message about it names."""

from __future__ import annotations

from dataclasses import dataclass

from torchprime.config.sections.dataset import DatasetConfig


@dataclass(frozen=True)
class SourceSpec:
    """The rows to read; most fields are the keys of the config's dataset and eval sections.

    Attributes:
        split: None if the key is not set, which is an error if there are several splits.
        name: the name of a mixture's part, which begins its row ids: `replay/train.jsonl:17`.
        section: the config section whose keys messages name.
    """

    file_dataset_path: str | None = None
    hf_dataset_name: str | None = None
    hf_dataset_config_name: str | None = None
    split: str | None = DatasetConfig.split
    cache_dir: str | None = None
    name: str = ""
    section: str = "dataset"

    def describe(self) -> str:
        if self.file_dataset_path:
            return self.file_dataset_path
        config = f"/{self.hf_dataset_config_name}" if self.hf_dataset_config_name else ""
        return f"{self.hf_dataset_name}{config}:{self.split}"

    def label(self, inner: str) -> str:
        """Return the prefix of row ids: the mixture part's name, if any, and `inner`."""
        return f"{self.name}/{inner}" if self.name else inner
