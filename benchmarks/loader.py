"""What feeds the network: `python benchmarks/loader.py decoders steps rates start memory`.

    decoders    images/s of one core by the library that decodes, and whether the pixels are PIL's
    steps       milliseconds of one core for each step of making the views of an image
    rates       images/s of the loader by the number of workers, and what a model of timm's eats beside it
    start       seconds from the end of an epoch's last step to the next epoch's first batch
    memory      what a worker holds for itself after an epoch, by the length of the list

Images are 500 x 375 JPEGs of quality 90 with the spectrum of photographs, made for the purpose. Whatever is compared is
run in turn; figures are medians with the smallest and the largest. Other decoders than PIL and torchvision are tried
where they are installed (simplejpeg, PyTurboJPEG, opencv-python-headless).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import write_photos
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from allnc.config import Config, DataConfig, ModelConfig, TrainConfig
from allnc.data import Batch, ImageSet, TrainLoader
from allnc.data.images import read_image
from allnc.data.paths import PathList
from allnc.data.sources import IMAGENET_MEAN, IMAGENET_STD
from allnc.data.views import image_transforms, normalise
from allnc.data.workers import Views
from allnc.trainer.loop import train_step
from allnc.trainer.run import Run

Decoder = Callable[[bytes], Any]
CPU = torch.device("cpu")


def median(values: list[float], digits: int = 0) -> str:
    """Median (smallest-largest)."""
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def seconds_of_core(step: Callable[[Any], Any], values: list[Any]) -> float:
    """Processor seconds of this process for one of the values."""
    began = time.process_time()
    for value in values:
        step(value)
    return (time.process_time() - began) / len(values)


def decoders_here() -> dict[str, Decoder]:
    """Decoders of a JPEG in memory, by name."""

    def pil(raw: bytes, smallest: int | None = None) -> Image.Image:
        image = Image.open(io.BytesIO(raw))
        if smallest is not None:
            image.draft("RGB", (smallest, smallest))
        image.load()
        return image

    found: dict[str, Decoder] = {
        "PIL": pil,
        "PIL, draft for 224 px": lambda raw: pil(raw, 224),
        "torchvision": lambda raw: _decoded(raw).permute(1, 2, 0),
    }
    with contextlib.suppress(ImportError):
        import simplejpeg  # pyright: ignore[reportMissingImports]

        found["simplejpeg"] = lambda raw: simplejpeg.decode_jpeg(raw, "RGB")
        found["simplejpeg, fast"] = lambda raw: simplejpeg.decode_jpeg(raw, "RGB", fastdct=True, fastupsample=True)
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import turbojpeg  # pyright: ignore[reportMissingImports]

        turbo = turbojpeg.TurboJPEG()
        found["PyTurboJPEG"] = lambda raw: turbo.decode(raw, pixel_format=turbojpeg.TJPF_RGB)
    with contextlib.suppress(ImportError):
        import cv2  # pyright: ignore[reportMissingImports]

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda raw: cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR_RGB)
    return found


def _decoded(raw: bytes) -> torch.Tensor:
    image = decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    assert isinstance(image, torch.Tensor)  # a list of them for a list of files
    return image  # [3, height, width]


def decoders(photos: list[Path], repeats: int) -> None:
    """Print a row for each decoder: alone, and with a random resized crop to 224 px by PIL or on tensors."""
    raws = [path.read_bytes() for path in photos]
    crop = v2.RandomResizedCrop(224, (0.08, 1.0))
    wanted = [np.asarray(read_image(str(path))).astype(int) for path in photos[:20]]

    def cropped(decode: Decoder, raw: bytes) -> Any:
        image = decode(raw)
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image)
        return crop(image.permute(2, 0, 1) if isinstance(image, torch.Tensor) else image)

    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in decoders_here()}
    for _ in range(repeats):
        for name, decode in decoders_here().items():
            rates[name][0].append(1 / seconds_of_core(decode, raws))
            rates[name][1].append(1 / seconds_of_core(lambda raw, decode=decode: cropped(decode, raw), raws))
    print("| decoder | decoded, images/s of a core | and cropped | largest difference from PIL | file cut in half |")
    print("| --- | --- | --- | --- | --- |")
    for name, decode in decoders_here().items():
        pixels = [np.asarray(decode(raw)).astype(int) for raw in raws[:20]]
        same = all(ours.shape == theirs.shape for ours, theirs in zip(pixels, wanted, strict=True))
        off = max(int(np.abs(a - b).max()) for a, b in zip(pixels, wanted, strict=True)) if same else "another size"
        try:
            decode(raws[0][: len(raws[0]) // 2])
            cut = "an image, silently"
        except Exception as error:  # each library has its own
            cut = type(error).__name__
        print(f"| {name} | {median(rates[name][0])} | {median(rates[name][1])} | {off} | {cut} |")


def steps(photos: list[Path], repeats: int) -> None:
    """Print the milliseconds of each step of making a view."""
    images = [read_image(str(path)) for path in photos]
    crop = v2.RandomResizedCrop(224, (0.08, 1.0))
    small = [crop(image) for image in images]
    tensors = [v2.functional.pil_to_tensor(image) for image in small]
    size, mean, std = 224, IMAGENET_MEAN, IMAGENET_STD
    table: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
        "read_image": (lambda path: read_image(str(path)), photos),
        "random resized crop": (crop, images),
        "colour jitter": (v2.ColorJitter(0.4, 0.4, 0.4, 0.1), small),
        "colour jitter without hue": (v2.ColorJitter(0.4, 0.4, 0.4), small),
        "RandAugment": (v2.RandAugment(num_ops=2, magnitude=10), small),
        "to a uint8 tensor": (v2.ToImage(), small),
        "to float32 and normalised": (lambda x: normalise(x, mean, std), tensors),
        "a view of resized_crop": (image_transforms("resized_crop", size, mean, std, train=True)[0], images),
        "a first view of randaugment": (image_transforms("randaugment", size, mean, std, train=True)[0], images),
        "a test view": (image_transforms("none", size, mean, std, train=False)[0], images),
    }
    found: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(repeats):
        for name, (step, values) in table.items():
            found[name].append(1e3 * seconds_of_core(step, values))
    for name, values in found.items():
        print(f"| {name} | {median(values, 2)} ms |")


def photo_set(photos: list[Path], number: int, classes: int = 10) -> ImageSet:
    """A set of so many images, whose files repeat."""
    paths = PathList.of(str(photos[n % len(photos)]) for n in range(number))
    labels = torch.arange(number) % classes
    return ImageSet(labels=labels, num_classes=classes, mean=IMAGENET_MEAN, std=IMAGENET_STD, paths=paths)


def data_config(workers: int, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"augmentation": "randaugment", "workers": workers, **changes}
    return DataConfig(name="image_folder", root=".", **values)


def rates(photos: list[Path], workers: list[int], model: str, batch_size: int, repeats: int) -> None:
    """Print images/s (two views of each) that the loader makes, and that a model's training steps eat."""
    images = photo_set(photos, 8 * batch_size)
    for count in workers:
        found = []
        source = TrainLoader(
            images,
            data_config(count),
            batch_size=batch_size,
            seed=0,
            two_batches=False,
            device=CPU,
            epochs=repeats + 1,
        )
        for epoch in range(repeats + 1):
            began = time.perf_counter()
            made = sum(batch.num_uniform for batch in source.epoch(epoch))
            found.append(made / (time.perf_counter() - began))
        print(f"| loader, {count} workers | {median(found[1:], 1)} images/s |")
    for threads in (1, torch.get_num_threads()):
        config = Config(
            data=data_config(0),
            model=ModelConfig(name=model),
            train=TrainConfig(batch_size=batch_size, threads=threads, device="auto"),
        )
        run = Run(config, images=(images, images))
        shape = (2 * batch_size, 3, 224, 224)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8).to(run.device)
        labels = torch.randint(0, 10, (batch_size,)).repeat(2).to(run.device)
        found = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            train_step(run, Batch(pixels, labels, batch_size, 0), progress=0.1)
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            found.append(batch_size / (time.perf_counter() - began))
        print(f"| {model} on {run.device.type}, {threads} threads | {median(found[1:], 1)} images/s |")


