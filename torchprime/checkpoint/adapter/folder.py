"""The PEFT folder that a run exports: its facts, and all its files except the weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from torchprime.adapters.peft_format import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    config_of,
    file_name,
    ties_head,
)
from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.card import adapter_card
from torchprime.checkpoint.adapter.parts import AdapterParts, adapter_parts
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.folder import CARD, HfFolder
from torchprime.checkpoint.hf.weight_names import EMBEDDING, HEAD, in_loaded
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.files.atomic import write_json, write_text


@dataclass(frozen=True)
class AdapterFolder:
    """A PEFT folder to be written.

    Attributes:
        hf: the folder that an export of the merged model would be; its `layout` is of the whole
            model's weights. Tokenizer, chat templates and stop tokens are taken from it.
        spec: of the adapter, with the run's `base_type`.
        base: the base's hub name or folder, written as base_model_name_or_path.
        base_sha256: of the base's weights when the run began (`base_fingerprint`), to be compared
            with the files at the end; None if it was not computed.
        wrapper: the base's model_type, if its text model is adapted; PEFT gets the names that the
            layers have in the whole base.
    """

    hf: HfFolder
    spec: AdapterSpec
    base: str
    base_sha256: str | None = None
    wrapper: str | None = None

    @classmethod
    def of(cls, hf: HfFolder, facts: ExportFacts) -> AdapterFolder:
        """Return the folder of a run that trained an adapter (`facts.adapter`).

        The base is named as the config names it.
        """
        assert facts.adapter is not None and facts.base_model is not None
        return cls(hf, facts.adapter, facts.base_model, facts.base_sha256, facts.card.wrapper)

    @cached_property
    def parts(self) -> AdapterParts:
        """The adapted layers and the trained tensors' shapes."""
        return adapter_parts(self.hf.config, self.spec)

    @property
    def layout(self) -> WeightLayout:
        """The tensors of adapter_model.safetensors, by PEFT's names."""
        trained = self.parts.shapes
        if self._head_twice:
            trained = {**trained, HEAD: trained[EMBEDDING]}
        shapes = {self._stored(name): shape for name, shape in sorted(trained.items())}
        # PEFT reads one file.
        return WeightLayout(shapes, self.hf.layout.dtype, sys.maxsize, WEIGHTS_NAME)

    def check(self) -> list[str]:
        """Find every contradiction that writing the folder would find, without weights.

        Returns:
            The repairs made in the source's files, as lines for the user.

        Raises:
            CheckpointError: contradicting or incomplete input.
            ConfigError: the adapter does not fit the model.
        """
        assert self.parts.shapes
        return self.hf.check()

    def write_small_files(self, folder: Path, facts: ExportFacts) -> None:
        """Write all files except the weights: adapter config, generation config, tokenizer, chat
        templates and card.

        There is no config.json: a reader would take the folder for a whole model.

        Raises:
            CheckpointError: contradicting or incomplete input.
        """
        self.hf.write_small_files(folder, card="")
        self.replace_files(folder, facts)

    def replace_files(self, folder: Path, facts: ExportFacts) -> None:
        """Make of the small files of a whole model those of an adapter: its config instead of
        config.json, and its card."""
        write_text(folder / CARD, adapter_card(facts, self.spec, self.parts, self.base))
        (folder / "config.json").unlink()
        config = config_of(
            self.spec,
            base=self.base,
            targets=[self._in_base(name) for name in self.parts.targets],
            whole=[self._in_base(name) for name in self.parts.whole],
            tied=self.parts.tied,
            full_names=self.wrapper is not None,
        )
        write_json(folder / CONFIG_NAME, config)

    def renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield trained tensors, given by their names in the adapted model, by PEFT's names."""
        for name, tensor in weights:
            yield self._stored(name), tensor
            if name == EMBEDDING and self._head_twice:
                yield self._stored(HEAD), tensor

    def _in_base(self, name: str) -> str:
        """Return a tensor's or module's name in the base that PEFT loads."""
        return in_loaded(name, wrapper=self.wrapper is not None)

    def _stored(self, name: str) -> str:
        return file_name(self._in_base(name))

    @property
    def _head_twice(self) -> bool:
        """True for a tied embedding that was trained: PEFT reads it as output projection, too."""
        return ties_head(self.parts.whole, self.parts.tied)
