"""Every configuration key, once, with its default and what it means.

A dataset file (`configs/pascal.py`, ...) starts from `get_config()` here and changes what its recipe changes; a user
changes any key on the command line (`--config.data.root=/data/voc`). A key that is not in this file does not exist.
"""

from ml_collections import ConfigDict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def get_config() -> ConfigDict:
    """Returns the defaults: DSSN on the generated shapes, with the recipe of VOC where nothing else is said."""
    config = ConfigDict()
    config.name = ""  # What the run is, for logs and reports: "pascal split=183 encoder=resnet101 method=dssn".
    config.seed = 0  # Seeds the initial weights, the order and the views of the images, and feature dropout.
    config.data = _data()
    config.views = _views()
    config.model = _model()
    config.method = _method()
    config.ema = _ema()
    config.optimizer = _optimizer()
    config.train = _train()
    config.eval = _eval()
    return config


def _data() -> ConfigDict:
    data = ConfigDict()
    # folder: image files, which lists or folders name | array_record: the same, packed by --mode=records | tfds: a data
    # set of TensorFlow Datasets | shapes: generated images, no files.
    data.source = "folder"
    data.root = ""  # Folder that the paths in the lists are relative to.
    # Folder of the lists, relative to `root` or to the current folder: SPLITS/SPLIT/{labeled,unlabeled}.txt and
    # SPLITS/val.txt, each line `image mask` (the mask may be left out in unlabeled.txt).
    data.splits = "splits"
    data.split = ""  # Name of the split. "": the images of `folders`.
    data.folders = _folders()
    # Whether validation images may be among labeled or unlabeled ones: allow | refuse.
    data.val_overlap = "allow"
    data.classes = ()  # Class names, in the order of the ids in the masks.
    data.ignore = 255  # Mask value that no loss and no score counts.
    data.ignore_values = ()  # Further values of masks that are ignored; without a label map.
    # File that says which value of a mask means which class, relative to `root` or to the current folder: text or CSV
    # with lines `ID CLASS`, or `RED GREEN BLUE CLASS` for masks of colors, or JSON {"ID": CLASS}. CLASS is a name, an
    # id or "ignore". Values that are not in it are errors. "": values are ids.
    data.label_map = ""
    # 0 in crop and batches: chosen from the images and the memory of the devices (dssn_jax/auto_config.py).
    data.crop = 513  # Side of the square training crop, in pixels.
    data.scale = (0.5, 2.0)  # The long side is scaled by U[scale] before the crop.
    data.flip = 0.5  # Probability of a horizontal flip.
    # Images per step, over all devices and hosts. Labeled ones are multiplied by `method.labeled_batch_factor`.
    data.labeled_batch = 8
    data.unlabeled_batch = 8
    data.mean = IMAGENET_MEAN  # Of RGB in [0, 1]; subtracted.
    data.std = IMAGENET_STD  # Of RGB in [0, 1]; divided by.
    data.workers = 0  # Processes that make batches; 0: threads of this process.
    data.threads = 16  # Threads (of each process) that decode and augment.
    data.buffer = 2  # Batches (of each process) made ahead.
    data.tfds = _tfds()
    data.shapes = ConfigDict()  # The generated source, for `source = "shapes"`.
    data.shapes.size = 96  # Side of an image, pixels.
    data.shapes.labeled = 16  # Labeled images (they are the first of the unlabeled ones).
    data.shapes.unlabeled = 512  # Unlabeled images.
    data.shapes.val = 64  # Validation images.
    data.shapes.seed = 0  # Another seed is another data set.
    return data


def _folders() -> ConfigDict:
    """Own images (configs/custom.py): folders, with their sub-folders, or lists (.txt), relative to `data.root`."""
    folders = ConfigDict()
    folders.labeled = ""  # Images with masks: a folder, or a list of lines `image mask`.
    folders.masks = "masks"  # Folder of their masks: that of a/b.jpg is a/b.png, or with another suffix of images.
    folders.mask_suffix = ""  # By which masks' names are longer: "_mask" where that of a/b.jpg is a/b_mask.png.
    folders.unlabeled = ""  # Images whose masks, if any, are not read: a folder or a list. "": the labeled ones.
    # Images that validate: a fraction of the labeled ones that is held out, such as "0.2", or a folder or a list, whose
    # images are left out of folders that hold them too.
    folders.val = "0.2"
    folders.val_masks = ""  # Folder of the masks, where `val` is a folder; "": `masks`.
    folders.unmasked = "refuse"  # Images without a mask in the folder `labeled`: an error (refuse) | unlabeled.
    return folders


