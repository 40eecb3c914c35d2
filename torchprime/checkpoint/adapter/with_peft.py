"""An adapter's folder in PEFT, over its base in transformers: what a user of the folder gets."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchprime.adapters.peft_format import PREFIX
from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.merge import base_in_run
from torchprime.checkpoint.adapter.parts import AdapterParts
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.weight_names import EMBEDDING, HEAD, in_loaded
from torchprime.checkpoint.proof.logits import Logits
from torchprime.checkpoint.proof.verify import (
    LogitsMatch,
    NotChecked,
    judge_logits,
    load_transformers,
    logits_of,
)
from torchprime.errors import CheckpointError
from torchprime.files.json_files import read_json
from torchprime.models.families import is_wrapper

# PEFT puts these into the names of the base's weights.
WRAPPED = (".base_layer.", ".original_module.")


class PeftOverBase:
    """PEFT's model of an adapter folder over its base, on the CPU, loaded once for several checks.

    Args:
        folder: of the adapter.
        base: the folder of the base's weights.
        spec: of the adapter.
        parts: of the adapted model.
        dtype: of the base's weights in the run.
    """

    def __init__(
        self, folder: Path, base: Path, spec: AdapterSpec, parts: AdapterParts, dtype: torch.dtype
    ) -> None:
        self.folder, self.base, self.spec, self.parts = folder, base, spec, parts
        self.dtype = dtype
        self.wrapped = is_wrapper(read_json(base / "config.json"))

    @cached_property
    def model(self) -> Any:
        """The loaded model.

        Raises:
            NotChecked: PEFT is not installed.
            CheckpointError: PEFT does not load the folder, or not all of it.
        """
        try:
            # late: it takes seconds, and is no dependency of a run
            import peft
        except ImportError as error:
            raise NotChecked("peft is not installed (pip install peft)") from error
        model = load_transformers(self.base, self.dtype)
        rows = self.parts.shapes.get(EMBEDDING, (0,))[0]
        if rows and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its names are compared below
                loaded = peft.PeftModel.from_pretrained(
                    model, str(self.folder), torch_device="cpu"
                ).eval()
                # Not "auto", which may ask the hub for the base's config.
                names = set(peft.get_peft_model_state_dict(loaded, save_embedding_layers=False))
        except Exception as error:  # libraries raise nearly anything
            first = (str(error).splitlines() or ["no text"])[0]
            raise CheckpointError(
                f"PEFT {peft.__version__} cannot load the adapter over {self.base}: "
                f"{type(error).__name__}: {first}"
            ) from error
        expected = {f"{PREFIX}{self._in_base(name)}" for name in self.parts.shapes}
        if self.parts.tied:
            names.discard(f"{PREFIX}{HEAD}")  # PEFT lists it beside the embedding
        if other := sorted(names ^ expected):
            raise CheckpointError(
                f"PEFT {peft.__version__} loads other tensors than the adapter has: "
                f"{', '.join(other[:3])}"
            )
        return loaded

    def _in_base(self, name: str) -> str:
        """Return the name in transformers' model of a tensor of the text model."""
        return in_loaded(name, wrapper=self.wrapped)

    def logits(self, ids: npt.NDArray[np.int64], *, as_trained: bool) -> Logits:
        """Return the logits [B, S, V].

        Args:
            as_trained: the base's linear layers have the values that the run computed with; else
                those of its files. The same for a base that was not quantized.
        """
        self._set_base(as_trained)
        return logits_of(self.model, ids)

    def judge(self, ids: npt.NDArray[np.int64], difference: float, least: float) -> LogitsMatch:
        """Return the largest accepted difference to another program's logits.

        It is that of the base alone (`judge_logits`), whose rounding the adapter shares.
        """
        with self.model.disable_adapter():
            return judge_logits(self.model, ids, logits_of(self.model, ids), difference, least)

    def changed_base(self) -> list[str]:
        """Return the names of the base's tensors that differ in PEFT's model from the files."""
        self._set_base(False)
        held, reader = self._held(), SafetensorsReader(self.base)
        grown = self.parts.shapes.get(EMBEDDING, (0,))[0]

        def differs(name: str) -> bool:
            mine, theirs = held[name], reader.get(name).to(self.dtype)
            if grown and name in (EMBEDDING, HEAD):
                mine = mine[: len(theirs)]  # PEFT's base was given more rows
            return not torch.equal(mine, theirs)

        return [name for name in held if differs(name)]

    def _held(self) -> dict[str, Tensor]:
        """Return the base's tensors in PEFT's model, by their names in the files."""
        held: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            for wrapped in WRAPPED:
                name = name.replace(wrapped, ".")
            held[name.removeprefix(PREFIX)] = tensor
        names = {name: self._in_base(name) for name in SafetensorsReader(self.base).names()}
        return {name: held[inside] for name, inside in names.items() if inside in held}

    def _set_base(self, as_trained: bool) -> None:
        """Set the weights of the base's linear layers."""
        if self.spec.base_type == "run":
            return
        reader = SafetensorsReader(self.base)
        kind = self.spec.base_type if as_trained else "run"
        with torch.no_grad():
            for name, tensor in self._held().items():
                if tensor.dim() == 2 and name not in (EMBEDDING, HEAD):
                    tensor.copy_(base_in_run(name, reader.get(name), kind, self.dtype))
