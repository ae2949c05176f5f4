"""CamVid (11 classes of street scenes, 480x360): small enough for development and comparisons.

    python main.py --config=configs/camvid.py:split=1_8 --config.data.root=/data/camvid --workdir=/runs/camvid8

Arguments: split (1_16, 1_8, 1_4, full), encoder, decoder, method, crop, reduce. The lists are in ROOT/splits. With
reduce=2 images are trained on and predicted at half their size (scores count at full size), which two cores can train.
There is no published recipe: crop 321 (322 and 320 with DINOv2 and DINOv3) and the selection of VOC, with a learning
rate for random initial weights; with a vision transformer, one by whether weights are pretrained.
"""

from configs import arguments, encoders
from configs.checks import ConfigError

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip


def get_config(argument: str | None = None):
    values = arguments.parse(argument, split="1_8", encoder="resnet50", decoder="", method="dssn", crop=321, reduce=1)
    if values["reduce"] < 1:
        raise ConfigError(f"config argument reduce={values['reduce']}; expected at least 1")
    config = arguments.recipe("camvid", values, CLASSES)
    config.optimizer.lr = 0.02 if encoders.find_family(values["encoder"]) is None else 0.0
    config.optimizer.lr_mults = ()
    config.data.scale = tuple(scale / values["reduce"] for scale in config.data.scale)
    config.eval.scales = (1 / values["reduce"],)
    low, high = config.views.blur_sigma
    config.views.blur_sigma = (low, max(low, high / values["reduce"]))
    config.train.epochs = 200
    config.train.eval_every = 450
    return arguments.finish(config)
