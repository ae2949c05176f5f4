"""The programs of the recipes lower for a TPU, at their full size; neither a TPU nor data is needed."""

import importlib
import re

import jax
import jax.export  # Not imported by `import jax`.
import numpy as np
import pytest

from dssn_jax.evaluation.evaluate import Evaluator
from dssn_jax.learner import learner as learners
from input_pipeline.batch import Batch

pytestmark = pytest.mark.slow
BATCH = 8


def build(name: str, encoder: str, dtype: str, argument: str | None = None, **keys) -> learners.Learner:
    """Returns the learner of a recipe, with values of SECTION__KEY, for all devices."""
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    assert config.model.encoder == encoder and config.method.teacher == "ema"
    config.model.dtype = dtype
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    return learners.build(config)


def shape(*size: int, dtype=np.uint8) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(size, dtype)


def check_program(exported: jax.export.Exported, dtype: str) -> None:
    """Checks that the program has static shapes, convolutions in `dtype`, and asks for nothing that a TPU lacks."""
    assert exported.platforms == ("tpu",) and exported.nr_devices == jax.device_count()
    text = exported.mlir_module()
    types = set(re.findall(r"tensor<([^>]*)>", text))
    assert not any("f64" in each or "?" in each for each in types)
    convolutions = re.findall(r"stablehlo\.convolution.* -> tensor<([^>]*)>", text)
    assert {each.rpartition("x")[2] for each in convolutions} == {dtype}
    # Shardings are attributes, and neither sorting nor random numbers need a library: no call is left.
    assert "custom_call" not in text


# One dtype per recipe: it matters little to what is lowered.
@pytest.mark.parametrize(("name", "encoder", "dtype"), [("pascal", "resnet101", "bf16"), ("coco", "xception", "f32")])
def test_the_training_step(name, encoder, dtype):
    learner = build(name, encoder, {"bf16": "bfloat16", "f32": "float32"}[dtype])
    state, crop = learner.abstract_state(), learner.config.data.crop
    assert crop == 513 and state.teacher is not None
    images, masks = shape(BATCH, crop, crop, 3), shape(BATCH, crop, crop, dtype=bool)
    labels, boxes = shape(BATCH, crop, crop), shape(BATCH, 2, 4, dtype=np.int32)
    batch = Batch(images, labels, images, masks, images, masks, boxes)
    exported = jax.export.export(learner.make_train_step(), platforms=["tpu"])(state, batch)
    check_program(exported, dtype)
    new_state, metrics = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    before, after = ([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(each)] for each in (state, new_state))
    assert before == after
    assert {"loss", "loss_x", "loss_s2", "loss_fp2", "contrast_image", "grad_norm", "lr"} <= set(metrics)
    shapes = {name: metric.shape for name, metric in metrics.items() if metric.shape}
    assert shapes == {"pseudo_labels": (len(learner.config.data.classes),)}


def test_the_training_step_with_labeled_partners():
    """And pasted classes, and class weights."""
    keys = {"views__mix_partner": "labeled", "views__paste_classes": 2, "method__class_weight_power": 0.5}
    learner = build("pascal", "resnet101", "float32", **keys, data__class_pixels=tuple(range(1, 22)))
    crop = learner.config.data.crop
    images, labels = shape(BATCH, crop, crop, 3), shape(BATCH, crop, crop)
    batch = Batch(images, labels, images, shape(BATCH, crop, crop, dtype=bool), images, label_m=labels)
    batch = batch._replace(boxes=shape(BATCH, 2, 4, dtype=np.int32), classes=shape(BATCH, 2, 21, dtype=bool))
    exported = jax.export.export(learner.make_train_step(), platforms=["tpu"])(learner.abstract_state(), batch)
    check_program(exported, "f32")


@pytest.mark.parametrize(
    ("method", "encoder", "crop", "dtype"),
    [("unimatch_v2", "dinov2_small", 518, "bf16"), ("dssn", "dinov3_small", 512, "f32")],
)
def test_the_training_step_of_a_vision_transformer(method, encoder, crop, dtype):
    name = {"bf16": "bfloat16", "f32": "float32"}[dtype]
    learner = build("pascal", encoder, name, f"encoder={encoder},method={method}")
    assert learner.config.data.crop == crop and learner.config.views.mix_partner == "reversed"
    images, masks = shape(BATCH, crop, crop, 3), shape(BATCH, crop, crop, dtype=bool)
    batch = Batch(images, shape(BATCH, crop, crop), images, masks, boxes=shape(BATCH, 2, 4, dtype=np.int32))
    state = learner.abstract_state()
    exported = jax.export.export(learner.make_train_step(), platforms=["tpu"])(state, batch)
    check_program(exported, dtype)
    new_state, metrics = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    before, after = ([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(each)] for each in (state, new_state))
    assert before == after
    assert ("contrast_feature" in metrics) == (method == "dssn") and "loss_s2" in metrics


def test_the_evaluation_step():
    """Sliding windows over full-size Cityscapes images."""
    learner = build("cityscapes", "resnet101", "float32")
    assert learner.config.eval.mode == "sliding_window"
    classes, size = len(learner.config.data.classes), (1024, 2048)
    batch = {
        "images": shape(BATCH, *size, 3), "labels": shape(BATCH, *size), "sizes": shape(BATCH, 2, dtype=np.int32),
    }  # fmt: skip
    variables = learner.abstract_state().networks()["teacher"]
    exported = jax.export.export(Evaluator(learner)._score, platforms=["tpu"])(variables, batch)
    check_program(exported, "f32")
    confusion, class_maps, _ = exported.out_avals
    assert (confusion.shape, confusion.dtype) == ((classes, classes), np.int32)
    assert (class_maps.shape, class_maps.dtype) == ((BATCH, *size), np.uint8)
