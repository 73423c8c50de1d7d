"""The command under torchrun: any number of processes train what one does, and stop together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from allnc import _command
from allnc import train as train_command
from allnc.trainer.checkpoint import load_weights
from allnc.trainer.processes import Processes
from tests.faults.runs import ROOT, Process, command, one_line
from tests.forks import Fork
from tests.processes import needs_gloo, run_ranks
from tests.trainer._ranks_worker import cases, train

pytestmark = needs_gloo
TINY = ["--model.width", "4", "--data.max_per_class", "60", "--data.imbalance_ratio", "6", "--train.precision", "fp32"]
# In float32, sums in another order part trajectories: by 1e-2 in some steps with P2P's separating form, by 1e-4 with
# the squared one. That the separating one is exact, the steps in float64 show.
TINY += ["--loss.p2p_target", "etf"]
TWO_BATCHES = ["--data.rebalance_sampler", "reversed", "--model.heads", "separate", "--loss.horizon", "0.3"]
WORLD = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of four processes saved, which trained in groups of two to four."""
    return run_ranks("tests.trainer._ranks_worker", WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", cases())
def test_steps_are_those_of_one_process(ranks: list[dict[Any, Any]], name: str) -> None:
    """Float64, so that what differs is a mistake; BatchNorm, batches that do not divide, resting classifiers."""
    want = train(cases()[name], Processes())
    for size in range(2, WORLD + 1):
        for rank in range(size):
            got = ranks[rank][size, name]
            for ours, theirs in zip(got["parts"], want["parts"], strict=True):
                assert ours.keys() == theirs.keys()
                assert all(float(ours[part]) == pytest.approx(float(theirs[part]), rel=1e-9) for part in theirs)
            for state in ("model", "loss"):
                for key, value in want[state].items():
                    difference = (got[state][key].double() - value.double()).abs().max()
                    assert float(difference) <= 1e-9 * float(value.double().abs().max()), (size, rank, key)
            assert got["measured"] == pytest.approx(want["measured"], rel=1e-4)
            assert got["measured"] == ranks[0][size, name]["measured"]


def test_batchnorm_in_parts_is_alike_on_all_processes(ranks: list[dict[Any, Any]]) -> None:
    """Which rows meet in a part depends on the number of processes, the weights not on which process has them."""
    for size in range(2, WORLD + 1):
        first = ranks[0][size, "ghosts"]["model"]
        for rank in range(1, size):
            for key, value in ranks[rank][size, "ghosts"]["model"].items():
                assert torch.equal(value, first[key]), (size, rank, key)
        assert int(first["encoder.bn.num_batches_tracked"]) == len(ranks[0][size, "ghosts"]["parts"])


def launch(size: int, *words: str, launcher: tuple[str, ...] = ("--standalone",)) -> Process:
    launcher = (sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc-per-node", str(size))
    return subprocess.Popen(
        [*launcher, "-m", "allnc.train", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def unlaunched(*words: str) -> None:
    """Train; a process whose mistake another one says does not wait for a launcher to end it."""
    _command._SPEAKING = 0
    sys.exit(train_command.main(words))


def together(*machines: Sequence[str]) -> list[Fork]:
    """Start a process for each list of words, with the environment in which torchrun would have started it."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(len(machines))}
    where |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return [
        Fork(unlaunched, *words, environment={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, words in enumerate(machines)
    ]


def trained(size: int, folder: Path, *words: str) -> dict[str, Any]:
    """Train in so many processes; return records, summary and weights."""
    if size == 1:
        status, errors = command(*words, "--out", str(folder))
        assert status == 0, errors
        return result(folder)
    processes = together(*[[*words, "--out", str(folder)]] * size)
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * size, outputs
    assert f"{size} processes share each batch" in outputs[0][0] or "--resume" in words
    return result(folder)


def result(folder: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "records": records,
        "summary": json.loads((folder / "summary.json").read_text()),
        "weights": load_weights(folder)[2],
    }


# What moves by a step when one image is taken for another class.
STEPPED = {"accuracy", "balanced", "many", "medium", "few", "macro_f1", "top5", "train_accuracy", "nc4"}
STEPPED |= {"ece", "ece_equal_mass", "ece_many", "ece_medium", "ece_few"}


def assert_alike(got: dict[str, Any], want: dict[str, Any], tolerance: float = 0.02) -> None:
    """What is written agrees, to what float32 keeps of sums in another order through BatchNorm and some steps."""
    for ours, theirs in zip(got["records"], want["records"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", "loader_wait", *STEPPED}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name
    # Five of 500 images, 50 a class: each is a fiftieth of the recall of one class and of the precision of another, so
    # that they move the mean of the classes' F1 twice as far as the accuracy.
    for name, points in (("accuracy", 1.0), ("balanced", 1.0), ("macro_f1", 2.0)):  # the first two are the same here
        assert got["summary"][name] == pytest.approx(want["summary"][name], abs=points)
    assert got["weights"].keys() == want["weights"].keys()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    words = (*TINY, *TWO_BATCHES, "--train.epochs", "4", "--train.lr", "0.02")
    return trained(1, tmp_path_factory.mktemp("alone") / "run", *words)


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_trains_the_same(size: int, alone: dict[str, Any], tmp_path: Path) -> None:
    """Also with batches that do not divide, two samplers, and a classifier that rests in the later epochs."""
    words = (*TINY, *TWO_BATCHES, "--train.epochs", "4", "--train.lr", "0.02")
    several = trained(size, tmp_path / "run", *words)
    assert_alike(several, alone)
    assert several["summary"]["processes"] == size and alone["summary"]["processes"] == 1
    etas = [record["eta"] for record in alone["records"]]
    assert etas[0] > 0 and etas[-1] == 0


def make_images(root: Path) -> None:
    random = np.random.default_rng(0)
    for part, sizes in (("train", (15, 9, 6)), ("val", (3, 3, 5))):
        for label, size in enumerate(sizes):
            (root / part / str(label)).mkdir(parents=True)
            for number in range(size):
                pixels = random.integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / str(label) / f"{number}.png")


def own_images(root: Path) -> list[str]:
    names = {"name": "image_folder", "root": str(root), "augmentation": "resized_crop", "workers": "1"}
    words = [word for name, value in (names | {"image_size": "32"}).items() for word in (f"--data.{name}", value)]
    return [*words, "--model.name", "timm:convnext_atto", "--train.batch_size", "7", "--train.epochs", "2"]


def test_images_from_workers_and_a_model_without_batchnorm(tmp_path: Path) -> None:
    make_images(tmp_path / "own")
    words = [*own_images(tmp_path / "own"), "--train.precision", "fp32", "--train.lr", "0.01"]
    one, two = (trained(size, tmp_path / f"run{size}", *words) for size in (1, 2))
    assert_alike(two, one, tolerance=1e-4)
    for name, value in one["weights"].items():
        difference = (two["weights"][name].double() - value.double()).abs().max()
        assert float(difference) <= 1e-4 * max(1e-2, float(value.double().abs().max())), name


def test_a_process_that_dies_ends_the_others_and_the_run_resumes_on_another_number(tmp_path: Path) -> None:
    words = (*TINY, "--train.epochs", "3", "--train.lr", "0.02")
    straight = trained(1, tmp_path / "straight", *words)
    run = tmp_path / "run"
    process = launch(2, *words, "--out", str(run))
    while not (run / "checkpoint.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    started = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - started < 60
    assert not (run / "summary.json").exists(), "the run was over before the process died"
    assert_alike(trained(3, run, "--resume"), straight)


def test_what_one_process_finds_is_said_once(tmp_path: Path) -> None:
    make_images(tmp_path / "own")
    for path in (tmp_path / "own" / "train" / "0").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    process = launch(2, *own_images(tmp_path / "own"), "--out", str(tmp_path / "run"))
    _, errors = process.communicate(timeout=100)
    said = {line for line in errors.splitlines() if line.startswith("allnc.train: error:")}
    assert process.returncode != 0 and len(said) in (1, 2)  # each of the two may have met one of the images
    gone = "another process of the run has gone"
    assert all("must be a readable image" in line or gone in line for line in said)
    assert any("must be a readable image" in line for line in said) and "]: Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.lr", "-1"], "train.lr must be > 0"),
        (["--train.batch_size", "2"], "train.batch_size must be at least the number of processes"),
        (["--config", "fashion_lt", "--data.root", "/nowhere"], "Fashion-MNIST's four idx files"),
    ],
)
def test_a_mistake_of_all_is_said_once(words: list[str], message: str, tmp_path: Path) -> None:
    processes = together(*[[*words, "--out", str(tmp_path / "run")]] * 3)
    errors = "".join(process.communicate(timeout=100)[1] for process in processes)
    assert all(process.returncode == 2 for process in processes) and message in one_line(errors)


def test_a_launcher_ends_those_that_leave_the_word_to_the_first(tmp_path: Path) -> None:
    process = launch(3, "--train.lr", "-1", "--out", str(tmp_path / "run"))
    _, errors = process.communicate(timeout=100)
    said = [line for line in errors.splitlines() if line.startswith("allnc.train: ")]
    assert process.returncode != 0 and "train.lr must be > 0" in one_line("\n".join(said))


def test_two_machines(alone: dict[str, Any], tmp_path: Path) -> None:
    """Two launches that find each other over the network, here the loopback."""
    words = (*TINY, *TWO_BATCHES, "--train.epochs", "4", "--train.lr", "0.02", "--out", str(tmp_path / "run"))
    where = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", free_port())
    machines = [launch(1, *words, launcher=(*where, "--node-rank", str(rank))) for rank in range(2)]
    for machine in machines:
        _, errors = machine.communicate(timeout=200)
        assert machine.returncode == 0, errors
    assert_alike(result(tmp_path / "run"), alone)


@pytest.mark.parametrize("difference", ["training images", "train.batch_size"])
def test_a_machine_with_other_images_or_options(difference: str, tmp_path: Path) -> None:
    words = own_images(tmp_path / "machine0")
    for rank in range(2):
        make_images(tmp_path / f"machine{rank}")
    if difference == "training images":
        (tmp_path / "machine1" / "train" / "0" / "3.png").rename(tmp_path / "machine1" / "train" / "0" / "99.png")
    own = [
        [*words, "--data.root", str(tmp_path / f"machine{rank}"), "--out", str(tmp_path / f"run{rank}")]
        for rank in range(2)
    ]
    own[1] += ["--train.batch_size", "8"] if difference == "train.batch_size" else []
    machines = together(*own)
    outputs = [machine.communicate(timeout=100)[1] for machine in machines]
    assert all(machine.returncode != 0 for machine in machines)
    said = [line for errors in outputs for line in errors.splitlines() if line.startswith("allnc.train: error")]
    assert f"every process must have the same {difference}; rank 1 has " in one_line("\n".join(said))


def test_one_process_under_the_launcher(alone: dict[str, Any], tmp_path: Path) -> None:
    process = launch(1, *TINY, *TWO_BATCHES, "--train.epochs", "4", "--train.lr", "0.02", "--out", str(tmp_path))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    got = result(tmp_path)
    assert all(torch.equal(got["weights"][name], value) for name, value in alone["weights"].items())


def test_evaluation_is_refused(tmp_path: Path) -> None:
    status, errors = command(str(tmp_path), program="allnc.evaluate", WORLD_SIZE="2")
    assert status == 2 and "allnc.evaluate runs as one process" in one_line(errors)
