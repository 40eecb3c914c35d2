#!/usr/bin/env bash
# Make the quickstart's assets again, from the seed to the weights. Run from the repository's root,
# inside the environment that `make quickstart` creates. See README.md beside this file.
set -euo pipefail

assets=torchprime/assets/quickstart
work=outputs/quickstart-data
run=outputs/quickstart-pretrain

python experimental/quickstart_assets/make_data.py --rows-dir "$assets/data" --pretrain-dir "$work"
python experimental/quickstart_assets/make_tokenizer.py --out "$assets/base"
python torchprime/torch_xla_models/train.py --config-name quickstart-pretrain \
    output_dir="$(dirname "$run")" run_name="$(basename "$run")" "$@"
install -m 644 "$run/export/model.safetensors" "$assets/base/model.safetensors"
