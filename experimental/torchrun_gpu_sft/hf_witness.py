"""An independent witness of a run: the same experiment by transformers' own model and Trainer.

    python experimental/torchrun_gpu_sft/hf_witness.py --config-name NAME run_name=witness [...]

It takes the training job's command line and writes the same run folder, for `torchprime compare`.
Rows, blocks and their order are torchprime's, because two runs on different data prove nothing.
All that computes is not: model and attention, accumulation, clipping, AdamW and schedule are
transformers', accelerate's and torch's, set up from the config by their own names. Only the loss is
spelled out below, since Trainer has no weights per token, and AdamW's fp32 copies of bf16 weights.
With task.loss.average=examples the weights are those of tokens, averaged here; rows have weight 1.

It runs on the CPU, on one GPU, and under torchrun with a whole copy of the model on each GPU (DDP):
the mesh of the config is not used. Packed blocks are kept apart by an explicit mask, [b, 1, S, S],
which both sdpa and eager attention honour; a varlen kernel would take the place of
`attention_mask`. There is no export, no held-out loss and no loss by source. An adapter is PEFT's
(witness_adapter.py), without dropout; regularization is in witness_regularization.py.
"""

from __future__ import annotations

import os

# If PyTorch/XLA is installed, transformers and accelerate take its device, unless told before
# they are imported.
os.environ["USE_TORCH_XLA"] = "0"

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging
from witness_adapter import ADAPTER, adapted, check_adapter
from witness_regularization import Regularization, check_regularization

from torchprime.checkpoint.hf.read import EMBEDDING, HEAD
from torchprime.config.checks import refuse
from torchprime.config.entry import run_main
from torchprime.config.schema import AXES, TrainConfig
from torchprime.config.sections.loss import Average, LossConfig
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.errors import ConfigError, DivergedError, RuntimeSetupError
from torchprime.files.atomic import write_json
from torchprime.metrics.record import StepRecord
from torchprime.metrics.throughput import (
    Stopwatch,
    host_memory_bytes,
    mfu,
)
from torchprime.metrics.trackers.sender import Sender, finish
from torchprime.metrics.trackers.tensorboard import TensorBoard
from torchprime.metrics.trackers.tracker import TrackedRun
from torchprime.metrics.writers import ConsoleWriter, JsonlWriter, Writer
from torchprime.text import terminal
from torchprime.training.loop import DataOrder
from torchprime.training.optim.make import own_betas
from torchprime.training.run import folder as run_folder
from torchprime.training.setup.datasets import RunData, prepare_run_data, template_of
from torchprime.training.setup.model_files import ModelFiles, pretrained_tensors
from torchprime.training.setup.plan import (
    count_parameters,
    data_order,
    flops_per_token,
    plan_steps,
    stored_parameters,
)
from torchprime.training.setup.recipe import files_of

Inputs = dict[str, Any]
CROSS_ENTROPY = LossConfig()


# Inputs -------------------------------------------------------------------------------------------


class OrderedBlocks(Dataset):
    """The blocks of all updates, one after another, as `DataOrder` has them."""

    def __init__(self, order: DataOrder, total_steps: int) -> None:
        self.order, self.total_steps = order, total_steps

    def __len__(self) -> int:
        return self.total_steps * self.order.global_batch_size

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        """Return the fields of one block, each [S]."""
        order, data = self.order, self.order.data
        step, row = divmod(place, order.global_batch_size)
        block = data.batch(order.indices(step)[row : row + 1])
        return {name: torch.from_numpy(array[0]) for name, array in block.arrays().items()}


def collate(blocks: Sequence[Mapping[str, Tensor]], average: Average = "tokens") -> Inputs:
    """Return a micro-batch for Trainer, which hands `labels` to `weighted_loss` unread."""
    fields = {name: torch.stack([block[name] for block in blocks]).long() for name in blocks[0]}
    weights = torch.stack([block["loss_weights"] for block in blocks])
    if average == "examples":
        weights = over_examples(weights, fields["segment_ids"])
    return {
        "input_ids": fields["input_ids"],
        "position_ids": fields["position_ids"],
        "segment_ids": fields["segment_ids"],
        "labels": {"targets": fields["targets"], "weights": weights},
    }


def over_examples(weights: Tensor, segment_ids: Tensor) -> Tensor:
    """Return weights of tokens that add up to 1 in every example; a segment is a whole one."""
    sums = weights.new_zeros(len(weights), int(segment_ids.max()) + 1)
    sums.scatter_add_(1, segment_ids, weights)
    return torch.where(weights > 0, weights / sums.gather(1, segment_ids), 0.0)


