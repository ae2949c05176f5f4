import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import defaults
from configs.checks import ConfigError
from dssn_jax.learner import optimizer as optimizers

PARAMS = {
    "encoder": {"conv1": {"kernel": jnp.array([1.0, -2.0])}},
    "decoder": {"classifier": {"bias": jnp.array([3.0])}},
}


def config_of(**options):
    config = defaults.get_config().optimizer
    config.update({"weight_decay": 0.01, **options})
    return config


def run(config, params=PARAMS, steps=3):
    """Returns (encoder kernel, decoder bias) after steps with the gradients 0.5 step and -1."""
    optimizer = optimizers.build(config, lambda step: 0.1 / (step + 1))
    trainable, frozen = optimizer.partition(params)
    state = optimizer.transform.init(trainable)
    for step in range(steps):
        gradients = {"encoder": {"conv1": {"kernel": jnp.array([0.5, 0.1]) * step}}}
        gradients |= {"decoder": {"classifier": {"bias": jnp.array([-1.0])}}}
        gradients, _ = optimizer.partition(gradients)
        updates, state = optimizer.transform.update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return trainable, frozen, state


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_three_steps_are_pytorchs(name):
    """With a factor for the learning rate and for the weight decay of the decoder."""
    torch = pytest.importorskip("torch")
    config = config_of(name=name, lr_mults=(("decoder/", 10.0),), wd_mults=((".*/bias", 0.0),))
    ours, _, _ = run(config)
    encoder, decoder = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    groups = [{"params": [encoder]}, {"params": [decoder], "weight_decay": 0.0}]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    theirs = kind(groups, lr=0.1, weight_decay=0.01, **({"momentum": 0.9} if name == "sgd" else {}))
    for step in range(3):
        for group, factor in zip(theirs.param_groups, (1, 10), strict=True):
            group["lr"] = factor * 0.1 / (step + 1)
        encoder.grad, decoder.grad = torch.tensor([0.5, 0.1]) * step, torch.tensor([-1.0])
        theirs.step()
    np.testing.assert_allclose(ours["encoder"]["conv1"]["kernel"], encoder.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(ours["decoder"]["classifier"]["bias"], decoder.detach().numpy(), rtol=1e-5)


def test_the_first_expression_that_matches_counts():
    once, _, _ = run(
        config_of(momentum=0.0, weight_decay=0.0, lr_mults=(("decoder/cl", 2.0), ("decoder", 7.0))), steps=1
    )
    assert float(once["decoder"]["classifier"]["bias"][0]) == pytest.approx(3.0 + 2 * 0.1)


def test_frozen_parameters_have_no_state():
    trainable, frozen, state = run(config_of(freeze="encoder/"))
    assert list(trainable) == ["decoder"] and frozen == {"encoder": PARAMS["encoder"]}
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(1,), ()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"freeze": "encodr"}, "config.optimizer.freeze: 'encodr' matches no parameter"),
        ({"freeze": ".*"}, "nothing is trained"),
        ({"lr_mults": (("head", 10.0),)}, "config.optimizer.lr_mults: 'head' matches no parameter"),
        ({"wd_mults": (("(", 0.0),)}, "is no regular expression"),
    ],
)
def test_expressions_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        optimizers.check(config_of(**options), PARAMS)


def test_poly_schedule():
    schedule = optimizers.poly(0.002, 1000)
    for step in (0, 1, 400, 999):
        assert float(schedule(step)) == pytest.approx(0.002 * (1 - step / 1000) ** 0.9, rel=1e-4)
    assert schedule(1000) == 0
