"""Base of the golden cases: weights and inputs are not stored, but computed from their names."""

import functools
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from dssn_jax.evaluation import inference, metrics
from dssn_jax.learner.learner import init_variables
from dssn_jax.models.extent import Extent
from dssn_jax.models.network import Network
from dssn_jax.weights import names

FLOAT64 = {"dtype": "float64", "param_dtype": "float64"}
# Each program runs only a few times, so compile time counts more; but it is large, so some optimization pays.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": False}
)


def normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns standard normal float32 numbers that depend on `key` alone."""
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)


class Case:
    """A case of a folder: its manifest entry, stored arrays, inputs and network."""

    def __init__(self, folder: pathlib.Path, manifest: dict, entry: dict):
        self.entry, self.seed = entry, manifest["seed"]
        with np.load(folder / entry["file"]) as stored:
            self.stored = dict(stored)

    def input(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """Returns the made-up float64 input called `name`."""
        return jnp.asarray(normal(f"{self.seed}input:{name}", tuple(shape)), jnp.float64)

    def network(self) -> Network:
        """Returns the network of the case, in float64."""
        raise NotImplementedError

    def weight(self, seed: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the made-up float32 weight called `name` in the PyTorch state dict, in PyTorch's `shape`."""
        raise NotImplementedError

    def variables(self, seed_suffix: str = "") -> dict:
        """Returns variables filled by `weight`."""
        shapes = abstract_variables(self.network())
        seed = self.seed + seed_suffix
        filled = {name: self.weight(seed, name, shape) for name, shape in names.shapes(shapes).items()}
        return names.from_state_dict(filled, shapes)


@functools.cache
def abstract_variables(network: Network) -> dict:
    """Returns the shapes and dtypes of the network's variables."""
    return jax.eval_shape(functools.partial(init_variables, network), jax.random.PRNGKey(0))


def named(variables: dict, prefix: str) -> dict[str, np.ndarray]:
    """Returns variables, or gradients of parameters, by `prefix` and name in the PyTorch state dict."""
    return {prefix + name: value for name, value in names.to_state_dict(variables).items()}


def evaluate(case: Case, variables: dict, windows: str) -> dict[str, np.ndarray]:
    """Computes class maps and IoU of whole-image and sliding-window prediction of one padded batch.

    `windows` is that of `config.eval`.
    """
    count = sum(name.endswith("/mask") for name in case.stored)
    images = [case.input(f"eval{i}", case.stored[f"{i}/shape"])[0] for i in range(count)]
    masks = [case.stored[f"{i}/mask"].reshape(image.shape[:2]) for i, image in enumerate(images)]
    sizes = np.array([image.shape[:2] for image in images])
    padding = [[(0, most - side) for most, side in zip(sizes.max(0), size, strict=True)] for size in sizes]
    batch = jnp.stack([jnp.pad(image, [*pad, (0, 0)]) for image, pad in zip(images, padding, strict=True)])
    labels = jnp.stack([jnp.pad(mask, pad, constant_values=255) for mask, pad in zip(masks, padding, strict=True)])
    extent = Extent(*jnp.asarray(sizes.T, jnp.int32))
    outputs = {}
    for mode, window in (("original", 0), ("sliding", case.entry["crop"])):
        predict = jit(inference.Inference(case.network(), window, windows).predict)
        predictions, _ = predict(variables, batch, extent)
        for i, (height, width) in enumerate(sizes):
            outputs[f"{i}/pred_{mode}"] = predictions[i, :height, :width].reshape(case.stored[f"{i}/mask"].shape)
        iou = 100 * metrics.iou(metrics.confusion_matrix(predictions, labels, case.entry["num_classes"]))
        outputs |= {f"iou_{mode}": iou, f"miou_{mode}": iou.mean()}
    return outputs
