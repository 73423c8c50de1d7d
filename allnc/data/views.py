"""Augmented views: whole batches of small images at once, or one large image at a time in worker processes.

Legend: N images or views in a batch, c channels, H, W height and width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from allnc.config import BATCH_AUGMENTATIONS

PADDING = 4  # pixels, for images of 28 or 32
CUTOUT = 0.5  # side of the square that is cut out, as a share of the image's
LONGEST = 8  # sides of an image that is resized whole, the shorter as 1


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Scale uint8 pixels to [0, 1], then subtract the mean and divide by the deviation of each channel."""
    shift = torch.tensor(mean, device=images.device)[:, None, None] * 255
    scale = torch.tensor(std, device=images.device)[:, None, None] * 255
    # In place, as there may be gigabytes of it.
    return images.to(torch.float32, copy=True).sub_(shift).div_(scale)  # [N, c, H, W]


class Draws:
    """Random numbers of a whole batch, of which a process takes those of its own rows: the same views on any number.

    Args:
        generator: CPU generator that decides everything, so that a GPU sees the same views.
        total: rows of the whole batch.
        rows: those that are augmented here, a slice or [N] positions.
    """

    def __init__(self, generator: torch.Generator, total: int, rows: slice | Tensor = slice(None)) -> None:
        self.generator, self.total, self.rows = generator, total, rows

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), [..., N]."""
        return torch.rand(*shape, self.total, generator=self.generator)[..., self.rows]

    def integers(self, stop: int, *shape: int) -> Tensor:
        """Integers in [0, stop), [..., N]."""
        return torch.randint(0, stop, (*shape, self.total), generator=self.generator)[..., self.rows]


def augment_batch(
    images: Tensor, kind: str, mean: tuple[float, ...], std: tuple[float, ...], draws: Draws, *, flip: bool = True
) -> Tensor:
    """Augment and normalise a batch of small images, each in its own random way.

    Args:
        images: [N, c, H, W], uint8, on any device, N >= 1.
        kind: none, shift_rotate (shift by up to a pixel in eight, rotate by up to 15 degrees, scale by up
            to a tenth) or crop_flip_cutout (shift by up to 4 pixels, mirror, blank a square of half the
            side).
        mean, std: of the pixels scaled to [0, 1], by channel.
        draws: random numbers for the N images.
        flip: let crop_flip_cutout mirror images.

    Returns:
        [N, c, H, W], float32.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "none":
        return normalise(images, mean, std)
    if kind == "shift_rotate":
        return _shift_rotate(normalise(images, mean, std), draws)
    if kind != "crop_flip_cutout":
        raise ValueError(f"kind must be none, shift_rotate or crop_flip_cutout; got {kind!r}")
    return _cutout(normalise(_crop_flip(images, draws, flip=flip), mean, std), draws)


