"""Generated shapes (6 classes, one of them rare), without any download: the data of `make demo`.

    python main.py --config=configs/shapes.py --workdir=/tmp/shapes
    python main.py --config=configs/shapes.py:method=supervised,labeled=16 --workdir=/tmp/shapes_supervised

Arguments: labeled (number of labeled images), encoder, decoder, method, crop, steps. Vision transformers, such as
dinov2_w64, run too (crop 56 or 48), with a learning rate by whether weights are pretrained; nothing was searched.
"""

from configs import arguments, encoders
from input_pipeline.class_names import SHAPES_CLASSES


def get_config(argument: str | None = None):
    values = arguments.parse(
        argument, labeled=8, encoder="resnet18w16", decoder="", method="dssn", crop=49, steps=400
    )  # fmt: skip
    config = arguments.recipe("shapes", values, SHAPES_CLASSES)
    config.data.source = "shapes"
    config.data.scale = (0.8, 1.5)  # At half the size of a small image its classes are not recognizable.
    config.data.shapes.size = 64
    config.data.shapes.labeled = values["labeled"]
    config.data.shapes.val = 128
    # Hue distinguishes these classes, so a view must not change it.
    config.views.hue = 0.0
    config.views.gray = 0.0
    # With 8 labels and random initial weights, many mixed views of many images help most (docs/results).
    config.views.mix_partner = "other"
    config.views.cutmix = 0.8
    config.model.decoder_channels = 32
    config.method.feature_dropout = 0.2  # Half of only 16 channels would be too many.
    config.method.strong_weight *= 2
    # Searched for every method (docs/results/shapes_search.md).
    config.optimizer.lr = 0.02 if values["method"] == "dssn" else 0.05
    if encoders.find_family(values["encoder"]) is not None:
        config.optimizer.lr = 0.0  # By the weights.
    config.optimizer.lr_mults = ()
    config.train.steps = values["steps"]
    # In a run this short the teacher must follow the student within about 25 steps, not 250.
    config.ema.decay = 0.96
    config.train.eval_every = 100
    config.train.log_every = 25
    config.eval.batch = 32
    return arguments.finish(config)
