"""The compiling process apart from the command: its ends without a result."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from torchprime.compiling.apart import run_apart
from torchprime.errors import RuntimeSetupError, UserError


def run_code(tmp_path: Path, code: str, limit_s: float = 60.0):
    """Run code in the place of the compiler."""
    return run_apart([sys.executable, "-c", code], {}, dict(os.environ), tmp_path, limit_s)


def test_over_the_time_limit(tmp_path) -> None:
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    with pytest.raises(RuntimeSetupError, match="compile_time_limit: .* longer than 0.05 minutes"):
        run_code(tmp_path, code + "time.sleep(600)", limit_s=3)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIG_DFL)


def test_a_compiler_that_ends_its_process(tmp_path) -> None:
    code = "import os; print('Check failed: x', flush=True); os.abort()"
    with pytest.raises(RuntimeSetupError, match=r"(?s)signal SIGABRT.*Check failed: x"):
        run_code(tmp_path, code)


def test_what_the_step_objects_to_is_a_users_error(tmp_path) -> None:
    """A block size that the kernel cannot take, say, is found where the step is traced."""
    objection = "model.attention_kernel=splash works in tiles of 128 positions, but ..."
    path = str(tmp_path / "result.json")
    code = f"import json; json.dump({{'user_error': {objection!r}}}, open({path!r}, 'w'))"
    with pytest.raises(UserError, match="works in tiles of 128"):
        run_code(tmp_path, code)
    assert not Path(path).exists()