def segment_mask(segment_ids: Tensor) -> Tensor:
    """bool [b, 1, S, S], true where a query (dim 2) sees a key: its own segment, not what follows.

    Padding is a segment like any other, so no query is left without a key (a softmax over nothing).
    """
    length = segment_ids.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (same & earlier)[:, None]


def additive(mask: Tensor) -> Tensor:
    """Return the mask that eager attention adds to its scores."""
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)


def weighted_loss(
    outputs: Any,
    labels: Mapping[str, Tensor],
    num_items_in_batch: Tensor,
    loss: LossConfig = CROSS_ENTROPY,
) -> Tensor:
    """Return this micro-batch's part of the update's loss. Targets are shifted already.

    Args:
        num_items_in_batch: the weight of the whole update, over all micro-batches and processes.
    """
    logits, targets = outputs.logits.float().flatten(0, 1), labels["targets"].flatten()
    each = F.cross_entropy(
        logits,
        targets,
        ignore_index=-100,
        reduction="none",
        label_smoothing=loss.label_smoothing,
    )
    if loss.dft:
        probabilities = logits.detach().softmax(-1)
        each = each * probabilities.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    if loss.z_loss:
        each = each + loss.z_loss * logits.logsumexp(-1) ** 2
    return (each * labels["weights"].flatten()).sum() / num_items_in_batch


class MasterAdamW(torch.optim.AdamW):
    """torch's AdamW on fp32 copies of bf16 weights, which it then rounds them to.

    Trainer's own bf16 is autocast: products in bf16, but sums between layers and norms in fp32.
    That is another computation than a bf16 run of ours, by more than its noise (docs/parity.md).
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **kwargs: Any) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        copied = []
        for group in groups:
            copies = [weight.detach().float() for weight in group["params"]]
            self.pairs += zip(group["params"], copies, strict=True)
            copied.append({**group, "params": copies})
        super().__init__(copied, **kwargs)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the copies by the weights' gradients, already clipped."""
        for weight, copy in self.pairs:
            assert weight.grad is not None
            copy.grad = weight.grad.float()
        super().step(closure)
        for weight, copy in self.pairs:
            weight.copy_(copy)


class WitnessTrainer(Trainer):
    """Trainer with our blocks instead of a shuffled data set, and weights instead of counts."""

    regularization: Regularization | None = None

    def get_train_dataloader(self) -> DataLoader:
        """In order; accelerate gives each process its blocks of every micro-batch."""
        assert isinstance(self.train_dataset, OrderedBlocks)
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=False,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """One update's micro-batches and their weight in all processes; Trainer counts tokens."""
        batches = list(islice(epoch_iterator, num_batches))
        weight = torch.stack([batch["labels"]["weights"].sum() for batch in batches]).sum()
        everywhere: Any = self.accelerator.gather(weight.to(device))
        return batches, everywhere.sum().clamp(min=1e-12)  # empty blocks only: loss 0

    def compute_loss(self, model: Any, inputs: Inputs, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, with the mask made on the device."""
        mask = segment_mask(inputs.pop("segment_ids"))
        eager = self.accelerator.unwrap_model(model).config._attn_implementation == "eager"
        inputs["attention_mask"] = additive(mask) if eager else mask
        if self.regularization is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        given, weight = dict(inputs), kwargs["num_items_in_batch"]
        loss, outputs = cast(Any, super()).compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=weight
        )
        return loss + self.regularization.part(model, outputs.logits, given, weight)


# Outputs ------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Turns what Trainer logs into our records. Trainer logs every step: its loss is a mean over
    the steps since it last logged."""

    def __init__(
        self,
        order: DataOrder,
        writers: Sequence[Writer],
        *,
        total_steps: int,
        logging_steps: int,
        flops_per_token: float,
        device_kind: str,
        device_count: int,
    ) -> None:
        self.order, self.writers = order, writers
        self.total_steps, self.logging_steps = total_steps, logging_steps
        self.flops_per_token = flops_per_token
        self.device_kind, self.device_count = device_kind, device_count
        self.lr = math.nan
        self.watch = Stopwatch()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.restart()

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.lr = float(optimizer.param_groups[0]["lr"])  # what the optimizer is about to use

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        done, loss, norm = state.global_step, float(logs["loss"]), float(logs["grad_norm"])
        batch = self.order.batch(done - 1)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"The loss or gradient norm of step {done} is not finite: {loss} and {norm} (batch "
                f"{batch.hash()}). Lower task.optimizer.learning_rate, set task.max_grad_norm, or "
                "look at that batch's rows."
            )
        self.watch.count(supervised_tokens=batch.supervised_tokens, slot_tokens=batch.slot_tokens)
        if done % self.logging_steps and done != self.total_steps:
            if done == 1:  # slower than the others, as in our loop
                self.watch.restart()
            return
        lap = self.watch.lap()
        cuda = torch.cuda.is_available()
        record = StepRecord(
            step=done,
            epoch=self.order.epoch(done),
            loss=loss,
            grad_norm=norm,
            lr=self.lr,
            supervised_tokens=batch.supervised_tokens,
            real_tokens=batch.real_tokens,
            slot_tokens=batch.slot_tokens,
            batch_hash=batch.hash(),
            step_seconds=lap.step_seconds,
            supervised_tokens_per_s=lap.supervised_tokens_per_s,
            slot_tokens_per_s=lap.slot_tokens_per_s,
            mfu=mfu(
                slot_tokens_per_s=lap.slot_tokens_per_s,
                flops_per_token=self.flops_per_token,
                device_kind=self.device_kind,
                num_chips=self.device_count,
            ),
            device_memory_bytes=int(torch.cuda.max_memory_allocated()) if cuda else None,
            host_memory_bytes=host_memory_bytes(),
            compiles=None,
        )
        for writer in self.writers:
            writer.write(record)


