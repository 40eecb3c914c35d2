"""`torchprime prepare`: prepare a config's rows now, so that training finds them prepared."""

from __future__ import annotations

from torchprime.cli.shared.data import load
from torchprime.config.schema import TrainConfig
from torchprime.text.terminal import print_lines
from torchprime.training.setup.plan import plan_steps


def prepare_data(config: TrainConfig) -> int:
    """Prepare, and print what one update costs; the exit code."""
    budget = plan_steps(config, load(config).data.train).budget
    supervised = budget["supervised_tokens_per_update"]
    line = (
        f"{budget['blocks']:,} blocks of {budget['block_size']:,}, {budget['steps_per_epoch']:,} "
        f"steps per epoch at {budget['blocks_per_update']:,} blocks per update; supervised tokens "
        f"per update: mean {supervised['mean']:,.0f}, min {supervised['min']:,}, max "
        f"{supervised['max']:,}"
    )
    print_lines([line])
    return 0
