"""The report on a compiled step: memory, traffic, operations and a lower bound of its time.

The compiler's memory figures are compared with the chip, traffic between chips with what the
sharding needs in theory, operations with the analytic formula. The time is an estimate
(estimate.py). The code depends on no compiler: a `Program`, a model's sizes and the compiler's
figures go in, plain containers come out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchprime.compiling.estimate import estimate
from torchprime.compiling.hlo.collectives import COLLECTIVES
from torchprime.compiling.hlo.program import Program
from torchprime.compiling.side_by_side import describe_both
from torchprime.compiling.theory import (
    Sizes,
    kernel_flops,
    products_in_theory,
    traffic_in_theory,
)
from torchprime.config.topologies import GIB, Chip

# A warning is given above this multiple of the theoretical traffic.
TOLERATED = 1.25
MEMORY_PARTS = ("argument", "temp", "generated_code")


# -- memory ----------------------------------------------------------------------------------------


def memory_use(stats: Mapping[str, int], chip: Chip) -> dict[str, Any]:
    """Return the bytes of one chip by use, and True if the chip has them.

    Arguments are weights, optimizer state and batch; `alias` are those that the step writes its
    results over.
    Temporaries are the live arrays at the step's peak. `host` are those in the host's memory.
    """
    parts = {part: stats[part] for part in MEMORY_PARTS}
    parts["output"] = stats["output"] - stats["alias"]
    total = sum(parts.values())
    return {
        **parts,
        "alias": stats["alias"],
        "total": total,
        "limit": chip.hbm_bytes,
        "fits": total <= chip.hbm_bytes,
        "host": stats.get("host_temp", 0),
    }


_SIZE = r"([\d.]+)([KMG]?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def read_shortage(message: str, sizes: Sizes) -> dict[str, Any] | None:
    """Parse the compiler's message that a program does not fit; None for another message."""
    used = re.search(rf"Used {_SIZE} of {_SIZE} hbm", message)
    if used is None:
        return None
    largest = []
    for block in re.split(r"\n\s*\d+\. ", message)[1:]:
        size = re.match(rf"Size: {_SIZE}", block)
        shape = re.search(r"Shape: (\w+)\[([\d,]*)\]", block)
        if size is None or shape is None or "hbm" not in _memory_of(message, block):
            continue
        dims = tuple(int(n) for n in shape.group(2).split(",") if n)
        largest.append(
            {
                "bytes": _bytes(size.group(1), size.group(2)),
                "array": f"{shape.group(1)}[{','.join(map(str, dims))}]",
                "what": allocation_in_words(dims, sizes),
            }
        )
    return {
        "used": _bytes(*used.group(1, 2)),
        "limit": _bytes(*used.group(3, 4)),
        "largest": largest,
    }


def _memory_of(message: str, block: str) -> str:
    """Return the heading above the allocation in the message."""
    before = message[: message.index(block)]
    headings = re.findall(r"[Ll]argest program allocations in (\w+)", before)
    return headings[-1] if headings else "hbm"


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def allocation_in_words(dims: Sequence[int], s: Sizes) -> str:
    """Return a description of an array in a chip's memory by its dims; its own name does not help a
    user."""
    known = list(_known_arrays(s))
    # The compiler adds, drops, reorders or merges dims, those of size 1 freely.
    wanted = sorted(dim for dim in dims if dim > 1)
    for shape, words in known:
        if sorted(dim for dim in shape if dim > 1) == wanted:
            return words
    for shape, words in known:
        if math.prod(shape) == math.prod(dims) and shape[-1] in dims:
            return words
    return "a temporary of the step"


