"""Option names of other trainers, and the torchprime key or advice for each."""

from __future__ import annotations

# Another trainer's name -> ours.
SAME = {
    "adam_epsilon": "task.optimizer.eps",
    "attn_implementation": "model.attention_kernel",
    "base_model": "model.pretrained_model",
    "cutoff_len": "dataset.block_size",
    "dataset_name": "dataset.hf_dataset_name",
    "eval_steps": "eval.every_steps",
    "label_smoothing_factor": "task.loss.label_smoothing",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_rank": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_target_modules": "adapter.targets",
    "modules_to_save": "adapter.modules_to_train",
    "lr": "task.optimizer.learning_rate",
    "lr_scheduler_type": "task.lr_scheduler.name",
    "max_length": "dataset.block_size",
    "max_seq_length": "dataset.block_size",
    "metric_for_best_model": "selection.ranking",
    "model_name_or_path": "model.pretrained_model",
    "num_train_epochs": "task.num_epochs",
    "optim": "task.optimizer.name",
    "resume_from_checkpoint": "resume.source",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "sequence_len": "dataset.block_size",
    "train_file": "dataset.file_dataset_path",
    "validation_file": "eval.file_dataset_path",
}
_RECORDS = (
    "Records always go to metrics.jsonl in the run's folder, and to TensorBoard: leave it out, and "
    "look with `tensorboard --logdir outputs`. For others: metrics.trackers=[tensorboard,wandb]."
)
_BATCH = (
    "Set task.global_batch_size: blocks per update over all devices and micro-batches; "
    "task.gradient_accumulation_steps says in how many micro-batches."
)
_DTYPE = "Set torch_dtype=bfloat16 (fp16 is not supported)."
_LOSS = "Set dataset.compute_loss_on=completion or assistant; auto does so already."
_MESH = "Choose a mesh: mesh=fsdp4, or ici_mesh.fsdp=4."
_LORA = "Choose an adapter: adapter=lora adapter.rank=16."
_QUANTIZED = "Choose adapter=qlora, or adapter=lora adapter.base_dtype=int8."
# Another trainer's name -> advice.
ADVICE = {
    "adam_beta1": "Set task.optimizer.betas=[0.9,0.999].",
    "adam_beta2": "Set task.optimizer.betas=[0.9,0.999].",
    "assistant_only_loss": _LOSS,
    "bf16": _DTYPE,
    "completion_only_loss": _LOSS,
    "deepspeed": _MESH,
    "fp16": _DTYPE,
    "gradient_checkpointing": "Choose remat=full, or remat=scan_full.",
    "load_best_model_at_end": "Set export.which=best.",
    "logging_dir": _RECORDS,
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "lora_target": "Set adapter.targets=[q_proj,v_proj], or [all-linear].",
    "loss_type": "Set task.loss.dft=true for dft; nll is the default.",
    "micro_batch_size": _BATCH,
    "per_device_eval_batch_size": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "push_to_hub": "Leave it out; afterwards: hf upload OWNER/NAME outputs/RUN/export.",
    "report_to": _RECORDS,
    "train_batch_size": _BATCH,
    "use_dora": "Choose adapter=dora.",
    "use_peft": _LORA,
    "use_rslora": "Set adapter.scaling=rslora.",
}


def advice_for(key: str) -> str | None:
    """Return the replacement for another trainer's name; None for an unknown name."""
    name = key.rsplit(".", 1)[-1]
    if name in SAME:
        return f"Here it is {SAME[name]}."
    return ADVICE.get(name)
