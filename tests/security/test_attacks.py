"""Strangers' files and shared folders can only end a command with one message.

`make attack` runs all of it; SECURITY.md says what is promised.
"""

from __future__ import annotations

import attack
import checkpoints
import foreign_names
import hangs
import held
import links
import prepared
import pytest
import terminal_output

GROUPS = (foreign_names, links, prepared, checkpoints, held, terminal_output, hangs)


@pytest.mark.parametrize(
    "row", attack.parameters([row for group in GROUPS for row in group.ATTACKS])
)
def test_attack(row: attack.Attack, ground: attack.Ground) -> None:
    attack.carry_out(row, ground)
