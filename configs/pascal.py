"""PASCAL VOC 2012 (21 classes), with the SBD masks in `SegmentationClass`; recipe of DSSN, ACM MM 2023.

    python main.py --config=configs/pascal.py:split=183 --config.data.root=/data/voc --workdir=/runs/voc183

Arguments: split (92, 183, 366, 732, 1464: labeled images of the original set; 1_16, 1_8, 1_4, 1_2: of the blended set;
u2pl_1_16, ...: the lists of U2PL), encoder, method, crop (513; UniMatch also reports 321).
Published, ResNet-101, crop 513, best mIoU of student or teacher: 92: 75.24, 183: 76.75, 366: 78.68, 732: 80.61,
1464: 81.18; blended 1_16: 78.53, 1_8: 79.58, 1_4: 79.45, 1_2: 79.96.
"""

from configs import arguments, defaults, methods
from configs.checks import check_choice

SPLITS = (
    "92",
    "183",
    "366",
    "732",
    "1464",
    "1_16",
    "1_8",
    "1_4",
    "1_2",
    "u2pl_1_16",
    "u2pl_1_8",
    "u2pl_1_4",
    "u2pl_1_2",
)
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


def get_config(argument: str | None = None):
    values = arguments.parse(argument, split="183", encoder="resnet101", method="dssn", crop=513)
    check_choice("split", values["split"], SPLITS)
    config = defaults.get_config()
    config.name = arguments.describe("pascal", values)
    config.data.splits = "splits/pascal"
    config.data.split = values["split"]
    config.data.classes = CLASSES
    config.data.crop = values["crop"]
    config.views.operations = (1, 3)
    config.model.encoder = values["encoder"]
    config.optimizer.lr = 0.002
    config.optimizer.lr_mults = (("decoder/", 10.0),)
    config.train.epochs = 100
    methods.apply(config, values["method"])
    return config
