"""Generated shapes (6 classes, one of them rare): the embedded default, no download; what `make demo` trains on.

    python main.py --config=configs/shapes.py --workdir=/tmp/shapes
    python main.py --config=configs/shapes.py:method=supervised,labeled=16 --workdir=/tmp/shapes_supervised

Arguments: labeled (number of labeled images), backbone, method, crop, steps.
"""

from configs import arguments, defaults, methods
from input_pipeline.shapes import SHAPES_CLASSES


def get_config(argument: str | None = None):
    values = arguments.parse(argument, labeled=16, backbone="resnet18w16", method="dssn", crop=65, steps=200)
    config = defaults.get_config()
    config.name = arguments.describe("shapes", values)
    config.data.source = "shapes"
    config.data.classes = SHAPES_CLASSES
    config.data.crop = values["crop"]
    config.data.shapes.labeled = values["labeled"]
    config.model.backbone = values["backbone"]
    config.model.decoder_channels = 64
    config.optimizer.lr = 0.05
    config.optimizer.lr_multi = 1.0
    config.train.steps = values["steps"]
    # A run is so short that the teacher must follow the student sooner than over 250 steps.
    config.teacher.keep_rate = 0.98
    config.teacher.warmup_steps = 50
    config.train.eval_every = 100
    config.train.log_every = 25
    methods.apply(config, values["method"])
    return config
