"""`compile_only=v6e-8`: compiles the run's training step for a TPU, without a TPU or weights.

The config defines the step; the architecture comes from the model's config.json only. Tracing
and compiling happen in a separate process (worker.py), since a compiler that fails can end
its process and the number of devices is fixed in one. Its result is judged here
(torch_xla_models/compile/report.py), printed, and written to compile_report.json. With
`compile_libtpu` another version of the compiler gets the same module, and the report has both.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchprime.config.schema import AXES, TrainConfig
from torchprime.config.topologies import topology
from torchprime.files.atomic import make_folder, write_json
from torchprime.files.private_folders import require_private
from torchprime.models.architecture import Architecture, architecture_from_hf
from torchprime.sharding import shard_count
from torchprime.text.terminal import print_lines
from torchprime.torch_xla_models.compile.apart import run_apart
from torchprime.torch_xla_models.compile.fitting import find_nearest, weights_per_chip
from torchprime.torch_xla_models.compile.hlo.program import Program
from torchprime.torch_xla_models.compile.library import Library, check_chip, find_library
from torchprime.torch_xla_models.compile.other_compiler import (
    OtherCompiler,
    compile_with,
    find_other,
    known_flags,
)
from torchprime.torch_xla_models.compile.report import describe, judge, read_shortage
from torchprime.torch_xla_models.compile.theory import Sizes, Weight
from torchprime.torch_xla_models.runtime import (
    TORCH_XLA_FLAGS,
    TORCH_XLA_V5_FLAGS,
    tpu_flags,
    with_flags,
)
from torchprime.training.optim.groups import freeze_groups
from torchprime.training.setup.adapter import build_model
from torchprime.training.setup.model_files import find_architecture
from torchprime.training.setup.plan import loss_chunk, stored_parameters
from torchprime.training.setup.recipe import adapter_of, checked_table, groups_of, vocabulary_of

REPORT = "compile_report.json"
# Autograd counts an XLA client's devices in a signed byte, and fails from 128 on.
MOST_DEVICES = 64
Say = Callable[[str], None]


def compile_only(config: TrainConfig, say: Say | None = None) -> int:
    """Compile the config's step for the slice it names, and print the result.

    Returns:
        The exit code: 0 if it compiles and fits, else 1.

    Raises:
        ConfigError: the compiler does not know the slice's chip.
        CheckpointError: the folder of `adapter.pretrained` holds no adapter of this model.
    """
    say = say or (lambda line: print_lines([line]))
    assert config.compile_only is not None
    check_chip(topology(config.compile_only))
    library = find_library()
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
        return compile_report(candidate, hf_config, architecture, library, folder, module)

    with tempfile.TemporaryDirectory(prefix="torchprime-module-") as scratch:
        module = None if other is None else Path(scratch) / "module.vhlo"
        report = compile_one(config, module)
        if other is not None and module is not None:
            write_json(folder / REPORT, report)
            say(f"compiling the same module with libtpu {other.libtpu}, jax {other.jax}")
            sizes = step_sizes(config, architecture)
            report["other"] = other_report(config, sizes, other, module, folder)
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
    library: Library,
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
        **_step_request(config, hf_config),
        "compile": True,
        "portable": None if module is None else str(module),
    }
    result = _run_worker(config, request, library, folder)
    trained, frozen = sizes.counts()
    report = {
        "topology": slice_.name,
        "chips": slice_.chips * request["slices"],
        "mesh": config.mesh_shape(),
        "settings": settings(config),
        "parameters": trained + frozen,
        "trained_parameters": trained,
        "weights_per_chip": weights_per_chip(config, sizes),
        "slot_tokens_per_chip": sizes.tokens // sizes.tensor,
        **{key: result[key] for key in ("versions", "compiler", "flags", "seconds")},
        "host_memory_bytes": result["host_memory_bytes"],
    }
    report["versions"]["libtpu"] = library.version
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


def save_module(
    config: TrainConfig,
    hf_config: Mapping[str, Any],
    library: Library,
    folder: Path,
    module: Path,
) -> None:
    """Trace and lower the step without compiling it, and write it in jax's portable format."""
    request = {**_step_request(config, hf_config), "compile": False, "portable": str(module)}
    _run_worker(config, request, library, folder)


