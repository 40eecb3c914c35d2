"""Reader of a PEFT folder: description and tensors, checked against the model they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprime.adapters.peft_format import (
    CONFIG_NAME,
    TYING,
    WEIGHTS_NAME,
    by_tensors,
    model_tensors,
    spec_of,
    ties_head,
)
from torchprime.adapters.spec import ALL_LINEAR, AdapterSpec
from torchprime.checkpoint.adapter.parts import AdapterParts, adapter_parts
from torchprime.checkpoint.hf.read import open_checked
from torchprime.checkpoint.hf.source import resolve_adapter
from torchprime.checkpoint.hf.weight_names import (
    EMBEDDING,
    HEAD,
    PLAIN_DTYPES,
    inner_names,
    of_text_model,
)
from torchprime.checkpoint.hf.write import is_finite
from torchprime.errors import CheckpointError, ConfigError
from torchprime.files.json_files import read_json
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.families import text_part

SHOWN = 3  # names in a message
# In the place of a config's own layers, which may be given by a pattern.
ANY_LAYERS = {"target_modules": ALL_LINEAR, "exclude_modules": None}


@dataclass(frozen=True)
class StoredAdapter:
    """The content of a PEFT folder.

    Attributes:
        where: the folder or hub name as it was given, for messages.
        folder: the local folder.
        spec: the description; its `base_type` is always `run`, since PEFT stores none.
        base: base_model_name_or_path; None if the folder names none.
        tensors: views of the file by their names in the adapted model; `fit` checks them.
        tying: the output projection follows a trained embedding.
    """

    where: str
    folder: Path
    spec: AdapterSpec
    base: str | None
    tensors: Mapping[str, Tensor]
    tying: bool

    def config_for(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the base's config.json with the vocabulary of a trained embedding that has more
        rows."""
        embedding = self.tensors.get(EMBEDDING)
        rows = 0 if embedding is None else embedding.shape[0]
        config = text_part(config)
        grown = rows > architecture_from_hf(config).vocab_size
        return {**config, "vocab_size": rows} if grown else dict(config)

    def fit(self, config: Mapping[str, Any]) -> AdapterParts:
        """Check that the adapter is one for the model of a config.json; return its parts there.

        Args:
            config: the content of the base's config.json.

        Raises:
            CheckpointError: the model lacks a layer, a tensor is missing, unexpected, of another
                shape or type, or not finite; each by name.
        """
        try:
            parts = adapter_parts(config, self.spec)
        except ConfigError as error:
            raise CheckpointError(
                f"{self.where} is no adapter for this model. {error} Give the base that it was "
                f"trained on: {CONFIG_NAME} names {self.base!r}."
            ) from error
        self._check_tying(parts)
        self._check_tensors(parts.shapes)
        return parts

    def base_note(self, base: str) -> str | None:
        """Return a line for the user if the folder names another base than the one given."""
        if self.base is None or self.base == base or _same_folder(self.base, base):
            return None
        return (
            f"{self.where} was trained on {self.base!r}, and is used on {base!r}. The shapes fit; "
            "if the weights differ, so does what the adapter computes."
        )

    def _check_tying(self, parts: AdapterParts) -> None:
        if ties_head(parts.whole, parts.tied) and not self.tying:
            raise CheckpointError(
                f"{self.where}: {CONFIG_NAME}: {TYING}: given False, expected True: the model's "
                "output projection is its embedding, which this adapter trained apart from it. "
                "Merge it into its base with PEFT (merge_and_unload) and name that folder as "
                "model.pretrained_model."
            )

    def _check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        found = self.tensors
        missing = [name for name in shapes if name not in found]
        extra = [name for name in found if name not in shapes]
        wrong = [
            f"{name} is {list(found[name].shape)}, in the model {list(shape)}"
            for name, shape in shapes.items()
            if name in found and tuple(found[name].shape) != shape
        ]
        if missing or extra or wrong:
            raise CheckpointError(
                f"{self.where}: {WEIGHTS_NAME} does not fit the model"
                f"{_some('shapes differ', wrong)}{_some('missing', missing)}"
                f"{_some('not known', extra)}. Give the base that the adapter was trained on: "
                f"{CONFIG_NAME} names {self.base!r}."
            )
        for name, tensor in found.items():
            if tensor.dtype not in PLAIN_DTYPES:
                raise CheckpointError(
                    f"{self.where}: {WEIGHTS_NAME}: {name} has the type {tensor.dtype}, expected "
                    "float32, bfloat16 or float16. Save the adapter again with PEFT."
                )
            if not is_finite(tensor):
                raise CheckpointError(
                    f"{self.where}: {WEIGHTS_NAME}: {name} holds NaN or infinite values. Use an "
                    "adapter from before the loss diverged."
                )