def _crop_flip(images: Tensor, draws: Draws, *, flip: bool) -> Tensor:
    """Take a random window of each zero-padded image, mirrored half of the time if it may be."""
    n, _, height, width = images.shape
    device = images.device
    top, left = draws.integers(2 * PADDING + 1, 2).to(device)[:, :, None]  # [N, 1] each
    mirrored = (draws.uniform() < (0.5 if flip else 0.0)).to(device)[:, None]
    rows = top + torch.arange(height, device=device)  # [N, H]
    columns = torch.arange(width, device=device)
    columns = left + torch.where(mirrored, width - 1 - columns, columns)  # [N, W]
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    batch = torch.arange(n, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(images: Tensor, draws: Draws) -> Tensor:
    """Set a square at a random place, partly outside maybe, to the mean pixel (0 after normalising)."""
    _, _, height, width = images.shape
    device = images.device
    centre = draws.uniform(2).to(images.device)[:, :, None]  # share of the side, [N, 1] each
    half = CUTOUT / 2
    rows = ((torch.arange(height, device=device) + 0.5) / height - centre[0]).abs() < half  # [N, H]
    columns = ((torch.arange(width, device=device) + 0.5) / width - centre[1]).abs() < half  # [N, W]
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def _shift_rotate(images: Tensor, draws: Draws) -> Tensor:
    """Rotate, scale and shift each image about its centre; pixels from outside repeat the border."""
    n = len(images)
    random = draws.uniform(4) * 2 - 1  # each in [-1, 1], [N]
    angle, scale = random[0] * math.radians(15), 1 + 0.1 * random[1]
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    shift = random[2:] * 0.25  # the image is 2 wide in these coordinates: one pixel in eight
    rows = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], dim=1).view(n, 2, 3).to(images.device)
    grid = torch.nn.functional.affine_grid(rows, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def image_transforms(
    kind: str,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    train: bool,
    margin: bool = False,
    fit: str = "crop",
    flip: bool = True,
    crop_scale: float = 0.08,
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the pipelines (torchvision.transforms.v2) of the first view and of all others, one image at a
    time.

    Args:
        kind: an augmentation of DataConfig; autoaugment for small uint8 tensors, the rest for PIL images.
        size: side of the result in pixels.
        mean, std: of the pixels scaled to [0, 1], by channel.
        train: False gives the plain pipeline of a test image for both: resize by 8/7, centre crop.
        margin: the plain pipeline leaves the whole square of 8/7 of the side, for crops elsewhere than in its centre.
        fit: whole makes every image fit whole first, so that the plain pipeline cuts nothing.
        flip: mirror half of the views where the augmentation does.
        crop_scale: least share of the area that the crops of large images have.

    Returns:
        Two modules from an image to a tensor [c, size, size]: uint8, or normalised float32 for autoaugment, in which
        the square that is cut out must be exactly the mean pixel.
    """
    from torchvision.transforms import v2

    last = [v2.ToImage()]
    fitted = [v2.Lambda(functools.partial(whole, size=size))] if fit == "whole" else []
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    jitter = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
    if fitted and (not train or kind in BATCH_AUGMENTATIONS):  # batches are augmented when they are whole
        return v2.Compose([*fitted, *last]), v2.Compose([*fitted, *last])
    if not train or kind == "none":
        square = size * 8 // 7
        cut = v2.CenterCrop(square if margin else size)
        plain = v2.Compose([v2.Lambda(_middle), v2.Resize(square), cut, *last])
        return plain, plain
    if kind == "autoaugment":
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        # A square of half the side: torchvision's erasing takes the share of the area.
        last += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        cutout = v2.RandomErasing(1.0, scale=(CUTOUT**2, CUTOUT**2), ratio=(1.0, 1.0))
        first = v2.Compose([v2.RandomCrop(size, PADDING), *mirror, policy, *last, cutout])
        second = v2.Compose([v2.RandomResizedCrop(size, (0.2, 1.0)), *mirror, *jitter, *last])
        return first, second
    crop = [*fitted, v2.RandomResizedCrop(size, (crop_scale, 1.0)), *mirror]
    second = v2.Compose([*crop, *jitter, *last])
    if kind == "resized_crop":
        return second, second
    if kind == "crop_flip":
        return v2.Compose([*crop, *last]), v2.Compose([*crop, *last])
    if kind != "randaugment":
        raise ValueError(f"kind must be none, autoaugment, resized_crop, crop_flip or randaugment; got {kind!r}")
    return v2.Compose([*crop, *jitter, v2.RandAugment(num_ops=2, magnitude=10), *last]), second


def whole(image: Any, size: int) -> Any:
    """Resize an image until all of it fits into a square of `size` pixels, and repeat its border beside it.

    Args:
        image: of PIL, or a tensor [c, H, W]; one of size x size stays as it is.
    """
    from torchvision.transforms.v2 import functional

    height, width = functional.get_size(image)
    longer = max(height, width)
    if longer != size:
        height, width = max(1, round(height * size / longer)), max(1, round(width * size / longer))
        image = functional.resize(image, [height, width], antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    sides = [left, top, size - width - left, size - height - top]
    return functional.pad(image, sides, padding_mode="edge") if any(sides) else image


def _middle(image: Any) -> Any:
    """Cut the ends off an image that is longer than 8 squares, of which the centre crop sees one.

    Resized whole, 1 x 20,000 pixels would take 4 GB.
    """
    from torchvision.transforms.v2 import functional

    height, width = functional.get_size(image)
    longest = LONGEST * min(height, width)
    return (
        image
        if max(height, width) <= longest
        else functional.center_crop(image, [min(height, longest), min(width, longest)])
    )
