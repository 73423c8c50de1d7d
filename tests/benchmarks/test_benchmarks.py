"""The benchmarks measure what they say: formulas, statuses, columns, a tiny run, and rivals that compute our number."""

from __future__ import annotations

import csv
import importlib
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from allnc import hycon
from allnc._extension import has_cpp
from allnc.ops.hycon import hycon_reference
from tests.tolerances import assert_as_exact, assert_near

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BOTH = [pytest.param(False, id="forward"), pytest.param(True, id="forward+backward")]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # scripts there import their neighbours plainly


def module(name: str) -> Any:
    return importlib.import_module(name)


def shape(**sizes: Any) -> Any:
    return module("cases").Shape(**sizes)


# Formulas, against numbers counted by hand at N = 100, C = 10, D = 8.
@pytest.mark.parametrize(
    ("algorithm", "flops", "exps"),
    [
        ("AUTOGRAD", (176_000, 528_000), (11_000, 22_000)),
        ("DENSE", (176_000, 704_000), (11_000, 22_000)),
        ("TRIANGLE", (96_000, 384_000), (6_000, 12_000)),
        ("TRIANGLE_AND_SQUARE", (96_000, 480_000), (6_000, 18_000)),
        ("INF_CL", (160_000, 800_000), (10_000, 30_000)),
        ("SIGLIP", (480_000, 480_000), (10_000, 10_000)),
    ],
)
def test_work_of_the_contrast(algorithm: str, flops: tuple[int, int], exps: tuple[int, int]) -> None:
    for backward in (False, True):
        work = getattr(module("work"), algorithm).work(100, 10, 8, backward=backward)
        assert (work.flops, work.exps) == (flops[backward], exps[backward])


def test_work_of_p2p() -> None:
    work = module("work")
    assert work.pair_work(10, 20, backward=True) == work.Work(flops=12_000)  # F >= C - 1: squared form
    assert work.pair_work(10, 4, backward=True) == work.Work(flops=2_400, exps=200)  # softmax form


def test_bytes_of_class_mean_ema() -> None:
    work = module("work")
    forward = 100 * 16 * 2 + 100 * 8 + 3 * 5 * 16 * 4  # features, labels; state read, value and state written
    assert work.class_mean_work(100, 5, 16, 2, backward=False).bytes == forward
    assert work.class_mean_work(100, 5, 16, 2, backward=True).bytes == forward + 100 * 16 * 2 + 100 * 8 + 5 * 16 * 4


def test_limit_is_the_slowest_of_the_three() -> None:
    peaks, work = module("peaks"), module("work")
    machine = peaks.Peaks(flops=1e9, exps=1e8, copy=1e10, source="")
    assert machine.limit_ms(work.Work(flops=2e6, exps=1e5, bytes=1e6)) == pytest.approx(2.0)
    assert machine.limit_ms(work.Work(flops=2e6, exps=5e5, bytes=1e6)) == pytest.approx(5.0)
    assert machine.limit_ms(work.Work(flops=2e6, exps=5e5, bytes=1e8)) == pytest.approx(10.0)
    unknown = peaks.Peaks(flops=1e9, exps=None, copy=1e10, source="")
    assert unknown.limit_ms(work.Work(flops=2e6, exps=5e9)) == pytest.approx(2.0)


def test_limits_of_the_design_at_65536_rows_on_an_h200() -> None:
    """N = 65,536: 1.7 ms at D = 64, bound by exponentials, and 44 ms at D = 2048."""
    peaks, best = module("peaks"), module("work").BEST["cuda"]
    rates = peaks.GPUS["H200"]
    machine = peaks.Peaks(flops=rates["bfloat16"], exps=rates["exps"], copy=4.3e12, source="")
    limits = {d: machine.limit_ms(best.work(65536, 0, d, backward=True)) for d in (64, 128, 2048)}
    assert limits == pytest.approx({64: 1.65, 128: 2.78, 2048: 44.5}, rel=0.01)


