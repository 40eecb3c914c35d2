"""HLO text as the TPU's compilers print it: one line an instruction, and the exceptions."""

from __future__ import annotations

from torchprime.compiling.hlo.parsing import Array, parse

# ruff: noqa: E501
# From libtpu 0.0.52, shortened: a Pallas kernel's metadata on lines of their own, the last of which
# starts like the end of a computation.
METADATA = r"""HloModule jit_step, is_scheduled=true

FileLocations
1 {file_name_id=1 function_name_id=1 line=33 end_line=33 column=40 end_column=56}

%body (p: (s32[], bf16[8,2048,128])) -> (s32[], bf16[8,2048,128]) {
  %p = (s32[]{:T(128)}, bf16[8,2048,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %q = bf16[8,2048,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %splash_mha_fwd_segmented_residuals.3 = (f32[2,1024,128]{2,1,0:T(8,128)}, bf16[8,2048,128]{2,1,0:T(8,128)(2,1)S(1)}) custom-call(%q, /*index=1*/%q), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,2048,128]{2,1,0}, bf16[8,2048,128]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 1024, \"q_layout\": 1}"
}}, metadata={op_name="jit(step)/pallas_call" stack_frame_id=41}, backend_config={"custom_call_config":{"body":"TUzvUgFN","debug":"a } in text"}}
  %out = bf16[8,2048,128]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%splash_mha_fwd_segmented_residuals.3), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 1024, \"q_layout\": 1}"
}}, metadata={op_name="jit(step)/pallas_call" stack_frame_id=41}
  ROOT %next = (s32[]{:T(128)}, bf16[8,2048,128]{2,1,0:T(8,128)(2,1)}) tuple(%i, %out)
}

ENTRY %main (x: bf16[8,2048,128]) -> bf16[8,2048,128] {
  ROOT %x = bf16[8,2048,128]{2,1,0} parameter(0)
}
"""


def test_metadata_on_several_lines_ends_no_computation() -> None:
    computations, entry = parse(METADATA)
    assert entry == "main" and list(computations) == ["body", "main"]
    kernel, out = (computations["body"][name] for name in list(computations["body"])[3:5])
    assert list(computations["body"])[5] == "next" and computations["body"]["next"].root
    assert (kernel.kind, kernel.operands) == ("custom-call", ("q", "q"))
    assert kernel.purpose == out.purpose == "jit(step)/pallas_call"
    assert '"body":"TUzvUgFN"' in kernel.rest and out.attribute("index") == "1"


def test_a_result_on_the_core_is_not_in_hbm() -> None:
    kernel = parse(METADATA).computations["body"]["splash_mha_fwd_segmented_residuals.3"]
    assert kernel.arrays == (
        Array("f32", (2, 1024, 128), in_hbm=True),
        Array("bf16", (8, 2048, 128), in_hbm=False),
    )
    assert kernel.hbm_bytes == 2 * 1024 * 128 * 4
    assert kernel.nbytes == 2 * 1024 * 128 * 4 + 8 * 2048 * 128 * 2


def test_an_instruction_that_never_closes_its_braces_takes_only_itself() -> None:
    lines = ["ENTRY %main (x: f32[8]) -> f32[8] {", "  %x = f32[8]{0} parameter(0), metadata={"]
    found = parse("\n".join([*lines, "  ROOT %y = f32[8]{0} negate(%x)", "}"])).computations["main"]
    assert [each.kind for each in found.values()] == ["parameter", "negate"]
