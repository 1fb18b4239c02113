"""What devices say to each other: known programs, and the forms that a program's text takes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from fnml.core import make_mesh
from fnml.plan import Collective, collectives, wire_bytes
from fnml.plan._hlo import parse


def compiled(function, mesh, specs, out, *shapes):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


@pytest.fixture(scope="module")
def line():
    return make_mesh({"data": 8})


def of(text):
    return [(c.kind, c.count, c.bytes, c.group) for c in collectives(text)]


def test_a_psum_of_n_bytes_is_n_bytes(line):
    text = compiled(lambda x: lax.psum(x, "data"), line, P(), P(), (1000,))
    assert of(text) == [("all-reduce", 1, 4000, 8)]


def test_in_a_scan_it_counts_once_per_turn(line):
    def body(x, _):
        return lax.psum(x, "data") * 0.5, None

    def five(x):
        return lax.scan(body, x, None, length=5)[0]

    def twice_five(x):
        return lax.scan(lambda x, _: (five(x), None), x, None, length=2)[0]

    assert of(compiled(five, line, P(), P(), (1000,))) == [("all-reduce", 5, 20_000, 8)]
    assert of(compiled(twice_five, line, P(), P(), (1000,))) == [("all-reduce", 10, 40_000, 8)]


# A device holds 256 floats, or 1 KiB; 4 devices along "data" make 4 KiB.
KINDS = {
    "all-gather": (lambda x: lax.all_gather(x, "data", tiled=True), 4096),
    "reduce-scatter": (lambda x: lax.psum_scatter(x, "data", tiled=True), 1024),
    "all-to-all": (lambda x: lax.all_to_all(x, "data", 0, 0, tiled=True), 1024),
    "collective-permute": (
        lambda x: lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]),
        1024,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_along_one_axis_of_two(kind):
    mesh = make_mesh({"data": 4, "model": 2})
    function, size = KINDS[kind]
    text = compiled(function, mesh, P(("data", "model")), P(("data", "model")), (2048,))
    (found,) = collectives(text)
    assert (found.kind, found.count, found.bytes, found.group) == (kind, 1, size, 4)
    # The first group: every second device, since "model" changes fastest.
    assert sorted(found.members) == [0, 2, 4, 6]


def program(groups, header="HloModule m, num_partitions=8"):
    return (
        f"{header}\nENTRY %main (x: f32[256]) -> f32[256] {{\n"
        f"  ROOT %y = f32[256]{{0}} all-reduce(%x), {groups}, to_apply=%add\n}}"
    )


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups={{1,3},{0,2}}", (1, 3)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        # The larger half of an axis of four: what stands before it is 1.
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_are_read_in_every_form(groups, members):
    (found,) = collectives(program(groups))
    assert found == Collective("all-reduce", 1, 1024, len(members), members)


def test_one_device_alone_says_nothing():
    assert collectives(program("replica_groups={{0},{1}}")) == []


LOOP = """HloModule m, num_partitions=4
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(STEP)
  %next = s32[] add(%i, %two)
  %y = f32[8]{0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %y)
}
%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %limit = s32[] constant(9)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = s32[] constant(START)
  %carry = (s32[], f32[8]{0}) tuple(%start, %x)
  %loop = (s32[], f32[8]{0}) while(%carry), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}"""


# Turns of `for i in range(start, 9, step)`.
@pytest.mark.parametrize(("start", "step"), [(0, 1), (3, 1), (0, 2), (1, 3), (9, 1)])
def test_a_loop_without_a_note_of_its_turns_is_counted_by_its_condition(start, step):
    text = LOOP.replace("START", str(start)).replace("STEP", str(step))
    turns = len(range(start, 9, step))
    assert [c.count for c in collectives(text)] == [turns] * bool(turns)
    assert parse(text).unbounded == ()


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    text = LOOP.replace("STEP", "1").replace(
        "%start = s32[] constant(START)", "%start = s32[] foo(%x)"
    )
    assert [c.count for c in collectives(text)] == [1]
    assert parse(text).unbounded == ("loop",)


def test_an_asynchronous_start_counts_what_it_moves_once():
    text = """HloModule m, num_partitions=4
ENTRY %main (x: f32[8]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %d = f32[32]{0} all-gather-done(%s)
}"""
    assert of(text) == [("all-gather", 1, 128, 4)]


def test_wire_bytes_are_those_of_a_ring():
    wire = functools.partial(Collective, count=1, bytes=1200, group=4)
    assert wire_bytes(wire("all-reduce")) == 1800
    assert wire_bytes(wire("all-gather")) == wire_bytes(wire("reduce-scatter")) == 900
    assert wire_bytes(wire("all-to-all")) == 900
    assert wire_bytes(wire("collective-permute")) == 1200


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("hello")
