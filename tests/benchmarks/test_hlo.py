"""`benchmarks.hlo` reads programs that XLA compiled for CPUs, and a schedule for GPUs that is written by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compiled, hlo
from dssn_jax import sharding

# In the form of XLA's schedules for GPUs: convolutions of cuDNN, a product of cuBLAS, a loop, a branch, collectives.
GPU = r"""HloModule jit_step, is_scheduled=true

FileNames
1 "/repository/dssn_jax/models/layers.py"
2 "/repository/dssn_jax/learner/step.py"

FunctionNames
1 "BatchNorm.__call__"
2 "TrainStep.__call__"

FileLocations
1 {file_name_id=2 function_name_id=2 line=57 end_line=57 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=60 end_line=60 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %count = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %twice = f32[8]{0} fusion(%x, %x), kind=kLoop, calls=%doubled
  ROOT %next = (s32[], f32[8]{0}) tuple(%count, %twice)
}

%doubled (a: f32[8], b: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  ROOT %add = f32[8]{0} add(%a, %b)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %number = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%number, %number), direction=LT
}

%early (e: f32[8]) -> f32[8] {
  %e = f32[8]{0} parameter(0)
  ROOT %sine = f32[8]{0} sine(%e)
}

%late (l: f32[8]) -> f32[8] {
  %l = f32[8]{0} parameter(0)
  ROOT %cosine = f32[8]{0} cosine(%l)
}

%scattered (s: f32[8]) -> f32[2] {
  %s = f32[8]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[2]{0} reduce-scatter(%s), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%sum
}

ENTRY %main (image: bf16[2,9,9,4], kernel: bf16[6,3,3,4], x: f32[8], flag: pred[]) -> f32[8] {
  %image = bf16[2,9,9,4]{3,2,1,0} parameter(0), metadata={op_name="state[\'image\']"}
  %kernel = bf16[6,3,3,4]{3,2,1,0} parameter(1)
  %x.1 = f32[8]{0} parameter(2)
  %flag = pred[] parameter(3)
  %cudnn-conv.1 = (bf16[2,5,5,6]{3,2,1,0}, u8[1000]{0}) custom-call(%image, %kernel), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/conv(general)" stack_frame_id=2}, backend_config={"a":{"b":"1"}}
  %grad = bf16[2,5,5,6]{3,2,1,0} get-tuple-element(%cudnn-conv.1), index=0
  %conv-input.1 = (bf16[2,9,9,4]{3,2,1,0}, u8[0]{0}) custom-call(%grad, %kernel), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %conv-filter.1 = (bf16[6,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%image, %grad), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %all-reduce-start.1 = f32[8]{0} all-reduce-start(%x.1), replica_groups={{0,1,2,3}}, to_apply=%sum
  %left = f32[2,4]{1,0} bitcast(%x.1)
  %gemm = (f32[2,2]{1,0}, s8[4194304]{0}) custom-call(%left, %left), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]},"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}
  %query = bf16[2,7,3,8]{3,2,1,0} constant({...})
  %key = bf16[2,5,3,8]{3,2,1,0} constant({...})
  %attention = (bf16[2,3,7,8]{3,1,2,0}, f32[2,3,7]{2,1,0}, u8[0]{0}) custom-call(%query, %key, %key), custom_call_target="__cudnn$fmhaSoftmax", api_version=API_VERSION_STATUS_RETURNING
  %all-reduce-done.1 = f32[8]{0} all-reduce-done(%all-reduce-start.1)
  %start = ((f32[8]{0}), f32[2]{0}) async-start(%all-reduce-done.1), calls=%scattered
  %done = f32[2]{0} async-done(%start)
  %state = (s32[], /*index=1*/f32[8]{0}) tuple(%flag, %all-reduce-done.1)
  %loop = (s32[], f32[8]{0}) while(%state), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %result = f32[8]{0} get-tuple-element(%loop), index=1
  ROOT %either = f32[8]{0} conditional(%flag, %result, %result), true_computation=%early, false_computation=%late
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def gpu():
    program = hlo.Program(GPU)
    return program, {step.instruction.name: step for step in program.steps()}


def test_launches_are_counted_with_loops_and_branches(gpu):
    program, steps = gpu
    assert program.entry == "main" and not program.unbounded
    once = (
        "cudnn-conv.1",
        "conv-input.1",
        "conv-filter.1",
        "gemm",
        "attention",
        "all-reduce-start.1",
        "reduce-scatter.1",
    )
    expected = dict.fromkeys((*once, "cosine"), (1, False)) | {"twice": (3, False), "sine": (1, True)}
    assert {name: (step.times, step.rare) for name, step in steps.items()} == expected


def test_bytes_are_those_of_operands_and_results(gpu):
    program, steps = gpu
    image, kernel, output = 2 * 2 * 9 * 9 * 4, 2 * 6 * 3 * 3 * 4, 2 * 2 * 5 * 5 * 6
    for name in ("cudnn-conv.1", "conv-input.1", "conv-filter.1"):  # Scratch space left out.
        assert program.bytes_moved(steps[name]) == image + kernel + output
    assert program.bytes_moved(steps["twice"]) == 2 * 32  # An operand that is read twice counts once.
    assert program.bytes_moved(steps["gemm"]) == 32 + 16
    assert program.bytes_moved(steps["reduce-scatter.1"]) == 32 + 8
    query, key, sums = 2 * 2 * 7 * 3 * 8, 2 * 2 * 5 * 3 * 8, 4 * 2 * 3 * 7
    assert program.bytes_moved(steps["attention"]) == query + key + query + sums


