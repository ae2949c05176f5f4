"""The collectives that `benchmarks.scaling` reads from a compiled program, and what they cost."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import scaling
from dssn_jax import sharding


def test_collectives_are_found_with_their_size_group_and_turns():
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
    found = scaling.collectives(program.lower(shape).compile().as_text(), mesh.size)
    reductions = {(each.bytes, each.group, each.times, each.branch) for each in found if each.kind == "all-reduce"}
    assert {(32, 2, 1, False), (32, 0, 3, False), (32, 0, 1, True)} <= reductions


def test_the_estimate_adds_up():
    machine = scaling.Machine(rate=1e12, near=1e9, far=1e8, node=8, hop=1e-3)
    reduction = scaling.Collective("all-reduce", 10**6, 0, 2, False, "")
    found = [reduction, reduction._replace(branch=True)]
    row = scaling.estimate(found, 4e9, 8, machine)
    assert row["collectives"] == 2 and row["MB"] == 2 and row["compute ms"] == pytest.approx(10)
    assert row["bytes ms"] == pytest.approx(3.5) and row["latency ms"] == pytest.approx(12)
    assert row["share"] == pytest.approx(15.5 / 25.5)
    far = scaling.estimate(found, 4e9, 64, machine)
    assert far["bytes ms"] == pytest.approx(2 * 2 * 63 / 64 * 10) and far["latency ms"] == pytest.approx(24)
