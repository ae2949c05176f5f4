"""COCO 2017 (80 classes and background); recipes of DSSN, ACM MM 2023, and UniMatch V2.

    python main.py --config=configs/coco.py:split=1_128 --config.data.root=/data/coco --workdir=/runs/coco128

Arguments: split (1_512, 1_256, 1_128, 1_64, 1_32), encoder, decoder, method (dssn), crop (513; 518 and 512 with DINOv2
and DINOv3).
"""

from configs import arguments, encoders

CLASSES = (
    "background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep",
    "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


def get_config(argument: str | None = None):
    values = arguments.parse(argument, split="1_128", encoder="xception", decoder="", method="dssn", crop=513)
    config = arguments.recipe("coco", values, CLASSES)
    config.data.splits = "splits/coco"
    if encoders.find_family(values["encoder"]) is None:
        config.optimizer.lr = 0.004
        config.optimizer.lr_mults = (("decoder/", 10.0),)
        config.train.epochs = 30
    return arguments.finish(config)
