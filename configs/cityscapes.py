"""Cityscapes (19 classes, train ids); recipes of DSSN, ACM MM 2023, and UniMatch V2.

    python main.py --config=configs/cityscapes.py:split=1_8 --config.data.root=/data/cityscapes --workdir=/runs/city8
    python main.py --config=configs/cityscapes.py:split=1_8,encoder=dinov2_base,method=unimatch_v2 \\
        --config.data.root=/data/cityscapes --config.model.pretrained=dinov2_vitb14_pretrain.pth --workdir=/runs/city_v2

Arguments: split (1_16, 1_8, 1_4, 1_2; UniMatch also has 1_30), encoder, decoder, method (dssn), crop (801; 798 and 800
with DINOv2 and DINOv3).
Published mIoU (%), crop 801, better of student and teacher: ResNet-101 1_16: 76.69, 1_8: 78.18, 1_4: 78.92, 1_2: 79.58;
ResNet-50 75.41, 77.31, 78.05, 78.73. With DINOv2: docs/encoders.md.
"""

from configs import arguments, encoders

CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip


_CROP = 801
_MIN_KEPT = 100000  # Hard pixels of OHEM per image of the recipe's crop: 200000 per GPU, which has two labeled images.


def get_config(argument: str | None = None):
    values = arguments.parse(argument, split="1_8", encoder="resnet101", decoder="", method="dssn", crop=_CROP)
    config = arguments.recipe("cityscapes", values, CLASSES)
    config.data.splits = "splits/cityscapes"
    config.eval.mode = "sliding_window"
    config.method.labeled_loss = "ohem"
    crop = encoders.nearest_crop(values["encoder"], _CROP)
    config.method.ohem_min_kept = round(_MIN_KEPT * (config.data.crop / crop) ** 2)
    if encoders.find_family(values["encoder"]) is None:
        config.optimizer.lr = 0.005
        config.optimizer.lr_mults = ()
        config.ema.warmup_epochs = 5
        config.train.epochs = 240
        config.method.selection = "threshold"
        config.method.threshold = 0.0  # Selects every pixel, with all methods.
    else:  # The supervised baseline has four labeled images per GPU, and the same 200000 pixels.
        config.method.ohem_group *= config.method.labeled_batch_factor
        config.method.ohem_min_kept //= config.method.labeled_batch_factor
    return arguments.finish(config)
