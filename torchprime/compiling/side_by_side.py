"""The figures of one step by two compilers, beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchprime.compiling.hlo.collectives import COLLECTIVES
from torchprime.config.topologies import GIB

LABEL, COLUMN = 32, 30


def describe_both(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the lines of the report on two compilers.

    Args:
        first: the content of compile_report.json.
        other: the same about the other compiler, or its message (`error`).
    """
    versions = [each["versions"] for each in (first, other)]
    heads = [f"libtpu {v['libtpu']}, jax {v['jax']}" for v in versions]
    lines = [line("both compilers", heads)]
    if "error" in other:
        said = [f"  {each[:300]}" for each in other["error"].strip().splitlines()[:12]]
        return [*lines, f"libtpu {versions[1]['libtpu']} says:", *said]
    if "memory" not in first:
        return [*lines, *(line(label, ["", cell]) for label, cell in figures(other))]
    both = zip(figures(first), figures(other), strict=True)
    lines += [line(label, [mine, its]) for (label, mine), (_, its) in both]
    return lines + _collective_lines(first, other)


def line(label: str, cells: Sequence[str]) -> str:
    """Return a line of columns."""
    return (f"{label:<{LABEL}}" + "".join(f"{cell:<{COLUMN}}" for cell in cells)).rstrip()


def figures(r: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a report on a compiled step, each with its label."""
    m, f, e = r["memory"], r["flops"], r["estimate"]
    fits = "" if m["fits"] else ", does not fit"
    return [
        ("HBM at the peak, GiB", f"{m['total'] / GIB:.2f} of {m['limit'] / GIB:.2f}{fits}"),
        ("in the host's memory, GiB", f"{m['host'] / GIB:.2f}"),
        ("operations in products", f"{f['products']:.4e}"),
        ("operations in kernels", f"{f['kernels_estimate']:.4e}"),
        ("HBM traffic, GB", f"{e['hbm_bytes'] / 1e9:,.1f}"),
        ("estimate, s", f"{e['step_s']:.4f}"),
        ("  operations one by one, s", f"{e['operations_s']:.4f}"),
        ("compiler's own cycles, s", f"{e['compiler']['seconds']:.4f}"),
        ("compile, s", f"{r['seconds']['compile']:.0f}"),
    ]


def _collective_lines(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    found = [each["collectives"] for each in (first, other)]
    lines = []
    for kind in COLLECTIVES:
        sizes = [each.get(kind, {"bytes": 0, "runs": 0}) for each in found]
        if max(each["bytes"] for each in sizes) >= 2**20:
            cells = [f"{n['bytes'] / GIB:.2f} in {n['runs']:,} runs" for n in sizes]
            lines.append(line(f"{kind}, GiB", cells))
    return lines
