"""CamVid (11 classes of street scenes, 480x360): small enough for development and comparisons.

    python main.py --config=configs/camvid.py:split=1_8 --config.data.root=/data/camvid --workdir=/runs/camvid8

Arguments: split (1_16, 1_8, 1_4, full), encoder, method, crop. The lists are in ROOT/splits.
There is no published recipe: crop 321 and the selection of VOC, with a learning rate for random initial weights.
"""

from configs import arguments

SPLITS = ("1_16", "1_8", "1_4", "full")
CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip


def get_config(argument: str | None = None):
    values = arguments.parse(argument, split="1_8", encoder="resnet50", method="dssn", crop=321)
    config = arguments.recipe("camvid", values, CLASSES, SPLITS)
    config.optimizer.lr = 0.02
    config.optimizer.lr_mults = ()
    config.train.epochs = 200
    config.train.eval_every = 450
    return config
