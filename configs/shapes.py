"""Generated shapes (6 classes, one of them rare): the embedded default, no download; what `make demo` trains on.

    python main.py --config=configs/shapes.py --workdir=/tmp/shapes
    python main.py --config=configs/shapes.py:method=supervised,labeled=16 --workdir=/tmp/shapes_supervised

Arguments: labeled (number of labeled images), encoder, method, crop, steps.
"""

from configs import arguments, defaults, methods
from input_pipeline.sources.shapes import SHAPES_CLASSES


def get_config(argument: str | None = None):
    values = arguments.parse(argument, labeled=8, encoder="resnet18w16", method="dssn", crop=49, steps=400)
    config = defaults.get_config()
    config.name = arguments.describe("shapes", values)
    config.data.source = "shapes"
    config.data.classes = SHAPES_CLASSES
    config.data.crop = values["crop"]
    config.data.scale = (0.8, 1.5)  # Half of a small image is too small to tell its classes.
    config.data.shapes.size = 64
    config.data.shapes.labeled = values["labeled"]
    config.data.shapes.val = 128
    # Hue tells these classes, so a view that changes it has no label any more.
    config.views.hue = 0.0
    config.views.gray = 0.0
    # 8 labels and random weights: what helps most is many mixed views of many images (README, "Results so far").
    config.views.mix_partner = "other"
    config.views.cutmix = 0.8
    config.model.encoder = values["encoder"]
    config.model.decoder_channels = 32
    config.method.feature_dropout = 0.2  # Of 16 channels, half cannot be missed.
    # Searched for every method (docs/results/shapes_search.md).
    config.optimizer.lr = 0.02 if values["method"] == "dssn" else 0.05
    config.optimizer.lr_mults = ()
    config.train.steps = values["steps"]
    # A run is so short that the teacher must follow the student within some 25 steps, not 250.
    config.ema.decay = 0.96
    config.train.eval_every = 100
    config.train.log_every = 25
    config.eval.batch = 32
    methods.apply(config, values["method"])
    if config.method.strong_views:
        config.method.strong_weight *= 2
    return config
