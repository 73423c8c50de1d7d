"""allnc.evaluate --data: folders, lists and arrays give the trainer's numbers; classes are found by name."""

from __future__ import annotations

import csv
import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from allnc import evaluate
from allnc.data.images import shown
from allnc.data.own import Index, Row
from allnc.inference.labelled import labelled_images
from allnc.inference.measure import measure
from allnc.inference.predictor import restore
from tests.inference.conftest import CLASSES, on_arrays, on_files, saved
from tests.trainer.test_training import TINY


def accuracy_of(text: str) -> float:
    found = re.search(r"accuracy \([^)]*\) +│ +([\d.]+)", text)
    assert found is not None, text
    return float(found.group(1))


def list_of(tree: Path, path: Path, *, numbers: bool = False) -> Path:
    """Write a list of the test images, which starts from the tree's folder."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        for image in sorted(tree.glob("test/*/*.png")):
            name = image.parent.name
            rows.writerow([image.relative_to(tree), sorted(CLASSES).index(name) if numbers else name])
    return path


def test_every_kind_of_data_gives_the_trainers_numbers(tree: Path, tmp_path: Path) -> None:
    trained = saved(on_files(tree, data={"test_crops": 5}), tmp_path / "run")
    wanted = trained.measure_accuracy()
    run = restore(tmp_path / "run", device="cpu")
    sources = (tree / "test", list_of(tree, tmp_path / "a.csv"), list_of(tree, tmp_path / "b.csv", numbers=True))
    for source in sources:
        labelled = labelled_images(str(source), run, str(tree))
        measured = measure(run, labelled.images, measured_on="test")
        assert {name: measured.values[name] for name in wanted} == wanted
        assert [score.name for score in measured.classes] == sorted(CLASSES)
        assert bool(labelled.notes) == (source.name == "b.csv")  # numbers are said to be taken in the run's order
    prior = trained.measure_accuracy(torch.tensor([0.2, 0.5, 0.3]))
    (tmp_path / "prior.csv").write_text(
        "".join(f'"{n.replace(chr(34), chr(34) * 2)}",{w}\n' for n, w in zip(sorted(CLASSES), (2, 5, 3), strict=True))
    )
    adjusted = measure(
        run, labelled_images(str(tree / "test"), run).images, prior=str(tmp_path / "prior.csv"), measured_on=""
    )
    assert adjusted.values["nll"] == pytest.approx(prior["nll"], rel=1e-6)


def test_of_images_with_splits_those_of_the_test_set_are_measured(
    tree: Path, run_of_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = restore(run_of_files, device="cpu")
    wanted = sorted(map(str, tree.glob("test/*/*.png")))
    listed, table = tmp_path / "all.csv", tmp_path / "images.tsv"
    found = [(image.relative_to(tree), image.parent.name) for image in sorted(tree.glob("*/*/*.png"))]
    with listed.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "split"), *((p, name, p.parts[0]) for p, name in found)])
    rows = [Row(str(path), name, path.parts[0], 40, 48, "RGB", "", "") for path, name in found]
    left_out = Row("train/gone.png", CLASSES[0], "", 0, 0, "", "", "a link that leads nowhere")
    table.write_bytes(Index(root="", rows=(*rows, left_out)).text())
    for source in (tree, listed, table):  # the paths of the table start from the run's own data.root
        images, notes = labelled_images(str(source), run, str(tree) if source == listed else None)
        assert sorted(images.paths) == wanted
        assert notes == (f"{shown(str(source))} has splits: its 9 test images of 33 are taken",)

    parts = tmp_path / "parts"
    shutil.copytree(tree / "test", parts / "Val")
    (parts / "Val" / "empty").mkdir()  # no class, as in a training
    images, notes = labelled_images(str(parts), run)
    assert len(images) == 9 and any("its 9 validation images of 9 are taken" in note for note in notes)
    assert any("has no image: no class" in note for note in notes)
    link = parts / "Val" / CLASSES[0] / "link.png"
    link.symlink_to("nowhere")
    assert evaluate.main([str(run_of_files), "--data", str(parts)]) == 2
    assert f"{link} (a link that leads nowhere)" in capsys.readouterr().err
    (parts / "Val").rename(parts / "train")
    (parts / "train" / CLASSES[0] / "link.png").unlink()
    assert evaluate.main([str(run_of_files), "--data", str(parts)]) == 0
    assert "has training images alone" in capsys.readouterr().out


def test_arrays_and_files_of_small_images(arrays: Path, tmp_path: Path) -> None:
    """The same pixels from the run's own file, from a labelled one with fewer classes, and from PNGs."""
    wanted = saved(on_arrays(arrays), tmp_path / "run").measure_accuracy()
    run = restore(tmp_path / "run", device="cpu")
    with np.load(arrays) as file:
        images, labels = file["test_images"], file["test_labels"]
    for position, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "png" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{position}.png")
    np.savez(
        tmp_path / "two.npz", images=images, labels=(labels + 1) % 3, classes=np.array([*CLASSES[2:], *CLASSES[:2]])
    )
    for source in (arrays, tmp_path / "png", tmp_path / "two.npz"):
        measured = measure(run, labelled_images(str(source), run).images, measured_on="test")
        for name, value in wanted.items():
            assert measured.values[name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
    kept = labels != 1
    np.savez(tmp_path / "fewer.npz", images=images[kept], labels=labels[kept])
    measured = measure(run, labelled_images(str(tmp_path / "fewer.npz"), run).images, measured_on="test")
    assert [score.measured_images for score in measured.classes] == [3, 0, 3]
    np.savez(tmp_path / "other.npz", images=images, labels=labels + 1)
    with pytest.raises(ValueError, match="must have labels in 0 to 2, the classes of the run; got 3"):
        labelled_images(str(tmp_path / "other.npz"), run)


def test_a_run_on_files_takes_arrays(tree: Path, run_of_files: Path, tmp_path: Path) -> None:
    run = restore(run_of_files, device="cpu")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 50, 70), np.uint8), labels=np.array([0, 2]))
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    labelled = labelled_images(str(tmp_path / "A.NPZ"), run)
    assert labelled.images.images is not None and labelled.images.images.shape == (2, 3, 32, 32)
    assert any("were fitted to 32 x 32 pixels" in note for note in labelled.notes)


