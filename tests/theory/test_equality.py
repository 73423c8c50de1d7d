"""Equal, different or open: against numbers worked out by hand, and on records that do not fit together."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import yaml

from allnc.sweep.plan import read_sweep
from allnc.sweep.record import Result
from allnc.theory.__main__ import main
from allnc.theory.equality import compare, counted, read_grids, standard_error

SWEEPS = Path(__file__).parents[2] / "benchmarks" / "sweeps"
Runs = dict[str, list[float]]
stats: Any = scipy.stats  # its stubs lack the p-value


def result(loss: str, seed: int, accuracy: float, *, width: int = 4, epochs: int = 35, **changes: Any) -> Result:
    """A record such as a sweep writes; `changes` are of options and summary."""
    options = {"data.name": "digits", "model.name": "resnet8", "model.width": width, "train.epochs": epochs}
    summary = {"balanced": accuracy, "nc1": 0.1 * seed, "measured_on": "test", "images": {"test": "1,500 (SHA-256 a)"}}
    options |= {name: value for name, value in changes.items() if "." in name}
    summary |= {name: value for name, value in changes.items() if "." not in name}
    return Result(changes.get("data", f"w{width}_e{epochs}"), loss, seed, options, summary)


def results(runs: Runs, **place: Any) -> list[Result]:
    return [result(loss, s, score, **place) for loss, scores in runs.items() for s, score in enumerate(scores)]


def test_two_losses_are_the_paired_test() -> None:
    """Of two losses, the analysis of variance is Student's test of the differences 0.2, 0.4 and 0.6."""
    (grid,) = read_grids(results({"ce": [98.0, 99.0, 97.0], "ls": [98.2, 99.4, 97.6]}), "ce").values()
    (base, row), (spread,) = compare(grid, "ce", margin=1.0)
    assert (grid.images, grid.left_out, base.difference, base.verdict) == (1500, 0, 0.0, None)
    assert (row.loss, row.seeds, row.difference) == ("ls", 3, pytest.approx(0.4))
    assert row.half_width == pytest.approx(2.919986 * 0.2 / 3**0.5, rel=1e-6)  # t(0.95, 2)
    above = stats.ttest_1samp([0.2, 0.4, 0.6], -1.0, alternative="greater").pvalue
    below = stats.ttest_1samp([0.2, 0.4, 0.6], 1.0, alternative="less").pvalue
    assert row.p == pytest.approx(max(above, below)) and max(above, below) < 0.05 and row.verdict == "equal"
    assert row.nc1 == pytest.approx(0.1) and row.nc3 is None and row.train_accuracy is None
    assert spread.residual == pytest.approx(0.02**0.5)
    assert spread.seeds == pytest.approx(((1.0 + 0.84) / 2) ** 0.5)  # 98.2, 99.4, 97.6: variance 0.84
    assert spread.losses == pytest.approx((0.08 - 0.02 / 3) ** 0.5)


def test_three_losses_share_their_spread() -> None:
    """Effects of losses 0, 1, 5 and of seeds 0, 2; a rest of ± 0.1, ∓ 0.1 and 0: Σ r² = 0.04, freedom 2 x 1."""
    (grid,) = read_grids(results({"ce": [90.1, 91.9], "b": [90.9, 93.1], "c": [95.0, 97.0]}), "ce").values()
    rows, (spread,) = compare(grid, "ce", margin=2.0)
    assert spread.residual == pytest.approx(0.02**0.5)
    error = 0.02**0.5  # times sqrt(2 / 2 seeds)
    assert [row.difference for row in rows] == pytest.approx([0, 1, 5])
    assert rows[1].half_width == pytest.approx(2.919986 * error, rel=1e-6)
    assert rows[1].p == pytest.approx(stats.t.sf(1 / error, 2))
    assert [row.verdict for row in rows] == [None, "equal", "different"]
    assert counted(rows) == {"equal": 1, "different": 1, "open": 0, "holm": 1, "all": 2}


