"""Cityscapes (19 classes, train ids); recipe of DSSN, ACM MM 2023.

    python main.py --config=configs/cityscapes.py:split=1_8 --config.data.root=/data/cityscapes --workdir=/runs/city8

Arguments: split (1_16, 1_8, 1_4, 1_2; UniMatch also has 1_30), encoder, method, crop.
Published mIoU (%), crop 801, better of student and teacher: ResNet-101 1_16: 76.69, 1_8: 78.18, 1_4: 78.92, 1_2: 79.58;
ResNet-50 75.41, 77.31, 78.05, 78.73.
"""

from configs import arguments

SPLITS = ("1_30", "1_16", "1_8", "1_4", "1_2")
CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip


def get_config(argument: str | None = None):
    values = arguments.parse(argument, split="1_8", encoder="resnet101", method="dssn", crop=801)
    config = arguments.recipe("cityscapes", values, CLASSES, SPLITS)
    config.data.splits = "splits/cityscapes"
    config.optimizer.lr = 0.005
    config.optimizer.lr_mults = ()
    config.ema.warmup_epochs = 5
    config.train.epochs = 240
    config.eval.mode = "sliding_window"
    config.method.selection = "threshold"
    config.method.threshold = 0.0  # Selects every pixel, with all methods.
    config.method.labeled_loss = "ohem"
    config.method.ohem_min_kept = round(100000 * (config.data.crop / 801) ** 2)  # 100000 per image at crop 801.
    return config
