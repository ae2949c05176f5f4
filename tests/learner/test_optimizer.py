import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax.learner import optimizer


def test_sgd_by_hand():
    """Three steps of torch.optim.SGD's rule: d = g + wd p; b = m b + d; p -= lr b; lr_multi outside the backbone."""
    transformation = optimizer.sgd(lambda step: 0.1 / (step + 1), lr_multi=10.0, momentum=0.9, weight_decay=0.01)
    params = {"backbone": {"w": jnp.array([1.0, -2.0])}, "head": {"b": jnp.array([3.0])}}
    state = transformation.init(params)
    expected = {"backbone": np.array([1.0, -2.0]), "head": np.array([3.0])}
    buffers = {"backbone": np.zeros(2), "head": np.zeros(1)}
    for step in range(3):
        gradients = {"backbone": {"w": jnp.array([0.5, 0.1]) * step}, "head": {"b": jnp.array([-1.0])}}
        updates, state = transformation.update(gradients, state, params)
        params = {name: {key: params[name][key] + updates[name][key] for key in params[name]} for name in params}
        for name, multiple in (("backbone", 1), ("head", 10)):
            gradient = np.concatenate([np.asarray(value) for value in gradients[name].values()])
            buffers[name] = 0.9 * buffers[name] + gradient + 0.01 * expected[name]
            expected[name] = expected[name] - multiple * 0.1 / (step + 1) * buffers[name]
    np.testing.assert_allclose(params["backbone"]["w"], expected["backbone"], rtol=1e-5)
    np.testing.assert_allclose(params["head"]["b"], expected["head"], rtol=1e-5)


def test_poly_schedule():
    schedule = optimizer.poly(0.002, 1000)
    for step in (0, 1, 400, 999):
        assert float(schedule(step)) == pytest.approx(0.002 * (1 - step / 1000) ** 0.9, rel=1e-4)
    assert schedule(1000) == 0