def _tfds() -> ConfigDict:
    """A data set of TensorFlow Datasets that is on disk, for `source = "tfds"`; TensorFlow is not needed."""
    tfds = ConfigDict()
    tfds.name = ""  # Such as "oxford_iiit_pet"; with a configuration "NAME/CONFIG", with a version "NAME:1.0.0".
    tfds.data_dir = ""  # Folder of the data sets; "": $TFDS_DATA_DIR or ~/tensorflow_datasets.
    tfds.labeled = "train[:10%]"  # Splits, in the words of TFDS.
    tfds.unlabeled = "train[10%:]"
    tfds.val = "test"
    tfds.image = "image"  # Keys of the features.
    tfds.label = "segmentation_mask"
    return tfds


def _views() -> ConfigDict:
    """Strong views of an unlabeled image (docs/method.md, "Views"); probabilities and ranges of UniMatch's transforms.

    They are drawn inside the training step, on the accelerator, with Pillow's 8-bit arithmetic.
    """
    views = ConfigDict()
    views.jitter = 0.8  # Probability of color jitter.
    views.brightness = 0.5  # Jitter factors are U[1 - x, 1 + x] ...
    views.contrast = 0.5
    views.saturation = 0.5
    views.hue = 0.25  # ... and the hue shifts by U[-x, x] of the color circle.
    views.gray = 0.2  # Probability of conversion to grayscale.
    views.blur = 0.5  # Probability of Gaussian blur.
    views.blur_sigma = (0.1, 2.0)  # Range of the standard deviation, in pixels.
    views.operations = (
        0,
        0,
    )  # Range of the number of operations drawn from the eleven of the VOC recipe; there (1, 3).
    views.cutmix = 0.5  # Probability of a CutMix box.
    views.cutmix_area = (0.02, 0.4)  # Range of its area, as a fraction of the crop.
    views.cutmix_aspect = (0.3, 1 / 0.3)  # Range of its aspect ratio.
    # CutMix partner. same: another random view of the same image, as the released code pairs them | other: a view of
    # another image.
    views.mix_partner = "same"
    return views


def _model() -> ConfigDict:
    model = ConfigDict()
    model.encoder = "resnet101"  # A name of `dssn_jax.models.ENCODERS`.
    model.decoder = "deeplabv3plus"  # A name of `dssn_jax.models.DECODERS`.
    # ResNet stem. deep: three 3x3 convolutions with 64, 64 and 128 channels (the original) | 7x7: one convolution
    # (torchvision, timm) | deep_narrow: three with 32, 32 and 64 channels (timm's resnet50c, resnet50d).
    model.stem = "deep"
    # ResNet shortcut where a block changes size. strided: 1x1 convolution | average: 2x2 average pooling, then 1x1
    # convolution (timm's resnet50d, resnet101d).
    model.shortcut = "strided"
    # Weights to start from: a file of an encoder or of a whole network (.pth, .safetensors), or the work directory of
    # a run (its student). "": random weights.
    model.pretrained = ""
    model.output_stride = 16  # Of the last encoder stage: 16 | 8.
    model.aspp_dilations = (6, 12, 18)  # DeepLab doubles them at output stride 8.
    model.decoder_channels = 256  # Of ASPP and of the decoder.
    model.dtype = "float32"  # Of the computation: float32 | bfloat16 | float64 (which needs JAX_ENABLE_X64=1).
    model.param_dtype = "float32"  # Of parameters and running statistics.
    model.remat = False  # Recompute residual blocks in the backward pass: less memory, more time.
    return model


def _method() -> ConfigDict:
    """The streams and terms of the loss (docs/method.md); `configs/methods.py` names the combinations.

    loss = 0.5 [ L_x + strong_weight * sum(L_s) + feature_weight * sum(L_fp)
                 + image_contrast_weight * C_image + feature_contrast_weight * C_feature ],
    or L_x alone if there is no unlabeled stream (strong_views = feature_views = 0).
    """
    method = ConfigDict()
    method.name = "dssn"  # The entry of configs/methods.py that filled this section.
    # Labeled images per step are data.labeled_batch times this. 2 for the supervised baseline, which gives the place
    # of the unlabeled images to labeled ones.
    method.labeled_batch_factor = 1
    method.strong_views = 2  # Streams of strongly augmented views: 0, 1, 2, ...
    method.strong_perturb = "none"  # What happens to their features: none | complementary (channel dropout in pairs).
    method.feature_views = 2  # Streams of the weak view with channel dropout on its features: 0, 1, 2, ...
    method.feature_dropout = 0.5  # Probability that a channel is dropped there.
    # Also decode channel-dropout views of the labeled images, as the original does. No loss reads them, but they take
    # part in the decoder's batch statistics.
    method.perturb_labeled = True
    # Source of the pseudo-labels of the strong views. ema: the EMA teacher | student_eval: the student with running
    # statistics | student: the student's training forward for the weak view, its running statistics for the CutMix
    # partner | none: no pseudo-labels (supervised).
    method.teacher = "ema"
    method.strong_weight = 0.25  # Of each L_s.
    method.feature_weight = 0.25  # Of each L_fp.
    method.image_contrast_weight = 0.01  # Of the contrast between the two strong views.
    method.feature_contrast_weight = 0.01  # Of the contrast between the two feature views.
    method.selection = "class_aware"  # Which pseudo-labeled pixels are trained on: class_aware | threshold.
    method.threshold = 0.95  # Least confidence, for selection = threshold; 0 selects every pixel.
    method.class_aware_ratio = 0.96  # A class keeps pixels above ratio * (its largest probability in the image) ...
    method.class_aware_floor = 0.92  # ... if that largest probability exceeds the floor, else none.
    method.labeled_loss = "ce"  # ce: cross-entropy | ohem: cross-entropy of hard pixels.
    method.ohem_threshold = 0.7  # Pixels whose true class has at most this probability are hard.
    method.ohem_min_kept = 100000  # At least this many pixels per image are kept.
    method.ohem_group = 2  # Images whose pixels are ranked together (those of one GPU in the original).
    return method