def start(photos: list[Path], workers: int, repeats: int) -> None:
    """Print how long an epoch's first batch is waited for, when the model was busy for two seconds before."""
    images = photo_set(photos, 1024)
    for batch_size in (64, 256):
        source = TrainLoader(
            images,
            data_config(workers),
            batch_size=batch_size,
            seed=0,
            two_batches=False,
            device=CPU,
            epochs=repeats + 1,
        )
        found = []
        for epoch in range(repeats + 1):
            began = time.perf_counter()
            batches = source.epoch(epoch)
            next(batches)
            found.append(time.perf_counter() - began)
            for _ in batches:
                pass
            time.sleep(2.0)  # as measuring the model takes
        print(
            f"| batch {batch_size}, {workers} workers | first epoch {found[0]:.2f} s | later ones "
            f"{median(found[1:], 3)} s |"
        )


class _Nothing(Views):
    """Looks a path up, and makes an image of nothing."""

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        assert self.set.paths[key[0]]
        return torch.zeros(1, 3, 1, 1, dtype=torch.uint8)


def memory(lengths: list[int], workers: int) -> None:
    """Print what is a worker's own (USS) and its share of everything (PSS) after as many images for every length."""
    folder = "a/folder/of/a/usual/length/and/a/name/of/an/image/"
    for length in lengths:
        for kind, make in (("arrays", PathList.of), ("strings", list)):
            images = photo_set([Path("x")], length)
            object.__setattr__(images, "paths", make(f"{folder}{n:032x}.jpg" for n in range(length)))
            config, epochs, held = data_config(workers), max(lengths) // length, []
            source = TrainLoader(images, config, batch_size=500, seed=0, two_batches=False, device=CPU, epochs=epochs)
            source.views = _Nothing(images, config, train=True)
            for epoch in range(epochs):
                for _ in source.epoch(epoch):
                    held = [_own_memory(child.pid) for child in multiprocessing.active_children()] or held
            own, share = (np.mean(values) for values in zip(*held, strict=True))
            print(f"| {length:,} paths as {kind} | USS {own:.1f} MiB | PSS {share:.1f} MiB |")


def _own_memory(pid: int | None) -> tuple[float, float]:
    """Unique and proportional set size of a process in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Pss"]


@contextlib.contextmanager
def photos_of(number: int) -> Iterator[list[Path]]:
    """Photographs in a folder that is removed again."""
    with tempfile.TemporaryDirectory(prefix="allnc-photos-") as folder:
        yield write_photos(Path(folder), number, 500, 375)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("decoders", "steps", "rates", "start", "memory"))
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", default="timm:resnet50")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 500_000])
    options = parser.parse_args()
    with photos_of(options.photos) as photos:
        for what in options.what:
            print(f"\n{what}, n = {options.repeats}")
            if what in ("decoders", "steps"):
                threads = torch.get_num_threads()
                torch.set_num_threads(1)
                (decoders if what == "decoders" else steps)(photos, options.repeats)
                torch.set_num_threads(threads)
            elif what == "rates":
                rates(photos, options.workers, options.model, options.batch_size, options.repeats)
            elif what == "start":
                start(photos, options.workers[-1], options.repeats)
            else:
                memory(options.lengths, options.workers[-1])


if __name__ == "__main__":
    main()
