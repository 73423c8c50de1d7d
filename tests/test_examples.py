"""The examples of docs/examples run: AllNC in plain PyTorch, in Lightning and in timm's training."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


def test_plain_pytorch_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("plain_pytorch", monkeypatch).main(epochs=6) > 0.5  # 0.1 is chance
    assert "after 6 epochs of 409 images" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about its versions and the machine
def test_lightning_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed: pip install -e '.[test]'")
    module = example("lightning_module", monkeypatch)
    assert module.main(epochs=6) > 0.5
    model = module.LongTailed(torch.nn.Flatten(), 64, torch.tensor([3, 2]))
    model.configure_model()
    criterion = model.criterion
    model.configure_model()  # as before each test
    assert model.criterion is criterion, "the class means would be lost"
    assert "after 6 epochs of 409 images" in capsys.readouterr().out


def test_timm_s_task_learns_and_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm.task", reason="an older timm")
    module = example("timm_train", monkeypatch)
    torch.manual_seed(0)
    train, _ = module.long_tailed_digits()
    images, labels = (tensor[::4] for tensor in train.tensors)

    def make() -> Any:
        model = module.timm.create_model("test_resnet", num_classes=10, in_chans=1)
        return module.AllNCTask(
            model, class_counts=torch.bincount(train.tensors[1]), steps=20, projection_dim=8, verbose=False
        )

    task = make().train()
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        result = task(images, labels)
        result["loss"].backward()
        optimizer.step()
        losses.append(float(result["cls"]))
    assert losses[-1] < 0.7 * losses[0] and result["output"].shape == (len(labels), 10)

    again = make()
    again.load_checkpoint_state(*copy.deepcopy([*task.get_checkpoint_state().values()]))
    assert again.step == 20
    for (name, value), restored in zip(task.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, restored), name
    again.eval()
    assert again.get_eval_model()(images).shape == (len(labels), 10)