def _known_arrays(s: Sizes) -> Iterator[tuple[tuple[int, ...], str]]:
    """Return the shapes, on one chip, of a step's known arrays."""
    chunk = s.loss_chunk
    vocab, ffn, heads = (each // s.tensor for each in (s.vocab, s.ffn, s.heads))
    fewer = "a larger task.gradient_accumulation_steps makes them smaller"
    yield (s.rows, chunk, vocab), f"logits of one loss chunk, or their gradient ({fewer})"
    yield (s.rows, chunk, s.hidden), "hidden states of one loss chunk"
    yield (vocab, s.hidden), "the whole embedding or output weight, or its gradient"
    hint = "" if s.recomputed else " (remat=scan_full keeps less)"
    for shape, what in (
        ((s.rows, s.block_size, s.hidden), "hidden states"),
        ((s.rows, s.block_size, ffn), "MLP activations"),
        ((s.rows, s.block_size, 2 * ffn), "MLP activations"),
        ((s.rows, heads, s.block_size, s.head_size), "attention heads"),
        ((s.rows, heads, s.block_size, s.block_size), "attention scores"),
    ):
        yield (s.layers, *shape), f"{what} of all layers, kept for the backward{hint}"
        yield shape, f"{what} of one layer"
    for name, weight in s.weights.items():
        leaf = re.sub(r"^model\.layers\.\d+\.", "", name)
        inside = leaf != name
        what = f"{'each layer' + chr(39) + 's ' if inside else ''}{leaf}"
        role = "weight, gradient or optimizer state" if weight.trained else "frozen"
        for place in range(len(weight.shape)):
            cut = (n // (weight.shards if i == place else 1) for i, n in enumerate(weight.shape))
            stack = (s.layers, *cut) if inside else tuple(cut)
            yield stack, f"a chip's part of {what}: {role}"
        yield weight.shape, f"{'one layer' + chr(39) + 's ' if inside else ''}{leaf}, whole"
    for name, shape in s.shapes.items():
        if name not in s.weights:  # only its codes are stored, or it has an adapter
            yield shape, f"one layer's {re.sub(r'^model.layers.[0-9]+.', '', name)}, dequantized"


# Traffic ------------------------------------------------------------------------------------------


def traffic(program: Program) -> dict[str, dict[str, Any]]:
    """Return, by kind of collective: places in the program, runs in a step, bytes of payload in a
    step, and these bytes by type of element (`types`)."""
    found: dict[str, dict[str, Any]] = {
        kind: {"places": 0, "runs": 0, "bytes": 0, "types": Counter()} for kind in COLLECTIVES
    }
    for each in program.collectives():
        of_kind = found[each.kind]
        of_kind["places"] += 1
        of_kind["runs"] += each.runs
        of_kind["bytes"] += each.runs * each.payload
        of_kind["types"][each.dtype] += each.runs * each.payload
    return {kind: numbers for kind, numbers in found.items() if numbers["runs"]}


def judge_traffic(found: Mapping[str, Mapping[str, int]], theory: Mapping[str, int]) -> list[str]:
    """Return a sentence for each kind that moves more than `TOLERATED` times its theory.

    An all-reduce does the work of a reduce-scatter and an all-gather, so if gradients are
    all-reduced it counts against both.
    """
    said = []
    base = sum(theory.values())
    for kind in COLLECTIVES:
        bytes_ = found.get(kind, {}).get("bytes", 0)
        wanted = theory.get(kind, 0)
        # Norms, counters and losses are reduced whole: there is always some traffic.
        if bytes_ <= max(TOLERATED * wanted, 0.02 * base):
            continue
        times = f"{bytes_ / wanted:.2f} times the {wanted / GIB:.2f} GiB" if wanted else "none"
        said.append(f"{kind}: {bytes_ / GIB:.2f} GiB a step, {times} that the sharding needs")
    return said


# -- all together ---------------------------------------------------------------------------------


def judge(program: Program, memory: Mapping[str, int], sizes: Sizes, chip: Chip) -> dict[str, Any]:
    """Return the content of compile_report.json about a compiled program."""
    found, theory = traffic(program), traffic_in_theory(sizes)
    kernels = dict(program.kernels())
    each = kernel_flops(kernels, sizes)
    products, expected = program.product_flops(), products_in_theory(sizes)
    return {
        "memory": memory_use(memory, chip),
        "collectives": found,
        "collectives_in_theory": theory,
        "warnings": judge_traffic(found, theory),
        "flops": {
            "products": products,
            "products_in_theory": expected,
            "ratio": products / expected,
            "kernels_estimate": sum(calls * each[name] for name, calls in kernels.items()),
        },
        "kernels": {name.split("_block")[0]: calls for name, calls in kernels.items()},
        "fusions": program.count("fusion"),
        "loops": program.loops,
        "estimate": estimate(program, chip, sizes),
    }


# -- in words --------------------------------------------------------------------------------------


def describe(report: Mapping[str, Any]) -> str:
    """Return the report for the user, as lines."""
    r = report
    verdict = "fits" if r["fits"] else "does not fit" if r["compiles"] else "does not compile"
    lines = [f"{r['topology']}: {verdict}", *_settings_lines(r)]
    if "memory" in r:
        lines += _memory_lines(r["memory"])
        lines += _traffic_lines(r)
        lines += work_lines(r)
    elif r["shortage"] is not None:
        lines += _shortage_lines(r["shortage"])
    else:
        lines += ["the compiler says:", *(f"  {line}" for line in _first(r["error"], 12))]
    s = r["seconds"]
    lines.append(
        f"compile      {s['compile']:.0f} s after {s['trace'] + s['lower']:.0f} s of tracing, "
        f"{_gib(r['host_memory_bytes'])} of host memory; libtpu {r['versions']['libtpu']}, "
        f"{r['runtime']} {r['versions'][r['runtime']]}"
    )
    lines.append(f"flags        {' '.join(r['flags'])}")
    if r.get("other") is not None:
        lines += describe_both(r, r["other"])
    if r.get("nearest") is not None:
        lines += _nearest_lines(r["nearest"])
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _first(text: str, count: int) -> list[str]:
    return [line[:300] for line in text.strip().splitlines()[:count]]


def _settings_lines(r: Mapping[str, Any]) -> list[str]:
    s = r["settings"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in r["mesh"].items() if size > 1)
    remat = f"remat {s['remat']}{', scan' if s['scan_layers'] else ''}"
    masters = ", fp32 master weights" if s["master_weights"] else ""
    return [
        f"model        {r['parameters']:,} parameters, {s['torch_dtype']}, "
        f"{s['optimizer']}{masters}",
        *adapter_lines(r),
        f"mesh         {mesh or 'one device'} on {r['chips']} chips",
        f"step         {s['global_batch_size']} blocks of {s['block_size']} in "
        f"{s['gradient_accumulation_steps']} micro-batches, {r['slot_tokens_per_chip']:,} slot "
        f"tokens a chip; {remat}",
    ]


def adapter_lines(r: Mapping[str, Any]) -> list[str]:
    """Return the lines about the adapter, none without one."""
    adapter, kept = r["settings"]["adapter"], r["weights_per_chip"]
    if adapter is None:
        return []
    base = "as the run" if adapter["base_dtype"] == "run" else adapter["base_dtype"]
    options = ", ".join(
        [
            f"{'DoRA' if adapter['dora'] else 'LoRA'} rank {adapter['rank']}",
            f"base {base}",
            *([f"dropout {adapter['dropout']:g}"] if adapter["dropout"] else []),
        ]
    )
    return [
        f"adapter      {options}; {r['trained_parameters']:,} trained parameters, "
        f"{r['parameters'] - r['trained_parameters']:,} frozen",
        f"weights      a chip holds {_gib(kept['frozen'])} frozen, {_gib(kept['trained'])} trained "
        f"and {_gib(kept['optimizer'])} of optimizer state",
    ]


def _memory_lines(m: Mapping[str, Any]) -> list[str]:
    host = f"; {_gib(m['host'])} in the host's memory" if m["host"] else ""
    return [
        f"memory       {_gib(m['total'])} of {_gib(m['limit'])} a chip: weights, state and batch "
        f"{_gib(m['argument'])}, temporaries {_gib(m['temp'])}, code {_gib(m['generated_code'])}"
        f"{host}"
    ]


def _shortage_lines(shortage: Mapping[str, Any]) -> list[str]:
    used, limit = shortage["used"], shortage["limit"]
    lines = [f"memory       {_gib(used)} of {_gib(limit)} a chip, {_gib(used - limit)} too many"]
    for each in shortage["largest"][:8]:
        lines.append(f"             {_gib(each['bytes'])}  {each['array']}  {each['what']}")
    return lines


def _traffic_lines(r: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind, n in r["collectives"].items():
        if n["bytes"] < 2**20:
            continue
        theory = r["collectives_in_theory"].get(kind, 0)
        wanted = f"; in theory {_gib(theory)}" if theory else ""
        types = [f"{_gib(size)} in {t}" for t, size in n["types"].items() if size >= 2**20]
        of_types = f" ({', '.join(types)})" if len(types) > 1 else ""
        lines.append(f"{kind:<18} {n['runs']:,} runs, {_gib(n['bytes'])} a step{of_types}{wanted}")
    lines += [f"WARNING      {each}" for each in r["warnings"]]
    return lines or ["collectives  none worth counting"]


def work_lines(r: Mapping[str, Any]) -> list[str]:
    """Return the lines about operations, kernels and time."""
    f, e = r["flops"], r["estimate"]
    bound, alone, own = e["bound_by_s"], e["alone_s"], e["compiler"]
    kernels = ", ".join(f"{name} x {calls}" for name, calls in r["kernels"].items())
    loops = ", ".join(map(str, r["loops"])) or "none"
    return [
        f"operations   {f['products']:.3e} a chip and step in matrix products, {f['ratio']:.3f} of "
        f"what the formula says; about {f['kernels_estimate']:.2e} in kernels",
        f"kernels      {kernels or 'none'}",
        f"program      {r['fusions']} fusions; loops of {loops} trips",
        f"estimate     {e['step_s']:.3f} s a step by published peaks, "
        f"{e['slot_tokens_per_s_per_chip']:,.0f} slot tokens/s a chip; a lower bound, not a "
        "measurement",
        f"             bound by compute {bound['compute']:.3f} s, by memory {bound['hbm']:.3f}, by "
        f"the interconnect {bound['ici']:.3f}; waiting for transfers {bound['wait']:.3f}",
        f"             each alone: compute {alone['compute']:.3f} s, memory {alone['hbm']:.3f} "
        f"({e['hbm_bytes'] / 1e9:,.0f} GB), interconnect {alone['ici']:.3f}",
        f"compiler     its own cycles: {own['seconds']:.3f} s at {own['clock_hz'] / 1e9:.2f} GHz, "
        "without kernels and collectives",
    ]


def _nearest_lines(nearest: Mapping[str, Any]) -> list[str]:
    if nearest["overrides"] is None:
        return [f"nothing tried fits: {', '.join(nearest['tried'])}"]
    return [f"this fits ({_gib(nearest['total'])}): {' '.join(nearest['overrides'])}"]
