"""The images: section `data` of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from allnc._checks import check_integer, check_interval
from allnc.config.fields import check_fields

BALANCED_SETS = ("digits", "fashion_mnist", "cifar10", "cifar100")  # as published
SMALL_SETS = (*BALANCED_SETS, "arrays")  # held in memory as one uint8 tensor
TRAIN, VALIDATION, TEST = "train", "validation", "test"  # what an own image is for
ARRAY_ENDINGS = (".npz", ".safetensors")  # of files of images, in capitals too
FEATURES_MANIFEST = "features.json"  # of a folder that allnc.features wrote
BATCH_AUGMENTATIONS = ("none", "shift_rotate", "crop_flip_cutout")  # whole batches of a small set at once


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images, how many of each class, and how they are viewed and sampled.

    Args:
        name: data set; arrays reads a file of small images (docs/data.md); image_list reads `relative/path label`
            lines, image_folder a folder for each class, as torchvision's ImageFolder; features reads what
            `python -m allnc.features` wrote; own reads any folder of class folders, or a list, as `python -m
            allnc.train DIR` does (docs/data.md).
        root: folder of the images or of the data set's own files, or for arrays the file; None looks in the usual
            places.
        train_list: text file with the training images (image_list); for own a CSV, TSV, text or JSON list of them, or
            of all images.
        test_list: text file with the test images (image_list and own).
        index: file in which an own set's images stand with class and split, as a run leaves it in its folder
            (images.tsv); what it says is taken, and the folder is not looked through. None looks.
        test_share: share of the images of each class, in (0, 1), that an own set or a file of arrays is tested on where
            it has no test images: at least one of a class of two images, and no two copies of an image on both sides.
            `subset_seed` decides which.
        max_bad: files of an own set that cannot be read and are left out, >= 0; with more of them nothing starts.
        download: let torchvision download the files when they are not there.
        imbalance: profile of the class sizes that are cut out of the training images; none takes every image; auto
            takes exponential for the balanced small sets (digits, fashion_mnist, cifar10, cifar100) and none for
            arrays, image_list, image_folder and features, whose class sizes are their own.
        imbalance_ratio: largest class size over the smallest, >= 1.
        max_per_class: size of the largest class, >= 1; None takes the smallest class size of the full set.
        subset_seed: which images are held out and which make the long-tailed subset, independent of the run's seed.
        image_size: side in pixels of the images that the network sees (of images on disk, and of own ones).
        fit: how an image becomes square. crop: resized to 8/7 of the side, of which the middle is cut out. whole:
            resized until all of it fits, its border repeated beside it, for small images and letters.
        channels: 3 (colour) or 1 (grey) of images on disk, and of own ones.
        in_memory: hold all own images as one uint8 tensor of image_size, resized whole.
        views: augmented views of each image in a batch, >= 1; of features, that many different passes of those
            stored, drawn anew in each epoch.
        augmentation: none, shift_rotate (digits), crop_flip_cutout, autoaugment (CIFAR recipe: AutoAugment
            and cutout in the first view, resized crop and colour jitter in the others), resized_crop (large
            images), crop_flip (large images: resized crop without the jitter), randaugment (large images: RandAugment
            in the first view). Features have none: they were augmented when they were made. Own images have any of
            them; those of small images make them fit whole.
        flip: let the augmentations that mirror images mirror them; false for letters, and wherever left and right
            differ.
        crop_scale: least share of the image's area that resized_crop, crop_flip and randaugment cut out, in (0, 1].
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
        "digits", "fashion_mnist", "cifar10", "cifar100", "arrays", "image_list", "image_folder", "features", "own"
    ] = "digits"
    root: str | None = None
    train_list: str | None = None
    test_list: str | None = None
    index: str | None = None
    test_share: float = 0.2
    max_bad: int = 0
    download: bool = False
    imbalance: Literal["auto", "exponential", "step", "none"] = "auto"
    imbalance_ratio: float = 20.0
    max_per_class: int | None = None
    subset_seed: int = 0
    image_size: int = 224
    fit: Literal["crop", "whole"] = "crop"
    channels: int = 3
    in_memory: bool = False
    views: int = 2
    augmentation: Literal[
        "none", "shift_rotate", "crop_flip_cutout", "autoaugment", "resized_crop", "crop_flip", "randaugment"
    ] = "shift_rotate"
    flip: bool = True
    crop_scale: float = 0.08
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
        check_fields("data", self)
        check_interval("data.imbalance_ratio", self.imbalance_ratio, 1, math.inf)
        if self.max_per_class is not None:
            check_integer("data.max_per_class", self.max_per_class, minimum=1)
        for name, least in (("subset_seed", 0), ("image_size", 8), ("views", 1), ("workers", 0), ("few", 0)):
            check_integer(f"data.{name}", getattr(self, name), minimum=least)
        check_interval("data.subset_seed", self.subset_seed, 0, 2**32 - 1)
        check_interval("data.validation", self.validation, 0, 1, open_high=True)
        check_interval("data.test_share", self.test_share, 0, 1, open_low=True, open_high=True)
        check_integer("data.max_bad", self.max_bad, minimum=0)
        check_interval("data.crop_scale", self.crop_scale, 0, 1, open_low=True)
        if self.channels not in (1, 3):
            raise ValueError(f"data.channels must be 3 (colour) or 1 (grey); got {self.channels}")
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
        if self.name == "own" and not self.root:
            raise ValueError("data.root must be given with data.name own: the folder of the images")
        if self.name == "own" and self.test_list and not self.train_list:
            raise ValueError("data.train_list must be given with data.test_list")
        if self.name not in ("image_list", "own") and (self.train_list or self.test_list):
            raise ValueError(
                f"data.train_list and data.test_list are read by image_list and own only; got data.name {self.name}"
            )
        if self.name != "own" and (self.index or self.in_memory):
            raise ValueError(
                f"data.index and data.in_memory are read by own only; got data.name {self.name}: use data.name own"
            )
        if self.channels != 3 and self.name not in ("image_list", "image_folder", "own"):
            raise ValueError(
                f"data.channels must be 3 with data.name {self.name}, which has its own; got {self.channels}"
            )
        if self.fit == "whole" and self.test_crops != 1:
            raise ValueError(
                f"data.test_crops must be 1 with data.fit whole, which cuts nothing; got {self.test_crops}"
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
        if not small:
            self._check_augmentation_of_files()
        if self.name not in ("fashion_mnist", "cifar10", "cifar100") and self.download:
            raise ValueError(f"data.download must be false with data.name {self.name}; got true: nothing to download")

    def _check_augmentation_of_files(self) -> None:
        if self.in_memory and self.fit != "whole":
            raise ValueError(f"data.fit must be whole with data.in_memory true; got {self.fit}")
        if self.augmentation == "autoaugment" and not self.in_memory:
            raise ValueError(
                "data.augmentation must be none, resized_crop, crop_flip or randaugment with data.name "
                f"{self.name}; got autoaugment, which is for small images held in memory"
            )
        if self.augmentation in ("shift_rotate", "crop_flip_cutout") and self.fit != "whole":
            raise ValueError(
                f"data.augmentation must be none, resized_crop, crop_flip or randaugment with data.name {self.name}; "
                f"got {self.augmentation}, which is for small images: with data.fit whole, and their data.image_size"
            )
