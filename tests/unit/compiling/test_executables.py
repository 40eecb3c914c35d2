"""The text of a compiled program."""

from __future__ import annotations

from pathlib import Path

from torchprime.compiling.executables import program_text


class Executable:
    """One whose program jaxlib can't read, as it says of a lookup by the SparseCores."""

    def hlo_modules(self) -> list:
        raise RuntimeError("async-update instruction should have 1 operands but sees 3")


def test_a_program_that_jaxlib_cannot_read_is_read_from_the_compilers_files(tmp_path: Path) -> None:
    (tmp_path / "module_0000.train_step.cl_1.after_optimizations.txt").write_text("before" * 9)
    (tmp_path / "module_0000.train_step.cl_1.after_codegen.txt").write_text("the program")
    (tmp_path / "module_0001.small.cl_1.after_codegen.txt").write_text("small")
    assert program_text(Executable(), tmp_path) == "the program"
