"""Networks by name: `build(config.model, num_classes)`.

A new encoder or decoder is a module of this package and one line in a registry here; docs/extending.md shows both.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from configs.checks import ConfigError, check_choice
from configs.defaults import get_config
from dssn_jax.models import deeplabv3plus, dpt, efficientnet, linear, resnet, vit, xception
from dssn_jax.models.network import Network


class Encoder(NamedTuple):
    """An entry of `ENCODERS`."""

    build: Callable[..., nn.Module]  # Takes config.model, dtype and param_dtype.
    variants: tuple[dict, ...] = ({},)  # Values of keys of config.model that the encoder reads, one dict per variant.


def _resnet(*stage_sizes: int, **options) -> Encoder:
    return Encoder(functools.partial(resnet.from_config, stage_sizes=stage_sizes, **options), resnet.VARIANTS)


ENCODERS = {
    "resnet10w16": _resnet(1, 1, 1, 1, bottleneck=False, width=16),  # For tests.
    "resnet18": _resnet(2, 2, 2, 2, bottleneck=False),
    "resnet18w16": _resnet(2, 2, 2, 2, bottleneck=False, width=16),  # For the demonstration.
    "resnet50": _resnet(3, 4, 6, 3),
    "resnet101": _resnet(3, 4, 23, 3),
    "xception": Encoder(xception.from_config),
    **{name: Encoder(functools.partial(efficientnet.from_config, **size)) for name, size in efficientnet.SIZES.items()},
    **{name: Encoder(functools.partial(vit.from_config, **fields)) for name, fields in vit.SIZES.items()},
}

# Name -> constructor that takes config.model, the encoder, the number of classes, dtype and param_dtype. It raises
# ConfigError, saying why, if the decoder cannot use the feature maps of the encoder.
DECODERS = {"deeplabv3plus": deeplabv3plus.from_config, "dpt": dpt.from_config, "linear": linear.from_config}


def build(model, num_classes: int) -> Network:
    """Returns the network of `config.model`, whose values `check` has accepted."""
    types = {"dtype": jnp.dtype(model.dtype), "param_dtype": jnp.dtype(model.param_dtype)}
    encoder = ENCODERS[model.encoder].build(model, **types)
    decoder = DECODERS[model.decoder](model, encoder, num_classes, **types)
    return Network(encoder, decoder, num_classes, dtype=types["dtype"])


def decoder_misfits(model) -> dict[str, str]:
    """Returns for each decoder why it does not fit the encoder of `config.model`; "" if it does."""
    types = {"dtype": jnp.dtype(model.dtype), "param_dtype": jnp.dtype(model.param_dtype)}
    encoder = ENCODERS[model.encoder].build(model, **types)

    def reason(decoder: str) -> str:
        try:
            DECODERS[decoder](model, encoder, 2, **types)
        except ConfigError as error:
            return str(error)
        return ""

    return {name: reason(name) for name in DECODERS}


def variants(encoder: str) -> tuple[dict, ...]:
    """Returns the variants of an encoder: values of keys of config.model, such as {"stem": "7x7", ...}."""
    return ENCODERS[encoder].variants


def check(model) -> None:
    """Raises ConfigError if `config.model` names an unknown network.

    Likewise for a variant that its encoder does not have, and for a decoder that does not fit the encoder.
    """
    check_choice("config.model.encoder", model.encoder, ENCODERS)
    check_choice("config.model.decoder", model.decoder, DECODERS)
    defaults = get_config().model
    for key in sorted({key for entry in ENCODERS.values() for variant in entry.variants for key in variant}):
        known = list(dict.fromkeys(variant.get(key, defaults[key]) for variant in variants(model.encoder)))
        if model[key] not in known and len(known) == 1:
            raise ConfigError(f"config.model.{key} is {model[key]!r}; {model.encoder} has only {known[0]!r}")
        check_choice(f"config.model.{key}", model[key], known)
    reasons = decoder_misfits(model)
    if reasons[model.decoder]:
        fitting = ", ".join(name for name, reason in reasons.items() if not reason)
        raise ConfigError(f"{reasons[model.decoder]}; decoders for this encoder: {fitting}")
