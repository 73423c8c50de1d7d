"""What a run is made of: frozen dataclasses, one per owner, checked when they are built.

Only the standard library is imported, and allnc._checks, which imports nothing else. allnc/trainer/options.py turns
configurations into dictionaries and back; the command line (allnc/train.py) builds the same classes from a YAML recipe
and dotted overrides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from allnc._checks import check_integer, check_interval

BALANCED_SETS = ("digits", "fashion_mnist", "cifar10", "cifar100")  # as published
SMALL_SETS = (*BALANCED_SETS, "arrays")  # held in memory as one uint8 tensor
FEATURE_MODELS = ("linear", "mlp")  # what trains on stored features instead of images
FEATURES_MANIFEST = "features.json"  # of a folder that allnc.features wrote
BATCH_AUGMENTATIONS = ("none", "shift_rotate", "crop_flip_cutout")  # whole batches of a small set at once


_KINDS: dict[Any, str] = {type(None): "null", tuple[int, ...]: "list of int", tuple[float, ...]: "list of float"}
_LARGEST_INT, _LARGEST_FLOAT = 2**32 - 1, 3e38  # of what seeds, sizes and float32 can hold


def _check_fields(section: str, config: Any) -> None:
    """Check the type of every field, whoever builds the configuration; the command line's parser is one of several."""
    for name, hint in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise ValueError(f"{section}.{name} must be one of {', '.join(get_args(hint))}; got {value!r}")
        elif not any(_fits(value, kind) for kind in kinds):
            wanted = " or ".join(_KINDS.get(kind, getattr(kind, "__name__", "")) for kind in kinds)
            raise ValueError(f"{section}.{name} must be of type {wanted}; got {value!r}")
        elif isinstance(value, float) and math.isfinite(value) and abs(value) > _LARGEST_FLOAT:
            raise ValueError(f"{section}.{name} must be a number that float32 holds; got {value}")
        elif isinstance(value, int) and abs(value) > _LARGEST_INT:
            raise ValueError(f"{section}.{name} must be at most {_LARGEST_INT}; got {value}")


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images, how many of each class, and how they are viewed and sampled.

    Args:
        name: data set; arrays reads a file of small images (docs/data.md); image_list reads `relative/path label`
            lines, image_folder a folder for each class, as torchvision's ImageFolder; features reads what
            `python -m allnc.features` wrote.
        root: folder of the images or of the data set's own files, or for arrays the file; None looks in the usual
            places.
        train_list: text file with the training images (image_list only).
        test_list: text file with the test images (image_list only).
        download: let torchvision download the files when they are not there.
        imbalance: profile of the class sizes that are cut out of the training images; none takes every image; auto
            takes exponential for the balanced small sets (digits, fashion_mnist, cifar10, cifar100) and none for
            arrays, image_list, image_folder and features, whose class sizes are their own.
        imbalance_ratio: largest class size over the smallest, >= 1.
        max_per_class: size of the largest class, >= 1; None takes the smallest class size of the full set.
        subset_seed: which images are held out and which make the long-tailed subset, independent of the run's seed.
        image_size: side in pixels of the images that the network sees (large images only).
        views: augmented views of each image in a batch, >= 1; of features, that many different passes of those
            stored, drawn anew in each epoch.
        augmentation: none, shift_rotate (digits), crop_flip_cutout, autoaugment (CIFAR recipe: AutoAugment
            and cutout in the first view, resized crop and colour jitter in the others), resized_crop (large
            images), crop_flip (large images: resized crop without the jitter), randaugment (large images: RandAugment
            in the first view). Features have none: they were augmented when they were made.
        sampler: sampler of the batches, or of the uniform branch's where the loss has two branches: uniform (every
            image once an epoch), class_balanced (classes alike), square_root or reversed (P(c) ~ 1 / n_c), which draw
            as many images with replacement.
        rebalance_sampler: sampler of the re-balancing branch; uniform lets one batch serve both branches.
        validation: share of the images of each class, in [0, 1), that is held out of the training images before class
            sizes are cut out of them, at most all but one of a class; what is measured is measured on these then, and
            the test images are left to `python -m allnc.evaluate RUN --on test`. `subset_seed` decides which.
        many: a class with more training images than this is a many-shot class.
        few: a class with fewer training images than this is a few-shot class.
        workers: processes that decode large images, >= 0.
        mean, std: of the pixels scaled to [0, 1], by channel: what is subtracted, and what is divided by. None takes
            those of the data set (for arrays, of all training images of the file; ImageNet's for large images), or for
            large images and model.pretrained those that the weights were trained with, which timm knows; they then
            stand here in the run's own config.yaml.
        test_crops: 1 measures the test accuracy on the plain view; 5 averages the logits of five crops: the plain view
            (to a pixel) and the four corners of the square it was cut from. Large images only. It takes five times as
            long; neural collapse is measured on the plain view in either case. Source: LIFT's test-time ensembling (Shi
            et al., ICML 2024), whose corners are those of the whole image, resized to 31/28 of the side (ours: 8/7).
    """

    name: Literal[
        "digits", "fashion_mnist", "cifar10", "cifar100", "arrays", "image_list", "image_folder", "features"
    ] = "digits"
    root: str | None = None
    train_list: str | None = None
    test_list: str | None = None
    download: bool = False
    imbalance: Literal["auto", "exponential", "step", "none"] = "auto"
    imbalance_ratio: float = 20.0
    max_per_class: int | None = None
    subset_seed: int = 0
    image_size: int = 224
    views: int = 2
    augmentation: Literal[
        "none", "shift_rotate", "crop_flip_cutout", "autoaugment", "resized_crop", "crop_flip", "randaugment"
    ] = "shift_rotate"
    sampler: Literal["uniform", "reversed", "class_balanced", "square_root"] = "uniform"
    rebalance_sampler: Literal["uniform", "reversed", "class_balanced", "square_root"] = "uniform"
    validation: float = 0.0
    many: int = 100
    few: int = 20
    workers: int = 4
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    test_crops: int = 1

    @property
    def profile(self) -> Literal["exponential", "step", "none"]:
        """The profile of the class sizes: what `imbalance` says, or what auto stands for."""
        if self.imbalance != "auto":
            return self.imbalance
        return "exponential" if self.name in BALANCED_SETS else "none"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_fields("data", self)
        check_interval("data.imbalance_ratio", self.imbalance_ratio, 1, math.inf)
        if self.max_per_class is not None:
            check_integer("data.max_per_class", self.max_per_class, minimum=1)
        for name, least in (("subset_seed", 0), ("image_size", 8), ("views", 1), ("workers", 0), ("few", 0)):
            check_integer(f"data.{name}", getattr(self, name), minimum=least)
        check_interval("data.subset_seed", self.subset_seed, 0, 2**32 - 1)
        check_interval("data.validation", self.validation, 0, 1, open_high=True)
        check_integer("data.many", self.many, minimum=self.few)
        if self.name == "image_list" and not (self.root and self.train_list and self.test_list):
            raise ValueError("data.root, data.train_list and data.test_list must be given with data.name image_list")
        if self.name == "arrays" and not self.root:
            raise ValueError("data.root must be given with data.name arrays: a .npz or .safetensors file")
        if self.name == "image_folder" and not self.root:
            raise ValueError(
                "data.root must be given with data.name image_folder: a folder with train/ and val/ or test/"
            )
        if self.name == "features" and not self.root:
            raise ValueError("data.root must be given with data.name features: the folder that allnc.features wrote")
        if self.name != "image_list" and (self.train_list or self.test_list):
            raise ValueError(
                f"data.train_list and data.test_list are read by image_list only; got data.name {self.name}"
            )
        if self.name == "features" and self.augmentation != "none":
            raise ValueError(
                f"data.augmentation must be none with data.name features; got {self.augmentation}: features are stored "
                "as they are, augmented ones by --passes of allnc.features"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"data.mean and data.std must be given together; got mean {self.mean} and std {self.std}")
        if self.mean is not None and self.std is not None:
            if not (len(self.mean) == len(self.std) > 0):
                raise ValueError(
                    f"data.mean and data.std must have a number for each channel; got {list(self.mean)} and "
                    f"{list(self.std)}"
                )
            for value in self.mean:
                check_interval("data.mean", value, 0, 1)
            for value in self.std:
                check_interval("data.std", value, 0, math.inf, open_low=True)
        if self.test_crops not in (1, 5):
            raise ValueError(f"data.test_crops must be 1 or 5; got {self.test_crops}")
        small = self.name in SMALL_SETS
        if (small or self.name == "features") and self.test_crops != 1:
            raise ValueError(
                f"data.test_crops must be 1 with data.name {self.name}; got {self.test_crops}: for large images only"
            )
        if small and self.augmentation in ("resized_crop", "crop_flip", "randaugment"):
            raise ValueError(
                "data.augmentation must be none, shift_rotate, crop_flip_cutout or autoaugment with "
                f"data.name {self.name}; "
                f"got {self.augmentation}, which is for large images"
            )
        if not small and self.augmentation not in ("none", "resized_crop", "crop_flip", "randaugment"):
            raise ValueError(
                f"data.augmentation must be none, resized_crop, crop_flip or randaugment with data.name {self.name}; "
                f"got {self.augmentation}, which is for small images held in memory"
            )
        if self.name not in ("fashion_mnist", "cifar10", "cifar100") and self.download:
            raise ValueError(f"data.download must be false with data.name {self.name}; got true: nothing to download")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network: an encoder and the heads that the loss asks for.

    Args:
        name: resnetD, the CIFAR ResNet of depth D = 6n + 2 (8, 20, 32, 44, 56 ...), or timm:NAME; for data.name
            features, linear (the features go to the heads as they are) or mlp (a residual layer pair before them).
        width: channels of the first of the three stages of a CIFAR ResNet, >= 1 (features have 4 x width).
        feature_dim: CIFAR ResNet only: number F of features, >= 1, by a linear layer after the last stage, such as 2
            for a picture, or 128 so that an etf classifier has room for 100 classes; None: no such layer.
        shortcut: CIFAR ResNet only: A pads with zero channels (as He et al.), B projects with a 1 x 1
            convolution.
        mlp_hidden: mlp only: width between its two layers, >= 1; None takes that of the features.
        norm: batch keeps the encoder's own normalisation; group puts GroupNorm in the place of each BatchNorm2d, so
            that no image sees another and train.micro_batch changes nothing.
        pretrained: start a timm model from its published weights, which timm downloads unless `weights` names them.
        weights: file with the weights of the timm model, as timm saves or publishes them (.safetensors or .pth), for
            machines without a network; read with `pretrained` only.
        tune: what of a timm model trains beside the heads. full: all of it. head: nothing; the encoder runs without a
            graph. norm: scale and shift of its normalisation layers (LIFT's ln_tuning), whose running statistics then
            move, too. lora: low-rank updates beside the linear layers of its attention (Hu et al., ICLR 2022; needs
            Hugging Face's peft). adapter: a bottleneck beside the MLP of each block (AdaptFormer, Chen et al., NeurIPS
            2022). What does not train keeps its statistics, too, as BatchNorm in evaluation mode.
        tune_rank: columns of the bottleneck or of the low-rank update, >= 1; None takes 2^floor(log2(C / 2L)), at least
            1, for C classes and L adapted blocks, as LIFT, so that what is added is not larger than the classifier.
        heads: shared, one classifier for both branches; separate, one each (the re-balancing one predicts).
        classifier: linear, normalised (scaled cosine between features and class vectors), or etf (the same with class
            vectors that are a random simplex and do not train, for at least C - 1 features).
        classifier_scale: factor of the cosine of a normalised or etf classifier, > 0.
        classifier_init: random, or class_means: before the first epoch, each class vector of a normalised classifier
            becomes the unit mean of its class's features, over at most 100 plain training images. A pretrained encoder
            separates the classes already; random vectors would first move, and what is tuned with them, and rare
            classes, which have few steps, would move least (LIFT, section 4.3).
        posthoc: what is done to the trained classifier before it predicts: none; logit_adjusted, the logits minus
            posthoc_tau times the log of the class frequencies (Menon et al., ICLR 2021); tau_normalised, the class
            vectors of a linear classifier divided by their length to the power posthoc_tau, without bias (Kang et al.,
            ICLR 2020). It trains nothing: the model does it whenever it is measured or loaded to predict.
        posthoc_tau: strength of posthoc, > 0; 1 is full strength.
        projection_hidden: hidden width of the projection head (softmax HyCon); None takes the feature width.
        projection_dim: width D of the projection (softmax HyCon).
    """

    name: str = "resnet20"
    width: int = 16
    feature_dim: int | None = None
    shortcut: Literal["A", "B"] = "A"
    mlp_hidden: int | None = None
    pretrained: bool = False
    norm: Literal["batch", "group"] = "batch"
    weights: str | None = None
    tune: Literal["full", "head", "norm", "lora", "adapter"] = "full"
    tune_rank: int | None = None
    heads: Literal["shared", "separate"] = "shared"
    classifier: Literal["linear", "normalised", "etf"] = "linear"
    classifier_scale: float = 16.0
    classifier_init: Literal["random", "class_means"] = "random"
    posthoc: Literal["none", "logit_adjusted", "tau_normalised"] = "none"
    posthoc_tau: float = 1.0
    projection_hidden: int | None = None
    projection_dim: int = 128

    def __post_init__(self) -> None:
        _check_fields("model", self)
        check_interval("model.width", self.width, 1, math.inf)
        if self.feature_dim is not None:
            check_interval("model.feature_dim", self.feature_dim, 1, math.inf)
        check_interval("model.classifier_scale", self.classifier_scale, 0, math.inf, open_low=True)
        if self.projection_hidden is not None:
            check_interval("model.projection_hidden", self.projection_hidden, 1, math.inf)
        check_interval("model.projection_dim", self.projection_dim, 1, math.inf)
        if self.mlp_hidden is not None:
            check_interval("model.mlp_hidden", self.mlp_hidden, 1, math.inf)
        if self.pretrained and self.norm == "group":
            raise ValueError("model.norm must be batch with model.pretrained, whose weights are made for it; got group")
        if self.tune_rank is not None:
            check_interval("model.tune_rank", self.tune_rank, 1, math.inf)
        if self.classifier == "etf" and self.heads == "separate":
            raise ValueError("model.heads must be shared with model.classifier etf, which has nothing to learn in two")
        if self.classifier_init == "class_means" and self.classifier != "normalised":
            raise ValueError(
                f"model.classifier_init class_means needs model.classifier normalised; got {self.classifier}, whose "
                "logits would depend on the length of the features"
            )
        check_interval("model.posthoc_tau", self.posthoc_tau, 0, math.inf, open_low=True)
        if self.posthoc == "tau_normalised" and self.classifier != "linear":
            raise ValueError(
                f"model.posthoc tau_normalised needs model.classifier linear; got {self.classifier}, whose class "
                "vectors have length 1 and which has no bias: nothing would change"
            )
        if self.name.startswith("timm:") and len(self.name) > 5:
            return
        depth = self.name.removeprefix("resnet")
        resnet = self.name.startswith("resnet") and depth.isdecimal() and int(depth) >= 8 and int(depth) % 6 == 2
        if not resnet and self.name not in FEATURE_MODELS:
            raise ValueError(
                f"model.name must be resnetD with D = 6n + 2 (resnet8, resnet20, resnet32 ...), timm:NAME, or for "
                f"features linear or mlp; got {self.name!r} (the large-image ResNet-50 is timm:resnet50)"
            )
        if self.pretrained:
            raise ValueError(
                f"model.pretrained needs a timm:NAME model; got {self.name}, which has no published weights"
            )
        if self.tune != "full":
            raise ValueError(
                f"model.tune must be full with model.name {self.name}, which has no pretrained part; got {self.tune}"
            )


