"""AllNC in a LightningModule, with a class-balanced sampler: `python docs/examples/lightning_module.py`.

`pip install lightning` first. On several devices the contrast and the class means are those of all ranks.
"""

import lightning
import torch
import torch.nn.functional as F
from plain_pytorch import long_tailed_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from allnc.data import BalancedSampler
from allnc.losses import AllNC


class LongTailed(lightning.LightningModule):
    """Any encoder from images to features [N, F], with a classifier and a projection, trained by AllNC."""

    def __init__(self, encoder: nn.Module, feature_dim: int, class_counts: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(feature_dim, len(class_counts))
        self.projection = nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, 32))
        self.feature_dim, self.class_counts = feature_dim, class_counts
        self.criterion = None

    def configure_model(self) -> None:
        # Here the processes are connected: the class means are those of all ranks, and stand in the checkpoint.
        if self.criterion is not None:  # Lightning calls this again before each test
            return
        group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
        self.criterion = AllNC(self.class_counts, self.feature_dim, 32, group=group)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.encoder(images))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        features = self.encoder(images)
        branch = (self.classifier(features), labels)
        z = F.normalize(self.projection(features), dim=1)
        progress = min(1.0, self.global_step / self.trainer.estimated_stepping_batches)
        loss = self.criterion(features, labels, self.classifier.weight, branch, branch, progress, z=z)
        self.log_dict(dict(loss.parts))  # cls, hycon, p2p_means ... before their weights
        return loss.total

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean(), on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(epochs: int = 40) -> float:
    lightning.seed_everything(0, verbose=False)
    train, test = long_tailed_digits()
    encoder = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten())
    encoder.extend([nn.Linear(64 * 4 * 4, 64), nn.ReLU()])
    labels = train.tensors[1]
    sampler = BalancedSampler(labels, "square_root")  # knows the ranks: Lightning need not put its own around it
    trainer = lightning.Trainer(
        max_epochs=epochs,
        use_distributed_sampler=False,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = LongTailed(encoder, 64, torch.bincount(labels))
    trainer.fit(model, DataLoader(train, batch_size=64, sampler=sampler))
    (measured,) = trainer.test(model, DataLoader(test, batch_size=500), verbose=False)
    print(f"test accuracy {measured['accuracy']:.1%} after {epochs} epochs of {len(train)} images")
    return measured["accuracy"]


if __name__ == "__main__":
    main()
