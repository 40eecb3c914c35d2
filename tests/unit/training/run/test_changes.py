"""Settings that may differ between a checkpoint and the run that resumes from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from torchprime.config.compose import compose_config
from torchprime.errors import ConfigError
from torchprime.training.run.changes import (
    HARMLESS,
    IDENTITIES,
    QUESTIONABLE,
    REFUSED,
    find_changes,
    not_allowed,
    refuse_changes,
)

SCHEDULE = [
    "dataset.hf_dataset_name=null",
    "dataset.hf_dataset_config_name=null",
    "dataset.mixture=[{name: a, file_dataset_path: a}, {name: b, file_dataset_path: b, "
    "replay: true}]",
    "dataset.replay_schedule.start=0.2",
    "dataset.replay_schedule.end=0.05",
]
BASE = ["model.pretrained_model=x", "task.max_steps=10", "task.global_batch_size=8"]
SAME = dict.fromkeys(IDENTITIES, "0" * 64)
HELD = {"hash": "model", "base": "base", "fisher": "fisher"}  # in a manifest's `model`


def changes(
    *overrides: str,
    identity: dict[str, Any] | None = None,
    unknown: tuple = (),
    older: dict[str, str] | None = None,
    before: dict[str, Any] | None = None,
    base: list[str] = BASE,
):
    """`unknown`: keys of `model` and `dataset` that the checkpoint's version did not have;
    `before`: its config."""
    config = before or compose_config(base).to_dict()
    config["dataset"] = {k: v for k, v in config["dataset"].items() if k not in unknown}
    config["model"] = {k: v for k, v in config["model"].items() if k not in unknown}
    manifest: Any = SimpleNamespace(
        config=config,
        model={name: SAME[other] for name, other in HELD.items()},
        tokenizer_fingerprint=SAME["tokenizer"],
        template_fingerprint=SAME["template"],
        data_manifest={"fingerprint": SAME["data"]},
        eval_manifest={"fingerprint": SAME["eval"]},
    )
    now = compose_config([*base, *overrides]).to_dict()
    return find_changes(manifest, now, {**SAME, **(identity or {})}, older or {})


def test_nothing_changed() -> None:
    assert changes() == []
    refuse_changes([], [], "p")


def test_a_checkpoint_from_before_a_key_goes_on() -> None:
    assert changes(unknown=("add_special_tokens", "resize_embeddings")) == []
    (change,) = changes('model.add_special_tokens=["<a>"]', unknown=("add_special_tokens",))
    assert change.kind == REFUSED


def test_a_section_from_after_the_checkpoint_counts_as_its_defaults() -> None:
    before = compose_config(BASE).to_dict()
    del before["metrics"], before["task"]["loss"]
    assert changes(before=before) == []
    trackers, label = changes(
        *("task.loss.label_smoothing=0.1", "metrics.trackers=[]"), before=before
    )[::-1]
    assert (trackers.key, trackers.kind) == ("metrics.trackers", HARMLESS)
    assert (label.key, label.old, label.kind) == ("task.loss.label_smoothing", 0.0, QUESTIONABLE)


def test_a_schedule_of_replay_holds_for_the_whole_run() -> None:
    assert changes(unknown=("replay_schedule",)) == []
    scheduled = [*BASE, *SCHEDULE]
    assert changes(base=scheduled) == []
    (change,) = changes("dataset.replay_schedule.end=0.1", base=scheduled)
    assert (change.key, change.kind) == ("dataset.replay_schedule.end", REFUSED)
    (change,) = changes("task.max_steps=20", base=scheduled)
    assert (change.key, change.kind) == ("task.max_steps", REFUSED)
    constant = [*scheduled[:-1], "dataset.replay_schedule.shape=constant"]
    (change,) = changes("task.max_steps=20", base=constant)
    assert (change.key, change.kind) == ("task.max_steps", QUESTIONABLE)


def test_a_fingerprint_of_an_older_version_is_known() -> None:
    now = {"model": "1" * 64}
    assert changes(identity=now, older={"model": SAME["model"]}) == []
    (change,) = changes(identity=now, older={"model": "2" * 64})
    assert (change.key, change.kind) == ("model", REFUSED)


@pytest.mark.parametrize(
    ("override", "key", "kind"),
    [
        ("ici_mesh.fsdp=4", "ici_mesh.fsdp", HARMLESS),
        ("task.gradient_accumulation_steps=2", "task.gradient_accumulation_steps", HARMLESS),
        ("remat.scan_layers=true", "remat.scan_layers", HARMLESS),
        ("model.pretrained_model=moved", "model.pretrained_model", HARMLESS),
        ("dataset.num_proc=3", "dataset.num_proc", HARMLESS),
        ("profile_dir=there", "profile_dir", HARMLESS),
        ("task.optimizer.learning_rate=0.5", "task.optimizer.learning_rate", QUESTIONABLE),
        ("task.max_steps=20", "task.max_steps", QUESTIONABLE),
        ("task.optimizer.weight_decay=0.1", "task.optimizer.weight_decay", QUESTIONABLE),
        ("task.max_grad_norm=null", "task.max_grad_norm", QUESTIONABLE),
        ("task.loss.dft=true", "task.loss.dft", QUESTIONABLE),
        ("task.neftune_noise_alpha=5", "task.neftune_noise_alpha", QUESTIONABLE),
        ("task.global_batch_size=16", "task.global_batch_size", REFUSED),
        ("seed=1", "seed", REFUSED),
        ("task.optimizer.name=adafactor", "task.optimizer.name", REFUSED),
        ("torch_dtype=bfloat16", "torch_dtype", REFUSED),
        ('model.add_special_tokens=["<a>"]', "model.add_special_tokens", REFUSED),
        ("model.resize_embeddings=zeros", "model.resize_embeddings", REFUSED),
        ("model.pad_vocab_to_multiple=64", "model.pad_vocab_to_multiple", REFUSED),
    ],
)
def test_kinds(override: str, key: str, kind: str) -> None:
    (change,) = changes(override)
    assert (change.key, change.kind) == (key, kind)
    if kind == HARMLESS:
        return refuse_changes([change], [], "step_7")
    with pytest.raises(ConfigError) as caught:
        refuse_changes([change], [], "step_7")
    for part in ("step_7", key, str(change.old).removeprefix("None"), str(change.new)):
        assert part.replace("None", "null") in str(caught.value)


@pytest.mark.parametrize("name", ["model", "tokenizer", "template", "data"])
def test_what_the_steps_were_made_of(name: str) -> None:
    found = changes(identity={name: "f" * 64})
    assert [(c.key, c.kind) for c in found] == [(name, REFUSED)]
    with pytest.raises(ConfigError, match=f"refused +{name}: 000.*fff"):
        refuse_changes(found, [name], "p")  # no permission helps


def test_permission_is_by_key_or_section() -> None:
    found = changes("task.optimizer.learning_rate=0.5", "task.max_steps=20")
    keys = ["task.max_steps", "task.optimizer.learning_rate"]
    assert [c.key for c in not_allowed(found, [])] == keys
    assert [c.key for c in not_allowed(found, ["task.optimizer"])] == keys[:1]
    refuse_changes(found, keys, "p")
    refuse_changes(found, ["task"], "p")
    with pytest.raises(ConfigError, match=r"resume\.allow_changes=\[task\.max_steps\]"):
        refuse_changes(found, ["task.optimizer.learning_rate", "task.max"], "p")


def test_a_checkpoint_of_an_older_version_has_the_methods_own_betas() -> None:
    """It wrote them out, and had no section for Muon."""
    config = compose_config(BASE).to_dict()
    optimizer = config["task"]["optimizer"]
    optimizer["betas"] = [0.9, 0.999]
    del optimizer["muon"], optimizer["momentum"], optimizer["nesterov"]
    assert changes(before=config) == []
    (change,) = changes("task.optimizer.betas=[0.9,0.99]", before=config)
    assert (change.key, change.kind) == ("task.optimizer.betas", QUESTIONABLE)


def test_another_optimizer_is_refused_by_its_name() -> None:
    for name in ("muon", "lion", "sgd", "adafactor"):
        found = changes(f"task.optimizer.name={name}")
        assert ("task.optimizer.name", REFUSED) in [(c.key, c.kind) for c in found]
        with pytest.raises(ConfigError, match=f"refused +task.optimizer.name: adamw -> {name}"):
            refuse_changes(found, ["task.optimizer"], "p")


def test_groups_may_change_but_for_what_is_frozen() -> None:
    groups = "task.optimizer.groups"
    config = compose_config([*BASE, f"{groups}=[{{pattern: a, frozen: true}}]"]).to_dict()
    found = changes(f"{groups}=[{{pattern: a, frozen: true}},{{pattern: b}}]", before=config)
    assert [(c.key, c.kind) for c in found] == [(groups, QUESTIONABLE)]
    found = changes(before=config)
    assert (f"{groups}[frozen]", REFUSED) in [(c.key, c.kind) for c in found]
    with pytest.raises(ConfigError, match=r"refused +task.optimizer.groups\[frozen\]"):
        refuse_changes(found, ["task.optimizer"], "p")


def test_the_gravest_come_first() -> None:
    found = changes("seed=1", "ici_mesh.fsdp=4", "task.max_steps=20", identity={"eval": None})
    assert [c.kind for c in found] == [REFUSED, QUESTIONABLE, QUESTIONABLE, HARMLESS]
