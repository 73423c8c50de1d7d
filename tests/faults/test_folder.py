"""Who may write a run folder, and what of it may be deleted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
import yaml

from allnc.train import main
from allnc.trainer import ending, loop, state
from allnc.trainer import folder as folders
from allnc.trainer.folder import (
    CHECKPOINT,
    LOCK,
    STATE,
    WEIGHTS,
    RunFolder,
    check_folder,
    is_run,
    new_folder,
    own_files,
)
from allnc.trainer.manifest import read_manifest
from allnc.trainer.options import to_dict
from allnc.trainer.planning import plan
from tests.faults.runs import TINY, WORDS, command, one_line, quiet, shown, start


def make_run(path: Path) -> None:
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(TINY)))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path):
        with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .*: wait for it, stop it, or give"):
            RunFolder(tmp_path)
        if (child := os.fork()) == 0:  # as a worker of a loader, which may outlive its parent by seconds
            signal.pause()
    with RunFolder(tmp_path):  # free again, although the child lives
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        RunFolder(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / LOCK).is_file()
    RunFolder(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folders.fcntl, "flock", no_locks)
    console = quiet()
    loop.train(TINY, tmp_path / "run", console)
    assert "has no locks; do not start a second run in it" in shown(console)


def test_two_commands_in_one_folder(tmp_path: Path) -> None:
    first = start(*WORDS, "--train.epochs", "400", "--out", str(tmp_path / "run"))
    assert first.stdout is not None and "training images" in first.stdout.readline()
    for flags in ([], ["--overwrite"], ["--resume"]):
        words = [] if flags == ["--resume"] else WORDS
        status, errors = command(*words, *flags, "--out", str(tmp_path / "run"))
        wanted = "holds a run" if not flags else f"in use by process {first.pid}"
        assert status == 2 and (wanted in one_line(errors) or "has none yet" in errors)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and one_line(errors).startswith("allnc.train: stopped; ")


def test_default_names_are_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = [new_folder("x") for _ in range(3)]
    assert taken == [Path("runs/x"), Path("runs/x-2"), Path("runs/x-3")] and all(path.is_dir() for path in taken)
    processes = [start(*WORDS, "--train.epochs", "1") for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    names = {path.name for path in Path("runs").iterdir() if path.name.startswith("digits_lt")}
    stem = "digits_lt-allnc-width=4-max_per_class=40-epochs=1-eval_every=9-seed0"
    assert names == {stem, f"{stem}-2", f"{stem}-3"}
    assert all((Path("runs") / name / "summary.json").is_file() for name in names)


def test_default_names_tell_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where files lie, and never more than a name can hold."""
    monkeypatch.chdir(tmp_path)
    words = ["--loss.name", "ce", "--train.lr=0.05", "--train.threads", "1", "--seed", "3"]
    assert plan(words).folder == Path("runs/digits_lt-ce-lr=0.05-seed3")
    statistics = ["--data.mean", "[0.5]", "--data.std", "[0.5]"]
    assert plan(statistics).folder.name == "digits_lt-allnc-mean=_0.5_-std=_0.5_-seed0"
    many = ["--train.lr", "1", "--train.epochs", "9", "--loss.tau", "2", "--loss.alpha", "1", "--model.width", "8"]
    assert plan(many).folder.name == "digits_lt-allnc-lr=1.0-epochs=9-tau=2.0-alpha=1.0-etc-seed0"


def test_a_place_that_holds_no_files_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", "/proc/x"]) == 2
    assert "/proc/x" in one_line(capsys.readouterr().err)


def test_overwrite_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    loop.train(TINY, run, quiet())
    ours = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {str(path.relative_to(run)) for path in own_files(run)} == ours
    mine = ("notes.txt", "events.csv", "plots/mine.png", "events.log", "mine.safetensors", ".hidden")
    for name in mine:
        (run / name).write_text("mine")
    with RunFolder(run, "overwrite") as files:
        files.start()
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} == set(mine)


@pytest.mark.parametrize("config", ["", "data: 1\nmy: own\n", "- 1\n", "\x00", "train: {}\n", "a: [\n"])
def test_somebodys_own_folder_is_not_touched(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert not is_run(tmp_path)
    for mode in ("new", "overwrite"):
        with pytest.raises(ValueError, match="holds other files"):
            check_folder(tmp_path, mode)
    assert (tmp_path / "config.yaml").read_text() == config


def test_the_old_run_goes_last(tmp_path: Path) -> None:
    """A mistake in the new run must not cost the old one."""
    run = tmp_path / "run"
    loop.train(TINY, run, quiet())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for words in (["--config", "fashion_lt", "--data.root", "/nowhere"], ["--train.batch_size", "4000"]):
        assert command(*words, "--overwrite", "--out", str(run))[0] == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_leftovers_of_a_killed_run_are_known(tmp_path: Path) -> None:
    for name in (".config.yaml.tmp", ".last.safetensors.tmp", ".state.pt.tmp", LOCK):
        (tmp_path / name).write_text("half")
    for mode in ("new", "overwrite"):
        check_folder(tmp_path, mode)
    with RunFolder(tmp_path) as files:
        files.start()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_folders_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    loop_name = tmp_path / "loop"
    loop_name.symlink_to(loop_name)
    for out, message in (
        (tmp_path / "file", "must be a folder; got the file"),
        (tmp_path / "file" / "run", "file"),
        (tmp_path / "link", "which is missing"),
        (loop_name, "loop"),
        (tmp_path / ("n" * 300), "File name too long"),
        ("/proc/run", "/proc"),
    ):
        status, errors = command(*WORDS, "--out", str(out))
        assert status == 2 and message in one_line(errors), errors


def test_a_folder_deleted_in_mid_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*WORDS, "--train.epochs", "4000", "--out", str(run))
    assert process.stdout is not None and "training images" in process.stdout.readline()
    assert " 1/4000" in process.stdout.readline()
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    run.rename(tmp_path / "elsewhere")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "No such file or directory" in one_line(errors) and str(run) in errors


