"""The whole model around a trained text model: its base's files with the text weights replaced.

    base: vision tower, projector, text  +  trained text  ->  the base's other tensors, trained text

All other tensors are copied from the base one at a time, bit for bit, under their names and in
their types. config.json, the processor's files and the tokenizer are the base's. Only this changes
in them: the dtype and the rows of the vocabulary in config.json, if the run has others; and the
tokenizer's files, if the run trained with another tokenizer or chat template.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.portable import check_tokenizer
from torchprime.checkpoint.hf.portable_config import both_dtype_spellings
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.source import PROCESSOR_FILES, TOKENIZER_FILES
from torchprime.checkpoint.hf.weight_names import EMBEDDING, HEAD, inner_names
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.errors import CheckpointError
from torchprime.files.atomic import write_bytes, write_json
from torchprime.files.json_files import LARGE, read_json, read_json_if_there, read_regular
from torchprime.files.template_files import FOLDER_OF_OTHERS, own_templates
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.families import is_wrapper

# The exported parts of a wrapper: its text model, or all of them.
Parts = Literal["text", "all"]
SETTINGS, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
# Beside tokenizer.json, which has the same bytes.
BESIDE = tuple(name for name in TOKENIZER_FILES if name != TOKENIZER)


@dataclass(frozen=True)
class WholeModel:
    """A base whose text weights are replaced.

    Attributes:
        base: the folder of a wrapper's weights.
    """

    base: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's config.json.

        Raises:
            CheckpointError: the base is no wrapper.
        """
        config = read_json(self.base / "config.json")
        if not is_wrapper(config):
            raise CheckpointError(
                f"{self.base} holds a model of model_type {config.get('model_type')!r:.100}, "
                "expected one with a text model inside, whose other parts can be exported. Export "
                "the text alone (export.parts=text, --parts text), or name the base with --base."
            )
        return config

    @cached_property
    def reader(self) -> SafetensorsReader:
        """All tensors of the base by their names in its files."""
        assert self.config
        return SafetensorsReader(self.base, stored_names=True)

    @cached_property
    def text(self) -> dict[str, str]:
        """The names in the files of the text model's tensors, by those in the text model."""
        names = {public: stored for stored, public in inner_names(self.reader.names()).items()}
        if HEAD in names and EMBEDDING not in names:  # a tied model's only copy
            names[EMBEDDING] = names.pop(HEAD)
        return names

    def layout(self, text: WeightLayout) -> WeightLayout:
        """Return the layout of all tensors, in the order of the base's files.

        A copy of a tied embedding that the base stores as output projection is left out.

        Args:
            text: of the text model's weights.

        Raises:
            CheckpointError: the base has no text model of these names and shapes.
        """
        listing, public = self.reader.names(), {n: name for name, n in self.text.items()}
        self._check(text, listing)
        spec: dict[str, tuple[int, ...]] = {}
        kept: dict[str, torch.dtype] = {}
        for stored, (shape, dtype) in listing.items():
            name = public.get(stored)
            if name is not None and name in text.spec:
                spec[stored] = tuple(text.spec[name])
            elif name != HEAD:
                spec[stored], kept[stored] = shape, dtype
        return WeightLayout(spec, text.dtype, text.max_shard_bytes, kept=kept)

    def _check(self, text: WeightLayout, listing: Mapping[str, tuple[Any, Any]]) -> None:
        def fits(name: str, shape: tuple[int, ...]) -> bool:
            if name not in self.text:
                return False
            found = listing[self.text[name]][0]
            grown = name in (EMBEDDING, HEAD)  # may have rows for new tokens
            return tuple(shape[grown:]) == tuple(found[grown:])

        wrong = [name for name, shape in text.spec.items() if not fits(name, shape)]
        if wrong:
            raise CheckpointError(
                f"{self.base} has no text model of the trained one's names and shapes: "
                f"{len(wrong)} of {len(text.spec)} weights do not fit, the first is {wrong[0]}. "
                "Give the base that the run began with (--base)."
            )

    def weights(
        self, text: Iterable[tuple[str, Tensor]], layout: WeightLayout
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the text model's weights, given by their names in it, and then the base's others,
        by their names in the files."""
        for name, tensor in text:
            yield self.text.get(name, name), tensor
        yield from self.reader.weights(layout.kept)

    def text_hashes(self, hashes: Mapping[str, str]) -> dict[str, str]:
        """Return the hashes of the text model's weights, by their names in it."""
        return {name: hashes[stored] for name, stored in self.text.items() if stored in hashes}

    def replace_files(self, folder: Path, layout: WeightLayout) -> list[str]:
        """Make of a text model's small files those of the whole.

        Args:
            layout: of all tensors.

        Returns:
            The differences from the base's files, as lines for the user.
        """
        config, notes = self._config(layout)
        if notes:
            write_json(folder / "config.json", config)
        else:
            self._copy(folder, "config.json")
        for name in PROCESSOR_FILES:
            self._copy(folder, name)
        return [*notes, *self._replace_tokenizer(folder)]

    def _config(self, layout: WeightLayout) -> tuple[dict[str, Any], list[str]]:
        """Return config.json with the dtype and the vocabulary of the text weights."""
        config, notes = dict(self.config), []
        inner = config.get("text_config")
        parts = [config, dict(inner)] if isinstance(inner, Mapping) else [config]
        spellings = both_dtype_spellings(layout.dtype)
        name = spellings["dtype"]
        given = config.get("dtype") or config.get("torch_dtype")
        if given != name:
            notes.append(f"config.json: the export has dtype={name}, as the run; the base {given}.")
            for part in parts:
                part.update({key: name for key in spellings if key in part})
            if given is None:
                config.update(spellings)
        rows = layout.spec[self.text[EMBEDDING]][0]
        if rows != architecture_from_hf(self.config).vocab_size:
            notes.append(f"config.json: the export has vocab_size={rows}, for new tokens.")
            holders = [part for part in parts if "vocab_size" in part] or parts[-1:]
            for part in holders:
                part["vocab_size"] = rows
        if len(parts) == 2:
            config["text_config"] = parts[1]
        return config, notes

    def _replace_tokenizer(self, folder: Path) -> list[str]:
        """Take the base's tokenizer files if the export's define the same tokenizer and chat
        template, and transformers reads them so."""
        own = {name: (folder / name).read_bytes() for name in _there(folder)}
        if not self._same_tokenizer(folder):
            self._name_processor(folder)
            return [
                "tokenizer and chat template are the run's, not those of the base; see that the "
                "template writes images as the base's does."
            ]
        for name in own:
            (folder / name).unlink()
        for name in _there(self.base):
            self._copy(folder, name)
        try:
            check_tokenizer(folder)
        except CheckpointError as error:
            for name in _there(folder):
                (folder / name).unlink()
            for name, data in own.items():
                (folder / name).parent.mkdir(exist_ok=True)
                write_bytes(folder / name, data)
            self._name_processor(folder)
            told = str(error).replace(str(folder), "the base")
            return [f"{SETTINGS} is written anew, since with the base's: {told:.300}"]
        return []

    def _same_tokenizer(self, folder: Path) -> bool:
        one, other = (
            read_regular(place / TOKENIZER, most=LARGE)
            if (place / TOKENIZER).is_file()
            else b"none"
            for place in (folder, self.base)
        )
        if one != other:
            return False
        mine, its = (
            own_templates(place, read_json_if_there(place / SETTINGS))
            for place in (folder, self.base)
        )
        return mine == its

    def _name_processor(self, folder: Path) -> None:
        """Write the processor's class, which a text model's tokenizer does not name."""
        kind = read_json_if_there(self.base / SETTINGS).get("processor_class")
        if isinstance(kind, str):
            settings = read_json(folder / SETTINGS)
            write_json(folder / SETTINGS, {**settings, "processor_class": kind})

    def _copy(self, folder: Path, name: str) -> None:
        """Copy a small file of the base, if it has it."""
        if (self.base / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            write_bytes(folder / name, read_regular(self.base / name, most=LARGE))


def _there(folder: Path) -> list[str]:
    """Return the names of a folder's tokenizer files but tokenizer.json."""
    others = sorted((folder / FOLDER_OF_OTHERS).glob("*.jinja"))
    names = [*BESIDE, *(f"{FOLDER_OF_OTHERS}/{path.name}" for path in others)]
    return [name for name in names if (folder / name).is_file()]


@dataclass(frozen=True)
class WholeFolder:
    """A Hugging Face folder of a whole model, to be checked before it is written.

    Attributes:
        hf: the folder of the text model.
    """

    hf: HfFolder
    whole: WholeModel

    @property
    def layout(self) -> WeightLayout:
        """All tensors, and how they are stored."""
        return self.whole.layout(self.hf.layout)

    def check(self) -> list[str]:
        """Find every contradiction that writing the folder would find, without weights.

        Returns:
            The repairs and the differences from the base's files, as lines for the user.

        Raises:
            CheckpointError: contradicting or incomplete input.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            lines = self.hf.write_small_files(folder, card="")
            lines = [line for line in lines if not line.startswith("config.json")]
            lines += self.whole.replace_files(folder, self.layout)
            check_tokenizer(folder)
        return lines
