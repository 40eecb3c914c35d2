"""Fixtures every test may use. XLA compiles dominate the suite, so models and steps are shared."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# Before anything imports torch_xla (transformers does): four virtual devices, and no log noise.
os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ["HF_HUB_OFFLINE"] = "1"
# XLA's own passes and the partitioner as ever, but machine code without LLVM's optimizations, which
# are half of a compile. `make test-slow` sets XLA_FLAGS to nothing, and so has them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# jax reads it when it starts: as many devices as the meshes over which kernels are mapped have.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
# `make test` has a process for each core: a second thread in one would spin for want of a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Prepared data is kept apart from the user's, and gone after the tests.
_prepared = tempfile.TemporaryDirectory(prefix="torchprime-tests-")
os.environ["XDG_CACHE_HOME"] = _prepared.name
# torchax, through which torch_xla calls kernels, is beside libtpu (`make libtpu`). It alone goes
# on the path: with libtpu there, too, a host would look like one with a TPU.
_torchax = Path(sys.prefix) / "libtpu" / "torchax"
if _torchax.is_dir():
    _folder = Path(_prepared.name) / "packages"
    _folder.mkdir()
    (_folder / "torchax").symlink_to(_torchax)
    sys.path.insert(0, str(_folder))

from torchprime.torch_xla_models.runtime import prepare_environment  # noqa: E402

prepare_environment(4)

import pytest  # noqa: E402
import torch  # noqa: E402
import torch_xla  # noqa: E402
import torch_xla.runtime as xr  # noqa: E402

# Autograd counts its devices at the first backward of the process: XLA's must be there by then.
xr.use_spmd()
xr.global_runtime_device_count()  # starts the client, without which XLA counts no device
torch.zeros((), device=torch_xla.device(), requires_grad=True).backward()

sys.path.insert(0, str(Path(__file__).parent))  # of the modules that tests share
pytest_plugins = ["record_fixtures", "run_fixtures", "shared_fixtures"]

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_dir() -> Path:
    return REPO


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real models and data kept beside the checkout; tests that need them skip without."""
    folder = REPO.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with real models and data is not here")
    return folder
