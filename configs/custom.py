"""Your own data: a folder with images, some masks and the names of the classes. docs/custom_data.md is the guide.

    python main.py --config=configs/custom.py:root=/data/mine --mode=check
    python main.py --config=configs/custom.py:root=/data/mine --workdir=/runs/mine

Arguments and their defaults; paths are relative to root:

    root        (required) the folder
    names       classes.txt: one class name per line, in the order of the ids in the masks
    labeled     images: images with masks; a folder, or a list (.txt) of lines `image mask`
    masks       masks: the mask of images/a/b.jpg is masks/a/b.png, or masks/a/b_mask.png with mask_suffix=_mask
    unlabeled   unlabeled, if there is such a folder: images without masks; a folder or a list
    unmasked    refuse: images without a mask in labeled are an error; unlabeled: they are unlabeled images
    val         0.2: fraction of the labeled images for validation; or a folder (masks in val_masks) or a list
    split       a split in ROOT/splits, as made by --mode=split, instead of the above. If there are splits, set either
                split=NAME or labeled=images
    label_map   a file that maps mask values to classes
    ignore      mask values to ignore besides 255, such as 0+254

and encoder, decoder, method, pretrained, crop, steps. The method is chosen by the encoder, and crop, batch, number of
steps, evaluation interval and learning rate from the images, the memory and the weights (dssn_jax/auto_config.py); the
log says why.
"""

import os

from configs import arguments, encoders
from configs.checks import ConfigError, check_choice
from configs.defaults import KEYS
from configs.kinds import show
from input_pipeline.class_names import read_class_names
from input_pipeline.errors import DataError

_SPLITS = "splits"
_FEW_LABELS = (
    "fixmatch_balanced",
    "4.8 and 10.6 points of mean IoU above the supervised baseline on CamVid with 23 and 46 labels, where DSSN is "
    "below it (docs/results/camvid.md)",
)
_TRANSFORMERS = ("unimatch_v2", "published with vision transformers (docs/encoders.md)")


def get_config(argument: str | None = None):
    values = arguments.parse(
        argument, root="", names="classes.txt", labeled="", masks="masks", mask_suffix="", unlabeled="",
        unmasked="refuse", val="0.2", val_masks="", split="", label_map="", ignore="", encoder="resnet50",
        decoder="", method="", pretrained="", crop=0, steps=0,
    )  # fmt: skip
    reason = ""
    if not values["method"]:
        values["method"], reason = _FEW_LABELS if encoders.find_family(values["encoder"]) is None else _TRANSFORMERS
    root = os.path.expanduser(values["root"])
    if not root:
        raise ConfigError("configs/custom.py needs the folder of your images: configs/custom.py:root=FOLDER")
    if not os.path.isdir(root):
        raise ConfigError(f"configs/custom.py:root={show(values['root'])}: no such folder, expected that of images")
    _check_splits(root, values)
    check_choice("unmasked", values["unmasked"], KEYS["data"]["folders"]["unmasked"].kind.names)
    config = arguments.recipe("custom", values, _class_names(os.path.join(root, values["names"])))
    shown = {"root": values["root"], "split": values["split"] or "-"}
    config.name = arguments.describe("custom", shown | {key: values[key] for key in ("encoder", "method")})
    config.method.reason = reason
    config.data.root = values["root"]
    config.data.label_map = values["label_map"]
    config.data.ignore_values = _ignored(values["ignore"])
    config.data.splits = _SPLITS
    if not values["split"]:
        config.data.folders.update({key: values[key] for key in config.data.folders})
        config.data.folders.labeled = values["labeled"] or "images"
        if not values["unlabeled"] and os.path.isdir(os.path.join(root, "unlabeled")):
            config.data.folders.unlabeled = "unlabeled"
    config.data.val_overlap = "refuse"
    config.data.labeled_batch = config.data.unlabeled_batch = 0
    config.model.pretrained = values["pretrained"]
    config.optimizer.lr = 0.0
    config.train.epochs = 0
    config.train.steps = values["steps"]
    if values["steps"]:  # The teacher must follow the student within a quarter of a short run, and label before long.
        config.ema.decay = 1 - 1 / min(250, max(1, values["steps"] / 4))
        config.ema.warmup_steps = min(config.ema.warmup_steps, values["steps"] // 3)
    return arguments.finish(config)


def _class_names(path: str) -> tuple[str, ...]:
    try:
        return read_class_names(path)
    except DataError as error:
        raise ConfigError(f"{error} (configs/custom.py:names=FILE)") from None


def _ignored(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in text.split("+") if value)
    except ValueError:
        raise ConfigError(f"config argument ignore={text!r}: expected numbers, such as 0+254") from None


def _check_splits(root: str, values: dict) -> None:
    """Raises ConfigError if ROOT/splits has splits and the arguments choose neither one of them nor the folders."""
    folder = os.path.join(root, _SPLITS)
    if values["split"] or values["labeled"] or not os.path.isdir(folder):
        return
    known = sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)))
    if known:
        raise ConfigError(
            f"{folder} has splits: set split=NAME, one of {', '.join(known)}; or labeled=images, for the folders"
        )
