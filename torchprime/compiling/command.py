"""`compile_only=v6e-8`: compiles the run's training step for a TPU, without a TPU or weights.

The config defines the step; the architecture comes from the model's config.json only. Tracing
and compiling happen in a separate process, the worker of a runtime, since a compiler that fails can
end its process. Its result is judged here (report.py), printed, and written to
compile_report.json. With `compile_libtpu` another version of the compiler gets the same module, and
the report has both.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchprime.compiling.apart import run_apart
from torchprime.compiling.fitting import find_nearest, weights_per_chip
from torchprime.compiling.hlo.program import Program
from torchprime.compiling.other_compiler import OtherCompiler, compile_with, find_other
from torchprime.compiling.report import describe, judge, read_shortage
from torchprime.compiling.sizes import settings, step_sizes
from torchprime.compiling.theory import Sizes
from torchprime.config.schema import AXES, TrainConfig
from torchprime.config.topologies import topology
from torchprime.errors import UserError
from torchprime.files.atomic import make_folder, write_json
from torchprime.files.private_folders import require_private
from torchprime.models.architecture import Architecture, architecture_from_hf
from torchprime.text.terminal import print_lines
from torchprime.training.setup.model_files import find_architecture
from torchprime.training.setup.recipe import adapter_of, vocabulary_of

REPORT = "compile_report.json"
Say = Callable[[str], None]
Environment = dict[str, str]


@dataclass(frozen=True)
class Compiler:
    """A runtime's way to the TPU's compiler.

    Attributes:
        runtime: the package of the runtime.
        libtpu: the compiler's version.
        worker: the module of the process that compiles; it gets what apart.py describes.
        environment: of that process, for a config.
        other_environment: of the process with another version of the compiler.
        spmd: the module is of all chips and the compiler cuts it; else it is of one chip.
    """

    runtime: str
    libtpu: str
    worker: str
    environment: Callable[[TrainConfig], Environment]
    other_environment: Callable[[TrainConfig], Environment]
    spmd: bool


def compile_step(config: TrainConfig, compiler: Compiler, say: Say | None = None) -> int:
    """Compile the config's step for the slice it names, and print the result.

    Returns:
        The exit code: 0 if it compiles and fits, else 1.

    Raises:
        CheckpointError: the folder of `adapter.pretrained` holds no adapter of this model.
    """
    say = say or (lambda line: print_lines([line]))
    assert config.compile_only is not None
    other = None if config.compile_libtpu is None else find_other(config.compile_libtpu)
    hf_config, where = find_architecture(
        pretrained_model=config.model.pretrained_model,
        architecture=config.model.architecture,
        cache_dir=config.dataset.cache_dir,
        tokenizer_name=config.model.tokenizer_name,
        vocabulary=vocabulary_of(config),
    )
    architecture = architecture_from_hf(hf_config, where=where)
    adapter = adapter_of(config)
    if adapter is not None and adapter.start is not None:
        adapter.start.fit(hf_config)
    say(f"compiling the step for {config.compile_only}; architecture from {where}")
    folder = (
        Path(config.output_dir) / f"{config.run_name or config.task.name}-{config.compile_only}"
    )
    require_private(folder, "output_dir/run_name")
    make_folder(folder)

    def compile_one(candidate: TrainConfig, module: Path | None = None) -> dict[str, Any]:
        return compile_report(candidate, hf_config, architecture, compiler, folder, module)

    with tempfile.TemporaryDirectory(prefix="torchprime-module-") as scratch:
        module = None if other is None else Path(scratch) / "module.vhlo"
        report = compile_one(config, module)
        if other is not None and module is not None:
            write_json(folder / REPORT, report)
            say(f"compiling the same module with libtpu {other.libtpu}, jax {other.jax}")
            sizes = step_sizes(config, architecture)
            report["other"] = other_report(config, compiler, sizes, other, module, folder)
    write_json(folder / REPORT, report)  # the next step may take long
    if report["compiles"] and not report["fits"] and config.compile_search:
        limit = topology(report["topology"]).chip.hbm_bytes
        report["nearest"] = find_nearest(
            config, partial(step_sizes, a=architecture), limit, compile_one, say
        )
    write_json(folder / REPORT, report)
    say(describe(report))
    say(f"written to {folder / REPORT}")
    return 0 if report["fits"] else 1


def compile_report(
    config: TrainConfig,
    hf_config: Mapping[str, Any],
    architecture: Architecture,
    compiler: Compiler,
    folder: Path,
    module: Path | None,
) -> dict[str, Any]:
    """Compile once and return the content of compile_report.json. The program is written to
    program.txt.

    Args:
        module: a file to keep the module in, in jax's portable format.
    """
    assert config.compile_only is not None
    slice_ = topology(config.compile_only)
    sizes = step_sizes(config, architecture)
    request = {
        **step_request(config, hf_config),
        "compile": True,
        "portable": None if module is None else str(module),
    }
    result = run_worker(config, request, compiler, folder)
    trained, frozen = sizes.counts()
    report = {
        "topology": slice_.name,
        "runtime": compiler.runtime,
        "chips": slice_.chips * request["slices"],
        "mesh": config.mesh_shape(),
        "settings": settings(config),
        "parameters": trained + frozen,
        "trained_parameters": trained,
        "weights_per_chip": weights_per_chip(config, sizes),
        "slot_tokens_per_chip": sizes.tokens // sizes.tensor,
        **{key: result[key] for key in ("versions", "compiler", "flags", "seconds")},
        "host_memory_bytes": result["host_memory_bytes"],
        "state_bytes": result.get("state_bytes"),
    }
    report["versions"]["libtpu"] = compiler.libtpu
    if "error" not in result:
        program = Program((folder / "program.txt").read_text())
        judged = judge(program, result["memory"], sizes, slice_.chip)
        return {"compiles": True, "fits": judged["memory"]["fits"], **report, **judged}
    shortage = read_shortage(result["error"], sizes)
    return {
        "compiles": shortage is not None,
        "fits": False,
        **report,
        "shortage": shortage,
        "error": result["error"],
    }


def step_request(config: TrainConfig, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a worker's request that describes the step."""
    assert config.compile_only is not None
    return {
        "config": config.to_dict(),
        "architecture": dict(hf_config),
        "topology": topology(config.compile_only).name,
        "slices": _slices(config),
    }


