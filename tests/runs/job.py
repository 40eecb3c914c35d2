"""The main job on torch.distributed, with a mishap on one rank.

python job.py MISHAP key=value ...
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, NoReturn

os.environ["USE_TORCH_XLA"] = "0"

from torchprime.config.entry import run_main  # noqa: E402
from torchprime.errors import CheckpointError  # noqa: E402
from torchprime.torch_native.backend import NativeBackend  # noqa: E402
from torchprime.torch_native.train import main  # noqa: E402
from torchprime.training.run.export import Exporter  # noqa: E402

MISHAP_AT = 3  # the call of train_step in which it happens


def lose_rank_1(mishap: str) -> None:
    """In the middle of the run rank 1 dies without a word, or hangs."""
    plain, calls = NativeBackend.train_step, 0

    def train_step(self: NativeBackend, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if self.processes.index == 1 and calls == MISHAP_AT:
            if mishap == "die":
                os._exit(9)
            time.sleep(600)
        return plain(self, *args)

    NativeBackend.train_step = train_step  # type: ignore[method-assign]


def fail_to_write() -> None:
    """The one rank that writes the export can't."""

    def export(*_: Any) -> NoReturn:
        raise CheckpointError("no space left")

    Exporter._export = export  # type: ignore[method-assign]


if __name__ == "__main__":
    mishap, *argv = sys.argv[1:]
    if mishap in ("die", "hang"):
        lose_rank_1(mishap)
    elif mishap == "full-disk":
        fail_to_write()
    elif mishap == "own-disk" and os.environ["RANK"] == "1":
        argv.append("output_dir=/dev/shm")
    sys.exit(run_main(main, argv))
