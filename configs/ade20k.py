"""ADE20K, SceneParsing benchmark of 2016 (150 classes); recipe of UniMatch V2, TPAMI 2025.

    python main.py --config=configs/ade20k.py:split=1_8 --config.data.root=/data/ade20k \\
        --config.model.pretrained=dinov2_vitb14_pretrain.pth --workdir=/runs/ade8

Arguments: split (1_64, 1_32, 1_16, 1_8, 1_4, 1_2), encoder, decoder, method, crop (518; 512 with DINOv3).
Masks hold class ids from 0 with 255 ignored, as UniMatch V2 distributes them; docs/data.md says how to read those of
the benchmark, which count from 1. DSSN has no recipe for this data set, so the defaults are those of UniMatch V2, and a
convolutional encoder takes the rates of COCO. Published mIoU: docs/encoders.md.
"""

from configs import arguments, encoders

# The first name in each line of the benchmark's list of objects, in its order.
CLASSES = (
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet", "sidewalk",
    "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water", "painting", "sofa",
    "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp",
    "bathtub", "railing", "cushion", "base", "box", "column", "signboard", "chest of drawers", "counter", "sand",
    "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path", "stairs", "runway", "case", "pool table",
    "pillow", "screen door", "stairway", "river", "bridge", "bookcase", "blind", "coffee table", "toilet", "flower",
    "book", "hill", "bench", "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair", "boat", "bar",
    "arcade machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier", "awning", "streetlight",
    "booth", "television receiver", "airplane", "dirt track", "apparel", "pole", "land", "bannister", "escalator",
    "ottoman", "bottle", "buffet", "poster", "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer",
    "plaything", "swimming pool", "stool", "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven",
    "ball", "food", "step", "tank", "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher",
    "screen", "blanket", "sculpture", "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier",
    "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator", "glass", "clock", "flag",
)  # fmt: skip


def get_config(argument: str | None = None):
    values = arguments.parse(
        argument, split="1_8", encoder="dinov2_base", decoder="", method="unimatch_v2", crop=513
    )  # fmt: skip
    config = arguments.recipe("ade20k", values, CLASSES)
    config.data.splits = "splits/ade20k"
    if encoders.find_family(values["encoder"]) is None:
        config.optimizer.lr = 0.004
        config.optimizer.lr_mults = (("decoder/", 10.0),)
        config.train.epochs = 60
    return arguments.finish(config)
