"""Compile the named runs and their variants for TPU slices, and write the tables of docs/tpu.md.

    python experimental/tpu_report/run.py            cases that are missing or failed
    python experimental/tpu_report/run.py --fresh    all cases again
    python experimental/tpu_report/run.py 8b-v6e-8   these cases again
    python experimental/tpu_report/run.py --keep outputs/tpu 8b-v6e-8    and keep what they write

Each case is the training command with `compile_only`. It runs in its own processes and needs
minutes and up to 10 GB of memory. Its report goes into results.json, from which the tables are
made. The cases with adapters are in adapters.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import adapters  # beside this script
from adapters import Case

REPO = Path(__file__).resolve().parents[2]
TRAIN = REPO / "torchprime" / "torch_xla_models" / "train.py"
RESULTS = Path(__file__).with_name("results.json")
PAGE = REPO / "docs" / "tpu.md"
END = "<!-- end of table -->"
GIB = 2**30
# Parts of an entry that a version wrote whose estimate was too high.
OUTDATED = ("hbm_bytes_estimate", "roofline_estimate_s", "slot_tokens_per_s_per_chip_estimate")

NAMED = ["--config-name", "llama-3-8b-sft-w-gsm8k"]
ADAFACTOR = ["task.optimizer.name=adafactor"]
NO_MASTERS = ["task.optimizer.master_weights=false"]


def accumulate(count: int) -> list[str]:
    return [f"task.gradient_accumulation_steps={count}"]


def long_blocks(rows: int) -> list[str]:
    return ["dataset.block_size=8192", f"task.global_batch_size={rows}"]


OFFLOAD = ["remat=scan_offload"]
MATH = ["--config-name", "qwen2.5-math-1.5b-sft-w-gsm8k"]
PIRATE = ["--config-name", "qwen3-14b-sft-w-pirate"]
BIG = [
    *NAMED, "model.pretrained_model=meta-llama/Llama-3.1-70B", "ici_mesh.fsdp=64",
    "ici_mesh.tensor=4", *long_blocks(64),
]  # fmt: skip

CASES = [
    Case("8b-v6e-8", "v6e-8", "Llama 3 8B, the named run", NAMED),
    Case("8b-v6e-8-accumulate", "v6e-8", "Llama 3 8B, accumulation 4", [*NAMED, *accumulate(4)]),
    Case("8b-v6e-8-adafactor", "v6e-8", "Llama 3 8B, Adafactor", [*NAMED, *ADAFACTOR]),
    Case("8b-v6e-4", "v6e-4", "Llama 3 8B, Adafactor, accumulation 4",
         [*NAMED, "mesh=fsdp4", *ADAFACTOR, *accumulate(4)]),
    Case("8b-v6e-4-offload", "v6e-4", "Llama 3 8B, Adafactor, accumulation 4, offload",
         [*NAMED, "mesh=fsdp4", *ADAFACTOR, *accumulate(4), *OFFLOAD]),
    Case("8b-v5e-16", "v5e-16", "Llama 3 8B, the named run", [*NAMED, "ici_mesh.fsdp=16"]),
    Case("8b-v5p-8", "v5p-8", "Llama 3 8B, the named run", [*NAMED, "mesh=fsdp4"]),
    Case("8b-2-v6e-8", "v6e-8", "Llama 3 8B, the named run on two slices",
         [*NAMED, "mesh=two_slices_fsdp8"]),
    Case("8b-v6e-8-8192", "v6e-8", "Llama 3 8B, blocks of 8192", [*NAMED, *long_blocks(8)]),
    Case("8b-v6e-8-8192-attention", "v6e-8", "Llama 3 8B, blocks of 8192, attention kept",
         [*NAMED, *long_blocks(8), "remat=scan_attention"]),
    Case("8b-v6e-8-8192-core", "v6e-8", "Llama 3 8B, blocks of 8192, attention's result kept",
         [*NAMED, *long_blocks(8), "remat.save=[core_out]"]),
    Case("8b-v6e-8-8192-bf16", "v6e-8", "Llama 3 8B, blocks of 8192, no master weights",
         [*NAMED, *long_blocks(8), *NO_MASTERS]),
    Case("8b-v6e-8-8192-bf16-offload", "v6e-8",
         "Llama 3 8B, blocks of 8192, no master weights, offload",
         [*NAMED, *long_blocks(8), *NO_MASTERS, *OFFLOAD]),
    Case("8b-v5e-8-8192-bf16-offload", "v5e-8",
         "Llama 3 8B, blocks of 8192, no master weights, offload",
         [*NAMED, *long_blocks(8), *NO_MASTERS, *OFFLOAD]),
    Case("70b-v6e-256", "v6e-256", "Llama 3.1 70B, fsdp 64 x tensor 4, blocks of 8192", BIG),
    Case("14b-v6e-8", "v6e-8", "Qwen3 14B, the named run (Adafactor)", PIRATE),
    Case("14b-v6e-16", "v6e-16", "Qwen3 14B, AdamW, accumulation 4, 64 blocks",
         [*PIRATE, "ici_mesh.fsdp=16", "task.optimizer.name=adamw", "task.global_batch_size=64",
          *accumulate(4)]),
    Case("math-1.5b-v6e-4", "v6e-4", "Qwen2.5 Math 1.5B, the named run", MATH),
    Case("math-1.5b-v6e-1", "v6e-1", "Qwen2.5 Math 1.5B, Adafactor, accumulation 4",
         [*MATH, "mesh=single", *ADAFACTOR, *accumulate(4)]),
]  # fmt: skip


ADAPTED = list(adapters.cases())
ALL = [*CASES, *ADAPTED]


def compile_case(case: Case, keep: Path | None = None) -> dict[str, Any]:
    """Run one case and return its entry for results.json.

    Args:
        keep: the folder to leave its program in.
    """
    hopeless = adapters.too_large(case) if case in ADAPTED else None
    if hopeless is not None:
        return {"what": case.what, "argv": case.argv, "wall_s": 0, **hopeless}
    with tempfile.TemporaryDirectory(prefix="tpu-report-") as folder:
        argv = [*case.argv, f"compile_only={case.slice_}", "compile_search=false"]
        argv += [f"output_dir={folder}", "run_name=case"]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(TRAIN), *argv], capture_output=True, text=True, check=False
        )
        print(done.stdout, done.stderr, sep="\n", flush=True)
        path = Path(folder) / f"case-{case.slice_}" / "compile_report.json"
        if not path.is_file():
            return {"what": case.what, "failed": done.stderr.strip().splitlines()[-1:]}
        report = json.loads(path.read_text())
        if keep is not None:
            shutil.copytree(path.parent, keep / case.name, dirs_exist_ok=True)
    report.pop("error", None)
    return {
        "what": case.what,
        "argv": case.argv,
        "wall_s": round(time.perf_counter() - began),
        **report,
    }


def row(case: Case, r: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = [case.what, case.slice_]
    if "settings" not in r:
        return "| " + " | ".join([*cells, "does not compile", *[""] * 8]) + " |"
    s = r["settings"]
    rows = s["global_batch_size"] // s["gradient_accumulation_steps"]
    cells.append(f"{s['gradient_accumulation_steps']} x {rows} x {s['block_size']}")
    seconds = f"{r['seconds']['compile']:.0f}"
    if "memory" not in r:
        shortage = r.get("shortage") or {"used": 0, "limit": 0}
        used, limit = (shortage[key] / GIB for key in ("used", "limit"))
        return (
            "| "
            + " | ".join([*cells, f"**no**: {used:.2f} of {limit:.2f}", *[""] * 7, seconds])
            + " |"
        )
    no = "" if r["fits"] else "**no**: "
    m, moved, theory = r["memory"], r["collectives"], r["collectives_in_theory"]
    cells.append(f"{no}{m['total'] / GIB:.2f} of {m['limit'] / GIB:.2f}")
    cells.append(f"{m['argument'] / GIB:.1f} + {m['temp'] / GIB:.1f}")
    for kind in ("all-gather", "reduce-scatter"):
        found = moved.get(kind, {"bytes": 0})["bytes"]
        cells.append(f"{found / GIB:.1f} ({theory[kind] / GIB:.1f})")
    cells.append(f"{r['flops']['ratio']:.3f}")
    cells += estimate_cells(r.get("estimate"))
    cells.append(seconds)
    return "| " + " | ".join(cells) + " |"


def estimate_cells(e: dict[str, Any] | None) -> list[str]:
    """Return the cells of the estimate; empty for a report that was made before it."""
    if e is None:
        return ["", "", ""]
    alone = [e["alone_s"][kind] for kind in ("compute", "hbm", "ici")]
    return [
        f"{e['step_s']:.3f} ({', '.join(f'{s:.3f}' for s in alone)})",
        f"{e['slot_tokens_per_s_per_chip']:,.0f}",
        f"{e['compiler']['seconds']:.3f}",
    ]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table, in the order of CASES."""
    heads = [
        "Step", "Slice", "Micro-batches x blocks x tokens", "GiB per chip",
        "arguments + temporaries", "gathered GiB (theory)", "reduce-scattered GiB (theory)",
        "products / formula", "seconds of a step, estimate (compute, memory, interconnect alone)",
        "slot tokens/s per chip, estimate", "compiler's own cycles, s", "compile s",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += [row(case, results[case.name]) for case in CASES if case.name in results]
    return "\n".join(lines)


def write_page(results: dict[str, dict[str, Any]]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, rows in (("table", table(results)), ("adapters", adapters.table(results))):
        begin = f"<!-- {name}: make tpu-report -->"
        before, rest = text.split(begin)
        after = rest.partition(END)[2]
        text = f"{before}{begin}\n\n{rows}\n\n{END}{after}"
    PAGE.write_text(text, encoding="utf-8")


def read_results() -> dict[str, dict[str, Any]]:
    """Return the results of the cases whose command is the same as when they were made."""
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return {
        case.name: {k: v for k, v in found[case.name].items() if k not in OUTDATED}
        | {"what": case.what}
        for case in ALL
        if found.get(case.name, {}).get("argv") == case.argv
    }


def main() -> int:
    """Compile the chosen cases, and write results and page after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="names of cases; none: all missing or failed")
    parser.add_argument("--fresh", action="store_true", help="all cases again")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--keep", type=Path, help="a folder for the compiled programs")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    by_name = {case.name: case for case in ALL}
    results = read_results()
    unknown = [name for name in given.cases if name not in by_name]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(by_name)}")
    wanted = given.cases or [n for n in by_name if given.fresh or n not in results]
    if given.page:
        wanted = []
    with ThreadPoolExecutor(given.jobs) as pool:
        # Each once, in the order given.
        made = {
            pool.submit(compile_case, by_name[name], given.keep): name
            for name in dict.fromkeys(wanted)
        }
        for each in as_completed(made):
            # Read again: another process may have finished a case meanwhile.
            results = {**read_results(), made[each]: each.result()}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            write_page(results)
    write_page(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