def read_adapter(name_or_folder: str | Path, *, cache_dir: str | None = None) -> StoredAdapter:
    """Read a PEFT folder: LoRA or DoRA, made by PEFT, by this project or another tool.

    The tensors are views of the file. Call `StoredAdapter.fit` before they are used.

    Args:
        name_or_folder: a local folder, or a hub repository (`owner/name`).
        cache_dir: where hub files are kept; None for the library's own place (HF_HOME).

    Raises:
        CheckpointError: no PEFT folder, another method, a setting that this project doesn't have,
            or a damaged file.
    """
    where = str(name_or_folder)
    folder = resolve_adapter(where, cache_dir=cache_dir)
    config = read_json(folder / CONFIG_NAME)
    spec_of({**config, **ANY_LAYERS}, where)  # before the file, which may be of another method
    base = config.get("base_model_name_or_path")
    stored = model_tensors(_views(folder / WEIGHTS_NAME), where)
    tensors = _of_text_model(stored, where)
    if (tying := bool(config.get(TYING))) and HEAD in tensors and EMBEDDING in tensors:
        _drop_head(tensors, where)
    pattern = config.get("target_modules")
    if tensors is not stored or (isinstance(pattern, str) and pattern != ALL_LINEAR):
        config = by_tensors(config, tensors)
    spec = spec_of(config, where)
    return StoredAdapter(
        where=where,
        folder=folder,
        spec=spec,
        base=base if isinstance(base, str) and base else None,
        tensors=tensors,
        tying=tying,
    )


def _of_text_model(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors by their names in the text model, if they are of one inside a wrapper;
    else the same object.

    Raises:
        CheckpointError: layers of other parts are adapted, too.
    """
    if not any(of_text_model(name) for name in tensors):
        return tensors
    names = inner_names(tensors)
    if others := [name for name in tensors if name not in names]:
        raise CheckpointError(
            f"{where}: {WEIGHTS_NAME}: {len(others)} of {len(tensors)} tensors are not of the text "
            f"model ({others[0]:.160}), which alone is trained here. Merge the adapter into its "
            "base with PEFT (merge_and_unload) and name that folder as model.pretrained_model."
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def _drop_head(tensors: dict[str, Tensor], where: str) -> None:
    """Leave out the copy of a tied embedding that PEFT writes as output projection, too."""
    if not torch.equal(tensors.pop(HEAD), tensors[EMBEDDING]):
        raise CheckpointError(
            f"{where}: {WEIGHTS_NAME}: {HEAD} differs from {EMBEDDING}, but {CONFIG_NAME} says "
            f"that they are one ({TYING}). Save the adapter again with PEFT."
        )


def _views(path: Path) -> dict[str, Tensor]:
    file = open_checked(path)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _same_folder(one: str, other: str) -> bool:
    first, second = Path(one), Path(other)
    return first.is_dir() and second.is_dir() and first.resolve() == second.resolve()


def _some(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return f"; {title}: {', '.join(f'{each:.160}' for each in items[:SHOWN])}{more}"