CONTRASTIVE = ("supcon", "bcl", "proco")  # the baselines that contrast projections beside a classification loss
_COMPARING = ("allnc", *CONTRASTIVE, "ntce", "nonl")  # the losses that look at the class of several images at once
REWEIGHTED = ("ce", "focal", "ldam", "mse")  # the losses that deferred re-weighting serves

_NOT_NEGATIVE = (
    "hycon_weight",
    "alpha",
    "mean_weight",
    "p2p_means",
    "p2p_weights",
    "p2p_duality",
    "tau",
    "focal_gamma",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The loss: AllNC with its parts, or one classification loss alone.

    Args:
        name: allnc, or the baseline trained on the uniform branch alone: ce, logit_adjusted, focal, class_balanced,
            ldam, mse, ntce and nonl (which normalise each class over the batch; for a normalised classifier), etf_dr
            (dot regression, for the etf classifier); or with a contrast of the projections, weighed by hycon_weight,
            supcon (beside ce), bcl and proco (beside logit_adjusted).
        hycon: form of HyCon: softmax (projected, with negatives), cosine (positives only) or none.
        hycon_weight: weight of HyCon beside P2P on the means, or of the contrast of supcon, bcl and proco, >= 0.
        alpha: weight of HyCon and P2P on the means against classification, >= 0.
        temperature: temperature of softmax HyCon, or of the contrast of supcon, bcl and proco, > 0.
        mean_weight: weight of the own class mean among the positives of softmax HyCon, >= 0.
        balance: column weights of softmax HyCon: class (each class counts once) or none (as SupCon).
        ema_momentum: share of the old class mean kept at each step, in [0, 1).
        mean_gradient: gradient through the class means: exact, or straight_through (that of the batch mean).
        p2p_means: weight of P2P between the class means, >= 0.
        p2p_weights: weight of P2P between the classifier's vectors, >= 0.
        p2p_duality: weight of P2P between means and classifier vectors, >= 0.
        p2p_target: etf (simplex), softmax (separation, for more classes than features), or auto.
        p2p_temperature: temperature of P2P's softmax target, > 0.
        rebalance: loss of the re-balancing branch.
        tau: strength of the logit adjustment, wherever it is used, >= 0.
        label_smoothing: share of the target that is spread over all classes, in [0, 1), for cross-entropy and logit
            adjustment, alone or in the re-balancing branch.
        focal_gamma: exponent of the focal loss, wherever it is used, >= 0.
        drw: share of training, in [0, 1), after which classes weigh by the inverse of their effective number of images
            (deferred re-weighting), for ce, focal, ldam and mse; None: never.
        gamma: exponent of the schedule: eta = 1 - min(1, progress / horizon) ** gamma, > 0.
        horizon: share of training after which the re-balancing branch alone remains, in [0, 1]; 0: from the
            start.
        backend: implementation of the ops; auto takes the fastest that can run.
    """

    name: Literal[
        "allnc",
        "ce",
        "logit_adjusted",
        "focal",
        "class_balanced",
        "ldam",
        "mse",
        "ntce",
        "nonl",
        "etf_dr",
        "supcon",
        "bcl",
        "proco",
    ] = "allnc"
    hycon: Literal["softmax", "cosine", "none"] = "softmax"
    hycon_weight: float = 1.0
    alpha: float = 1.0
    temperature: float = 0.1
    mean_weight: float = 1.0
    balance: Literal["class", "none"] = "class"
    ema_momentum: float = 0.9
    mean_gradient: Literal["exact", "straight_through"] = "straight_through"
    p2p_means: float = 1.0
    p2p_weights: float = 1.0
    p2p_duality: float = 1.0
    p2p_target: Literal["auto", "etf", "softmax"] = "auto"
    p2p_temperature: float = 0.1
    rebalance: Literal["ce", "logit_adjusted", "focal", "class_balanced", "ldam"] = "logit_adjusted"
    tau: float = 1.0
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    drw: float | None = None
    gamma: float = 2.0
    horizon: float = 0.3
    backend: Literal["auto", "eager", "cpp", "triton", "cuda"] = "auto"

    @property
    def contrast(self) -> Literal["softmax", "cosine", "none"]:
        """The form of HyCon that is computed: none where its weight is 0."""
        return self.hycon if self.alpha * self.hycon_weight > 0 else "none"

    def __post_init__(self) -> None:
        _check_fields("loss", self)
        for name in _NOT_NEGATIVE:
            check_interval(f"loss.{name}", getattr(self, name), 0, math.inf)
        for name in ("temperature", "p2p_temperature", "gamma"):
            check_interval(f"loss.{name}", getattr(self, name), 0, math.inf, open_low=True)
        check_interval("loss.ema_momentum", self.ema_momentum, 0, 1, open_high=True)
        check_interval("loss.horizon", self.horizon, 0, 1)
        check_interval("loss.label_smoothing", self.label_smoothing, 0, 1, open_high=True)
        if self.drw is not None:
            check_interval("loss.drw", self.drw, 0, 1, open_high=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The optimisation.

    Args:
        epochs: passes over the training set, >= 1.
        batch_size: images (not views) in a step, of all processes together, >= 2.
        micro_batch: images of a process (of both branches' batches, where there are two) that pass the encoder at a
            time, >= 1, in parts as equal as can be: memory is that of a part, the step takes one forward more, and all
            images of a batch contrast as before. BatchNorm takes the statistics of a part. None: the whole batch.
        optimizer: sgd with Nesterov momentum, lars, adamw or lamb.
        lr: peak learning rate, > 0; of a batch of 256 images where lr_scaling is not none.
        lr_scaling: how the peak grows with the batch: none, linear (lr x batch_size / 256) or sqrt (its square root).
        momentum: momentum of sgd and lars, and beta1 of adamw and lamb (beta2 is 0.999), in [0, 1).
        weight_decay: of matrices and kernels (not of biases or normalisation), >= 0: L2 penalty for sgd, lars and lamb,
            decoupled for adamw.
        ema_decay: share of the old weights kept at each step by the moving average that is then measured and saved, in
            (0, 1); it grows from 0 by 1 - (1 + step)^(-2/3), so that the first weights are soon forgotten. None: the
            weights themselves.
        mixup: alpha >= 0 of mixup, for losses of logits and labels alone: every image is mixed with another of its
            batch, with one share from Beta(alpha, alpha) a step, and the loss is the mixture of those of both labels
            (Zhang et al., ICLR 2018). A second stage (retrain_epochs) has plain images. 0: no mixing.
        remix: let mixtures have the label of a class that is at least 3 times rarer alone where its image has more than
            half of the pixels (Chou et al., ECCV 2020 workshops).
        retrain_epochs: how many of the epochs, the last ones, train a new classifier alone, in [0, epochs): the encoder
            rests in evaluation mode, batches are class-balanced, the loss is cross-entropy whatever the first stage's
            is, and the rate falls from its peak to zero once more, by half a cosine (classifier re-training, Kang et
            al., ICLR 2020). Schedule, warm-up and milestones are of the epochs before. 0: no second stage.
        warmup_epochs: epochs of linear warm-up, >= 0 (fractions allowed); at most half of all epochs are
            used.
        schedule: cosine to zero by step, or step (x 0.1 at the milestones).
        milestones: epochs after which the step schedule divides the rate by ten.
        grad_clip: largest norm of the whole gradient; None does not clip.
        precision: autocast type; auto takes bf16 where the device multiplies it faster than fp32 (CPU: with AMX), else
            fp16 on a GPU and fp32 on a CPU.
        matmul_precision: how float32 matrices are multiplied, in torch's words: highest (float32), high (TF32 on a
            GPU), medium (bfloat16 where the hardware has it); auto takes high on a GPU and highest on a CPU.
        device: auto takes a GPU when there is one.
        threads: CPU threads of torch, in [1, 1024]; None takes one a core. A small network is as fast with one, and
            much faster when other programs want the cores, too; results depend on the number in the last bits.
        channels_last: memory order of the images; faster for convolutions on CPU and GPU.
        eval_every: epochs between measurements of the test accuracy, >= 1 (the last epoch is always
            measured).
        collapse_every: epochs between measurements of neural collapse on the training set, 0: only after
            the last.
        save: which weights a checkpoint holds where pretrained ones stay frozen (model.pretrained with a model.tune
            other than full): tuned, those that train, with the SHA-256 of the frozen ones, which evaluating and
            resuming then read from the pretrained weights again; or whole. Without frozen pretrained weights, whole.
    """

    epochs: int = 30
    batch_size: int = 128
    micro_batch: int | None = None
    optimizer: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"
    lr: float = 0.1
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ema_decay: float | None = None
    mixup: float = 0.0
    remix: bool = False
    retrain_epochs: int = 0
    warmup_epochs: float = 1.0
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[int, ...] = ()
    grad_clip: float | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    channels_last: bool = True
    eval_every: int = 1
    collapse_every: int = 5
    save: Literal["tuned", "whole"] = "tuned"

    @property
    def feature_epochs(self) -> int:
        """The epochs in which the whole network trains: all but those of the second stage."""
        return self.epochs - self.retrain_epochs

    def __post_init__(self) -> None:
        if isinstance(self.milestones, list):
            object.__setattr__(self, "milestones", tuple(self.milestones))
        _check_fields("train", self)
        check_interval("train.epochs", self.epochs, 1, math.inf)
        check_interval("train.batch_size", self.batch_size, 2, math.inf)
        if self.micro_batch is not None:
            check_interval("train.micro_batch", self.micro_batch, 1, self.batch_size)
        if self.ema_decay is not None:
            check_interval("train.ema_decay", self.ema_decay, 0, 1, open_low=True, open_high=True)
        check_interval("train.mixup", self.mixup, 0, math.inf)
        check_interval("train.retrain_epochs", self.retrain_epochs, 0, self.epochs, open_high=True)
        check_interval("train.lr", self.lr, 0, math.inf, open_low=True)
        check_interval("train.momentum", self.momentum, 0, 1, open_high=True)
        check_interval("train.weight_decay", self.weight_decay, 0, math.inf)
        check_interval("train.warmup_epochs", self.warmup_epochs, 0, math.inf)
        if self.grad_clip is not None:
            check_interval("train.grad_clip", self.grad_clip, 0, math.inf, open_low=True)
        if self.threads is not None:
            check_interval("train.threads", self.threads, 1, 1024)  # more cannot be started
        check_interval("train.eval_every", self.eval_every, 1, math.inf)
        check_interval("train.collapse_every", self.collapse_every, 0, math.inf)
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"train.milestones must be given with train.schedule step, and only then; "
                f"got schedule {self.schedule} and milestones {list(self.milestones)}"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"train.milestones must increase; got {list(self.milestones)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run.

    Args:
        data: the images.
        model: the network.
        loss: the loss.
        train: the optimisation.
        seed: seed of the weights, the batches and the augmentation, in [0, 2**32).
        out: run folder; None makes runs/RECIPE-LOSS-seedSEED, with a number behind it if that exists.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        for name, section in SECTIONS.items():
            if not isinstance(getattr(self, name), section):
                raise ValueError(f"{name} must be a {section.__name__}; got {getattr(self, name)!r}")
        if not (self.out is None or isinstance(self.out, str)):
            raise ValueError(f"out must be of type str or null; got {self.out!r}")
        if not _fits(self.seed, int):
            raise ValueError(f"seed must be of type int; got {self.seed!r}")
        check_interval("seed", self.seed, 0, 2**32 - 1)
        if self.loss.name == "allnc" and self.loss.contrast == "cosine" and self.data.views != 2:
            raise ValueError(f"data.views must be 2 with loss.hycon cosine; got {self.data.views}")
        needs = {"etf_dr": ("etf",), "ntce": ("normalised", "etf"), "nonl": ("normalised", "etf")}.get(self.loss.name)
        if needs is not None and self.model.classifier not in needs:
            raise ValueError(
                f"model.classifier must be {' or '.join(needs)} with loss.name {self.loss.name}; got "
                f"{self.model.classifier}"
            )
        if self.model.classifier == "etf" and (self.model.name == "linear" or self.model.tune == "head"):
            raise ValueError("model.classifier etf needs an encoder that trains, as it does not; got a frozen one")
        if self.train.mixup > 0 and self.loss.name in _COMPARING:
            raise ValueError(
                f"train.mixup needs a loss of logits and labels alone; got loss.name {self.loss.name}, which compares "
                "images of the same class, and a mixed image has none: set train.mixup 0, or another loss"
            )
        adjusted = self.train.retrain_epochs > 0 or (
            (
                self.loss.name in ("logit_adjusted", "bcl", "proco")
                or (self.loss.name == "allnc" and self.loss.rebalance == "logit_adjusted")
            )
            and self.loss.tau > 0
        )
        if self.model.posthoc == "logit_adjusted" and adjusted:
            raise ValueError(
                "model.posthoc logit_adjusted needs a classifier that was trained without any balancing; got "
                f"loss.name {self.loss.name} and train.retrain_epochs {self.train.retrain_epochs}, which would balance "
                "it twice"
            )
        if self.train.retrain_epochs and self.model.classifier == "etf":
            raise ValueError("train.retrain_epochs needs a model.classifier that trains, linear or normalised; got etf")
        if (self.data.name == "features") != (self.model.name in FEATURE_MODELS):
            raise ValueError(
                f"model.name must be {' or '.join(FEATURE_MODELS)} with data.name features, and only then; got "
                f"{self.model.name} with data.name {self.data.name}"
            )


SECTIONS = {"data": DataConfig, "model": ModelConfig, "loss": LossConfig, "train": TrainConfig}