def _slices(config: TrainConfig) -> int:
    return math.prod(getattr(config.dcn_mesh, axis) for axis in AXES)


def run_worker(
    config: TrainConfig, request: Mapping[str, Any], compiler: Compiler, folder: Path
) -> dict[str, Any]:
    """Run a runtime's worker and return its result."""
    command = [sys.executable, "-m", compiler.worker]
    env = compiler.environment(config)
    return run_apart(command, request, env, folder, config.compile_time_limit * 60)


def save_module(
    config: TrainConfig,
    hf_config: Mapping[str, Any],
    compiler: Compiler,
    folder: Path,
    module: Path,
) -> None:
    """Trace and lower the step without compiling it, and write it in jax's portable format."""
    request = {**step_request(config, hf_config), "compile": False, "portable": str(module)}
    run_worker(config, request, compiler, folder)


def other_report(
    config: TrainConfig,
    compiler: Compiler,
    sizes: Sizes,
    other: OtherCompiler,
    module: Path,
    folder: Path,
) -> dict[str, Any]:
    """Compile the module by another version and return the same figures of its program. That is
    written to a folder of its own, named by the version."""
    assert config.compile_only is not None
    chip = topology(config.compile_only).chip
    own = folder / f"libtpu-{other.libtpu}"
    env, request = compiler.other_environment(config), other_request(config, compiler, module)
    try:
        result = compile_with(other, request, env, own, config.compile_time_limit * 60)
    except UserError as error:  # it must not take the first compiler's report away
        known = {"libtpu": other.libtpu, "jax": other.jax}
        return {"versions": known, "fits": False, "error": str(error)}
    found = {key: result[key] for key in ("versions", "compiler", "flags", "seconds")}
    if "error" in result:
        return {**found, "fits": False, "error": result["error"]}
    judged = judge(Program((own / "program.txt").read_text()), result["memory"], sizes, chip)
    return {**found, "fits": judged["memory"]["fits"], **judged}


def other_request(config: TrainConfig, compiler: Compiler, module: Path) -> dict[str, Any]:
    """Return the request for another version's process, as executables.py reads it."""
    assert config.compile_only is not None
    slice_ = topology(config.compile_only)
    return {
        "module": str(module),
        "spmd": compiler.spmd,
        "libtpu_name": slice_.libtpu_name,
        "host_shape": slice_.host_shape,
        "slices": _slices(config),
    }


def import_path(given: Mapping[str, str], *first: str) -> str:
    """Return PYTHONPATH of a process that imports this package, and before it from some folders.

    Args:
        given: the environment of this process.
    """
    package = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [*first, package, given.get("PYTHONPATH")]))


def common_environment(given: Mapping[str, str], flags: str) -> Environment:
    """Return the environment of every process that compiles for chips that this host does not have.

    Args:
        given: the environment of this process.
        flags: the compiler's, as LIBTPU_INIT_ARGS has them.
    """
    # Descriptions of a TPU host (TPU_ACCELERATOR_TYPE and the like) would be believed.
    kept = {name: value for name, value in given.items() if not name.startswith("TPU_")}
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": flags,
    }
