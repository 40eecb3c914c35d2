"""Payload of collectives, and the bytes of it that leave a chip."""

from __future__ import annotations

import pytest

from torchprime.compiling.hlo.collectives import as_collective
from torchprime.compiling.hlo.parsing import parse

EIGHT = "channel_id=5, replica_groups=[2,8]<=[16]"  # two groups of 8
PAIRS = "channel_id=5, replica_groups={{0,1},{2,3}}"
WHOLE = 64 * 32 * 2


@pytest.mark.parametrize(
    ("line", "kind", "chips", "payload", "crossing"),
    [
        # The result of a gather is the whole; of 8 parts 7 come from others, and as many go out.
        (f"bf16[64,32] all-gather(%x), {EIGHT}", "all-gather", 8, WHOLE, WHOLE * 7 // 8),
        # The result of a scatter is a part; its operand is the whole.
        (f"bf16[8,32] reduce-scatter(%x), {EIGHT}", "reduce-scatter", 8, WHOLE, WHOLE * 7 // 8),
        (f"bf16[64,32] all-reduce(%x), {PAIRS}", "all-reduce", 2, WHOLE, 2 * WHOLE // 2),
        (f"(bf16[64,32], bf16[8]) all-reduce-start(%x, %y), {PAIRS}", "all-reduce", 2, WHOLE + 16,
         WHOLE + 16),
        (f"bf16[64,32] all-to-all(%x), {EIGHT}", "all-to-all", 8, WHOLE, WHOLE * 7 // 8),
        # All of it goes to one neighbour.
        ("(bf16[64,32], bf16[64,32], u32[]) collective-permute-start(%x), channel_id=5, "
         "source_target_pairs={{0,1},{1,0}}", "collective-permute", 0, WHOLE, WHOLE),
        # Without groups all chips take part, however many.
        ("bf16[64,32] all-gather(%x), channel_id=5", "all-gather", 0, WHOLE, WHOLE),
    ],
)  # fmt: skip
def test_forms(line: str, kind: str, chips: int, payload: int, crossing: int) -> None:
    text = "\n".join(["ENTRY %main (x: bf16[64]) -> bf16[64] {", f"  %c.1 = {line}", "}"])
    found = as_collective("main", parse(text).computations["main"]["c.1"], runs=1)
    assert found is not None and (found.kind, found.channel) == (kind, "5")
    assert (found.chips, found.payload, found.crossing) == (chips, payload, crossing)


def test_its_end_is_no_collective() -> None:
    line = "  %d.1 = bf16[64,32] all-gather-done(%c.1)"
    text = "\n".join(["ENTRY %main (x: bf16[64]) -> bf16[64] {", line, "}"])
    assert as_collective("main", parse(text).computations["main"]["d.1"], runs=1) is None
