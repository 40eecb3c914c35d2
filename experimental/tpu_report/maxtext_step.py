"""Compile MaxText's training step ahead of time and keep the program. Run by maxtext.py with the
Python of MaxText's environment.

    PYTHON maxtext_step.py FOLDER CONFIG.yml KEY=VALUE ...

MaxText's own ahead-of-time compile builds the step. Only its last stage is replaced by one that
does the same, and also writes the program and its memory figures into FOLDER.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

app: Any = importlib.import_module("absl.app")
ahead: Any = importlib.import_module("maxtext.trainers.pre_train.train_compile")
PACKAGES = ("maxtext", "jax", "libtpu")


def compile_into(folder: Path):
    """Return a stage for MaxText that lowers and compiles a step and writes to a folder."""

    def stage(function, args, kwargs, mesh, ins, outs, static, donated, config, rules):
        # The arguments are those of MaxText's `jit_and_compile`.
        around = mesh if config.enable_diloco else contextlib.nullcontext()
        with jax.set_mesh(mesh), around, rules:
            jitted = jax.jit(
                function,
                in_shardings=ins,
                out_shardings=outs,
                static_argnums=static,
                donate_argnums=donated,
            )
            lowered = jitted.lower(*args, **kwargs)
        options = ahead.max_utils.parse_libtpu_flags_to_dict(config.compile_xla_flags)
        result: dict[str, Any] = {"versions": {name: metadata.version(name) for name in PACKAGES}}
        began = time.perf_counter()
        try:
            compiled: Any = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            (folder / "result.json").write_text(json.dumps({**result, "error": str(error)}))
            sys.exit(0)
        result["seconds"] = {"compile": time.perf_counter() - began}
        (program,) = compiled.runtime_executable().hlo_modules()
        (folder / "program.txt").write_text(program.to_string())
        stats = compiled.memory_analysis()
        names = [name for name in dir(stats) if name.endswith("_size_in_bytes")]
        result["memory"] = {n.removesuffix("_size_in_bytes"): getattr(stats, n) for n in names}
        (folder / "result.json").write_text(json.dumps(result))
        return compiled

    return stage


def main() -> None:
    """Compile as the command line says."""
    folder = Path(sys.argv[1])
    ahead.jit_and_compile = compile_into(folder)
    app.run(ahead.main, argv=[sys.argv[0], *sys.argv[2:]])


if __name__ == "__main__":
    main()
