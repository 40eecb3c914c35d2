"""The trackers by name: their libraries, and the writers of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from torchprime.errors import ConfigError
from torchprime.metrics.trackers.mlflow import MLflow
from torchprime.metrics.trackers.sender import Say, Sender
from torchprime.metrics.trackers.tensorboard import TensorBoard
from torchprime.metrics.trackers.tracker import Table, TrackedRun, Tracker
from torchprime.metrics.trackers.trackio import Trackio
from torchprime.metrics.trackers.wandb import Wandb

TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    tracker.name: tracker for tracker in (TensorBoard, Wandb, MLflow, Trackio)
}


def require_libraries(names: Sequence[str]) -> None:
    """Check that the libraries of the named trackers are installed, without importing them.

    Raises:
        ConfigError: one is not; the message has the command that installs it.
    """
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        rest = [name for name in names if name not in missing]
        extras = ",".join(name for name in missing if name != "tensorboard")
        packages = ["tensorboard"] if "tensorboard" in missing else []
        packages += [f"'torchprime[{extras}]'"] if extras else []
        raise ConfigError(
            f"metrics.trackers: given [{', '.join(names)}], but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed. Install with "
            f"pip install {' '.join(packages)}, or set "
            f"metrics.trackers=[{','.join(rest)}]."
        )


def _is_installed(name: str) -> bool:
    """Return True for a library; a folder of this name that happens to be in sys.path is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def open_trackers(
    names: Sequence[str], run: TrackedRun, say: Say, samples: Callable[[int], Table]
) -> list[Sender]:
    """Start the thread of each named tracker.

    Args:
        samples: returns the graded answers of a step.
        say: prints a line for the user.

    Raises:
        UserError: a tracker cannot have its folder in the run's.
    """
    made = [TRACKERS[name](run) for name in names]
    return [Sender(tracker, say, samples) for tracker in made]
