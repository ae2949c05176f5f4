"""Checks that images in padded batches get the logits that they get alone: `python -m tests.sizes`.

Alone is PyTorch: the twin of `benchmarks/torch_twin.py` sees each image at its own size, in float64. Prints a line for
each backbone and output stride, and exits with 1 if an error is over 1e-9.
"""

import argparse
import os
import sys

os.environ["JAX_ENABLE_X64"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np
import torch

from dssn_jax import models
from dssn_jax.models.extent import Extent
from dssn_jax.weights import names as state_dicts
from tests import golden
from tests.reference import torch_twin

TOLERANCE, CLASSES, BATCH = 1e-9, 19, 10


def twin(backbone: str, output_stride: int) -> torch.nn.Module:
    """The PyTorch network with made-up weights, in evaluation mode."""
    network = torch_twin.DeepLabV3Plus(backbone, CLASSES, output_stride=output_stride).double().eval()
    weights = {name: tuple(value.shape) for name, value in network.state_dict().items() if "num_batches" not in name}
    filled = {name: torch.from_numpy(golden.weight("", name, shape)).double() for name, shape in weights.items()}
    network.load_state_dict(filled, strict=False)
    return network


def largest_error(backbone: str, output_stride: int, sizes: np.ndarray) -> float:
    """The largest difference from the twin's logits, relative to their largest, over images of `sizes` [n, 2]."""
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model = models.DeepLabV3Plus(models.BACKBONES[backbone](output_stride=output_stride, **types), CLASSES, **types)
    network = twin(backbone, output_stride)
    state_dict = {name: value.numpy() for name, value in network.state_dict().items()}
    variables = state_dicts.from_state_dict(state_dict, golden.abstract_variables(model))
    apply = golden.jit(lambda x, extent: model.apply(variables, x, extent=extent))
    images = golden.normal("sizes", (len(sizes), *sizes.max(0), 3)).astype(np.float64)
    worst = 0.0
    for start in range(0, len(sizes), BATCH):
        rows = slice(start, start + BATCH)
        found = np.asarray(apply(images[rows], Extent(*jnp.asarray(sizes[rows].T, jnp.int32))))
        for logits, image, (height, width) in zip(found, images[rows], sizes[rows], strict=True):
            alone = torch.from_numpy(image[None, :height, :width].transpose(0, 3, 1, 2).copy())
            with torch.no_grad():
                expected = network(alone)[0].permute(1, 2, 0).numpy()
            worst = max(worst, golden.relative_error(logits[:height, :width], expected))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet50", "resnet101", "xception"])
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--largest", type=int, default=80, help="largest side, pixels")
    arguments = parser.parse_args()
    sizes = np.random.default_rng(0).integers(9, arguments.largest, (arguments.images, 2), endpoint=True)
    sizes = np.concatenate([sizes, sizes[: -len(sizes) % BATCH]])  # Full batches: one compilation.
    passed = True
    for backbone in arguments.backbones:
        for output_stride in (16, 8):
            error = largest_error(backbone, output_stride, sizes)
            passed &= error <= TOLERANCE
            verdict = "ok    " if error <= TOLERANCE else "FAILED"
            what = f"{verdict} {backbone:10s} output stride {output_stride:2d}, {len(set(map(tuple, sizes)))} sizes"
            print(f"{what}: error {error:.1e} <= {TOLERANCE:.0e}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