def test_arrays_on_the_chip_count_where_they_are_brought_there():
    text = """HloModule step, is_scheduled=true

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %negate = f32[8,128]{1,0:T(8,128)S(1)} negate(%copy-done)
  ROOT %add = f32[8,128]{1,0:T(8,128)} add(%negate, %x), backend_config={"window_config":{"estimated_cycles":"2130"}}
}
"""
    program = hlo.Program(text)
    moved = {step.instruction.name: program.bytes_moved(step) for step in program.steps()}
    size = 4 * 8 * 128
    assert moved == {"copy-start": size, "negate": 0, "add": 2 * size}
    kinds = [compiled.kind(step.instruction, False) for step in program.steps()]
    assert kinds == ["prefetch", "other", "other"]
    assert [step.instruction.estimated_cycles for step in program.steps()] == [0, 0, 2130]


def test_flop_are_two_per_multiplication(gpu):
    program, steps = gpu
    convolution = [(2.0 * (2 * 5 * 5 * 6) * (3 * 3 * 4), "bfloat16")]
    for name in ("cudnn-conv.1", "conv-input.1", "conv-filter.1"):
        assert program.products(steps[name]) == convolution
    assert program.products(steps["gemm"]) == [(2.0 * 2 * 2 * 4, "float32")]
    assert program.products(steps["attention"]) == [(2 * 2.0 * (2 * 3 * 7 * 5 * 8), "bfloat16")]
    assert program.products(steps["twice"]) == []


def test_collectives_overlap_if_something_runs_between_start_and_done(gpu):
    program, steps = gpu
    assert program.overlaps(steps["all-reduce-start.1"]) and not program.overlaps(steps["reduce-scatter.1"])
    assert not program.overlaps(steps["gemm"])


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{{0,1,2,3,4,5,6,7}}", 0),
        ("{}", 0),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("[1,8]<=[8]", 0),
        ("mesh['a'=4,'b'=2] {'b'}", 2),
        ("mesh['a'=4,'b'=2] {'a','b'}", 0),
    ],
)
def test_groups_of_collectives_are_counted_in_all_their_forms(groups, members):
    text = GPU.replace("replica_groups={{0,1,2,3}}", f"replica_groups={groups}")
    steps = hlo.Program(text).computations["scattered"]
    assert steps["reduce-scatter.1"].group(8) == members


def test_collectives_of_a_compiled_program_have_their_size_group_and_turns():
    mesh = sharding.make_mesh()
    assert mesh.size == 4

    def program(x):  # [4, 8], a row on each device.
        pairs = x.reshape(2, 2, 8).max(1)

        def turn(total, _):
            return jnp.sin((x * total).sum(0)), None

        early = jax.lax.cond(x[0, 0] > 0, lambda: (x * x).min(0), lambda: jnp.zeros(8))
        return pairs, jax.lax.scan(turn, jnp.ones(8), length=3)[0] + early

    shape = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    program = jax.jit(program, in_shardings=sharding.batch_sharded(mesh), out_shardings=sharding.replicated(mesh))
    steps = list(hlo.Program(program.lower(shape).compile().as_text()).steps())
    reductions = {
        (step.instruction.bytes, step.instruction.group(mesh.size), step.times, step.rare)
        for step in steps
        if step.instruction.opcode == "all-reduce"
    }
    assert {(32, 2, 1, False), (32, 0, 3, False), (32, 0, 1, True)} <= reductions


def test_frames_are_those_of_the_tables(gpu):
    program, steps = gpu
    frames = program.frames(steps["cudnn-conv.1"].instruction)
    assert [(frame.line, frame.function) for frame in frames] == [
        (60, "BatchNorm.__call__"),
        (57, "TrainStep.__call__"),
    ]
    assert frames[0].file == "/repository/dssn_jax/models/layers.py"
    assert steps["cudnn-conv.1"].instruction.op_name == "jit(step)/conv(general)"
    assert program.frames(steps["gemm"].instruction) == []


def test_what_a_compiler_wrote_is_read():
    def program(images, kernel, matrix):
        found = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        found = found.reshape(-1, 6)
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ matrix), None), found, length=5)[0]

    shapes = (2, 9, 9, 4), (3, 3, 4, 6), (6, 6)
    lowered = jax.jit(program).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    read = hlo.Program(lowered.compile().as_text())
    flop = [(step.times * flop, precision) for step in read.steps() for flop, precision in read.products(step)]
    assert sorted(flop) == [(5 * 2.0 * 98 * 6 * 6, "tf32"), (2.0 * 98 * 6 * 36, "tf32")]
    assert any(frame.file == __file__ for step in read.steps() for frame in read.frames(step.instruction))
