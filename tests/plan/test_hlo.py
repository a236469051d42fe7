# ruff: noqa: E501  XLA writes long lines
"""Collectives read from programs' text: literals in the three ways that XLA writes them, and a real program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from loraplus_jax import make_mesh
from loraplus_jax.plan.hlo import (
    Collective,
    collectives,
    count_looped_matmuls,
    execution_counts,
    parse_hlo,
    shape_bytes,
)
from loraplus_jax.step.sharding import batch_sharding

CPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %p = (s32[], f32[16,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x.1 = f32[16,4]{1,0} get-tuple-element(%p), index=1
  %all-reduce = f32[16,4]{1,0} all-reduce(%x.1), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(f)/while/body/psum"}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[16,4]{1,0}) tuple(%next, %all-reduce)
}

%cond (p.1: (s32[], f32[16,4])) -> pred[] {
  %p.1 = (s32[], f32[16,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(30)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[16,4], b: bf16[8,2]) -> (s32[], f32[16,4]) {
  %a = f32[16,4]{1,0} parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  %all-gather = bf16[64,2]{1,0} all-gather(%b), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %reduce-scatter = f32[4,4]{1,0} reduce-scatter(%a), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %zero = s32[] constant(0)
  %start = (s32[], f32[16,4]{1,0}) tuple(%zero, %a)
  ROOT %loop = (s32[], f32[16,4]{1,0}) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"30"}}
}
"""
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%pieces (param_0: bf16[256,4096], param_1: bf16[4096,4096]) -> bf16[4096,4096] {
  %param_0 = bf16[256,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %all-gather.2 = bf16[4096,4096]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0), channel_id=93, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0','axis_1'}, dimensions={0}
}

