"""The programs of the recipes lower for a TPU, at their full size; neither a TPU nor data is needed."""

import importlib
import re

import jax
import jax.export  # Not imported by `import jax`.
import numpy as np
import pytest

from benchmarks.scaling import abstract_step
from dssn_jax import models, sharding
from dssn_jax.evaluation import evaluate
from dssn_jax.learner import learner as experiment

# (backbone, side of a training crop, images that an evaluation sees).
RECIPES = {
    "pascal": ("resnet101", 513, (513, 513)),
    "cityscapes": ("resnet101", 801, (1024, 2048)),
    "coco": ("xception", 513, (641, 641)),
}
BATCH = 8


def recipe(name: str, dtype: str):
    """The configuration of a recipe, and the mesh of all devices."""
    config = importlib.import_module(f"configs.{name}").get_config()
    assert RECIPES[name][:2] == (config.model.encoder, config.data.crop)
    config.model.dtype = dtype
    return config, sharding.make_mesh()


def check_program(exported: jax.export.Exported, dtype: str) -> None:
    """The program is for a TPU, knows all sizes, and asks for nothing that a TPU lacks; convolutions are in `dtype`."""
    assert exported.platforms == ("tpu",) and exported.nr_devices == jax.device_count()
    text = exported.mlir_module()
    types = set(re.findall(r"tensor<([^>]*)>", text))
    assert not any("f64" in each or "?" in each for each in types)
    convolutions = re.findall(r"stablehlo\.convolution.* -> tensor<([^>]*)>", text)
    assert {each.rpartition("x")[2] for each in convolutions} == {{"bfloat16": "bf16", "float32": "f32"}[dtype]}
    # Shardings are attributes, and neither sorting nor random numbers need a library: no call is left.
    assert "custom_call" not in text


# The dtype matters little to what is lowered, so that each recipe comes with one.
@pytest.mark.parametrize(("name", "dtype"), [("pascal", "bfloat16"), ("cityscapes", "float32"), ("coco", "float32")])
def test_the_training_step(name, dtype):
    config, mesh = recipe(name, dtype)
    assert config.views.device and config.method.teacher == "teacher"
    assert config.data.labeled_batch == config.data.unlabeled_batch == BATCH
    step, state, batch = abstract_step(config, mesh)
    assert "image_s1" not in batch and state.teacher_params is not None
    exported = jax.export.export(step, platforms=["tpu"])(state, batch)
    check_program(exported, dtype)
    new_state, metrics = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    before, after = ([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(each)] for each in (state, new_state))
    assert before == after
    assert {"loss", "loss_x", "loss_s2", "loss_fp2", "contrast_image", "grad_norm", "lr"} <= set(metrics)
    assert all(metric.shape == () for metric in metrics.values())


@pytest.mark.parametrize("name", RECIPES)
def test_the_evaluation_step(name):
    config, mesh = recipe(name, "float32")
    assert config.eval.mode == ("sliding_window" if name == "cityscapes" else "original")
    classes, size = len(config.data.classes), RECIPES[name][2]
    score = evaluate.Evaluator(models.build(config.model, classes), config, mesh)._score
    shapes = {"images": ((BATCH, *size, 3), np.uint8), "labels": ((BATCH, *size), np.uint8)}
    shapes["sizes"] = ((BATCH, 2), np.int32)
    batch = {key: jax.ShapeDtypeStruct(*each) for key, each in shapes.items()}
    exported = jax.export.export(score, platforms=["tpu"])(experiment.abstract_state(config, mesh).teacher, batch)
    check_program(exported, "float32")
    confusion, class_maps = exported.out_avals
    assert (confusion.shape, confusion.dtype) == ((classes, classes), np.int32)
    assert (class_maps.shape, class_maps.dtype) == ((BATCH, *size), np.uint8)
