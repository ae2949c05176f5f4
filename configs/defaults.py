"""Every configuration key, once: its default, the values that it accepts, and what it means (docs/keys.md lists them).

A dataset file (`configs/pascal.py`, ...) starts from `get_config()` here and changes what its recipe changes; a user
changes any key on the command line (`--config.data.root=/data/voc`). A key that is not in this file does not exist.
`checks.check_values` tests values by this file; rules that combine keys are in `dssn_jax/validate.py`.
"""

from ml_collections import ConfigDict

from configs.kinds import (
    STORAGE,
    Bool,
    Choice,
    Float,
    Int,
    Key,
    Names,
    Pair,
    Path,
    Registered,
    Row,
    Section,
    Text,
    Tuple,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_PROBABILITY = Float(0, 1)
# A regular expression and a factor each.
_MULTS = Tuple(Row(Text(), Float()))
# Twice the sum of the levels of a crop must fit in 32 bits (`dssn_jax.methods.strong_augment.contrast`).
_CROP = Int(0, 2048)

_FOLDERS = Section(
    "Own images (configs/custom.py), where `data.split` is empty: folders, with their sub-folders, or lists (.txt), "
    "relative to `data.root`.",
    labeled=Key("", Path(), "Images with masks: a folder, or a list of lines `image mask`."),
    masks=Key("masks", Path(), "Folder of their masks: that of a/b.jpg is a/b.png, or with another suffix of images."),
    mask_suffix=Key(
        "", Text(), 'By which names of masks are longer: "_mask" where the mask of a/b.jpg is a/b_mask.png.'
    ),
    unlabeled=Key(
        "", Path(), 'Images whose masks, if any, are not read: a folder or a list. "": the labeled ones.'
    ),
    val=Key(
        "0.2", Path(), 'Images that validate: a fraction of the labeled ones that is held out, such as "0.2", or a '
        "folder or a list, whose images are left out of folders that hold them too.",
    ),
    val_masks=Key("", Path(), 'Folder of the masks, where `val` is a folder. "": `masks`.'),
    unmasked=Key(
        "refuse", Choice("refuse", "unlabeled"),
        "Images without a mask in the folder `labeled`. refuse: an error; unlabeled: unlabeled images.",
    ),
)  # fmt: skip

_TFDS = Section(
    'A data set of TensorFlow Datasets that is on disk, for `data.source = "tfds"`; TensorFlow is not needed.',
    name=Key(
        "", Text(), 'Such as "oxford_iiit_pet"; with a configuration "NAME/CONFIG", with a version "NAME:1.0.0".'
    ),
    data_dir=Key("", Path(), 'Folder of the data sets. "": $TFDS_DATA_DIR or ~/tensorflow_datasets.'),
    labeled=Key("train[:10%]", Text(), "Split of the labeled images, in the words of TFDS."),
    unlabeled=Key("train[10%:]", Text(), "Split of the unlabeled images."),
    val=Key("test", Text(), "Split of the validation images."),
    image=Key("image", Text(), "Feature that holds the image."),
    label=Key("segmentation_mask", Text(), "Feature that holds the mask."),
)  # fmt: skip

_SHAPES = Section(
    'The generated images of `data.source = "shapes"`.',
    size=Key(96, Int(32, 2048), "Side of an image.", "pixels"),
    labeled=Key(16, Int(1, 10**6), "Labeled images: the first of the unlabeled ones."),
    unlabeled=Key(512, Int(1, 10**6), "Unlabeled images."),
    val=Key(64, Int(1, 10**6), "Validation images."),
    seed=Key(0, Int(), "Another seed is another data set."),
)

_DATA = Section(
    "Images, masks and batches.",
    source=Key(
        "folder", Registered("input_pipeline.sources.open:SOURCES"),
        "folder: image files, which lists or folders name; array_record: the same, packed by --mode=records; tfds: a "
        "data set of TensorFlow Datasets; shapes: generated images, no files.",
    ),
    root=Key("", Path(), "Folder that the paths in the lists are relative to."),
    splits=Key(
        "splits", Path(), "Folder of the lists, relative to `root` or to the current folder: "
        "SPLITS/SPLIT/{labeled,unlabeled}.txt and SPLITS/val.txt, each line `image mask` (the mask may be left out in "
        "unlabeled.txt).",
    ),
    split=Key("", Text(), 'Name of the split. "": the images of `folders`.'),
    folders=_FOLDERS,
    val_overlap=Key(
        "allow", Choice("allow", "refuse"), "Whether validation images may be among labeled or unlabeled ones."
    ),
    classes=Key((), Names(least=2, most=255), "Class names, in the order of the ids in the masks."),
    ignore=Key(255, Int(0, 255), "Mask value that no loss and no score counts."),
    ignore_values=Key((), Tuple(Int(0, 65535)), "Further values of masks that are ignored; without a label map."),
    label_map=Key(
        "", Path(), "File that says which value of a mask means which class, relative to `root` or to the current "
        "folder: text or CSV with lines `ID CLASS`, or `RED GREEN BLUE CLASS` for masks of colors, or JSON "
        '{"ID": CLASS}. CLASS is a name, an id or "ignore". Values that are not in it are errors. "": values are ids.',
    ),
    crop=Key(
        513, _CROP, "Side of the square training crop; 0: chosen from the images (dssn_jax/auto_config.py).", "pixels"
    ),
    scale=Key((0.5, 2.0), Pair(Float(0.01, 100)), "The long side is scaled by U[scale] before the crop."),
    flip=Key(0.5, _PROBABILITY, "Probability of a horizontal flip."),
    labeled_batch=Key(
        8, Int(0, 4096), "Labeled images per step, over all devices and hosts; `method.labeled_batch_factor` "
        "multiplies them. 0: chosen from the memory of the devices.", "images",
    ),
    unlabeled_batch=Key(8, Int(0, 4096), "Unlabeled images per step, likewise.", "images"),
    labeled_sampling=Key(
        "uniform", Choice("uniform", "rare"), "How labeled images are drawn, and labeled CutMix partners. uniform: all "
        "equally often; rare: a class by its rarity, an image that has it, and a crop with some of it, as in DAFormer "
        "(docs/method.md, Eq. 24).",
    ),
    rare_temperature=Key(
        0.01, Float(1e-4, 100), "Temperature of the draw of classes by rarity; the lower, the more often the rarest."
    ),
    class_pixels=Key(
        (), Tuple(Int(0, 2**53), 0, 255), "Pixels of each class in the labeled images. (): counted in their masks, if "
        "`labeled_sampling`, `views.paste_classes`, `method.class_weight_power`, `method.logit_adjustment` or "
        "`method.align_classes` needs them.", "pixels",
    ),
    mean=Key(IMAGENET_MEAN, Tuple(_PROBABILITY, 3, 3), "Of RGB in [0, 1]; subtracted."),
    std=Key(IMAGENET_STD, Tuple(Float(0.001, 10), 3, 3), "Of RGB in [0, 1]; divided by."),
    workers=Key(0, Int(0, 256), "Processes that make batches; 0: threads of this process."),
    threads=Key(16, Int(1, 1024), "Threads (of each process) that decode and augment."),
    buffer=Key(2, Int(1, 100), "Batches (of each process) made ahead.", "batches"),
    tfds=_TFDS,
    shapes=_SHAPES,
)  # fmt: skip

_VIEWS = Section(
    "Strong views of an unlabeled image (docs/method.md, \"Views\"), with probabilities and ranges of UniMatch's "
    "transforms. They are drawn inside the training step, on the accelerator, with Pillow's 8-bit arithmetic.",
    jitter=Key(0.8, _PROBABILITY, "Probability of color jitter."),
    # Factors are at most 8 (`dssn_jax.methods.strong_augment`).
    brightness=Key(0.5, Float(0, 7), "The factor of brightness is U[1 - x, 1 + x]."),
    contrast=Key(0.5, Float(0, 7), "The factor of contrast is U[1 - x, 1 + x]."),
    saturation=Key(0.5, Float(0, 7), "The factor of saturation is U[1 - x, 1 + x]."),
    hue=Key(0.25, Float(0, 0.5), "The hue shifts by U[-x, x].", "color circle"),
    gray=Key(0.2, _PROBABILITY, "Probability of conversion to grayscale."),
    blur=Key(0.5, _PROBABILITY, "Probability of Gaussian blur."),
    blur_sigma=Key((0.1, 2.0), Pair(Float(0, 16)), "Range of the standard deviation of the blur.", "pixels"),
    operations=Key(
        (0, 0), Pair(Int(0, 32)),
        "Range of the number of operations drawn from the eleven of the VOC recipe; there (1, 3).",
    ),
    cutmix=Key(0.5, _PROBABILITY, "Probability of a CutMix box."),
    cutmix_area=Key((0.02, 0.4), Pair(Float(0, 1)), "Range of its area, as a fraction of the crop."),
    cutmix_aspect=Key((0.3, 1 / 0.3), Pair(Float(0.01, 100)), "Range of its aspect ratio."),
    mix_partner=Key(
        "same", Choice("same", "other", "reversed", "labeled"),
        "CutMix partner. same: another random view of the same image, as the released code of DSSN pairs them; other: "
        "a view of another image; reversed: another image of the same batch, as in UniMatch V2, in pairs of rows that "
        "swap their strong views: no partner is read, augmented or predicted, and each device needs an even number of "
        "unlabeled images; labeled: a labeled image, which brings its labels (docs/method.md, Eq. 21), so that classes "
        "that are never pseudo-labeled are in the strong views all the same.",
    ),
    paste_classes=Key(
        0, Int(0, 32), "Classes of a labeled partner whose pixels are all pasted, besides the box: drawn for each "
        "strong view from those in the partner's crop, by their rarity (docs/method.md, Eq. 22, "
        "`data.rare_temperature`). Needs `mix_partner` = labeled.", "classes",
    ),
)  # fmt: skip

_MODEL = Section(
    "The network.",
    encoder=Key("resnet101", Registered("dssn_jax.models:ENCODERS"), "Maps images to feature maps."),
    decoder=Key(
        "deeplabv3plus", Registered("dssn_jax.models:DECODERS"),
        "Maps feature maps to logits. deeplabv3plus: for convolutional encoders; dpt: for vision transformers, as in "
        "UniMatch V2; linear: batch norm and a 1x1 convolution on the last map, for any.",
    ),
    stem=Key(
        "deep", Choice("deep", "7x7", "deep_narrow"),
        "ResNet stem. deep: three 3x3 convolutions with 64, 64 and 128 channels (the original); 7x7: one convolution "
        "(torchvision, timm); deep_narrow: three with 32, 32 and 64 channels (timm's resnet50c, resnet50d).",
    ),
    shortcut=Key(
        "strided", Choice("strided", "average"), "ResNet shortcut where a block changes size. strided: 1x1 "
        "convolution; average: 2x2 average pooling, then 1x1 convolution (timm's resnet50d, resnet101d).",
    ),
    pretrained=Key(
        "", Path(STORAGE),
        "Weights to start from: a file of an encoder or of a whole network (.pth, .safetensors), or the "
        'work directory of a run (its student). "": random weights.',
    ),
    output_stride=Key(16, Choice(16, 8), "Of the last encoder stage."),
    aspp_dilations=Key((6, 12, 18), Tuple(Int(1, 256), 1, 16), "DeepLab doubles them at output stride 8."),
    decoder_channels=Key(256, Int(1, 4096), "Of ASPP and of deeplabv3plus.", "channels"),
    dtype=Key(
        "float32", Choice("float32", "bfloat16", "float64"),
        "Of the computation; float64 needs the environment variable JAX_ENABLE_X64=1.",
    ),
    param_dtype=Key("float32", Choice("float32", "bfloat16", "float64"), "Of parameters and running statistics."),
    remat=Key(False, Bool(), "Recompute blocks in the backward pass: less memory, more time."),
    attention=Key(
        "auto", Choice("auto", "xla", "cudnn"),
        "Of vision transformers. cudnn: NVIDIA's fused kernel, which needs bfloat16 and a GPU; xla: anywhere; auto: "
        "cudnn where it can run.",
    ),
    rope_rescale=Key(
        1.0, Float(1, 16), "Of DINOv3: in training, the positions in each block are scaled by exp(U[-ln x, ln x]), "
        "with 2 in its pretraining. 1: not.",
    ),
)  # fmt: skip

_METHOD = Section(
    "Streams and terms of the loss (docs/method.md, Eq. 1); `configs/methods.py` names the combinations. Without "
    "unlabeled streams (strong_views = feature_views = 0) the labeled loss remains.",
    name=Key("dssn", Text(), "The entry of configs/methods.py that filled this section."),
    reason=Key("", Text(), 'Why the config file chose this entry, for the log; "" if the user did.'),
    labeled_batch_factor=Key(
        1, Int(1, 16), "Labeled images per step are `data.labeled_batch` times this. 2 for the supervised baseline, "
        "which gives the place of the unlabeled images to labeled ones.",
    ),
    strong_views=Key(2, Int(0, 16), "Streams of strongly augmented views."),
    strong_perturb=Key(
        "none", Registered("dssn_jax.methods.perturbations:PERTURBATIONS"),
        "What happens to their features. dropout: channel dropout; complementary: channel dropout in pairs, which keep "
        "opposite channels.",
    ),
    feature_views=Key(2, Int(0, 16), "Streams of the weak view with perturbed features."),
    feature_perturb=Key(
        "dropout", Registered("dssn_jax.methods.perturbations:PERTURBATIONS"), "What happens to their features."
    ),
    feature_dropout=Key(0.5, Float(0, 0.99), "Probability that dropout drops a channel."),
    perturb_labeled=Key(
        True, Bool(), "Also decode channel-dropout views of the labeled images, as the original does. No loss reads "
        "them, but they take part in the decoder's batch statistics.",
    ),
    teacher=Key(
        "ema", Registered("dssn_jax.methods.method:TEACHERS"),
        "Source of the pseudo-labels of the strong views. ema: the EMA teacher; student_eval: the student with running "
        "statistics; student: the student's training forward for the weak view, its running statistics for the CutMix "
        "partner; none: no pseudo-labels (supervised).",
    ),
    strong_weight=Key(0.25, Float(), "Weight of the loss of each strong view."),
    feature_weight=Key(0.25, Float(), "Weight of the loss of each feature view."),
    image_contrast_weight=Key(0.01, Float(), "Weight of the contrast between the two strong views."),
    feature_contrast_weight=Key(0.01, Float(), "Weight of the contrast between the two feature views."),
    selection=Key(
        "class_aware", Registered("dssn_jax.methods.pseudo_labels:SELECTIONS"),
        "Which pseudo-labeled pixels are trained on, or with what weight. class_aware: those near the largest "
        "probability of a class in the image, as in DSSN; threshold: those of a confidence; adaptive: the same with a "
        "threshold for each class that follows the predictions, as in FreeMatch; soft: all, with less weight below the "
        "running mean of the confidence, as in SoftMatch; class_balanced: the most confident pixels of each class, the "
        "same share of each, as in class-balanced self-training (docs/method.md, Eq. 6, 7, 19, 20, 26).",
    ),
    balanced_share=Key(
        0.5, Float(0.01, 1), "Share of the pixels of each class that selection = class_balanced selects."
    ),
    threshold=Key(0.95, _PROBABILITY, "Least confidence, for selection = threshold; 0 selects every pixel."),
    class_aware_ratio=Key(
        0.96, _PROBABILITY, "A class keeps pixels above ratio * (its largest probability in the image) ..."
    ),
    class_aware_floor=Key(0.92, _PROBABILITY, "... if that largest probability exceeds the floor, else none."),
    selection_momentum=Key(
        0.999, Float(0, 0.999999), "Of the running statistics of `align_classes` and of the selections adaptive, soft "
        "and class_balanced, which forget what is older than about 1 / (1 - x) steps; at first nearly all pixels count "
        "fully.",
    ),
    align_classes=Key(
        False, Bool(), "Distribution alignment: before pixels are labeled and selected, the probability of a class is "
        "multiplied by its share of the labeled pixels and divided by the running mean of its probabilities, so that "
        "classes are pseudo-labeled about as often as they are labeled (docs/method.md, Eq. 25).",
    ),
    labeled_loss=Key(
        "ce", Registered("dssn_jax.methods.method:LABELED_LOSSES"),
        "ce: cross-entropy; ohem: cross-entropy of hard pixels.",
    ),
    class_weight_power=Key(
        0.0, Float(0, 2),
        "A class weighs (its share of the labeled pixels) ** -x in the labeled loss, times a constant with which "
        "labeled pixels weigh 1 on average (docs/method.md, Eq. 23). 0: classes weigh the same.",
    ),
    logit_adjustment=Key(
        0.0, Float(-2, 2),
        "In training, x * log(share of the class of the labeled pixels) is added to each logit. The network predicts "
        "without that: for x > 0 rare classes more often, for x < 0, with `class_weight_power`, less often than with "
        "the class weights alone (docs/method.md, Eq. 27).",
    ),
    weigh_pseudo_labels=Key(
        False, Bool(), "Pseudo-labels, and true labels pasted into strong views, weigh as their classes do in the "
        "labeled loss (`class_weight_power`).",
    ),
    ohem_threshold=Key(0.7, _PROBABILITY, "Pixels whose true class has at most this probability are hard."),
    ohem_min_kept=Key(100000, Int(0, 2**22), "At least this many pixels per image are kept.", "pixels"),
    ohem_group=Key(2, Int(1, 256), "Images whose pixels are ranked together (those of one GPU in the original)."),
)  # fmt: skip

_EMA = Section(
    'The EMA teacher, for `method.teacher = "ema"` (docs/method.md, Eq. 8). During the warm-up, the longer of two, the '
    "teacher is a copy of the student and strong views are not trained on.",
    decay=Key(0.996, _PROBABILITY, "Of the exponential moving average of parameters and running statistics."),
    ramp=Key(False, Bool(), "Start with a small decay: min(1 - 1 / (step + 1), decay)."),
    warmup_steps=Key(1, Int(), "Length of the warm-up.", "steps"),
    warmup_epochs=Key(0, Int(0, 10000), "Length of the warm-up.", "epochs"),
    batch_stats_epochs=Key(
        1, Int(0, 10000), "In these first epochs the teacher predicts with batch statistics.", "epochs"
    ),
)  # fmt: skip

_OPTIMIZER = Section(
    "Optimizer and learning rate. Regular expressions are matched (re.match) against the path of a parameter, such as "
    '"encoder/layer1_0/conv1/kernel"; the first that matches counts.',
    name=Key("sgd", Registered("dssn_jax.learner.optimizer:OPTIMIZERS"), "SGD with momentum, or AdamW."),
    lr=Key(
        0.002, Float(), "Initial learning rate; decays to 0 as (1 - step / steps) ** power. 0: chosen by whether "
        "weights are pretrained, together with lr_mults (dssn_jax/auto_config.py).",
    ),
    power=Key(0.9, Float(0, 100), "Of the decay."),
    lr_mults=Key((("decoder/", 10.0),), _MULTS, "Regular expressions, each with a factor of the learning rate."),
    wd_mults=Key((), _MULTS, "Regular expressions, each with a factor of the weight decay."),
    freeze=Key(
        "", Text(), "Regular expression of parameters that are frozen: no gradient, no optimizer state, no copy in the "
        'teacher. "": none.',
    ),
    weight_decay=Key(1e-4, Float(0, 100), "Of every parameter, batch norm and biases included."),
    momentum=Key(0.9, Float(0, 0.9999), "Of SGD."),
    b1=Key(0.9, Float(0, 0.999999), "Of AdamW."),
    b2=Key(0.999, Float(0, 0.999999), "Of AdamW."),
    eps=Key(1e-8, Float(1e-30, 1), "Of AdamW."),
)  # fmt: skip

_TRAIN = Section(
    "Length of the run, log and checkpoints.",
    epochs=Key(
        100, Int(0, 10000), "Passes over the unlabeled list. 0: `steps`, `eval_every` and `checkpoint_every`, where "
        "they are 0, are chosen from the number of images (dssn_jax/auto_config.py).", "epochs",
    ),
    steps=Key(0, Int(), "If not 0, the number of steps instead of `epochs`.", "steps"),
    accumulation=Key(
        1, Int(1, 1024), "Micro-batches per step: each batch is processed in this many parts before the one update. "
        "Needs less memory. Batch norm and the means over pixels are those of a micro-batch.", "micro-batches",
    ),
    resume=Key(
        "exact", Choice("exact", "changed"), "When a continued run has a configuration, or lists of images, that would "
        "change what follows. exact: stop and name the changes; changed: continue with them.",
    ),
    log_every=Key(50, Int(1, 10000), "Interval of log lines.", "steps"),
    eval_every=Key(
        0, Int(), "Interval of evaluations; 0: every epoch. The last step is always evaluated.", "steps"
    ),
    checkpoint_every=Key(
        0, Int(), "Interval of checkpoints; 0: every epoch. Each evaluation saves one too.", "steps"
    ),
    pictures=Key(
        4, Int(0, 256), "Images in the TensorBoard panels that each evaluation draws; 0: no panels.", "images"
    ),
)  # fmt: skip

_EVAL = Section(
    "Prediction and scores.",
    metric=Key("miou", Registered("dssn_jax.evaluation.metrics:METRICS"), "Ranks checkpoints."),
    mode=Key("original", Choice("original", "sliding_window", "center_crop"), "original: whole images."),
    crop=Key(0, _CROP, "Side of the window or center crop; 0: that of training.", "pixels"),
    windows=Key(
        "cut", Choice("cut", "inside"), "Sliding windows at the right and bottom edges. cut: are cut short there "
        "(DSSN, UniMatch); inside: are moved inside, where they are whole (UniMatch V2).",
    ),
    batch=Key(
        8, Int(1, 4096), "Images predicted together (rounded up to a multiple of the devices).", "images"
    ),
    buckets=Key(
        4, Int(1, 1000),
        "Most sizes that images are padded to; a program is compiled for each. Scores do not change.", "sizes",
    ),
    flip=Key(False, Bool(), "Test-time augmentation: adds the mirrored image to the class probabilities."),
    scales=Key(
        (1.0,), Tuple(Float(0.1, 8), 1, 32), "Test-time augmentation: scales at which the image is predicted."
    ),
)  # fmt: skip

KEYS = Section(
    "Keys without a section.",
    name=Key("", Text(), 'For logs and reports, such as "pascal split=183 encoder=resnet101 method=dssn".'),
    seed=Key(0, Int(), "Seeds the initial weights, the order and the views of the images, and feature dropout."),
    data=_DATA,
    views=_VIEWS,
    model=_MODEL,
    method=_METHOD,
    ema=_EMA,
    optimizer=_OPTIMIZER,
    train=_TRAIN,
    eval=_EVAL,
)


def get_config() -> ConfigDict:
    """Returns the defaults: DSSN on the generated shapes, with the recipe of VOC where nothing else is said."""
    return _defaults(KEYS)


def _defaults(section: Section) -> ConfigDict:
    return ConfigDict({
        name: _defaults(key) if isinstance(key, Section) else key.default for name, key in section.items()
    })  # fmt: skip