def _step_request(config: TrainConfig, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    assert config.compile_only is not None
    return {
        "config": config.to_dict(),
        "architecture": dict(hf_config),
        "topology": topology(config.compile_only).name,
        "slices": _slices(config),
    }


def _slices(config: TrainConfig) -> int:
    return math.prod(getattr(config.dcn_mesh, axis) for axis in AXES)


def _run_worker(
    config: TrainConfig, request: Mapping[str, Any], library: Library, folder: Path
) -> dict[str, Any]:
    command = [sys.executable, "-m", "torchprime.torch_xla_models.compile.worker"]
    env = environment(config, library, os.environ)
    return run_apart(command, request, env, folder, config.compile_time_limit * 60)


def other_report(
    config: TrainConfig, sizes: Sizes, other: OtherCompiler, module: Path, folder: Path
) -> dict[str, Any]:
    """Compile the module by another version and return the same figures of its program. That is
    written to a folder of its own, named by the version."""
    assert config.compile_only is not None
    chip = topology(config.compile_only).chip
    own = folder / f"libtpu-{other.libtpu}"
    env = other_environment(config, os.environ)
    request = other_request(config, module)
    result = compile_with(other, request, env, own, config.compile_time_limit * 60)
    found = {key: result[key] for key in ("versions", "compiler", "flags", "seconds")}
    if "error" in result:
        return {**found, "fits": False, "error": result["error"]}
    judged = judge(Program((own / "program.txt").read_text()), result["memory"], sizes, chip)
    return {**found, "fits": judged["memory"]["fits"], **judged}


def other_request(config: TrainConfig, module: Path) -> dict[str, Any]:
    """Return the request for another version's process, as executables.py reads it."""
    assert config.compile_only is not None
    slice_ = topology(config.compile_only)
    return {
        "module": str(module),
        "libtpu_name": slice_.libtpu_name,
        "host_shape": slice_.host_shape,
        "slices": _slices(config),
    }


def settings(config: TrainConfig) -> dict[str, Any]:
    """Return the config values that affect the step's memory and time."""
    c = config
    return {
        "torch_dtype": c.torch_dtype,
        "block_size": c.dataset.block_size,
        "global_batch_size": c.task.global_batch_size,
        "gradient_accumulation_steps": c.task.gradient_accumulation_steps,
        "optimizer": c.task.optimizer.name,
        "master_weights": c.task.optimizer.master_weights and c.torch_dtype != "float32",
        "loss_chunks": c.task.loss_chunks,
        "scan_layers": c.remat.scan_layers,
        "remat": c.remat.policy,
        "attention_kernel": c.model.attention_kernel,
        "adapter": _adapter_settings(c),
    }


def _adapter_settings(config: TrainConfig) -> dict[str, Any] | None:
    adapter = adapter_of(config)  # with `adapter.pretrained` its folder describes it
    if adapter is None:
        return None
    spec = adapter.spec
    return {
        "rank": spec.rank,
        "base_dtype": spec.base_type,
        "dora": spec.dora,
        "dropout": spec.dropout,
        "targets": list(spec.targets),
        "layers": None if spec.layers is None else list(spec.layers),
        "modules_to_train": list(spec.modules_to_train),
    }


def step_sizes(config: TrainConfig, a: Architecture) -> Sizes:
    """Return the sizes that the report's arithmetic needs, checked against the sharding table.

    Raises:
        ConfigError: a run of the config would be refused.
    """
    mesh, dtype = config.mesh_shape(), getattr(torch, config.torch_dtype)
    adapter = adapter_of(config)
    model = build_model(a, adapter, dtype)
    freeze_groups(model, groups_of(config))
    stored = stored_parameters(model)
    plain = stored if adapter is None else stored_parameters(build_model(a, None, dtype))
    _, specs = checked_table(config, model)
    along = {axis: size if axis == "fsdp" else 1 for axis, size in mesh.items()}
    rows = config.task.micro_batch_size // (mesh["data"] * mesh["fsdp"])
    return Sizes(
        shapes={name: p.shape for name, p in plain.items()},
        weights={
            name: Weight(
                shape=p.shape,
                itemsize=p.dtype.itemsize,
                trained=p.trained,
                pieces=shard_count(specs[name], along),
                shards=shard_count(specs[name], mesh),
            )
            for name, p in stored.items()
        },
        fsdp=mesh["fsdp"],
        tensor=mesh["tensor"],
        data=mesh["data"],
        weight_bytes=dtype.itemsize,
        layers=a.num_hidden_layers,
        hidden=a.hidden_size,
        ffn=a.intermediate_size,
        vocab=a.vocab_size,
        heads=a.num_attention_heads,
        kv_heads=a.num_key_value_heads,
        head_size=a.head_dim,
        tied=a.tie_word_embeddings,
        block_size=config.dataset.block_size,
        rows=rows,
        accumulation=config.task.gradient_accumulation_steps,
        loss_chunk=loss_chunk(config, a, rows),
        recomputed=config.remat.recomputed,
        dora=adapter is not None and adapter.spec.dora,
        dropout=adapter is not None and adapter.spec.dropout > 0,
    )


# -- the other process -----------------------------------------------------------------------------


def environment(config: TrainConfig, library: Library, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the compiling process: virtual devices for tracing, libtpu for
    compiling, and training's flags."""
    path = [*library.python_path, str(Path(__file__).resolve().parents[3])]
    return {
        **_common_environment(config, given),
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [given.get("PYTHONPATH")])]),
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(min(config.device_count, MOST_DEVICES)),
        "USE_TORCH_XLA": "0",
        "TPU_LIBRARY_PATH": str(library.path),
    }


def other_environment(config: TrainConfig, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of another version's process, without flags that it does not know."""
    found = _common_environment(config, given)
    return {**found, "LIBTPU_INIT_ARGS": known_flags(found["LIBTPU_INIT_ARGS"])}


def _common_environment(config: TrainConfig, given: Mapping[str, str]) -> dict[str, str]:
    assert config.compile_only is not None
    chip = topology(config.compile_only).chip
    flags = tpu_flags(config.async_collectives) | TORCH_XLA_FLAGS
    flags |= TORCH_XLA_V5_FLAGS if chip.name.startswith("v5") else {}
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
        "LIBTPU_INIT_ARGS": with_flags(given.get("LIBTPU_INIT_ARGS", ""), flags),
    }