@pytest.mark.parametrize("largest_file", [40, 1000, 3000, 100_000])
def test_a_full_disk(largest_file: int, tmp_path: Path) -> None:
    """A limit on the size of a file stands for it: the lock, config.yaml, the events or the checkpoint cannot grow."""
    run = tmp_path / "run"
    words = [*WORDS, "--model.width", "16", "--train.epochs", "40", "--out", str(run)]
    status, errors = command(*words, largest_file=largest_file)
    assert status == 2 and "File too large" in one_line(errors)
    assert not (run / "checkpoint.json").exists() and not list(run.glob(".*.tmp"))


def test_the_summary_does_not_wait_for_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ending, "plot_angles", killed)
    with pytest.raises(KeyboardInterrupt, match="continues after epoch 3 of 3"):
        loop.train(TINY, tmp_path, quiet())
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] == 3


def test_ctrl_c_before_the_first_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("--config", "digits_lt", "--data.views", "64", "--model.width", "64", "--out", str(run))
    assert process.stdout is not None and "training images" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert one_line(errors) == "allnc.train: stopped; there is no checkpoint yet: --overwrite starts the run again"
    assert command("--resume", "--out", str(run))[0] == 2


@pytest.mark.parametrize(
    "moment", ["yaml", "jsonargparse", "rich.console", "torch", "sklearn.datasets", "torch.utils.tensorboard"]
)
def test_ctrl_c_in_the_first_seconds(moment: str, tmp_path: Path) -> None:
    """When a library is just being imported; Python's own start cannot be answered."""
    program = (
        "import os, signal, sys\n"
        "def stop(event, arguments):\n"
        "    if event == 'import' and arguments[0] == sys.argv[1]: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(stop)\n"
        "from allnc.train import main\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    words = [moment, *WORDS, "--train.epochs", "4000", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 130 and one_line(done.stderr).startswith("allnc.train: stopped")


@pytest.mark.parametrize(("first", "status"), [("torch", 130), ("nothing", 0)])
def test_ctrl_c_while_python_ends(first: str, status: int, tmp_path: Path) -> None:
    """A second one, or two after all was done, find nothing to stop: torch's clean-up would show its traceback."""
    program = (
        "import atexit, os, signal, sys\n"
        "def stop(*_): os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(lambda event, told: stop() if event == 'import' and told[0] == sys.argv[1] else None)\n"
        "atexit.register(stop)\n"
        "atexit.register(stop)\n"
        "from allnc import train\n"
        "words, sys.argv[0] = sys.argv[2:], train.__file__\n"  # as python -m allnc.train
        "sys.exit(train.main(words))\n"
    )
    words = ["--print_config"] if status == 0 else [*WORDS, "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", program, first, *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == status
    assert done.stderr.splitlines() == (["allnc.train: stopped"] if status else [])


def test_a_summary_is_that_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run goes on for more epochs and is stopped: the summary of the fewer ones must not stay."""
    loop.train(TINY, tmp_path, quiet())
    longer = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, epochs=5))
    train_epoch = loop.train_epoch

    def interrupted(run: loop.Run, log: loop.RunLog) -> dict[str, float]:
        if run.epoch == 4:
            raise KeyboardInterrupt
        return train_epoch(run, log)

    monkeypatch.setattr(loop, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt, match="continues after epoch 4 of 5"):
        loop.train(longer, tmp_path, quiet(), mode="resume")
    assert not (tmp_path / "summary.json").exists()


def test_a_damaged_line_of_the_metrics_is_kept_and_said(tmp_path: Path) -> None:
    run = tmp_path / "run"
    loop.train(TINY, run, quiet())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "", '{"epoch": 2, "lo', lines[2]]) + "\n")
    console = quiet()
    loop.train(TINY, run, console, mode="resume")
    assert "has no record of an epoch in line 2, 3; kept as it is" in shown(console)
    assert (run / "metrics.jsonl").read_text().splitlines() == [lines[0], "", '{"epoch": 2, "lo', lines[2]]


def test_a_checkpoint_with_flipped_bits_is_refused(tmp_path: Path) -> None:
    loop.train(TINY, tmp_path, quiet())
    resumed, random = loop.Run(TINY), Random(0)
    damaged = "is damaged, or of another epoch"
    for name, message in (
        (STATE, damaged),
        (WEIGHTS, damaged),
        (CHECKPOINT, "must be the description of a checkpoint"),
    ):
        good = (tmp_path / name).read_bytes()
        for _ in range(40):
            data = bytearray(good)
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            (tmp_path / name).write_bytes(data)
            with pytest.raises(ValueError, match=f"{name} {message}"):
                state.restore(resumed, tmp_path)
        (tmp_path / name).write_bytes(good)
    state.restore(resumed, tmp_path)


def test_other_training_images_are_not_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    loop.train(TINY, run, quiet())
    state = torch.load(run / "state.pt", weights_only=True)
    state["class_counts"][4] += 1
    torch.save(state, run / "state.pt")
    manifest = read_manifest(run)
    assert manifest is not None
    sums = manifest.files | {"state.pt": hashlib.sha256((run / "state.pt").read_bytes()).hexdigest()}
    (run / "checkpoint.json").write_text(json.dumps(dataclasses.replace(manifest, files=sums).to_json()))
    with pytest.raises(ValueError, match=r"must have the training images it began with; class 4 has"):
        loop.train(TINY, run, quiet(), mode="resume")
