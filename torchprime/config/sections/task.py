"""The section `task`: the kind of training, its length, batch size, optimizer and export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchprime.config.checks import at_least, fraction, positive, refuse
from torchprime.config.paths import PathOrUrl, is_url
from torchprime.config.sections.loss import LossConfig
from torchprime.config.sections.optimizer import OptimizerConfig, SchedulerConfig
from torchprime.config.sections.spike import SpikeConfig
from torchprime.errors import ConfigError


@dataclass(frozen=True)
class TaskConfig:
    """The size of a step, the number of steps, and the export at the end."""

    name: Literal["train", "sft"]
    global_batch_size: int  # blocks per step, over all devices and micro-batches
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    num_epochs: float | None = None
    max_grad_norm: float | None = 1.0
    max_grad_value: float | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    neftune_noise_alpha: float | None = None  # noise on embeddings, arXiv:2310.05914
    loss_chunks: int | None = None
    loss_kernel: Literal["auto", "liger", "chunked", "supervised"] = "auto"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    # Exponential moving average of the weights, evaluated and exported instead of them; null: none.
    ema_decay: float | None = None
    # Relative: inside the run's folder; or a URL (gs://, s3://).
    export_checkpoint_path: PathOrUrl | None = None
    convert_to_safetensors: bool = True
    max_shard_size_gb: float = 5.0
    sample_prompts: int = 0

    def __post_init__(self) -> None:
        at_least("task.global_batch_size", self.global_batch_size, 1)
        at_least("task.gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        self._check_length()
        positive("task.max_grad_norm", self.max_grad_norm)
        positive("task.max_grad_value", self.max_grad_value)
        positive("task.neftune_noise_alpha", self.neftune_noise_alpha)
        at_least("task.loss_chunks", self.loss_chunks, 1)
        if self.loss.dft and self.loss_kernel == "liger":
            refuse(
                "task.loss_kernel",
                "liger",
                "auto or chunked, since task.loss.dft=true: Liger does not tell the cross-entropy "
                "beside that loss",
                "Set task.loss_kernel=auto.",
            )
        if is_url(self.export_checkpoint_path or "") and not self.convert_to_safetensors:
            refuse(
                "task.export_checkpoint_path",
                self.export_checkpoint_path,
                "a folder, since task.convert_to_safetensors=false leaves shards that are not "
                "proved, and only a proved export is sent to a URL",
                "Set task.convert_to_safetensors=true, or a folder.",
            )
        fraction("task.ema_decay", self.ema_decay, one_allowed=False)
        if self.ema_decay is not None and not self.convert_to_safetensors:
            refuse(
                "task.convert_to_safetensors",
                False,
                "true, since task.ema_decay exports the average from a checkpoint",
                "Set it to true, or task.ema_decay=null.",
            )
        positive("task.max_shard_size_gb", self.max_shard_size_gb)
        at_least("task.sample_prompts", self.sample_prompts, 0)

    @property
    def micro_batch_size(self) -> int:
        """Blocks per forward pass, over all devices."""
        return self.global_batch_size // self.gradient_accumulation_steps

    def _check_length(self) -> None:
        if self.max_steps is None and self.num_epochs is None:
            raise ConfigError(
                "task.max_steps and task.num_epochs: given null and null, expected one of the two. "
                "Set task.max_steps=100 or task.num_epochs=3."
            )
        if self.max_steps is not None and self.num_epochs is not None:
            raise ConfigError(
                f"task.max_steps and task.num_epochs: given {self.max_steps} and "
                f"{self.num_epochs}, expected only one of the two. Add task.num_epochs=null or "
                "task.max_steps=null."
            )
        at_least("task.max_steps", self.max_steps, 1)
        positive("task.num_epochs", self.num_epochs)
