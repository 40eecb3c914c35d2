"""Compile MaxText's training steps and ours with the same TPU compiler, and write the table of
docs/maxtext.md.

    python experimental/tpu_report/maxtext.py                 steps that are missing or failed
    python experimental/tpu_report/maxtext.py 8b-8192-recipe  these steps again
    python experimental/tpu_report/maxtext.py --page          only write the page

MaxText gets an environment of its own (Python 3.12, `maxtext[tpu]` from PyPI). Its newer libtpu
compiles our step too, from the module in jax's portable format. Both programs are counted by
torchprime's own counter. A compile takes minutes and up to 10 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from torchprime.compiling.command import other_report, save_module
from torchprime.compiling.hlo.program import Program
from torchprime.compiling.other_compiler import find_other
from torchprime.compiling.report import judge
from torchprime.compiling.sizes import step_sizes
from torchprime.compiling.theory import Sizes
from torchprime.config.compose import compose_config
from torchprime.config.schema import TrainConfig
from torchprime.config.topologies import topology
from torchprime.errors import RuntimeSetupError
from torchprime.models.architecture import architecture_from_hf
from torchprime.torch_xla_models.compile.command import compiler_of, other_environment
from torchprime.torch_xla_models.compile.library import find_library
from torchprime.torch_xla_models.runtime import TPU_FLAGS
from torchprime.training.setup.model_files import find_architecture

REPO = Path(__file__).resolve().parents[2]
STEP = Path(__file__).with_name("maxtext_step.py")
RESULTS = Path(__file__).with_name("maxtext.json")
PAGE = REPO / "docs" / "maxtext.md"
BEGIN, END = "<!-- table: experimental/tpu_report/maxtext.py -->", "<!-- end of table -->"
GIB = 2**30
MAXTEXT = "maxtext[tpu]==0.2.5"
PYTHON = "python3.12"

NAMED = ["--config-name", "llama-3-8b-sft-w-gsm8k"]
PIRATE = ["--config-name", "qwen3-14b-sft-w-pirate", "task.optimizer.name=adamw"]
# The flags and the tensor policy of MaxText's published 8B recipe for v6e. Of its attention blocks
# of 2048 this libtpu says that they do not fit the vector memory, so they are 1024 here.
RECIPE = [
    "remat_policy=custom", "decoder_layer_input=offload", "out_proj=offload",
    "query_proj=offload", "key_proj=offload", "value_proj=offload", "use_iota_embed=true",
    *(f"sa_block_{name}=1024" for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")),
    "sa_block_kv_compute=512", "sa_block_kv_dkv_compute=512", "sa_use_fused_bwd_kernel=true",
]  # fmt: skip
HEADS = (
    "Step", "Program", "HBM at the peak, GiB", "GiB on the host", "operations in products, 1e14",
    "in kernels, 1e14", "HBM traffic, GB", "operations one by one, s", "estimate, s",
    "compiler's own cycles, s", "gathered GiB", "reduced GiB",
)  # fmt: skip


class Step(NamedTuple):
    """One training step, for both."""

    what: str
    slice_: str
    argv: list[str]  # ours
    model: str  # MaxText's name
    options: list[str]  # MaxText's


STEPS = {
    "8b-8192": Step(
        "Llama 3.1 8B, 8 x 8192", "v6e-8",
        [*NAMED, "dataset.block_size=8192", "task.global_batch_size=8"],
        "llama3.1-8b", ["max_target_length=8192", "per_device_batch_size=1"],
    ),
    "8b-1024": Step(
        "Llama 3 8B, 64 x 1024", "v6e-8", NAMED,
        "llama3-8b", ["max_target_length=1024", "per_device_batch_size=8"],
    ),
    "14b-8192": Step(
        "Qwen3 14B, 16 x 8192", "v6e-16",
        [*PIRATE, "ici_mesh.fsdp=16", "dataset.block_size=8192", "task.global_batch_size=16"],
        "qwen3-14b", ["max_target_length=8192", "per_device_batch_size=1"],
    ),
}  # fmt: skip
# The programs of each step: ours by our overrides, MaxText's by its options.
OURS: dict[str, list[str]] = {
    "ours": [],
    "ours-offload": ["remat=scan_offload", "remat.offload=[core_out]"],
    "ours-as-recipe": ["remat=scan_offload", "remat.offload=[core_out,q,k,v,attn_out]"],
}
THEIRS: dict[str, list[str]] = {
    "defaults": [],
    "recipe": RECIPE,
    "int8": [*RECIPE, "quantization=int8"],
}
WORDS = {
    "ours": "torchprime, the named run's remat",
    "ours-offload": "torchprime, layer inputs and attention's results on the host",
    "ours-as-recipe": "torchprime, also queries, keys, values and the output projection there",
    "defaults": "MaxText, its defaults",
    "recipe": "MaxText, its 8B recipe",
    "int8": "MaxText, its 8B recipe, int8 products",
}


def make_environment(folder: Path) -> Path:
    """Return the Python of MaxText's environment, which is made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([PYTHON, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, MAXTEXT], check=True)
    return python


def sizes_of(config: TrainConfig) -> tuple[dict[str, Any], Sizes]:
    """Return the architecture as Hugging Face writes it, and the sizes of the step."""
    hf_config, where = find_architecture(
        pretrained_model=config.model.pretrained_model,
        architecture=config.model.architecture,
        cache_dir=config.dataset.cache_dir,
    )
    return dict(hf_config), step_sizes(config, architecture_from_hf(hf_config, where=where))