# The config, in Trainer's words -------------------------------------------------------------------


def check_supported(c: TrainConfig, processes: int) -> None:
    """Refuse what transformers' Trainer would do differently.

    Raises:
        ConfigError, RuntimeSetupError: with the key and what to set instead.
    """
    check_adapter(c)
    check_regularization(c, processes)
    if c.model.pretrained_model is None:
        refuse("model.pretrained_model", None, "a checkpoint to start from", "Name one.")
    if c.task.optimizer.name != "adamw":
        refuse(
            "task.optimizer.name",
            c.task.optimizer.name,
            "adamw: Trainer's adafactor is another method than ours",
            "Set task.optimizer.name=adamw in both runs.",
        )
    if c.task.max_grad_value is not None:
        refuse(
            "task.max_grad_value",
            c.task.max_grad_value,
            "null: Trainer clips by norm only",
            "Set task.max_grad_value=null in both runs.",
        )
    if c.task.optimizer.groups:
        refuse(
            "task.optimizer.groups",
            [group.pattern for group in c.task.optimizer.groups],
            "[], since Trainer has one group",
            "Set task.optimizer.groups=[] in both runs.",
        )
    if c.task.lr_scheduler.name not in ("linear", "cosine", "constant"):
        refuse(
            "task.lr_scheduler.name",
            c.task.lr_scheduler.name,
            "linear, cosine or constant, which the witness has",
            "Set one of them in both runs.",
        )
    if c.torch_dtype == "bfloat16" and not c.task.optimizer.master_weights:
        refuse(
            "task.optimizer.master_weights",
            False,
            "true: Trainer without fp32 weights keeps AdamW's state in bfloat16 too",
            "Set task.optimizer.master_weights=true in both runs.",
        )
    if c.task.neftune_noise_alpha is not None:
        refuse(
            "task.neftune_noise_alpha",
            c.task.neftune_noise_alpha,
            "null: Trainer draws other noise than ours",
            "Set task.neftune_noise_alpha=null in both runs.",
        )
    if c.task.loss.average == "examples" and c.dataset.packing not in ("none", "bfd"):
        refuse(
            "dataset.packing",
            c.dataset.packing,
            "none or bfd, since task.loss.average=examples needs whole examples here",
            "Set dataset.packing=bfd in both runs.",
        )
    parts = processes * c.task.gradient_accumulation_steps
    if c.task.global_batch_size % parts:
        refuse(
            "task.global_batch_size",
            c.task.global_batch_size,
            f"a multiple of {parts} = {processes} processes x task.gradient_accumulation_steps "
            f"{c.task.gradient_accumulation_steps}",
            "Start another number of processes, or change the accumulation.",
        )
    if processes == 1 and torch.cuda.device_count() > 1:
        raise RuntimeSetupError(
            f"There are {torch.cuda.device_count()} GPUs and one process, which Trainer would use "
            "with DataParallel. Start the witness with torchrun --standalone --nproc_per_node=N, "
            "or set CUDA_VISIBLE_DEVICES=0."
        )