%body (p: (u32[], bf16[256,4096])) -> (u32[], bf16[256,4096]) {
  %p = (u32[]{:T(128)}, bf16[256,4096]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[256,4096]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %fusion.1 = bf16[4096,4096]{1,0:T(8,128)(2,1)} fusion(%x, %x), kind=kCustom, calls=%pieces
  %collective-permute-start = (bf16[256,4096]{1,0:T(8,128)(2,1)}, bf16[256,4096]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, /*index=3*/u32[]{:S(2)}) collective-permute-start(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done = bf16[256,4096]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start)
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (u32[]{:T(128)}, bf16[256,4096]{1,0:T(8,128)(2,1)}) tuple(%next, %collective-permute-done)
}

%cond (p.1: (u32[], bf16[256,4096])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p.1 = (u32[]{:T(128)}, bf16[256,4096]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: bf16[256,4096]) -> (u32[], bf16[256,4096]) {
  %a = bf16[256,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %fusion = bf16[4096,4096]{1,0:T(8,128)(2,1)} fusion(%a, %a), kind=kCustom, calls=%first
  %start = (u32[]{:T(128)}, bf16[256,4096]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  ROOT %loop = (u32[]{:T(128)}, bf16[256,4096]{1,0:T(8,128)(2,1)}) while(%start), condition=%cond, body=%body
}
"""
FIRST = """\
%first (q_0: bf16[256,4096], q_1: bf16[4096,4096]) -> bf16[4096,4096] {
  %q_0 = bf16[256,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %q_1 = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %all-gather.1 = bf16[4096,4096]{1,0:T(8,128)(2,1)} all-gather(%q_0), channel_id=93, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0','axis_1'}, dimensions={0}
}

"""
TPU = TPU.replace("%pieces (", FIRST + "%pieces (", 1)


def test_a_cpu_program_with_a_loop_of_noted_length():
    assert set(collectives(CPU)) == {
        Collective("all-reduce", 256, 4, 30, "f32[16,4]", "jit(f)/while/body/psum"),
        Collective("all-gather", 256, 8, 1, "bf16[64,2]", ""),
        Collective("reduce-scatter", 256, 4, 1, "f32[4,4]", ""),
    }


def test_a_gpu_program_whose_starts_return_inputs_and_outputs():
    pair = "(({0}, {0}), ({1}, {1}))"
    big, small = "f32[16,4]{1,0}", "f32[4,4]{1,0}"
    text = CPU.replace(
        "f32[4,4]{1,0} reduce-scatter(%a)", f"{pair.format(big, small)} reduce-scatter-start(%a, %a)"
    )
    text = text.replace(
        "bf16[64,2]{1,0} all-gather(%b)", "(bf16[8,2]{1,0}, bf16[64,2]{1,0}) all-gather-start(%b)"
    )
    text = text.replace(
        "  %zero =", f"  %all-to-all-start = (({big}), {big}) all-to-all-start(%a), channel_id=9\n  %zero ="
    )
    found = {c.kind: c for c in collectives(text)}
    assert found["all-to-all"] == Collective("all-to-all", 256, 8, 1, "f32[16,4]", "")
    assert found["reduce-scatter"] == Collective("reduce-scatter", 512, 4, 1, "f32[4,4], f32[4,4]", "")
    assert found["all-gather"] == Collective("all-gather", 256, 8, 1, "bf16[64,2]", "")


def test_the_length_of_a_loop_from_its_condition_alone():
    unnoted = CPU.replace(', backend_config={"known_trip_count":{"n":"30"}}', "")
    assert execution_counts(parse_hlo(unnoted)) == {"add": 0, "body": 30, "cond": 30, "main": 1} | {"add": 31}
    assert execution_counts(parse_hlo(unnoted.replace("direction=LT", "direction=LE")))["body"] == 31
    assert execution_counts(parse_hlo(unnoted.replace("constant(0)", "constant(10)")))["body"] == 20


def test_a_loop_whose_length_cannot_be_read_is_an_error():
    text = CPU.replace(', backend_config={"known_trip_count":{"n":"30"}}', "").replace("LT", "NE")
    with pytest.raises(ValueError, match="loop"):
        collectives(text)


def test_a_tpu_program_whose_gather_comes_in_pieces_some_of_them_in_a_loop():
    megabytes = 256 * 4096 * 2
    assert set(collectives(TPU)) == {
        Collective("all-gather", 16 * megabytes, 16, 1, "bf16[4096,4096]", ""),
        Collective("collective-permute", megabytes, 16, 4, "bf16[256,4096]", ""),
    }


@pytest.mark.parametrize(
    ("groups", "size", "hosts"),
    [
        # Of 16 devices, four on a host.
        ("mesh['axis_0'=4,'axis_1'=4] {'axis_1'}", 4, 1),
        ("mesh['axis_0'=4,'axis_1'=4] {'axis_0'}", 4, 4),
        ("mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_0'}", 4, 1),
        ("mesh['axis_0'=8,'axis_1'=2], device_ids=([2,8]T(1,0)) {'axis_0':(1)2}", 2, 2),
        ("mesh['axis_0'=8,'axis_1'=2], device_ids=([2,8]T(1,0)) {'axis_0':(4)2}", 2, 1),
        ("mesh['a'=4], device_ids=(0,12,1,13) {'a':(2)2}", 2, 2),
        ("mesh['a'=16] {'a':(4)4}", 4, 1),
        ("mesh['a'=16] {'a':(1)2,'a':(8)2}", 4, 2),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, 2),
        ("{{0,1},{3,4}}", 2, 2),
        ("[2,4]<=[4,2]T(1,0)", 4, 2),
        ("[4,4]<=[16]", 4, 1),
        ("{}", 16, 4),
    ],
)
def test_groups_of_devices_and_their_hosts(groups, size, hosts):
    text = TPU.replace("mesh['axis_0'=4,'axis_1'=4] {'axis_0','axis_1'}", groups)
    found = next(c for c in collectives(text, [n // 4 for n in range(16)]) if c.kind == "all-gather")
    assert (found.group, found.hosts) == (size, hosts)
    assert all(c.hosts == 1 for c in collectives(text))


def test_hosts_of_a_permute_are_those_of_its_pairs():
    (found,) = (c for c in collectives(TPU, [0] + [1] * 15) if c.kind == "collective-permute")
    assert (found.group, found.hosts) == (16, 2)
    (found,) = (c for c in collectives(TPU, [0, 0] + [1] * 14) if c.kind == "collective-permute")
    assert found.hosts == 1


def test_a_group_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="replica_groups=new"):
        collectives(TPU.replace("mesh['axis_0'=4,'axis_1'=4] {'axis_0','axis_1'}", "new[4]"))


@pytest.mark.parametrize(
    ("kind", "received"),
    [("all-reduce", 150.0), ("all-gather", 75.0), ("reduce-scatter", 75.0), ("collective-permute", 100.0)],
)
def test_what_a_device_receives_by_hand(kind, received):
    assert Collective(kind, 100, 4, 1, "", "").wire_bytes == received


def test_bytes_of_types():
    assert shape_bytes("pred[3]{0}") == 3
    assert shape_bytes("(s4[8]{0}, f8e4m3fn[2,2]{1,0}, c64[])") == 4 + 4 + 8
    with pytest.raises(ValueError, match="'opaque'"):
        shape_bytes("opaque[2]")


def test_loops_that_hold_matrix_products():
    product = "  %y = f32[16,16]{1,0} dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n"
    inside = CPU.replace("  %one = s32[]", product + "  %one = s32[]")
    outside = CPU.replace("  %zero = s32[]", product.replace("%x.1", "%a") + "  %zero = s32[]")
    assert (count_looped_matmuls(inside), count_looped_matmuls(outside), count_looped_matmuls(CPU)) == (
        1,
        0,
        0,
    )
    assert count_looped_matmuls(inside.replace('"n":"30"', '"n":"1"')) == 0


def test_a_real_program_reduces_the_gradient_and_nothing_else():
    mesh = make_mesh(8)
    whole = jax.NamedSharding(mesh, PartitionSpec())

    def step(w, x):
        return jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w)

    shapes = jax.ShapeDtypeStruct((4, 3), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.float32)
    program = jax.jit(step, in_shardings=(whole, batch_sharding(mesh)), out_shardings=whole).lower(*shapes)
    (found,) = collectives(program.compile().as_text())
    assert (found.kind, found.bytes, found.group, found.times) == ("all-reduce", 4 * 3 * 4, 8, 1)
    assert "dot_general" in found.where