def test_flops_of_autograd_as_torch_counts_them() -> None:
    for op, sizes in (
        ("hycon", {"N": 96, "D": 16, "C": 12}),
        ("supcon", {"N": 96, "D": 16, "C": 12}),
        ("p2p", {"C": 12, "F": 24}),
        ("all_around", {"N": 96, "D": 16, "C": 12, "F": 24}),
    ):
        case = module("cases").make_case(op, shape(**sizes), CPU)
        for provider in ("eager", "pytorch-metric-learning"):
            chosen = case.providers.get(provider)
            if chosen is None or chosen.work is None or chosen.unusable:
                continue
            for backward in (False, True):
                leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}
                with FlopCounterMode(display=False) as counter:
                    value = chosen.compute(**leaves, **case.others)
                    if backward:
                        value.backward()
                assert chosen.work(backward).flops == counter.get_total_flops(), (op, provider, backward)


def test_grid_covers_what_is_asked_for() -> None:
    shapes_of = module("grid").shapes_of
    hycon_shapes = {(s.N, s.D, s.C) for s in shapes_of("hycon", "full", torch.float32)}
    rows, columns = (512, 2048, 8192, 16384, 32768, 65536, 131072), (64, 128, 256, 512, 2048)
    assert hycon_shapes == {(n, d, c) for n in rows for d in columns for c in (10, 100, 1000, 8142)}
    assert all(s.N == s.D == 0 for s in shapes_of("p2p", "full", torch.float32, n=[64]))
    assert all(s.D == 0 and s.F for s in shapes_of("class_mean_ema", "full", torch.float32))
    given = shapes_of("hycon", "cpu", torch.float32, n=[64, 32], d=[8], c=[5], f=[7])
    assert [(s.N, s.D, s.C, s.F) for s in given] == [(32, 8, 5, 0), (64, 8, 5, 0)]
    for preset in ("cpu", "gpu", "full"):
        for op in module("cases").OPS:
            assert shapes_of(op, preset, torch.float32)


class Options:
    """What `measure` reads of the command line."""

    seconds, min_runs = 0.0, 1


