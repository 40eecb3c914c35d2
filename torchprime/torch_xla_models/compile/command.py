"""`compile_only=v6e-8`: compiles the run's training step for a TPU, without a TPU or weights.

The config defines the step; the architecture comes from the model's config.json only. Tracing
and compiling happen in a separate process (worker.py), since a compiler that fails can end
its process and the number of devices is fixed in one. Its result is judged here
(torch_xla_models/compile/report.py), printed, and written to compile_report.json.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchprime.config.schema import AXES, TrainConfig
from torchprime.config.topologies import Topology, topology
from torchprime.errors import RuntimeSetupError, UserError
from torchprime.files.atomic import make_folder, open_new, write_json, write_text
from torchprime.files.private_folders import require_private
from torchprime.models.architecture import Architecture, architecture_from_hf
from torchprime.sharding import shard_count
from torchprime.text.terminal import print_lines
from torchprime.torch_xla_models.compile.fitting import find_nearest, weights_per_chip
from torchprime.torch_xla_models.compile.hlo.program import Program
from torchprime.torch_xla_models.compile.library import Library, check_chip, find_library
from torchprime.torch_xla_models.compile.report import describe, judge, read_shortage
from torchprime.torch_xla_models.compile.theory import Sizes, Weight
from torchprime.torch_xla_models.runtime import (
    TORCH_XLA_FLAGS,
    TORCH_XLA_V5_FLAGS,
    TPU_FLAGS,
    with_flags,
)
from torchprime.training.optim.groups import freeze_groups
from torchprime.training.setup.adapter import build_model
from torchprime.training.setup.model_files import find_architecture
from torchprime.training.setup.plan import stored_parameters
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

    def compile_one(candidate: TrainConfig) -> dict[str, Any]:
        return compile_report(candidate, hf_config, architecture, library, folder, say)

    report = compile_one(config)
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
    say: Say,
) -> dict[str, Any]:
    """Compile once and return the content of compile_report.json. The program is written to
    program.txt."""
    assert config.compile_only is not None
    slice_ = topology(config.compile_only)
    slices = math.prod(getattr(config.dcn_mesh, axis) for axis in AXES)
    sizes = step_sizes(config, architecture)
    request = {
        "config": config.to_dict(),
        "architecture": dict(hf_config),
        "topology": slice_.name,
        "slices": slices,
    }
    result = compile_apart(
        request,
        environment(slice_, config.device_count, library, os.environ),
        folder,
        config.compile_time_limit * 60,
        say,
    )
    trained, frozen = sizes.counts()
    report = {
        "topology": slice_.name,
        "chips": slice_.chips * slices,
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
        rows=config.task.micro_batch_size // (mesh["data"] * mesh["fsdp"]),
        accumulation=config.task.gradient_accumulation_steps,
        loss_chunks=config.task.loss_chunks,
        recomputed=config.remat.recomputed,
        dora=adapter is not None and adapter.spec.dora,
        dropout=adapter is not None and adapter.spec.dropout > 0,
    )


# -- the other process -----------------------------------------------------------------------------


def environment(
    slice_: Topology, devices: int, library: Library, given: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of the compiling process: virtual devices for tracing, libtpu for
    compiling, and training's flags."""
    flags = TORCH_XLA_FLAGS | (TORCH_XLA_V5_FLAGS if slice_.chip.name.startswith("v5") else {})
    path = [*library.python_path, str(Path(__file__).resolve().parents[3])]
    # Descriptions of a TPU host (TPU_ACCELERATOR_TYPE and the like) would be believed.
    kept = {name: value for name, value in given.items() if not name.startswith("TPU_")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [given.get("PYTHONPATH")])]),
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(min(devices, MOST_DEVICES)),
        "JAX_PLATFORMS": "cpu",
        "USE_TORCH_XLA": "0",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TPU_LIBRARY_PATH": str(library.path),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": with_flags(given.get("LIBTPU_INIT_ARGS", ""), TPU_FLAGS | flags),
    }


def compile_apart(
    request: Mapping[str, Any],
    env: Mapping[str, str],
    folder: Path,
    limit_s: float,
    say: Say,
) -> dict[str, Any]:
    """Run worker.py in a separate process and return its result.

    Raises:
        RuntimeSetupError: over the time limit, or the process ended without a result.
        UserError: what the config's step itself objects to.
    """
    with tempfile.TemporaryDirectory(prefix="torchprime-compile-") as scratch:
        asked, log = Path(scratch) / "request.json", Path(scratch) / "log.txt"
        write_text(asked, json.dumps(request))
        command = [sys.executable, "-m", "torchprime.torch_xla_models.compile.worker"]
        with open_new(log) as out:
            process = subprocess.Popen(
                [*command, str(asked), str(folder.absolute()), str(os.getpid())],
                env=dict(env),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                raise RuntimeSetupError(
                    f"compile_time_limit: the compiler took longer than {limit_s / 60:g} minutes. "
                    "Allow it more (compile_time_limit=60), or give it less: with "
                    "remat.scan_layers=true it compiles one layer instead of all."
                ) from None
            finally:
                _end(process)
        path = folder / "result.json"
        if code != 0 or not path.is_file():
            raise RuntimeSetupError(_died(code, log.read_text(errors="replace")))
        result = json.loads(path.read_text())
        path.unlink()
    if "user_error" in result:
        raise UserError(result["user_error"])
    return result


def _end(process: subprocess.Popen[Any]) -> None:
    """End the process and all its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _died(code: int, log: str) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    tail = "\n  ".join(log.strip().splitlines()[-12:])
    hint = " The host ran out of memory?" if code == -signal.SIGKILL else ""
    return f"The compiler's process ended with {how} and no result.{hint} It said last:\n  {tail}"
