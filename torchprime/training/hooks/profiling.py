"""The hook that traces the steps from profile_start_step up to, not including, profile_end_step."""

from __future__ import annotations

from torchprime.training.backend import Backend
from torchprime.training.loop import BaseHook


class ProfileHook(BaseHook):
    """Hook for a trace. Steps count from 0. It stops the trace at the run's end if that comes
    first."""

    def __init__(self, backend: Backend, *, start: int, end: int, folder: str) -> None:
        self.backend, self.start, self.end, self.folder = backend, start, end, folder
        self.tracing = False

    def before_step(self, step: int) -> None:
        if step == self.start:
            self.backend.synchronize()
            self.backend.start_profile(self.folder)
            self.tracing = True

    def after_step(self, step: int, last: bool) -> None:
        if last or step >= self.end:
            self._stop()

    def on_end(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.tracing:
            self.backend.synchronize()
            self.backend.stop_profile()
            self.tracing = False
