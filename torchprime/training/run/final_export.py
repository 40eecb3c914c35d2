"""The export at a run's end, and the rescue of the weights if it fails.

The target was tested before the first step, but a disk may fill up and a network may fail while
a run trains. The weights must not be lost then: if no checkpoint holds them, all processes write
one, and the message has the command that exports it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from torchprime.checkpoint.places import ExportPlace, UnsentError
from torchprime.checkpoint.proof.certificate import UncertifiedError
from torchprime.errors import CheckpointError, UserError
from torchprime.training.processes import LongWork, Processes


class FinalExport:
    """The export of one run, executed once.

    Args:
        export: exports. Its argument is called on the first process when the others' part is done.
        saved: full path of the checkpoint with the weights to be exported; None if there is none.
        save: writes one, with all processes, and returns its full path.
    """

    def __init__(
        self,
        processes: Processes,
        place: ExportPlace,
        *,
        export: Callable[[Callable[[], None]], None],
        saved: Callable[[], str | None],
        save: Callable[[], str],
        say: Callable[[str], None],
    ) -> None:
        self.processes, self.place, self.say = processes, place, say
        self._export, self._saved, self._save = export, saved, save

    def run(self) -> None:
        """Export, or save the weights and tell how to export them.

        Raises:
            Exception: what the export raised; of a UserError, the message says that, too.
        """
        work, problem = LongWork(self.processes), None
        try:
            self._export(work.others_wait)
        except Exception as error:
            # Any other error with several processes means a lost partner, and ends them all.
            if self.processes.count > 1 and not isinstance(error, (UserError, OSError)):
                raise
            problem = error
        lacking = work.end(problem is not None and _lacks_weights(problem))
        told = self._keep(work) if lacking else None
        if problem is None:  # or only the first process, which writes, has one
            return
        if told is not None and isinstance(problem, (UserError, OSError)):
            raise CheckpointError(f"{problem}\n{told}") from problem
        if told is not None:
            self.say(told)
        raise problem

    def _keep(self, work: LongWork) -> str:
        """Make sure that a checkpoint holds the weights; return the message about it."""
        if work.lost is not None:
            return "The other processes are gone, so no checkpoint could be written."
        try:
            where = self._saved() or self._save()
        except (UserError, OSError) as error:
            return f"The weights could not be kept in a checkpoint either: {error}"
        command = ["torchprime", "export", where, "--out", str(self.place)]
        return f"The weights are in {where}. To export them: {shlex.join(command)}"


def _lacks_weights(problem: Exception) -> bool:
    """Return False if a whole export exists at the target or locally, even if a check of it
    failed."""
    return not isinstance(problem, (UnsentError, UncertifiedError))
