"""Augmentations: what each may and may not do to an image."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from allnc.data.views import PADDING, Draws, augment_batch, image_transforms, normalise, whole

MEAN, STD = (0.5, 0.25), (0.5, 0.25)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, size: int = 28, channels: int = 2) -> torch.Tensor:
    return torch.randint(1, 256, (n, channels, size, size), generator=random(), dtype=torch.uint8)


def test_normalise_by_hand() -> None:
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    torch.testing.assert_close(normalise(image, MEAN, STD).flatten(), torch.tensor([-1.0, 3.0]))


@pytest.mark.parametrize("kind", ["shift_rotate", "crop_flip_cutout"])
def test_the_generator_decides_everything(kind: str) -> None:
    images = pictures(8)
    torch.manual_seed(1)
    first = augment_batch(images, kind, MEAN, STD, Draws(random(3), len(images)))
    torch.manual_seed(2)
    assert torch.equal(first, augment_batch(images, kind, MEAN, STD, Draws(random(3), len(images))))
    other = augment_batch(images, kind, MEAN, STD, Draws(random(4), len(images)))
    assert first.shape == images.shape and first.dtype == torch.float32
    assert not torch.equal(first, other)
    assert not torch.equal(
        first[0], augment_batch(images[:1].repeat(2, 1, 1, 1), kind, MEAN, STD, Draws(random(3), 2))[1]
    )


def test_crop_and_flip_give_windows_of_the_padded_image() -> None:
    images = pictures(64, size=12)
    views = augment_batch(images, "crop_flip_cutout", (0.0, 0.0), (1.0, 1.0), Draws(random(), len(images)))
    padded = torch.nn.functional.pad(images, (PADDING,) * 4).float() / 255
    offsets, mirrored = set(), 0
    for view, source in zip(views, padded, strict=True):
        kept = view != 0  # neither padding nor cut out: every pixel of the pictures is positive
        found = [
            (top, left, flip)
            for top in range(2 * PADDING + 1)
            for left in range(2 * PADDING + 1)
            for flip in (False, True)
            if torch.equal(
                view[kept],
                (w.flip(-1) if flip else w)[kept]
                if (w := source[:, top : top + 12, left : left + 12]) is not None
                else view,
            )
        ]
        assert len(found) == 1
        offsets.add(found[0][:2])
        mirrored += found[0][2]
    assert len(offsets) > 30 and 16 < mirrored < 48


def test_cutout_blanks_a_square_of_half_the_side() -> None:
    images = torch.full((200, 1, 28, 28), 255, dtype=torch.uint8)
    views = augment_batch(images, "crop_flip_cutout", (0.0,), (1.0,), Draws(random(), len(images)))
    blank = (views[:, 0, PADDING:-PADDING, PADDING:-PADDING] == 0).flatten(1).sum(1)
    assert blank.max() == 14 * 14 and blank.min() >= 0 and blank.float().mean() > 60


def test_small_shifts_and_rotations_keep_the_digit() -> None:
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[:, :, 3:5, 3:5] = 255
    views = augment_batch(image.repeat(200, 1, 1, 1), "shift_rotate", (0.0,), (1.0,), Draws(random(), 200))[:, 0]
    mass = views.sum((1, 2))
    rows = (views * torch.arange(8.0)[:, None]).sum((1, 2)) / mass - 3.5  # centre of mass
    assert rows.abs().max() < 1.4 and rows.std() > 0.3
    assert (mass > 2.5).all() and (mass < 6).all()


@pytest.mark.parametrize("kind", ["autoaugment", "resized_crop", "crop_flip", "randaugment", "none"])
def test_pipelines_of_single_images(kind: str) -> None:
    image = pictures(1, size=32, channels=3)[0]
    picture = image if kind == "autoaugment" else v2.functional.to_pil_image(image)
    first, others = image_transforms(kind, 32, (0.5,) * 3, (0.5,) * 3, train=True)
    for pipeline in (first, others):
        view = pipeline(picture)
        assert view.shape == (3, 32, 32)
        assert view.dtype == (torch.float32 if kind == "autoaugment" else torch.uint8)
        changes = not torch.equal(view, pipeline(picture))
        assert changes == (kind != "none")


def test_unknown_kinds() -> None:
    with pytest.raises(ValueError, match="kind must be none, shift_rotate or crop_flip_cutout; got 'blur'"):
        augment_batch(pictures(1), "blur", MEAN, STD, Draws(random(), 1))
    with pytest.raises(ValueError, match="kind must be none, autoaugment"):
        image_transforms("blur", 32, MEAN, STD, train=True)


@pytest.mark.parametrize("kind", ["none", "shift_rotate", "crop_flip_cutout"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 9), (3, 1, 7, 2)])
def test_whole_batches_of_odd_sizes(kind: str, shape: tuple[int, int, int, int]) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    channels = shape[1]
    views = augment_batch(
        images, kind, (0.5,) * channels, (0.5,) * channels, Draws(torch.Generator().manual_seed(0), len(images))
    )
    assert views.shape == shape and torch.isfinite(views).all()


@pytest.mark.parametrize("kind", ["none", "resized_crop", "crop_flip", "randaugment"])
@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 5), (15, 16)])
def test_images_of_extreme_shapes_cost_no_more_than_others(kind: str, size: tuple[int, int]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for train in (False, True):
        for view in image_transforms(kind, 64, (0.5,) * 3, (0.5,) * 3, train=train):
            assert view(Image.new("RGB", size, (255, 0, 0))).shape == (3, 64, 64)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; whole, it took 400 MB and more


def test_a_long_image_is_seen_as_if_it_were_resized_whole() -> None:
    colours = np.zeros((4, 400, 3), np.uint8)
    colours[:, :, 0] = np.arange(400) % 256
    plain, _ = image_transforms("none", 56, (0.0,) * 3, (1.0,) * 3, train=False)
    whole = v2.Compose([v2.Resize(64), v2.CenterCrop(56), v2.ToImage()])
    assert torch.equal(plain(Image.fromarray(colours)), whole(Image.fromarray(colours)))


@pytest.mark.parametrize("kind", ["shift_rotate", "crop_flip_cutout"])
def test_a_part_of_the_rows_sees_what_it_would_in_the_whole(kind: str) -> None:
    images, rows = pictures(7), torch.tensor([5, 0, 3])
    whole = augment_batch(images, kind, MEAN, STD, Draws(random(2), 7))
    assert torch.equal(augment_batch(images[rows], kind, MEAN, STD, Draws(random(2), 7, rows)), whole[rows])


def halves(channels: int = 3, size: int = 32) -> torch.Tensor:
    """White on the left, black on the right."""
    image = torch.zeros(channels, size, size, dtype=torch.uint8)
    image[..., : size // 2] = 255
    return image


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("kind", ["crop_flip_cutout", "autoaugment", "resized_crop", "crop_flip", "randaugment"])
def test_nothing_is_mirrored_without_flip(kind: str, flip: bool) -> None:
    """Mirrored views are darker on the left; what else is done to colours keeps the order of the halves' means."""
    if kind == "crop_flip_cutout":
        images = halves().expand(64, -1, -1, -1)
        views = augment_batch(images, kind, (0.0,) * 3, (1.0,) * 3, Draws(random(), 64), flip=flip)
    else:
        how = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "train": True, "flip": flip, "crop_scale": 0.8}
        second = image_transforms(kind, 32, **how)[1]  # without AutoAugment's and RandAugment's inversions
        views = torch.stack([second(halves()) for _ in range(64)]).float()
    darker = views[..., :8].mean((1, 2, 3)) < views[..., -8:].mean((1, 2, 3))
    assert (int(darker.sum()) > 10) is flip and (flip or not darker.any())


