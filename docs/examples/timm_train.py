"""AllNC in timm's training: a task for timm's own train.py, and a short loop of timm's parts that uses it.

timm's train.py (1.0.27 or newer) trains whatever its task returns. Put this file beside it and, after its line
`task = ClassificationTask(...)`, add one more, with the training images of each class:

    task = AllNCTask(model, class_counts=counts, steps=args.epochs * len(loader_train), device=device)

`--mixup 0 --cutmix 0` (an image must have one class), `--smoothing` is not read. Its checkpoints hold the network and,
as the task's state, the class means. `python docs/examples/timm_train.py` trains the short loop on digits.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from plain_pytorch import long_tailed_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from allnc.losses import AllNC


class WithProjection(nn.Module):
    """A timm model that in training also returns its features [N, F] and their unit projections [N, D]."""

    def __init__(self, model: nn.Module, projection_dim: int) -> None:
        super().__init__()
        self.model = model
        width = model.get_classifier().in_features
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection_dim))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        features = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        logits = self.model.get_classifier()(features)
        if not self.training:
            return logits
        return logits, features, F.normalize(self.projection(features), dim=1)


class AllNCTask(ClassificationTask):
    """What timm's train.py calls with images and labels, and whose "loss" it minimises.

    Args:
        model: a timm model with a linear classifier.
        class_counts: [C] training images of each class.
        steps: of the whole training.
        projection_dim: D.
        options: of timm's task, such as the device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        class_counts: Sequence[int] | Tensor,
        steps: int,
        projection_dim: int = 128,
        **options: Any,
    ) -> None:
        group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
        width = model.get_classifier().in_features
        criterion = AllNC(class_counts, width, projection_dim, group=group)
        super().__init__(WithProjection(model, projection_dim), criterion, **options)
        self.trainable_module.to(self.device)
        self.step, self.steps = 0, steps

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        logits, features, z = self.trainable_module(input)
        branch = (logits, target)
        weight = timm.utils.unwrap_model(self.trainable_module).model.get_classifier().weight
        progress = min(1.0, self.step / self.steps)
        loss = self.criterion(features, target, weight, branch, branch, progress, z=z)
        self.step += self.training
        return {"loss": loss.total, "output": logits, **loss.parts}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        return {"criterion": self.criterion.state_dict(), "step": self.step}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        if state:
            self.criterion.load_state_dict(state["criterion"], strict=strict)
            self.step = state["step"]


def main(epochs: int = 40) -> float:
    torch.manual_seed(0)
    train, test = long_tailed_digits()
    loader = DataLoader(train, batch_size=64, shuffle=True)
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    counts = torch.bincount(train.tensors[1])
    task = AllNCTask(model, class_counts=counts, steps=epochs * len(loader), projection_dim=32, verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), "adamw", lr=1e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs)
    for epoch in range(epochs):
        task.train()
        for images, labels in loader:
            images = F.interpolate(images, size=32)
            optimizer.zero_grad()
            task(images, labels)["loss"].backward()
            optimizer.step()
        scheduler.step(epoch + 1)
    task.eval()
    images, labels = test.tensors
    with torch.no_grad():
        logits = task.get_eval_model()(F.interpolate(images, size=32))
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    print(f"test accuracy {accuracy:.1%} after {epochs} epochs of {len(train)} images")
    return accuracy


if __name__ == "__main__":
    main()
