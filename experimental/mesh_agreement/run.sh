#!/usr/bin/env bash
# The same fine-tuning on 1 device, fsdp=4 and fsdp=2 x tensor=2: 200 steps on GSM8K's training rows in
# fp32 from a small pretrained Llama, with held-out loss. Then compares the curves and draws them.
#   bash experimental/mesh_agreement/run.sh MODEL_FOLDER TRAIN_JSONL TEST_JSONL OUT_FOLDER
set -euo pipefail
model=$1 train=$2 test=$3 out=$4
here=$(dirname "${BASH_SOURCE[0]}")

run() { # name, overrides...
    python torchprime/torch_xla_models/train.py --config-name default \
        output_dir="$out" run_name="$1" "${@:2}" \
        model.pretrained_model="$model" torch_dtype=float32 \
        dataset=file dataset.file_dataset_path="$train" dataset.format=question_answer \
        dataset.block_size=1024 dataset.truncation=right \
        eval=file eval.file_dataset_path="$test" eval.max_examples=64 eval.every_steps=50 \
        task.global_batch_size=4 task.max_steps=200 task.export_checkpoint_path=null \
        task.optimizer.learning_rate=1e-3 task.lr_scheduler.name=cosine \
        task.lr_scheduler.warmup_steps=20 logging_steps=1
}

run one_device
run fsdp4 ici_mesh.fsdp=4
run fsdp2_tensor2 ici_mesh.fsdp=2 ici_mesh.tensor=2
python "$here/compare_runs.py" "$out"/one_device "$out"/fsdp4 "$out"/fsdp2_tensor2 \
    --figure "$out/mesh_agreement.png"
