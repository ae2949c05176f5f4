"""The benchmark of the training step times the step that is trained with."""

from benchmarks import step


def test_our_step_is_timed(tiny_config):
    found = step.measure_jax(tiny_config("supervised"), 0.01)
    assert found["ms"] > 0 and found["first_s"] > found["ms"] / 1000
    assert found["flop"] > 1e8 and found["ceiling"] > 0 and found["bytes"] > found["argument_bytes"]
