"""Differences between a checkpoint and the run that resumes from it, by severity.

    harmless       how the steps are computed or where files lie: mesh, accumulation, paths
    questionable   the settings of future steps: learning rate, length, weight decay
    refused        the inputs of past steps: data, tokenizer, template, model

Harmless changes are reported and accepted. A questionable one must be named in
resume.allow_changes. A refused one would give a run that no single config describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchprime.checkpoint.run.manifest import Manifest
from torchprime.config.load import flat_keys, schema_defaults
from torchprime.errors import ConfigError
from torchprime.training.optim.make import own_betas

HARMLESS, QUESTIONABLE, REFUSED = "harmless", "questionable", "refused"
# By prefix of the key. The sources of rows and weights are harmless as long as the content is the
# same, which the fingerprints tell.
HARMLESS_KEYS = (
    "ici_mesh", "dcn_mesh", "sharding", "remat", "checkpoint", "resume", "logging_steps",
    "output_dir", "run_name", "metrics", "device", "dry_run", "compile_", "allow_recompile",
    "isolation_probe", "profile_",
    "dataset", "eval", "model", "task.name", "task.gradient_accumulation_steps", "task.loss_chunks",
    "task.export_checkpoint_path", "task.convert_to_safetensors", "task.max_shard_size_gb",
    "task.sample_prompts", "selection", "export", "adapter.init", "adapter.pretrained",
    "regularization.ewc.fisher",
)  # fmt: skip
FROZEN = "task.optimizer.groups[frozen]"
REFUSED_KEYS = (
    "seed", "torch_dtype", "task.global_batch_size", "task.optimizer.name",
    "task.optimizer.master_weights", "task.ema_decay",
    "model.add_special_tokens", "model.resize_embeddings",
    "model.pad_vocab_to_multiple", "adapter.rank", "adapter.alpha", "adapter.scaling",
    "adapter.targets", "adapter.layers", "adapter.modules_to_train", "adapter.dora",
    "adapter.base_dtype", FROZEN, "dataset.replay_schedule",
)  # fmt: skip
SCHEDULE, CONSTANT = "dataset.replay_schedule", "constant"
KL = "regularization.kl"
# Fingerprints: the severity of a difference, and the thing that is fingerprinted.
IDENTITIES = {
    "model": (REFUSED, "names, shapes and new rows of the weights"),
    "base": (REFUSED, "the base's weights, which an adapter or a regularization needs"),
    "fisher": (REFUSED, "the Fisher information of the base"),
    "tokenizer": (REFUSED, "tokenizer.json and its special tokens"),
    "template": (REFUSED, "the chat template"),
    "data": (REFUSED, "the packed training rows"),
    "eval": (QUESTIONABLE, "the packed held-out rows"),
}


@dataclass(frozen=True)
class Change:
    """A difference in a config key or a fingerprint."""

    key: str
    old: Any
    new: Any
    kind: str
    what: str = ""

    def describe(self) -> str:
        """Return a line for the user."""
        note = f" ({self.what})" if self.what else ""
        return f"{self.kind:<12} {self.key}: {_shown(self.old)} -> {_shown(self.new)}{note}"


def find_changes(
    manifest: Manifest,
    config: Mapping[str, Any],
    identity: Mapping[str, str | None],
    older: Mapping[str, str],
) -> list[Change]:
    """Return all differences, the most severe first.

    Args:
        config: as TrainConfig.to_dict() gives it.
        identity: a fingerprint for each of IDENTITIES, as the run to come has it.
        older: fingerprints that an older version gave the same inputs, by name.
    """
    old, new = _settings(manifest.config), _settings(config)
    # A share that changes over the run depends on the run's length at every step.
    by_length = "task.max_steps" if new.get(f"{SCHEDULE}.shape", CONSTANT) != CONSTANT else None
    changes = [
        Change(key, old.get(key), new.get(key), REFUSED if key == by_length else _kind(key))
        for key in sorted(old.keys() | new.keys())
        if _given(old, key) != _given(new, key)
    ]
    before = identity_of(manifest)
    changes += [
        Change(name, before.get(name), identity.get(name), kind, what)
        for name, (kind, what) in IDENTITIES.items()
        if before.get(name) not in (identity.get(name), older.get(name, identity.get(name)))
    ]
    order = (REFUSED, QUESTIONABLE, HARMLESS)
    return sorted(changes, key=lambda change: order.index(change.kind))


def identity_of(manifest: Manifest) -> dict[str, str | None]:
    """Return the fingerprints that a checkpoint has for IDENTITIES."""
    held_out = manifest.eval_manifest or {}
    return {
        "model": manifest.model["hash"],
        "base": manifest.model.get("base"),
        "fisher": manifest.model.get("fisher"),
        "tokenizer": manifest.tokenizer_fingerprint,
        "template": manifest.template_fingerprint,
        "data": manifest.data_manifest.get("fingerprint"),
        "eval": held_out.get("fingerprint"),
    }


def refuse_changes(changes: Sequence[Change], allowed: Sequence[str], point: str) -> None:
    """Raise a ConfigError for changes that are refused, or questionable and not allowed."""
    refused = [change for change in changes if change.kind == REFUSED]
    asked = not_allowed(changes, allowed)
    if not refused and not asked:
        return
    lines = [change.describe() for change in [*refused, *asked]]
    advice = []
    if refused:
        advice.append(
            "A run with a refused change cannot resume from there: give the old values, or begin "
            "a new run (resume=never and another run_name)."
        )
    if asked:
        keys = ",".join(change.key for change in asked)
        advice.append(f"To allow the questionable ones: resume.allow_changes=[{keys}].")
    raise ConfigError(
        f"resume: this run differs from {point}:\n  " + "\n  ".join(lines) + "\n" + " ".join(advice)
    )


def not_allowed(changes: Sequence[Change], allowed: Sequence[str]) -> list[Change]:
    """Return the questionable changes that no key or key prefix allows."""
    return [
        change
        for change in changes
        if change.kind == QUESTIONABLE and not _begins_with(change.key, allowed)
    ]


def _begins_with(key: str, names: Sequence[str]) -> bool:
    return any(
        key == name or key.startswith(f"{name}.") or (name.endswith("_") and key.startswith(name))
        for name in names
    )


def _kind(key: str) -> str:
    if _begins_with(key, REFUSED_KEYS):
        return REFUSED
    return HARMLESS if _begins_with(key, HARMLESS_KEYS) else QUESTIONABLE


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that have an effect, by dotted name. A key that the version of a checkpoint
    did not have counts as its default."""
    flat = {**dict(flat_keys(schema_defaults())), **dict(flat_keys(config))}
    name = flat.get("task.optimizer.name", "adamw")
    flat[FROZEN] = _frozen(flat.get("task.optimizer.groups") or [])
    unused = [] if flat.get("adapter.rank") is not None else ["adapter."]
    unused += [] if flat.get(f"{KL}.coefficient") is not None else [f"{KL}."]
    unused += [] if name == "muon" else ["task.optimizer.muon."]
    unused += [] if flat.get(f"{SCHEDULE}.start") is not None else [f"{SCHEDULE}."]
    unused += [] if flat.get("task.spike.window") is not None else ["task.spike."]
    if flat.get("task.optimizer.betas") is None:  # older versions wrote the method's own
        flat["task.optimizer.betas"] = list(own_betas(name))
    return {key: value for key, value in flat.items() if not key.startswith(tuple(unused))}


def _frozen(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """Return what decides which parameters are frozen: the patterns up to the last that freezes."""
    deciding = [(group["pattern"], group["frozen"]) for group in groups]
    while deciding and not deciding[-1][1]:
        deciding.pop()
    return deciding


def _given(config: Mapping[str, Any], key: str) -> Any:
    """Return a value; an empty list counts as absent, because older versions did not have the
    key."""
    value = config.get(key)
    return None if value == [] else value


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-8:]}"