def test_noise_is_no_equality() -> None:
    """Means are the same, and three seeds differ by points: neither equal nor different."""
    (grid,) = read_grids(results({"ce": [98.0, 94.0, 96.0], "ls": [94.0, 98.0, 96.0]}), "ce").values()
    (_, row), _ = compare(grid, "ce", margin=1.0)
    assert row.difference == 0 and row.verdict == "open"


def test_holm_and_the_mean_over_cells() -> None:
    runs = [
        *results({"ce": [90.0, 91.0, 92.0], "ls": [90.1, 91.2, 92.3]}),
        *results({"ce": [90.0, 91.0, 92.0], "ls": [90.0, 91.4, 92.7]}, width=8),
        *results({"ce": [90.0, 91.0, 92.0], "ls": [90.2, 91.9, 92.6]}, epochs=70),
    ]
    (grid,) = read_grids(runs, "ce").values()
    assert list(grid.cells) == [("digits", 4, 35), ("digits", 4, 70), ("digits", 8, 35), ("digits", None, None)]
    rows = [row for row in compare(grid, "ce", margin=1.0)[0] if row.loss == "ls"]
    p: Any = [row.p for row in rows]
    assert p[0] < p[2] < p[1] < 2 * p[2]
    assert [row.holm for row in rows] == [pytest.approx(3 * p[0]), *[pytest.approx(2 * p[2])] * 2, None]
    overall = rows[-1]
    assert (overall.width, overall.difference) == (None, pytest.approx((0.2 + 1.1 / 3 + 1.7 / 3) / 3))
    over_seeds = stats.ttest_1samp([0.1, (0.2 + 0.4 + 0.9) / 3, (0.3 + 0.7 + 0.6) / 3], 1.0, alternative="less")
    assert overall.p == pytest.approx(over_seeds.pvalue)


def test_an_unfinished_sweep_counts_where_it_is_complete() -> None:
    runs = results({"ce": [98.0, 97.0, 96.0], "ls": [98.0, 97.5, 99.0], "focal": [98.0, 97.0]})
    runs += results({"ce": [98.0, 97.0], "ls": [97.0]}, width=8)
    runs += results({"ce": [98.0]}, width=16)
    (grid,) = read_grids(runs, "ce").values()
    used = {cell[1]: {loss: list(seeds) for loss, seeds in losses.items()} for cell, losses in grid.cells.items()}
    assert used == {
        4: {"ce": [0, 1], "ls": [0, 1], "focal": [0, 1]},
        8: {"ce": [0], "ls": [0]},
        16: {"ce": [0]},
        None: {"ce": [0]},
    }
    assert grid.left_out == 3
    (again,) = read_grids([*runs, result("ce", 0, 50.0)], "ce").values()  # the later record of a run counts
    assert again.cells["digits", 4, 35]["ce"][0]["balanced"] == 50.0