def test_classes_of_other_names_are_refused_by_name(
    tree: Path, run_of_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tree / "test" / CLASSES[2], folder / CLASSES[2])
    assert evaluate.main([str(run_of_files), "--data", str(folder), "--classes"]) == 0
    assert "2 images of 1 of 3 classes" in capsys.readouterr().out
    shutil.copytree(tree / "test" / CLASSES[0], folder / "plum")
    assert evaluate.main([str(run_of_files), "--data", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "does not know plum; the run has apple, red, " in error
    (folder / "test").mkdir()
    shutil.copy(tree / "test" / CLASSES[0] / "0.png", folder / "test")
    shutil.rmtree(folder / "plum")
    assert evaluate.main([str(run_of_files), "--data", str(folder)]) == 2
    assert f"give one of its folders, such as {folder / 'test'}" in capsys.readouterr().err
    shutil.rmtree(folder / "test")
    next((folder / CLASSES[2]).iterdir()).write_text("no image")
    assert evaluate.main([str(run_of_files), "--data", str(folder)]) == 2
    assert "1 of 2 images cannot be read, and none may be, such as" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_files_that_cannot_be_read_are_counted_and_listed(
    kind: str,
    tree: Path,
    arrays: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run, data = "run", Path("data")
    saved(on_files(tree) if kind == "files" else on_arrays(arrays), tmp_path / "run")
    shutil.copytree(tree / "test", data)
    assert evaluate.main([run, "--data", str(data)]) == 0
    whole = capsys.readouterr().out
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (100, 100, 3), dtype=np.uint8)).save("large.png")
    middle = bytearray(Path("large.png").read_bytes())
    middle[len(middle) // 2 : len(middle) // 2 + 40] = bytes(40)  # begins and ends as it should
    bad = {f"{CLASSES[0]}/broken.png": bytes(middle), f"{CLASSES[2]}/a\nb.png": b"no image"}
    for name, content in bad.items():
        (data / name).write_bytes(content)
    (data / CLASSES[1] / "link.png").symlink_to("nowhere")
    assert evaluate.main([run, "--data", str(data), "--max_bad", "2"]) == 2
    said = capsys.readouterr()
    assert "3 of 12 images cannot be read, and --max_bad allows 2, such as" in said.err and not said.out
    assert said.err.count("\n") == 1 and "leave them out with --max_bad 3" in said.err
    assert evaluate.main([run, "--data", str(data), "--max_bad", "3"]) == 0
    said = capsys.readouterr().out
    assert "note: 3 of 12 images left out that cannot be read:" in said and "9 images of 3 of 3 classes" in said
    for name in (CLASSES[0] + "/broken.png", "a\\nb.png", "link.png (a link that leads nowhere)"):
        assert name in said
    assert accuracy_of(said) == accuracy_of(whole)


def test_images_none_of_which_can_be_read(
    run_of_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.csv").write_text(f'path,label\r\na.png,"{CLASSES[0]}"\r\n', newline="")
    (tmp_path / "a.png").write_text("no image")
    assert evaluate.main([str(run_of_files), "--data", str(tmp_path / "list.csv"), "--max_bad", "9"]) == 2
    error = capsys.readouterr().err
    assert "1 of 1 images cannot be read" in error and "leave them out" not in error


def test_own_test_images_are_enough(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy)
    lists = {name: copy / f"{name}.txt" for name in ("train", "test")}
    for part, path in lists.items():
        images = sorted(copy.glob(f"{part}/*/*.png"))
        path.write_text(
            "".join(f"{i.relative_to(copy)} {sorted(CLASSES).index(i.parent.name)}\n" for i in images), encoding="utf-8"
        )
    of_lists = {"name": "image_list", "train_list": str(lists["train"]), "test_list": str(lists["test"])}
    saved(on_files(copy), tmp_path / "folder")
    saved(on_files(copy, data=of_lists), tmp_path / "list")
    whole = []
    for name in ("folder", "list"):
        assert evaluate.main([str(tmp_path / name)]) == 0
        whole.append(capsys.readouterr().out)
    shutil.rmtree(copy / "train")
    lists["train"].unlink()
    for name, before in zip(("folder", "list"), whole, strict=True):
        assert evaluate.main([str(tmp_path / name)]) == 0
        said = capsys.readouterr().out
        assert "the training images are not there: accuracy alone" in said and "NC1" in before and "NC1" not in said
        assert accuracy_of(said) == accuracy_of(before)
        assert evaluate.main([str(tmp_path / name), "--collapse"]) == 2
        capsys.readouterr()


def test_a_relative_root_is_found_from_another_folder(
    arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    shutil.copy(arrays, project / "set.npz")
    monkeypatch.chdir(project)
    config = dataclasses.replace(on_arrays(Path("set.npz")), out="runs/one")
    saved(config, project / "runs" / "one")
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["project/runs/one"]) == 0
    assert accuracy_of(capsys.readouterr().out) >= 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "gone"], "--data must be a folder, a list or a .npz file; there is no gone"),
        (["--max_bad", "3"], "--max_bad would be ignored without --data"),
        (["--data", ".", "--max_bad", "-1"], "--max_bad must be >= 0; got -1"),
        (["--data", ".", "--on", "test"], "--on would be ignored with --data"),
        (["--data", ".", "--collapse"], "--data would be ignored with --collapse"),
        (["--data", ".", "--predictions"], "--predictions would replace those of the run's own images"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["run", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_on_features_is_not_measured_on_images(tree: Path, tmp_path: Path) -> None:
    saved(TINY, tmp_path)
    run = restore(tmp_path, device="cpu")
    of_features = dataclasses.replace(run, card=dataclasses.replace(run.card, shape=(8,)))
    with pytest.raises(ValueError, match=r"--data needs a run on images; this one was trained on stored features"):
        labelled_images(str(tree / "test"), of_features)
