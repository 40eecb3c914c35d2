"""The written facts of a run: run.json, its checkpoints' manifests, the metrics of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import NotRequired, TypedDict

from torchprime.checkpoint.run.manifest import Manifest, ModelFacts
from torchprime.config.sections.evaluation import LOSSES
from torchprime.evaluation.selection import Evaluated
from torchprime.training.optim.optimizer import Parameter
from torchprime.training.prepare import Prepared
from torchprime.training.run import folder as run_folder
from torchprime.training.run import resume as resuming
from torchprime.training.setup.vocabulary import VocabularyFacts

LAST_LOSS = "train loss of the last step"


class DeviceFacts(TypedDict):
    """The devices of a run: their kind as the backend names it, and the number over all
    processes."""

    kind: str
    count: int


class RunModelFacts(TypedDict):
    """The model of a run; `parameters` is a count. `vocabulary` is absent if it was not changed."""

    pretrained: str | None
    parameters: int
    dtype: str
    vocabulary: NotRequired[VocabularyFacts]


class RunFile(TypedDict):
    """The content of run.json except its `starts`.

    `attention` and `loss` name the kernels in use; `mesh` has the size of each axis, and `plan`
    the fields of `Plan`.
    """

    command: str
    versions: dict[str, str]
    backend: str
    device: DeviceFacts
    processes: int
    mesh: dict[str, int]
    attention: str
    loss: str
    model: RunModelFacts
    fingerprints: dict[str, str | None]
    plan: dict[str, object]


def run_facts(prepared: Prepared) -> RunFile:
    """Return run.json: model, devices, data and versions; enough to compare two runs."""
    config, backend, files = prepared.config, prepared.backend, prepared.inputs.files
    model: RunModelFacts = {
        "pretrained": config.model.pretrained_model,
        "parameters": files.num_parameters,
        "dtype": config.torch_dtype,
    }
    if files.vocabulary:
        model["vocabulary"] = files.vocabulary.to_dict()
    return {
        "command": run_folder.command(),
        "versions": run_folder.versions(),
        "backend": backend.name,
        "device": {"kind": backend.device_kind, "count": backend.device_count},
        "processes": backend.processes.count,
        "mesh": config.mesh_shape(),
        "attention": backend.attention,
        "loss": backend.loss,
        "model": model,
        "fingerprints": prepared.inputs.rows.fingerprints(),
        "plan": prepared.plan.to_dict(),
    }


def make_manifest(
    prepared: Prepared, step: int, *, metrics: dict[str, float], hooks: Mapping[str, object]
) -> Manifest:
    """Return the manifest: all that a resume after a step needs except the tensors.

    Args:
        metrics: the last values.
        hooks: what hooks want to know again.
    """
    p, config, inputs = prepared, prepared.config, prepared.inputs
    schedule = config.task.lr_scheduler
    backend, plan, identity = p.backend, p.plan, inputs.identity()
    parameters = [Parameter((n,), s, inputs.dtype) for n, s in inputs.files.shapes.items()]
    slots = {slot for parameter in parameters for slot in p.optimizer.slots(parameter)}
    model: ModelFacts = {
        "names": len(inputs.files.shapes),
        "dtype": config.torch_dtype,
        "parameters": inputs.files.num_parameters,
        "hash": identity["model"],
        "base": identity["base"],
    }
    if identity["fisher"] is not None:
        model["fisher"] = identity["fisher"]
    return Manifest(
        backend=backend.name,
        mesh=config.mesh_shape(),
        processes=backend.processes.count,
        config=config.to_dict(),
        versions=run_folder.versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model,
        optimizer={"name": config.task.optimizer.name, "slots": sorted(slots)},
        scheduler={
            "name": schedule.name,
            "warmup_steps": plan.warmup_steps,
            "warmup_ratio": schedule.warmup_ratio,
            "min_lr_ratio": schedule.min_lr_ratio,
            "peak": config.task.optimizer.learning_rate,
            "total_steps": plan.total_steps,
        },
        global_step=step,
        rng=resuming.rng_states(backend.rng_state()),
        data_position={
            "seed": config.seed,
            "next_step": step,
            "global_batch_size": config.task.global_batch_size,
            "num_blocks": inputs.rows.train.num_blocks,
        },
        tokenizer_fingerprint=identity["tokenizer"],
        template_fingerprint=identity["template"],
        data_manifest={"fingerprint": identity["data"]},
        eval_manifest={"fingerprint": identity["eval"]} if identity["eval"] else None,
        best_metric=None,
        hooks=hooks,
        metrics=metrics,
    )


def metrics_at(
    step: int, loss: float, loss_step: int, history: Sequence[Evaluated]
) -> dict[str, float]:
    """Return the metrics of the weights after a step; older ones are labelled with their step."""
    metrics = {LAST_LOSS if loss_step == step else f"train loss of step {loss_step}": loss}
    if history:
        last, now = history[-1], history[-1].step == step
        metrics["held-out loss before"] = history[0].scores["eval_loss"]
        after = "held-out loss after" if now else f"held-out loss of step {last.step}"
        metrics[after] = last.scores["eval_loss"]
        metrics |= {n: v for n, v in last.scores.items() if now and n not in LOSSES}
    return metrics
