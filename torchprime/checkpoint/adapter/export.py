"""The export of a trained adapter to a PEFT folder that `peft` and vLLM load unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from torchprime.checkpoint.adapter.certificate import certify_adapter
from torchprime.checkpoint.adapter.folder import AdapterFolder
from torchprime.checkpoint.adapter.merge import TensorOf, merged_tensors
from torchprime.checkpoint.export import ExportResult, write_export
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.proof.logits import PromptLogits


def merged_weights(
    adapter: AdapterFolder, trained: Mapping[str, Tensor], base_of: TensorOf
) -> Iterator[tuple[str, Tensor]]:
    """Yield the merged model's weights, one at a time, for `export_hf`.

    An adapter of a quantized base is merged into the dequantized values, which it was trained on;
    so the merged model computes the trainer's logits, and `certify` can compare them.

    Args:
        trained: the trained tensors by their names in the adapted model.
        base_of: gives a weight of the base by its name.
    """
    layout = adapter.hf.layout
    tensor_of = merged_tensors(base_of, trained, adapter.spec, layout.dtype)
    for name in layout.spec:
        yield name, tensor_of(name)


def export_adapter(
    out: Path | str | ExportPlace,
    adapter: AdapterFolder,
    *,
    facts: ExportFacts,
    weights: Iterable[tuple[str, Tensor]],
    origin: str,
    trained: PromptLogits | str,
    base: Path | str | None,
) -> ExportResult:
    """Write an adapter's PEFT folder at `out`, whole or not at all, with its certificate.

    The folder holds adapter_config.json, adapter_model.safetensors, tokenizer and chat template,
    generation_config.json with the trained stop tokens, README.md and certificate.json.

    Args:
        out: a folder or URL; must be new or empty.
        facts: of the run, as for an export of all weights. Of them `dtype` (the run's, and that of
            the files), `step`, `stop_ids`, the template, `card`, `metrics` and `fingerprints` are
            used.
        weights: (name in the adapted model, tensor) of every trained tensor, in any order, as
            `Backend.weights()` yields them; taken one at a time and not kept.
        origin: where the tensors come from, for people: "a run from NAME after 600 updates".
        trained: the trainer's logits for the prompts, or the reason why there are none.
        base: the folder of the base's weights, or the reason why it can't be read; None if
            training began from random weights. With a folder, its weights are read and hashed
            once, and loaded in transformers if host memory holds them twice.

    Returns:
        The result, whose certificate may have failed checks: call `certificate.require(place)`.

    Raises:
        CheckpointError: used target, a tensor missing, unknown, of another shape or not finite, a
            target that refuses.
    """
    return write_export(
        out,
        small_files=partial(adapter.write_small_files, facts=facts),
        weights=adapter.renamed(weights),
        layout=adapter.layout,
        certify=partial(
            certify_adapter, adapter=adapter, facts=facts, origin=origin, trained=trained, base=base
        ),
    )