def test_a_crop_has_its_least_share_of_the_area() -> None:
    """Of a ramp from 0 to 255, the range that is left tells the width."""
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256).contiguous()
    for scale in (0.08, 0.9):
        crop, _ = image_transforms("crop_flip", 256, (0.0,) * 3, (1.0,) * 3, train=True, crop_scale=scale)
        widths = [int(view.amax()) - int(view.amin()) for view in (crop(ramp) for _ in range(64))]
        assert (min(widths) > 256 * 0.8) is (scale == 0.9)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["none", "shift_rotate", "resized_crop", "crop_flip", "randaugment"])
def test_grey_and_coloured_files_keep_their_channels(kind: str, channels: int) -> None:
    picture = Image.new("L" if channels == 1 else "RGB", (40, 30), 128)
    for fit in ("whole",) if kind == "shift_rotate" else ("crop", "whole"):
        for pipeline in image_transforms(kind, 16, (0.5,) * channels, (0.5,) * channels, train=True, fit=fit):
            for _ in range(8):
                assert pipeline(picture).shape == (channels, 16, 16)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (7, 7), (16, 16), (3000, 1), (1, 1)])
def test_a_whole_image_is_centred_and_its_border_repeated(size: tuple[int, int]) -> None:
    picture = Image.new("L", size, 90)
    picture.putpixel((size[0] // 2, size[1] // 2), 90)
    fitted = whole(picture, 16)
    assert fitted.size == (16, 16) and {*np.asarray(fitted).ravel().tolist()} == {90}
    tensor = torch.from_numpy(np.array(picture))[None]
    assert whole(tensor, 16).shape == (1, 16, 16)
    assert (whole(picture, 16) is picture) is (size == (16, 16))


def test_the_plain_view_of_a_whole_image_cuts_nothing() -> None:
    image = pictures(1, 32, 3)[0]
    for train in (True, False):
        for pipeline in image_transforms("none", 32, (0.5,) * 3, (0.5,) * 3, train=train, fit="whole"):
            assert torch.equal(pipeline(image), image)