def check_windows(files: ModelFiles, block_size: int) -> None:
    """Replace the model's own mask, and with it a sliding window, by an explicit one."""
    window = min((w for w in files.architecture.windows if w is not None), default=block_size)
    if window < block_size:
        raise ConfigError(
            f"dataset.block_size: given {block_size}, expected at most {window}, the sliding "
            "window of this model's attention, which the witness' mask does not have. Set "
            f"dataset.block_size={window} in both runs."
        )


def attention_of(c: TrainConfig, files: ModelFiles) -> str:
    """Return transformers' attention. The config's own choice is between kernels of ours;
    `reference` is the plainest of either. torch's attention has no soft-cap."""
    plain = c.model.attention_kernel == "reference"
    return "eager" if plain or files.architecture.attention_softcap is not None else "sdpa"


def schedule_arguments(c: TrainConfig, *, total_steps: int, warmup_steps: int) -> dict[str, Any]:
    """Our schedule by the names that transformers has for it."""
    s, peak = c.task.lr_scheduler, c.task.optimizer.learning_rate
    name, more = s.name, {}
    if name == "constant" or s.min_lr_ratio == 1 or warmup_steps >= total_steps:
        name = "constant_with_warmup"  # nothing falls
    elif name == "cosine" and s.min_lr_ratio:
        name, more = "cosine_with_min_lr", {"min_lr_rate": s.min_lr_ratio}
    elif name == "linear" and s.min_lr_ratio:
        name, more = "polynomial", {"lr_end": peak * s.min_lr_ratio, "power": 1.0}
    return {
        "learning_rate": peak,
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": more,
        "warmup_steps": warmup_steps,
    }


def training_arguments(
    c: TrainConfig, folder: Path, *, processes: int, total_steps: int, warmup_steps: int
) -> TrainingArguments:
    """All of Trainer's arguments that matter; with the device comes the process group."""
    t, o, cuda = c.task, c.task.optimizer, torch.cuda.is_available()
    betas = o.betas or own_betas(o.name)
    accumulation = t.gradient_accumulation_steps
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        seed=c.seed % 2**32,
        max_steps=total_steps,
        per_device_train_batch_size=t.global_batch_size // accumulation // processes,
        gradient_accumulation_steps=accumulation,
        average_tokens_across_devices=True,
        max_grad_norm=math.inf if t.max_grad_norm is None else t.max_grad_norm,
        optim="adamw_torch",
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_epsilon=1e-8 if o.eps is None else o.eps,
        weight_decay=o.weight_decay,
        **schedule_arguments(c, total_steps=total_steps, warmup_steps=warmup_steps),
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )


def with_token_weights(c: TrainConfig, files: ModelFiles, data: RunData) -> PackedDataset:
    """Return the training blocks with the weights of their tokens, before any average of ours."""
    if c.task.loss.average == "tokens":
        return data.train
    c = replace(c, task=replace(c.task, loss=CROSS_ENTROPY))
    template = template_of(c.dataset, files.tokenizer)
    return prepare_run_data(c, files.tokenizer, template, lambda _: None).train