def rows_of(case: Any, providers: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a case by provider and pass, on a machine of round numbers."""
    run = module("run")
    run.checked.cache_clear()
    limits = module("peaks").Peaks(flops=1e9, exps=1e9, copy=1e9, source="test")
    rows = run.measure(case, providers, "float32", CPU, Options(), limits)
    return {(row["provider"], row["pass"]): row for row in rows}


def replaced(case: Any, provider: str, **changes: Any) -> Any:
    """The case with one provider changed."""
    return replace(case, providers={**case.providers, provider: replace(case.providers[provider], **changes)})


def small_case(op: str = "supcon") -> Any:
    return module("cases").make_case(op, shape(N=32, D=8, C=4), CPU)


def test_a_missing_package_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = module("rivals")
    monkeypatch.setitem(rivals.MODULES, "pytorch-metric-learning", "pytorch_metric_learning_that_is_not_there.losses")
    rows = rows_of(small_case(), ["eager", "pytorch-metric-learning"])
    for direction in ("forward", "forward+backward"):
        row = rows["pytorch-metric-learning", direction]
        assert row["status"] == "not installed: pip install pytorch-metric-learning"
        assert row["median_ms"] == "" and row["limit_ms"] != ""


def test_a_package_that_cannot_be_loaded_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("no driver\nmore")

    rivals = module("rivals")
    monkeypatch.setattr(rivals.importlib, "import_module", fail)
    status = rivals.unusable("siglip-kernel", n=64, d=64, device=torch.device("cuda"))
    assert status == "not usable: RuntimeError: no driver"


@pytest.mark.parametrize(
    ("n", "d", "reason"), [(512, 128, ""), (512, 512, ""), (500, 128, "multiple of 64"), (512, 96, "power of 2")]
)
def test_shapes_inf_cl_cannot_take(monkeypatch: pytest.MonkeyPatch, n: int, d: int, reason: str) -> None:
    monkeypatch.setitem(sys.modules, "inf_cl", types.ModuleType("inf_cl"))
    status = module("rivals").unusable("inf-cl", n=n, d=d, device=torch.device("cuda"))
    assert (reason in status and status.startswith("unsupported: ")) if reason else status == ""


def test_gpu_providers_are_rows_on_a_cpu() -> None:
    rows = rows_of(small_case("pairs"), ["eager", "fused-graph", "inf-cl", "siglip-kernel"])
    for provider in ("fused-graph", "inf-cl", "siglip-kernel"):
        assert rows[provider, "forward"]["status"].startswith("unsupported: ")
    assert rows["eager", "forward"]["status"] == "ok"


def test_what_main_memory_cannot_hold_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case()
    monkeypatch.setattr(module("run"), "available_memory", lambda: 4.0 * 32 * 32 * 6 / 0.95)
    rows = rows_of(case, ["eager", "fused"])
    assert rows["eager", "forward"]["status"] == "ok"  # five matrices fit, six do not
    assert rows["eager", "forward+backward"]["status"] == "skipped: would need 0.0 GiB of 0.0"
    assert rows["fused", "forward+backward"]["status"] == "ok"
    assert rows["fused", "forward+backward"]["x_eager"] == ""


def test_out_of_memory_is_a_row() -> None:
    def exhaust(**_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = replaced(small_case(), "dense", compute=exhaust)
    run = module("run")
    assert run.prepared(case, "dense", CPU, backward=True)[:2] == (None, "out of memory")


@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_a_wrong_provider_is_not_timed(kind: str) -> None:
    def wrong(z: Tensor, labels: Tensor) -> Tensor:
        factor = 1.01 if kind == "value" else 1.0
        return hycon_reference(z if kind == "value" else z + 0.01 * (z - z.detach()), labels, balance="none") * factor

    case = replaced(small_case(), "dense", compute=wrong)
    status = module("run").difference(case, "dense", "float32")
    assert status.startswith("wrong: the value" if kind == "value" else "wrong: the gradient of z")
    assert module("run").difference(small_case(), "dense", "float32") == ""


def test_a_value_that_is_wrong_only_at_full_size_is_not_timed() -> None:
    case = replaced(small_case(), "dense", compute=lambda **inputs: hycon_reference(**inputs, balance="none") * 1.01)
    rows = rows_of(case, ["eager", "dense"])  # the check at a small size builds its own case, without the error
    assert rows["dense", "forward"]["status"].startswith("wrong: the value differs from eager's by 1.0e-02")
    assert rows["dense", "forward"]["median_ms"] == ""


def test_autocast_multiplies_in_the_type_of_its_inputs() -> None:
    cases = module("cases")
    assert "autocast" not in small_case().providers  # float32 inputs have no 16-bit rival
    case = cases.make_case("supcon", shape(N=64, D=16, C=4, dtype=torch.bfloat16), CPU)
    assert module("run").difference(case, "autocast", "bfloat16") == ""
    eager, autocast = (case.value_and_gradients(provider)[1] for provider in ("eager", "autocast"))
    assert not torch.equal(eager, autocast)


def test_a_tiny_run_writes_every_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"--n": 64, "--d": 16, "--classes": 8, "--features": 12, "--seconds": 0, "--min-runs": 1}
    command = [str(word) for pair in sizes.items() for word in pair]
    providers = ["dense", "fused", "pytorch-metric-learning", "inf-cl", "siglip-kernel"]
    module("run").main(
        [*command, "--device", "cpu", "--dtype", "float32", "--providers", *providers, "--out", str(tmp_path)]
    )
    table = module("table")
    for op in module("cases").OPS:
        with (tmp_path / f"{op}-float32.csv").open() as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        assert tuple(reader.fieldnames or ()) == table.COLUMNS + table.PLACE
        assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
        assert {"eager", "fused"} <= {row["provider"] for row in rows}
        for row in rows:
            assert row["command"].startswith("python benchmarks/run.py --n 64") and row["threads"] and row["commit"]
            if row["status"] == "ok":
                assert float(row["median_ms"]) >= float(row["p20_ms"]) > 0
                assert float(row["fraction_of_limit"]) >= 0
                assert row["gb_per_s"] if op == "class_mean_ema" else row["effective_gflops"]
            else:
                assert row["provider"] in providers[2:]
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "pairs-float32.csv")])
    capsys.readouterr()
    table.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(providers)
    assert lines[0].startswith("pairs N=64 D=16 float32 eager: ") and "of the limit" in lines[0]
    assert lines[-1] == "pairs N=64 D=16 float32 siglip-kernel: unsupported: needs a CUDA device"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [3, 200], ids=["common", "singletons"])
def test_metric_learning_computes_our_number(dtype: torch.dtype, num_classes: int) -> None:
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed ([bench])")
    z0 = F.normalize(torch.randn(150, 24, dtype=torch.float64), dim=1).to(dtype)
    labels = torch.randint(0, num_classes, (150,))

    def value_and_gradient(loss: Any, dtype: torch.dtype) -> list[Tensor]:
        z = z0.to(dtype, copy=True).requires_grad_()
        value = loss(z, labels)
        return [value, *torch.autograd.grad(value, z)]

    def supcon(z: Tensor, labels: Tensor) -> Tensor:
        return hycon(z, labels, balance="none", temperature=0.1)

    exact = value_and_gradient(lambda z, y: hycon_reference(z, y, balance="none", temperature=0.1), torch.float64)
    theirs = value_and_gradient(module("rivals").metric_learning, dtype)
    ours = value_and_gradient(supcon, dtype)
    for got, same, want in zip(ours, theirs, exact, strict=True):
        assert_as_exact(got, same, want)  # as near as theirs is ...
        assert_as_exact(same, got, want)  # ... and theirs as near as ours


def test_rivals_are_called_for_the_loss_they_are_checked_against(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels need a GPU: stand-ins with their signatures hold the formulas of their documentation."""

    def cal_flash_loss(q: Tensor, k: Tensor, labels: Tensor, scale: float, head_dim: int) -> Tensor:
        assert q.shape[1] % head_dim == 0
        logits = scale * q.double() @ k.double().T
        return torch.logsumexp(logits, 1) - logits.gather(1, labels[:, None]).squeeze(1)

    def fused_siglip_loss(img: Tensor, txt: Tensor, log_temperature: Tensor, bias: Tensor) -> Tensor:
        logits = img.double() @ txt.double().T * log_temperature.double().exp() + bias.double()
        target = torch.eye(len(img), dtype=torch.float64)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(img)

    for name, function in (("inf_cl", cal_flash_loss), ("siglip_kernel", fused_siglip_loss)):
        stand_in = types.ModuleType(name)
        setattr(stand_in, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, stand_in)
    case = module("cases").make_case("pairs", shape(N=64, D=16), CPU)
    for provider in ("inf-cl", "siglip-kernel"):
        assert module("run").difference(case, provider, "float32") == ""
    # What inf-cl's loss has more than ours is the anchor in its own sum, exp(1/τ).
    z, labels = case.leaves["z"].double(), case.others["labels"]
    lse = torch.logsumexp((z @ z.T / 0.1).fill_diagonal_(-torch.inf), 1)
    more = torch.logaddexp(lse, torch.tensor(10.0).double()) - lse
    ours = hycon_reference(z, labels, balance="none", reduction="none")
    torch.testing.assert_close((ours + more).mean(), module("rivals").inf_cl_reference(z, labels))


@pytest.mark.parametrize("blocks", ["own", "cross", "all"])
def test_forms_of_p2p_are_one_loss(blocks: str) -> None:
    """What p2p_forms.py compares: every form's gradient is that of the formula as it is written."""
    torch.manual_seed(0)
    steps = module("p2p_forms").steps(blocks, 7, 9, torch.device("cpu"))
    assert {"eager", "pairwise", "closed"} <= set(steps) and ("cpp" in steps) == has_cpp()
    for got in [step() for step in steps.values()]:
        for g, want in zip(got, steps["eager"](), strict=True):
            assert_near(g, want)