def compile_ours(step: Step, more: list[str], env: Path, folder: Path) -> dict[str, Any]:
    """Return the figures of our step."""
    config = compose_config([*step.argv, *more, f"compile_only={step.slice_}"])
    hf_config, sizes = sizes_of(config)
    module = folder / "module.vhlo"
    compiler = compiler_of(find_library())
    save_module(config, hf_config, compiler, folder, module)
    return other_report(config, compiler, sizes, find_other(str(env)), module, folder)


def compile_theirs(
    step: Step, more: list[str], python: Path, folder: Path, *, flags: bool
) -> dict[str, Any]:
    """Return the figures of MaxText's step.

    Args:
        flags: with the flags that its recipe gives to libtpu. They are the same as ours.
    """
    config = compose_config([*step.argv, f"compile_only={step.slice_}"])
    _, sizes = sizes_of(config)
    chip = topology(step.slice_).chip
    given = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LIBTPU_INIT_ARGS")}
    env = other_environment(config, given)
    env |= {"HF_HUB_OFFLINE": "1", "DECOUPLE_GCLOUD": "TRUE"}
    env["LIBTPU_INIT_ARGS"] = " ".join(f"--{k}={v}" for k, v in TPU_FLAGS.items() if flags)
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    base = Path(found.stdout.strip()) / "maxtext" / "configs" / "base.yml"
    options = [
        f"compile_topology={step.slice_}", "compile_topology_num_slices=1", "run_name=step",
        f"model_name={step.model}", f"ici_fsdp_parallelism={topology(step.slice_).chips}",
        "attention=flash", "dataset_type=synthetic", "enable_checkpointing=false",
        f"base_output_directory={folder}", *step.options, *more,
    ]  # fmt: skip
    subprocess.run([python, "-I", STEP, folder, base, *options], env=env, check=True)
    result = json.loads((folder / "result.json").read_text())
    return figures(result, folder / "program.txt", sizes, chip)


def figures(result: dict[str, Any], program: Path, sizes: Sizes, chip: Any) -> dict[str, Any]:
    """Return the figures of a program of MaxText, counted as ours are."""
    if "error" in result:
        return {**result, "fits": False}
    judged = judge(Program(program.read_text()), result["memory"], sizes, chip)
    return {**result, "fits": judged["memory"]["fits"], **judged}


def compile_one(key: str, env: Path, keep: Path | None) -> dict[str, Any]:
    """Return the entry of a step's program for the results."""
    name, program = key.split("/")
    step, python = STEPS[name], make_environment(env)
    with tempfile.TemporaryDirectory(prefix="maxtext-") as scratch:
        folder = Path(scratch) if keep is None else keep / f"{name}-{program}"
        folder.mkdir(parents=True, exist_ok=True)
        if program in OURS:
            found = compile_ours(step, OURS[program], env, folder)
        else:
            found = compile_theirs(
                step, THEIRS[program], python, folder, flags=program != "defaults"
            )
    return found


def row(key: str, r: dict[str, Any]) -> str:
    """Return a line of the table."""
    name, program = key.split("/")
    cells = [f"{STEPS[name].what}, {STEPS[name].slice_}", WORDS[program]]
    if "memory" not in r:
        return "| " + " | ".join([*cells, "does not fit", *[""] * (len(HEADS) - 3)]) + " |"
    m, f, e, moved = r["memory"], r["flops"], r["estimate"], r["collectives"]
    reduced = sum(moved.get(k, {"bytes": 0})["bytes"] for k in ("reduce-scatter", "all-reduce"))
    cells += [
        f"{'' if r['fits'] else '**no**: '}{m['total'] / GIB:.2f}",
        f"{m['host'] / GIB:.1f}",
        f"{f['products'] / 1e14:.3f}",
        f"{f['kernels_estimate'] / 1e14:.3f}",
        f"{e['hbm_bytes'] / 1e9:,.0f}",
        f"{e['operations_s']:.3f}",
        f"{e['step_s']:.3f}",
        f"{e['compiler']['seconds']:.3f}",
        f"{moved.get('all-gather', {'bytes': 0})['bytes'] / GIB:.1f}",
        f"{reduced / GIB:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    lines += [row(key, results[key]) for key in keys() if key in results]
    return "\n".join(lines)


def keys() -> list[str]:
    """Return the keys of the results, in the order of the table."""
    return [f"{name}/{program}" for name in STEPS for program in (*OURS, *THEIRS)]


def write_page(results: dict[str, dict[str, Any]]) -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    text = f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> int:
    """Compile the chosen programs, and write results and page after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="*", help="STEP/PROGRAM; none: missing or failed")
    parser.add_argument("--env", type=Path, default=Path(sys.prefix) / "maxtext")
    parser.add_argument("--keep", type=Path, help="a folder for the compiled programs")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    unknown = [each for each in given.programs if each not in keys()]
    if unknown:
        parser.error(f"no program {', '.join(unknown)}; there are {', '.join(keys())}")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    missing = [key for key in keys() if key not in results]
    for key in [] if given.page else given.programs or missing:
        try:
            found = compile_one(key, given.env.absolute(), given.keep)
        except (RuntimeSetupError, subprocess.CalledProcessError) as error:
            print(f"{key}: {error}", file=sys.stderr)
            continue
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        results[key] = found
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_page(results)
    write_page(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
