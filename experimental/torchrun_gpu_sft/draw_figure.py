"""The verdict on a TPU run, a GPU run and a Hugging Face run of one config, with its figure.

python experimental/torchrun_gpu_sft/draw_figure.py xla=RUN native=RUN hf=RUN [--out FOLDER]

The same as `torchprime compare`, whose --help says more; nothing here to install or to edit.
"""

from __future__ import annotations

import sys

from torchprime.cli.compare import compare_main

if __name__ == "__main__":
    sys.exit(compare_main(sys.argv[1:]))