def _ema() -> ConfigDict:
    """The EMA teacher, for method.teacher = "ema"."""
    ema = ConfigDict()
    ema.decay = 0.996  # Of the exponential moving average of parameters and running statistics.
    ema.ramp = False  # Start with a small decay: min(1 - 1 / (step + 1), decay).
    # During the warm-up the teacher is a copy of the student and strong views are not trained on. It lasts for the
    # longer of these two.
    ema.warmup_steps = 1
    ema.warmup_epochs = 0
    ema.batch_stats_epochs = 1  # In these first epochs the teacher predicts with batch statistics.
    return ema


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.name = "sgd"  # A name of `dssn_jax.learner.optimizer.OPTIMIZERS`: sgd | adamw.
    # Initial learning rate; decays to 0 as (1 - step / steps) ** power. 0: chosen by whether weights are pretrained,
    # together with lr_mults (dssn_jax/auto_config.py).
    optimizer.lr = 0.002
    optimizer.power = 0.9
    # Regular expressions, each with a factor, matched (re.match) against the path of a parameter, such as
    # "encoder/layer1_0/conv1/kernel". The first match multiplies the parameter's learning rate, or its weight decay.
    optimizer.lr_mults = (("decoder/", 10.0),)
    optimizer.wd_mults = ()
    # Parameters whose path matches are frozen: no gradient, no optimizer state, no copy in the teacher. "": none.
    optimizer.freeze = ""
    optimizer.weight_decay = 1e-4  # Of every parameter, batch norm and biases included.
    optimizer.momentum = 0.9  # SGD.
    optimizer.b1 = 0.9  # AdamW.
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    return optimizer


def _train() -> ConfigDict:
    train = ConfigDict()
    # Passes over the unlabeled list. 0: `steps`, `eval_every` and `checkpoint_every`, where they are 0, are chosen from
    # the number of images (dssn_jax/auto_config.py).
    train.epochs = 100
    train.steps = 0  # If not 0, the number of steps instead of `epochs`.
    # Micro-batches per step: each batch is processed in this many parts before the one update. Needs less memory. Batch
    # norm and the means over pixels are those of a micro-batch.
    train.accumulation = 1
    # When a continued run has a configuration, or lists of images, that would change what follows. exact: stop and name
    # the changes | changed: continue with them.
    train.resume = "exact"
    train.log_every = 50  # Steps between log lines.
    train.eval_every = 0  # Steps between evaluations; 0: every epoch. The last step is always evaluated.
    train.checkpoint_every = 0  # Steps between checkpoints; 0: every epoch. Each evaluation saves one too.
    train.pictures = 4  # Images in the TensorBoard panels that each evaluation draws; 0: no panels.
    return train


def _eval() -> ConfigDict:
    eval_ = ConfigDict()
    eval_.metric = "miou"  # Ranks checkpoints: a name of `dssn_jax.evaluation.metrics.METRICS`.
    eval_.mode = "original"  # original: whole images | sliding_window | center_crop.
    eval_.crop = 0  # Side of the window or center crop, in pixels; 0: that of training.
    eval_.batch = 8  # Images predicted together (rounded up to a multiple of the devices).
    eval_.buckets = 4  # Most sizes that images are padded to; a program is compiled for each. Scores do not change.
    eval_.flip = False  # Test-time augmentation: adds the mirrored image to the class probabilities.
    eval_.scales = (1.0,)  # Test-time augmentation: scales at which the image is predicted.
    return eval_
