"""PASCAL VOC 2012 (21 classes) with the SBD masks in `SegmentationClass`; recipes of DSSN and UniMatch V2.

    python main.py --config=configs/pascal.py:split=183 --config.data.root=/data/voc --workdir=/runs/voc183
    python main.py --config=configs/pascal.py:split=183,encoder=dinov2_base,method=unimatch_v2 \\
        --config.data.root=/data/voc --config.model.pretrained=dinov2_vitb14_pretrain.pth --workdir=/runs/voc183_v2

Arguments: split (number of labeled images of the original set: 92, 183, 366, 732, 1464; fraction of the blended set:
1_16, 1_8, 1_4, 1_2; the lists of U2PL: u2pl_1_16, ...), encoder, decoder, method, crop (513; UniMatch also reports
321; 518 and 512 with DINOv2 and DINOv3). The method is dssn unless it is given, whatever the encoder: the encoder
chooses the recipe (configs/encoders.py), the method what is trained.
Published mIoU (%), ResNet-101, crop 513, better of student and teacher: 92: 75.24, 183: 76.75, 366: 78.68, 732: 80.61,
1464: 81.18; blended 1_16: 78.53, 1_8: 79.58, 1_4: 79.45, 1_2: 79.96. With DINOv2: docs/encoders.md.
"""

from configs import arguments, encoders

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


def get_config(argument: str | None = None):
    values = arguments.parse(argument, split="183", encoder="resnet101", decoder="", method="dssn", crop=513)
    config = arguments.recipe("pascal", values, CLASSES)
    config.data.splits = "splits/pascal"
    if encoders.find_family(values["encoder"]) is None:
        config.views.operations = (1, 3)
        config.optimizer.lr = 0.002
        config.optimizer.lr_mults = (("decoder/", 10.0),)
        config.train.epochs = 100
    return arguments.finish(config)