def load_model(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    """Load transformers' model, computing in the weights' dtype."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        trust_remote_code=False,
    )


def resize(model: Any, files: ModelFiles, dtype: torch.dtype) -> None:
    """Give the model the rows that the config asks for, by transformers' own function; new ones
    take the values they have in a run of ours, since their noise is drawn."""
    rows = files.new_rows
    if rows is None:
        return
    model.resize_token_embeddings(rows.rows, mean_resizing=False)
    tensor_of = pretrained_tensors(files, dtype)
    weights = {EMBEDDING: model.get_input_embeddings().weight}
    if not files.architecture.tie_word_embeddings:
        weights[HEAD] = model.get_output_embeddings().weight
    for name, weight in weights.items():
        weight.data[rows.made] = tensor_of(name)[rows.made]


def optimizer_of(args: TrainingArguments, dtype: torch.dtype) -> dict[str, Any]:
    """Trainer's own AdamW, or the one with fp32 copies of bf16 weights, as arguments for it."""
    if dtype == torch.float32:
        return {}
    _, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    return {"optimizer_cls_and_kwargs": (MasterAdamW, settings)}


# The run ------------------------------------------------------------------------------------------


def plan_of(c: TrainConfig, data: RunData, processes: int) -> dict[str, Any]:
    """run.json's plan, but for memory, which the witness does not estimate."""
    steps = plan_steps(c, data.train)
    mesh = {axis: processes if axis == "data" else 1 for axis in AXES}
    return {**steps._asdict(), "mesh": mesh}


def facts_of(
    c: TrainConfig, data: RunData, plan: dict[str, Any], model: Any, args: TrainingArguments
) -> dict[str, Any]:
    """run.json, with the keys that a run of ours has."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "command": run_folder.command(),
        "versions": run_folder.versions() | {"accelerate": metadata.version("accelerate")},
        "backend": "transformers",
        "device": {"kind": device_kind(), "count": args.world_size},
        "processes": args.world_size,
        "mesh": plan["mesh"],
        "attention": model.config._attn_implementation,
        "loss": "torch",
        "model": {
            "pretrained": c.model.pretrained_model,
            "parameters": parameters,
            "dtype": c.torch_dtype,
        },
        "fingerprints": data.fingerprints(),
        "plan": plan | {"parameters": parameters},
    }


def device_kind() -> str:
    """Return the GPU's name, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main(c: TrainConfig) -> int:
    """Train as configured; the exit code."""
    processes, first = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    say = terminal.say if first else lambda _: None
    folder = Path(c.output_dir) / (c.run_name or c.task.name)
    check_supported(c, processes)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before anything asks for it
    if not c.dry_run:
        run_folder.check(folder)
    files = files_of(c, weights=not c.dry_run)
    check_windows(files, c.dataset.block_size)
    template = template_of(c.dataset, files.tokenizer)
    data = prepare_run_data(c, files.tokenizer, template, say)
    plan = plan_of(c, data, processes)
    attention = attention_of(c, files)
    say(
        f"  witness      transformers' Trainer, {plan['total_steps']:,} steps "
        f"({plan['warmup_steps']:,} of them warm-up) on {device_kind()} x {processes}, "
        f"{attention} attention; no held-out loss, no export"
    )
    if c.dry_run:
        say("dry_run=true: everything above is ready; stopping before the first step.")
        return 0
    train(c, folder, files, data, plan, processes=processes, attention=attention)
    return 0


def train(
    c: TrainConfig,
    folder: Path,
    files: ModelFiles,
    data: RunData,
    plan: dict[str, Any],
    *,
    processes: int,
    attention: str,
) -> None:
    """Load, make the run's folder, and run Trainer."""
    assert files.folder is not None
    total = plan["total_steps"]
    dtype = getattr(torch, c.torch_dtype)
    model = load_model(files.folder, dtype, attention)
    resize(model, files, dtype)
    model = adapted(model, files, dtype, c.seed)
    if c.remat.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    args = training_arguments(
        c, folder, processes=processes, total_steps=total, warmup_steps=plan["warmup_steps"]
    )
    writers: list[Writer] = []
    trackers: list[Sender] = []
    if args.process_index == 0:
        run_folder.claim(folder)
        run_folder.write_config(folder, c.to_dict())
        write_json(folder / "data_report.json", data.reports())
        write_json(folder / "run.json", facts_of(c, data, plan, model, args))
        metrics = JsonlWriter(folder / "metrics.jsonl")
        run = TrackedRun(folder.name, folder, c.to_dict())
        trackers = [Sender(TensorBoard(run), terminal.say)]
        writers = [metrics, *trackers, ConsoleWriter(total)]
    order = data_order(c, data.train, total)
    counts = count_parameters(stored_parameters(files.build(dtype)), files.shapes)
    recorder = Recorder(
        order,
        writers,
        total_steps=total,
        logging_steps=c.logging_steps,
        flops_per_token=flops_per_token(files.architecture, counts, c.dataset.block_size),
        device_kind=device_kind(),
        device_count=args.world_size,
    )
    trainer = WitnessTrainer(
        model=model,
        args=args,
        train_dataset=OrderedBlocks(replace(order, data=with_token_weights(c, files, data)), total),
        data_collator=partial(collate, average=c.task.loss.average),
        compute_loss_func=partial(weighted_loss, loss=c.task.loss),
        callbacks=[recorder],
        **optimizer_of(args, dtype),
    )
    if c.regularization.enabled:
        trainer.regularization = Regularization(c, model)
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
        if files.adapter is not None and args.process_index == 0:
            model.save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)
    finally:
        for writer in writers:
            writer.close()
        finish(trackers, "finished", [], c.metrics.finish_seconds)
        PartialState().destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_main(main))
