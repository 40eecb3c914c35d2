"""The report on one step by two compilers."""

from __future__ import annotations

from typing import Any

from torchprime.compiling.side_by_side import describe_both
from torchprime.config.topologies import GIB


def of(version: str, total: int, step_s: float, gathered: int) -> dict[str, Any]:
    return {
        "versions": {"jax": "0.7.1", "libtpu": version},
        "memory": {"total": total * GIB, "limit": 31 * GIB, "fits": total <= 31, "host": 0},
        "flops": {"products": 4.524e14, "kernels_estimate": 7.9e13},
        "estimate": {
            "hbm_bytes": 432e9,
            "step_s": step_s,
            "operations_s": 0.68,
            "compiler": {"seconds": 1.091},
        },
        "collectives": {"all-gather": {"bytes": gathered * GIB, "runs": 450}},
        "seconds": {"compile": 100.0},
    }


def test_each_figure_of_both_is_in_a_line() -> None:
    lines = describe_both(of("0.0.21", 22, 0.724, 28), of("0.0.52", 32, 0.7, 29))
    heads = "both compilers libtpu 0.0.21, jax 0.7.1 libtpu 0.0.52, jax 0.7.1"
    assert lines[0].split() == heads.split()
    text = {line[:32].strip(): line[32:].split("  ") for line in lines}
    found = {label: [cell.strip() for cell in row if cell.strip()] for label, row in text.items()}
    assert found["HBM at the peak, GiB"] == ["22.00 of 31.00", "32.00 of 31.00, does not fit"]
    assert found["estimate, s"] == ["0.7240", "0.7000"]
    assert found["compiler's own cycles, s"] == ["1.0910", "1.0910"]
    assert found["all-gather, GiB"] == ["28.00 in 450 runs", "29.00 in 450 runs"]


def test_an_error_of_the_other_is_shown_by_its_message() -> None:
    other = {"versions": {"jax": "0.12", "libtpu": "0.0.52"}, "error": "INVALID_ARGUMENT: a flag"}
    lines = describe_both(of("0.0.21", 22, 0.7, 28), other)
    assert lines[1:] == ["libtpu 0.0.52 says:", "  INVALID_ARGUMENT: a flag"]


def test_the_other_alone_where_the_first_does_not_fit() -> None:
    first = {"versions": {"jax": "0.7.1", "libtpu": "0.0.21"}, "shortage": {}}
    lines = describe_both(first, of("0.0.52", 22, 0.7, 28))
    assert lines[1] == "HBM at the peak, GiB".ljust(32 + 30) + "22.00 of 31.00"
