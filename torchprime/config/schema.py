"""The config schema: every key with its type and default, and the checks between keys.

YAML and overrides become a plain dict (compose.py), the dict becomes these frozen dataclasses
(load.py), and the dataclasses check themselves here. So every `TrainConfig` is valid: any fault is
reported with the key, the given value, the expected value and the fix, before weights are read or a
device is used. Config objects are not passed further down: builders take flat arguments, never a
section of this tree.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torchprime.config.checks import at_least, not_empty, positive, refuse, shown
from torchprime.config.paths import CompileCache, LocalFolder, PathOrUrl, RunFolders
from torchprime.config.sections.adapter import AdapterConfig
from torchprime.config.sections.dataset import DatasetConfig
from torchprime.config.sections.evaluation import (
    EvalConfig,
    ExportConfig,
    SelectionConfig,
    source_loss,
)
from torchprime.config.sections.metrics import MetricsConfig
from torchprime.config.sections.model import ModelConfig
from torchprime.config.sections.regularization import RegularizationConfig
from torchprime.config.sections.remat import RematConfig
from torchprime.config.sections.task import TaskConfig
from torchprime.config.topologies import check_devices, topology
from torchprime.errors import ConfigError
from torchprime.files.foreign_names import fault_of

Axis = Literal["data", "fsdp", "expert", "context", "tensor"]
# Outermost first: neighbours along the last axis are neighbours on the interconnect, and tensor
# parallelism communicates the most.
AXES: tuple[str, ...] = get_args(Axis)

# One entry per dim of a tensor: an axis, several axes (the first is the major one) or null.
AxisSpec = list[str | list[str] | None]


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes, within a slice (ici_mesh) or across slices (dcn_mesh)."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    def check(self, section: str) -> None:
        for axis in AXES:
            at_least(f"{section}.{axis}", getattr(self, axis), 1)
        for axis in ("expert", "context"):
            size = getattr(self, axis)
            if size != 1:
                refuse(
                    f"{section}.{axis}",
                    size,
                    f"1: parallelism over the {axis} axis is not supported yet",
                    f"Set {section}.{axis}=1 and use the data, fsdp or tensor axis.",
                )


@dataclass(frozen=True)
class ShardingConfig:
    """Name patterns -> axes, one entry per dim. Among activations, `batch` is the batch itself."""

    parameters: dict[str, AxisSpec] = field(default_factory=dict)
    activations: dict[str, AxisSpec] = field(default_factory=dict)
    # A larger parameter that is whole on every device is an error (number of elements).
    max_unsharded_params: int = 1_000_000

    def __post_init__(self) -> None:
        for section in ("parameters", "activations"):
            for pattern, spec in getattr(self, section).items():
                _check_axes_once(f"sharding.{section}['{pattern}']", spec)
        at_least("sharding.max_unsharded_params", self.max_unsharded_params, 0)


def _check_axes_once(key: str, spec: AxisSpec) -> None:
    names: list[str] = []
    for entry in spec:
        names += [entry] if isinstance(entry, str) else entry or []
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        refuse(
            key,
            spec,
            f"each axis for at most one dim ({', '.join(twice)} is listed twice)",
            "Replace one of them by null.",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """The schedule of checkpoints, and the number of them that is kept."""

    folder: PathOrUrl | None = None  # null: checkpoints/ in the run's folder
    every_steps: int | None = None
    every_minutes: float | None = None
    asynchronous: bool = True
    hf: bool = False  # also as a Hugging Face folder, inside the checkpoint
    keep_last: int | None = 2
    keep_best: int = 1
    keep_every: int | None = None

    def __post_init__(self) -> None:
        not_empty("checkpoint.folder", self.folder)
        at_least("checkpoint.every_steps", self.every_steps, 1)
        positive("checkpoint.every_minutes", self.every_minutes)
        at_least("checkpoint.keep_last", self.keep_last, 1)
        at_least("checkpoint.keep_best", self.keep_best, 0)
        at_least("checkpoint.keep_every", self.keep_every, 1)

    @property
    def enabled(self) -> bool:
        return self.every_steps is not None or self.every_minutes is not None


@dataclass(frozen=True)
class ResumeConfig:
    """The start of a run; `resume=X` on the command line is `resume.source=X`."""

    source: PathOrUrl = "auto"  # or never, a step of this run, a checkpoint's folder or URL
    # keys that may differ from the checkpoint's config
    allow_changes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        not_empty("resume.source", self.source)


@dataclass(frozen=True)
class TrainConfig:
    """The config of one run. Its folder is `<output_dir>/<run_name>`."""

    dataset: DatasetConfig
    eval: EvalConfig
    model: ModelConfig
    task: TaskConfig
    ici_mesh: MeshConfig
    dcn_mesh: MeshConfig
    sharding: ShardingConfig
    remat: RematConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    seed: int = 42
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    logging_steps: int = 10
    output_dir: RunFolders = "outputs"
    run_name: str | None = None  # null: the config's name
    # Of the native backend. tpu: one program per chip by TorchTPU; tpu_on_cpu: the same program on
    # virtual devices of the host's CPU, to try it without a TPU.
    device: Literal["auto", "cpu", "cuda", "tpu", "tpu_on_cpu"] = "auto"
    dry_run: bool = False
    # A slice's name (v6e-8): compile the step for it and exit; neither TPU nor weights are needed.
    compile_only: str | None = None
    compile_time_limit: float = 30.0  # minutes
    compile_search: bool = True  # if the step does not fit, compile changed settings until one fits
    # A Python environment with a newer jax and libtpu: compile the same step with that version too.
    compile_libtpu: LocalFolder | None = None
    # Let libtpu overlap collectives with computation, where its version does.
    async_collectives: bool = True
    # Compiled programs on a TPU, kept across restarts; auto: in the user's cache folder.
    compile_cache: CompileCache | None = "auto"
    allow_recompile: bool = False
    # Before the first step: change a segment's tokens and check that no other segment's loss moves.
    isolation_probe: bool = True
    profile_start_step: int | None = None
    profile_end_step: int | None = None
    profile_dir: LocalFolder | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            refuse("seed", self.seed, "a whole number from 0 to 2**63 - 1", "Set seed=42.")
        at_least("logging_steps", self.logging_steps, 1)
        not_empty("output_dir", self.output_dir)
        positive("compile_time_limit", self.compile_time_limit)
        not_empty("compile_cache", self.compile_cache)
        if self.compile_only is not None:
            slices = math.prod(getattr(self.dcn_mesh, axis) for axis in AXES)
            check_devices(topology(self.compile_only), self.mesh_shape(), slices)
        elif self.compile_libtpu is not None:
            refuse(
                "compile_libtpu",
                self.compile_libtpu,
                "null, since no step is compiled for a slice",
                "Set compile_only=v6e-8 too.",
            )
        self._check_run_name()
        self._check_profile()
        self._check_model()
        self.ici_mesh.check("ici_mesh")
        self.dcn_mesh.check("dcn_mesh")
        self._check_batch()
        self._check_replay()
        self._check_eval()
        self._check_adapter()
        self.regularization.check_run(self.adapter, bool(self.model.pretrained_model))
        if self.task.sample_prompts > 0 and not self.holds_out:
            refuse(
                "task.sample_prompts",
                self.task.sample_prompts,
                "0, since no held-out rows are given to ask about",
                "Choose held-out rows (eval=gsm8k_test) or set task.sample_prompts=0.",
            )

    def _check_replay(self) -> None:
        if self.dataset.replay_schedule.enabled and self.task.max_steps is None:
            refuse(
                "task.max_steps",
                None,
                "the length of the run, since dataset.replay_schedule goes from its first step to "
                "its last",
                "Set task.max_steps=1000 task.num_epochs=null; the plan prints the passes over "
                "both kinds of rows.",
            )

    @property
    def holds_out(self) -> bool:
        """Return True if held-out rows have their own source or are split from training rows."""
        return self.eval.enabled or self.dataset.eval_fraction is not None

    @property
    def measured(self) -> list[str]:
        """The names of the metrics that an evaluation measures."""
        names = [source.name for source in self.eval.sources]
        if self.dataset.eval_fraction is not None and len(self.dataset.mixture) > 1:
            names = [part.name for part in self.dataset.mixture]
        return [*self.eval.metrics, *map(source_loss, names)]

    def _check_adapter(self) -> None:
        a, asked = self.adapter, self.export.adapter
        if not a.enabled:
            if asked != "merged":
                refuse(
                    "export.adapter",
                    asked,
                    "merged, since adapter=none trains all weights",
                    "Set adapter=lora, or export.adapter=merged.",
                )
            return
        if self.model.pretrained_model is None:
            refuse(
                "model.pretrained_model",
                None,
                "the base of the adapter",
                "Name a checkpoint, or set adapter=none to train all weights.",
            )
        if self.model.new_rows is not None and not a.trains_whole("embed_tokens"):
            refuse(
                "adapter.modules_to_train",
                a.modules_to_train,
                "embed_tokens among them, since the vocabulary gets new rows (model."
                "add_special_tokens, resize_embeddings or pad_vocab_to_multiple)",
                "Set adapter.modules_to_train=[embed_tokens], and lm_head if the model has one.",
            )
        for key, given, expected in (
            ("task.ema_decay", self.task.ema_decay, None),
            ("task.convert_to_safetensors", self.task.convert_to_safetensors, True),
            ("checkpoint.hf", self.checkpoint.hf, False),
        ):
            if given != expected:
                refuse(
                    key,
                    given,
                    f"{shown(expected)}, since a run with an adapter keeps the adapter only",
                    f"Set {key}={shown(expected)}; `torchprime export` makes a Hugging Face folder "
                    "of a checkpoint.",
                )

    def _check_eval(self) -> None:
        if self.eval.enabled and self.dataset.eval_fraction is not None:
            refuse(
                "dataset.eval_fraction",
                self.dataset.eval_fraction,
                "null, since the eval section names held-out rows of its own",
                "Set dataset.eval_fraction=null or eval=none.",
            )
        if not self.holds_out and self.eval.every_steps is not None:
            refuse(
                "eval.every_steps",
                self.eval.every_steps,
                "null, since no held-out rows are given",
                "Set eval.hf_dataset_name, eval.file_dataset_path or dataset.eval_fraction, or "
                "eval.every_steps=null.",
            )
        wanting: dict[str, tuple[Any, Any]] = {
            "eval.generate.max_examples": (self.eval.generate.max_examples, 0),
            "selection.gates": (self.selection.gates, []),
            "selection.early_stopping.metric": (self.selection.early_stopping.metric, None),
            "export.which": (self.export.which, "last"),
        }
        for key, (given, none) in wanting.items():
            if given != none and not self.holds_out:
                refuse(
                    key,
                    given,
                    f"{shown(none)}, since no held-out rows are given",
                    "Choose some (eval=gsm8k_test, eval.file_dataset_path or "
                    f"dataset.eval_fraction), or set {key}={shown(none)}.",
                )
        if self.export.which == "best" and not self.task.convert_to_safetensors:
            refuse(
                "task.convert_to_safetensors",
                False,
                "true, since export.which=best exports from a checkpoint",
                "Set it to true, or export.which=last.",
            )
        if self.export.which == "best" and self.eval.every_steps is None:
            refuse(
                "eval.every_steps",
                None,
                "a number, since export.which=best chooses among evaluated steps",
                "Set eval.every_steps=50, for example, or export.which=last.",
            )
        if self.export.parts == "all" and not self.task.convert_to_safetensors:
            refuse(
                "task.convert_to_safetensors",
                False,
                "true, since export.parts=all writes a Hugging Face folder",
                "Set it to true, or export.parts=text.",
            )
        stopping = self.selection.early_stopping.metric
        if stopping is not None and self.eval.every_steps is None:
            refuse(
                "eval.every_steps",
                None,
                "a number, since selection.early_stopping looks at evaluations while training",
                "Set eval.every_steps=50, for example.",
            )

    @property
    def saves(self) -> bool:
        """Return True if the run writes checkpoints, as scheduled or for `export.which=best`."""
        return self.checkpoint.enabled or self.export.which == "best"

    def _check_run_name(self) -> None:
        not_empty("run_name", self.run_name)
        if self.run_name is not None and (fault := fault_of(self.run_name)) is not None:
            refuse(
                "run_name",
                self.run_name,
                f"one folder's name, and {fault}",
                "Put the folders above it into output_dir.",
            )

    def _check_profile(self) -> None:
        start, end = self.profile_start_step, self.profile_end_step
        at_least("profile_start_step", start, 0)
        if (start is None) != (end is None):
            missing = "profile_end_step" if end is None else "profile_start_step"
            raise ConfigError(
                f"profile_start_step and profile_end_step: given {shown(start)} and "
                f"{shown(end)}, expected both or neither. Set {missing} too."
            )
        if start is not None and end is not None and end <= start:
            refuse(
                "profile_end_step",
                end,
                f"more than profile_start_step={start}",
                f"Set profile_end_step={start + 3} to trace three steps.",
            )
        if start is not None and self.task.max_steps is not None and start >= self.task.max_steps:
            refuse(
                "profile_start_step",
                start,
                f"less than task.max_steps={self.task.max_steps}, or nothing is traced",
                "Start earlier; steps count from 0.",
            )

    def _check_model(self) -> None:
        has_weights = self.model.pretrained_model is not None
        if self.task.name == "sft" and not has_weights:
            refuse(
                "model.pretrained_model",
                None,
                "a checkpoint (hub name or local folder), since task=sft fine-tunes one",
                "Set model.pretrained_model=meta-llama/Llama-3.2-1B, or task=train to start from "
                "random weights.",
            )
        if not has_weights and self.model.architecture is None:
            refuse(
                "model.architecture",
                None,
                "an architecture, since model.pretrained_model is null too",
                "Choose a named model (model=llama-3.2-1b) or set model.pretrained_model.",
            )
        if not has_weights and self.model.tokenizer_name is None:
            refuse(
                "model.tokenizer_name",
                None,
                "a tokenizer (hub name or local folder), since there is no checkpoint to take it "
                "from",
                "Set model.tokenizer_name=meta-llama/Llama-3.2-1B.",
            )

    def _check_batch(self) -> None:
        """Check that every device gets the same number of whole blocks in every micro-batch."""
        sizes = self.mesh_shape()
        accumulation = self.task.gradient_accumulation_steps
        divisor = sizes["data"] * sizes["fsdp"] * accumulation
        given = self.task.global_batch_size
        if given % divisor:
            factors = " x ".join(
                f"{axis} {sizes[axis]} (ici {getattr(self.ici_mesh, axis)} x dcn "
                f"{getattr(self.dcn_mesh, axis)})"
                for axis in ("data", "fsdp")
            )
            nearest = max(divisor, round(given / divisor) * divisor)
            refuse(
                "task.global_batch_size",
                given,
                f"a multiple of {divisor} = {factors} x task.gradient_accumulation_steps "
                f"{accumulation}; {given} / {divisor} leaves {given % divisor}",
                f"Set task.global_batch_size={nearest}, or change the mesh or the accumulation.",
            )

    def mesh_shape(self) -> dict[str, int]:
        """Return the size of each axis over all slices, outermost first."""
        return {axis: getattr(self.ici_mesh, axis) * getattr(self.dcn_mesh, axis) for axis in AXES}

    @property
    def device_count(self) -> int:
        """The number of devices in the mesh."""
        return math.prod(self.mesh_shape().values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, as config.yaml stores them and load_config reads them."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
