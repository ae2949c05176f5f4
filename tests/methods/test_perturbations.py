import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax.methods.perturbations import ChannelDropout, ComplementaryDropout

KEY = jax.random.PRNGKey(0)


def test_channel_dropout_drops_whole_channels():
    dropped = np.asarray(ChannelDropout(0.5)((jnp.ones((8, 4, 4, 500)),), KEY, 0)[0])
    assert np.array_equal(dropped, np.broadcast_to(dropped[:, :1, :1], dropped.shape))
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert (dropped == 0).mean() == pytest.approx(0.5, abs=0.04)


def test_channel_dropout_differs_between_streams_and_feature_maps():
    features = (jnp.ones((4, 2, 2, 64)), jnp.ones((4, 1, 1, 64)))
    draws = [np.asarray(x[:, 0, 0]) for index in (2, 3) for x in ChannelDropout(0.5)(features, KEY, index)]
    assert len({draw.tobytes() for draw in draws}) == 4


@pytest.mark.parametrize(("batch", "untouched"), [(2, 1), (4, 2), (5, 2)])
def test_complementary_dropout_keeps_each_channel_in_one_stream_of_a_pair(batch, untouched):
    features = (jnp.ones((batch, 3, 3, 256)), jnp.ones((batch, 2, 2, 256)))
    first, second = (ComplementaryDropout()(features, KEY, index) for index in (0, 1))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one + other, 2)
        assert (np.asarray(one) == 1).all((1, 2, 3)).sum() == untouched
    masks = np.asarray(first[0])[:, 0, 0]
    np.testing.assert_array_equal(masks, np.asarray(first[1])[:, 0, 0])  # Shared by maps of the same width.
    perturbed = masks[(masks != 1).any(1)]
    assert set(np.unique(perturbed)) == {0.0, 2.0} and perturbed.mean() == pytest.approx(1, abs=0.2)
