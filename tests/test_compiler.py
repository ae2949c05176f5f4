"""Options of the compiler are for TPUs, and for compilers that know them."""

import pytest

from dssn_jax import compiler, sharding


@pytest.fixture
def mesh():
    compiler.options.cache_clear()
    yield sharding.make_mesh()
    compiler.options.cache_clear()


def test_other_devices_have_none(mesh):
    assert sharding.platform(mesh) == "cpu"
    assert compiler.options(mesh) is None


def test_a_compiler_that_does_not_know_them_is_left_to_itself(mesh, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda mesh: "tpu")  # Its compiler is that of the CPU all the same.
    assert compiler.options(mesh) is None


def test_a_compiler_that_knows_them_gets_them(mesh, monkeypatch):
    known = {"xla_cpu_enable_fast_math": False}
    monkeypatch.setattr(sharding, "platform", lambda mesh: "tpu")
    monkeypatch.setattr(compiler, "_TPU", known)
    assert compiler.options(mesh) == known