@pytest.mark.parametrize("runs", [{"ce": [98.0], "ls": [99.0]}, {"ce": [98.0, 99.0], "ls": [98.5, 99.5]}])
def test_where_nothing_can_be_said(runs: Runs) -> None:
    """One seed has no spread; and seeds that differ alike by chance say nothing of others."""
    (grid,) = read_grids(results(runs), "ce").values()
    (_, row), _ = compare(grid, "ce", margin=5.0)
    assert row.difference > 0 and (row.half_width, row.p, row.verdict) == (None, None, None)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([result("ce", 0, 9.0), result("ls", 1, 9.0)], "losses must have a seed in common; those of digits have none"),
        ([result("ls", 0, 9.0)], "must have a run of the baseline ce; digits, width 4, 35 epochs has ls"),
        ([result("ce", 0, 9.0), result("ls", 0, 9.0, data="b")], "w4_e35 and b both have digits, width 4 and 35"),
        (
            [result("ce", 0, 9.0)._replace(options={"data.name": "a", "model.name": "timm:a"})],
            "every run must have model.width",
        ),
        (
            [result("ce", 0, 9.0), result("ls", 0, 9.0, images={"test": "9 (SHA-256 b)"})],
            "must be trained and measured on the same images",
        ),
    ],
)
def test_records_that_do_not_fit_together(runs: list[Result], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_grids(runs, "ce")


def test_standard_error_of_the_images() -> None:
    assert standard_error(98.6, 500) == pytest.approx(0.525, abs=5e-4)


def written(folder: Path, runs: list[Result]) -> Path:
    folder.mkdir()
    (folder / "runs.jsonl").write_text("".join(json.dumps(run._asdict()) + "\n" for run in runs))
    return folder


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sweeps side by side, one of them not finished; tables, both kinds of picture."""
    runs = results({"ce": [98.0, 97.0, 97.5], "ls": [98.1, 97.3, 97.4]}) + results({"ce": [98.0]}, width=8)
    other = results({"ce": [80.0, 81.0], "ls": [84.0, 85.1]}, **{"data.name": "fashion_mnist"})
    folders = [written(tmp_path / "a", runs), written(tmp_path / "b", other)]
    out = tmp_path / "out"
    assert main(["losses", *map(str, folders), "--margin", "0.3", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "on 1,500 test images after the last epoch" in told and "standard error of 0.36" in told
    assert "--margin 0.3 is below that" in told and "outside: 1; open: 0" in told
    assert (out / "losses.png").stat().st_size > 5_000 and "<svg" in (out / "losses.svg").read_text()
    with (out / "equality.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows if row["loss"] == "ls"] == ["open", "different"]
    assert main(["losses", *map(str, folders), "--baseline", "ls", "--methods", "ls"]) == 0
    assert "ce" not in capsys.readouterr().out.split()
    assert main(["losses", str(folders[0]), "--methods", "ls", "lse"]) == 2
    assert "--methods must be of the sweep (ce, ls); got lse" in capsys.readouterr().err
    assert main(["losses", str(folders[0]), "--baseline", "mse"]) == 2
    assert "must have a run of the baseline mse" in capsys.readouterr().err
    assert main(["losses", str(folders[0]), "--margin", "0"]) == 2
    assert "--margin must be in (0, 100]" in capsys.readouterr().err


def test_mistakes_need_no_torch(tmp_path: Path) -> None:
    written(tmp_path / "a", results({"ls": [98.1, 97.3]}))
    program = "import sys; sys.modules['torch'] = None; from allnc.theory.__main__ import main; sys.exit(main())"
    for name, said in (("none", "must be the folder of a sweep with finished runs"), ("a", "baseline ce; digits")):
        command = [sys.executable, "-c", program, "losses", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(("name", "runs"), [("losses", 54), ("losses_fashion", 20), ("losses_cifar10", 64)])
def test_the_sweeps_are_grids_with_the_settings_of_the_source(name: str, runs: int, tmp_path: Path) -> None:
    values = yaml.safe_load((SWEEPS / f"{name}.yaml").read_text())
    assert len(values["seeds"]) == 3
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({**values, "seeds": [0]}))  # it takes a third of the time
    sweep = read_sweep(tmp_path / "one.yaml")
    cells = {(job.method, job.config.model.width, job.config.train.epochs): job.config for job in sweep.jobs}
    assert len(sweep.jobs) == len(cells) == runs
    for (method, width, epochs), config in cells.items():
        loss, train = config.loss, config.train
        assert train.milestones == (3 * epochs // 7, 5 * epochs // 7), (method, width, epochs)
        assert (train.lr, train.momentum, train.weight_decay, train.grad_clip) == (0.1, 0.9, 5e-4, 2.0)
        assert config.data.profile == "none" or config.data.imbalance_ratio == 1
        assert loss.label_smoothing == (0.05 if method == "label_smoothing" else 0.0)
        assert loss.focal_gamma == 3.0 or method != "focal"
