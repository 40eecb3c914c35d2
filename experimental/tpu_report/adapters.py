"""The cases with adapters: LoRA and QLoRA of rank 16, 8 x 1024 or 1 x 8192 tokens on each chip, and
their table."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any, NamedTuple

from torchprime.compiling.fitting import weights_per_chip
from torchprime.compiling.sizes import settings, step_sizes
from torchprime.config.compose import compose_config
from torchprime.config.topologies import topology
from torchprime.models.architecture import architecture_from_hf
from torchprime.training.setup.model_files import find_architecture

GIB = 2**30
# Hydra composes one config at a time in a process, and several cases run at once.
COMPOSING = Lock()
MODELS = {
    "8b": ("Llama 3 8B", "llama-3-8b-lora-w-gsm8k"),
    "14b": ("Qwen3 14B", "qwen3-14b-qlora-w-pirate"),
}
KINDS = {"lora": "LoRA", "qlora": "QLoRA"}
SLICES = {"v6e-1": 1, "v5e-1": 1, "v6e-4": 4, "v5e-4": 4}
# Where layer inputs have no room on the chip: 2.0 GiB of the 8B model, 3.1 of the 14B one.
OFFLOADED = {("14b", "lora", "v6e-1"), ("14b", "qlora", "v5e-1"), ("8b", "lora", "v5e-1")}
HEADS = (
    "Step", "Slice", "Micro-batches x blocks x tokens on a chip", "Remat", "GiB per chip",
    "frozen + trained + optimizer state", "temporaries", "gathered GiB (theory)",
    "reduced GiB (theory)", "products / formula", "compile s",
)  # fmt: skip


class Case(NamedTuple):
    """One compile."""

    name: str
    slice_: str
    what: str
    argv: list[str]


def cases() -> Iterator[Case]:
    """Yield the cases in the order of the table."""
    for model, (title, run) in MODELS.items():
        named = ["--config-name", run]
        yield Case(f"{model}-named-v6e-1", "v6e-1", f"{title}, the named run", named)
        for kind, method in KINDS.items():
            for slice_, chips in SLICES.items():
                for block, rows in ((1024, 8), (8192, 1)):
                    offload = (model, kind, slice_) in OFFLOADED
                    argv = [
                        *named, f"adapter={kind}", f"ici_mesh.fsdp={chips}",
                        f"remat=scan_{'offload' if offload else 'full'}",
                        f"dataset.block_size={block}", f"task.global_batch_size={rows * chips}",
                        "task.gradient_accumulation_steps=1",
                    ]  # fmt: skip
                    name = f"{model}-{kind}-{slice_}-{block}"
                    yield Case(name, slice_, f"{title}, {method}", argv)


def too_large(case: Case) -> dict[str, Any] | None:
    """Return a case's entry for results.json if the chip can't hold its weights and optimizer state
    alone; None if it has to be compiled."""
    with COMPOSING:
        config = compose_config([*case.argv, f"compile_only={case.slice_}"])
    found, where = find_architecture(
        pretrained_model=config.model.pretrained_model, architecture=None, cache_dir=None
    )
    kept = weights_per_chip(config, step_sizes(config, architecture_from_hf(found, where=where)))
    slice_ = topology(case.slice_)
    if sum(kept.values()) <= slice_.chip.hbm_bytes:
        return None
    return {
        "fits": False,
        "chips": slice_.chips,
        "settings": settings(config),
        "weights_per_chip": kept,
        "shortage": {"used": sum(kept.values()), "limit": slice_.chip.hbm_bytes},
        "seconds": {"compile": 0},
    }


def row(case: Any, r: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = [case.what, case.slice_]
    if "settings" not in r:
        return _line([*cells, "", "", "does not compile"])
    s, kept = r["settings"], r["weights_per_chip"]
    batches = s["gradient_accumulation_steps"]
    rows = s["global_batch_size"] // (batches * r["chips"])
    cells += [f"{batches} x {rows} x {s['block_size']}", s["remat"]]
    found = r.get("memory") or r.get("shortage") or {"used": 0, "limit": 0}
    total, limit = (found.get("total") or found["used"]) / GIB, found["limit"] / GIB
    alone = "" if r["seconds"]["compile"] else "over "
    cells.append(f"{'' if r['fits'] else '**no**: '}{alone}{total:.2f} of {limit:.2f}")
    cells.append(" + ".join(f"{kept[k] / GIB:.2f}" for k in ("frozen", "trained", "optimizer")))
    if "memory" not in r:
        return _line([*cells, *[""] * 4, "not compiled" if alone else _seconds(r)])
    moved, theory = r["collectives"], r["collectives_in_theory"]
    reduced = sum(
        moved.get(kind, {"bytes": 0})["bytes"] for kind in ("reduce-scatter", "all-reduce")
    )
    wanted = theory["reduce-scatter"] + theory["all-reduce"]
    gather = moved.get("all-gather", {"bytes": 0})
    codes = gather.get("types", {}).get("u8", 0)
    in_codes = f", {codes / GIB:.1f} as codes and scales" if codes else ""
    cells += [
        f"{r['memory']['temp'] / GIB:.2f}",
        f"{gather['bytes'] / GIB:.1f} ({theory['all-gather'] / GIB:.1f}){in_codes}",
        f"{reduced / GIB:.2f} ({wanted / GIB:.2f})",
        f"{r['flops']['ratio']:.3f}",
        _seconds(r),
    ]
    return _line(cells)


def _seconds(r: dict[str, Any]) -> str:
    return f"{r['seconds']['compile']:.0f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join([*cells, *[""] * (len(HEADS) - len(cells))]) + " |"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table, in the order of the cases."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    lines += [row(case, results[case.name]) for case in cases() if case.name in results]
    return "\n".join(lines)
