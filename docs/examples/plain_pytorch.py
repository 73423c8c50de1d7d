"""AllNC in a plain PyTorch loop, on long-tailed digits: `python docs/examples/plain_pytorch.py` (15 s on a core)."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from allnc.losses import AllNC


def long_tailed_digits() -> tuple[TensorDataset, TensorDataset]:
    """120 training images of the digit 0 to 6 of the digit 9, and 50 test images of each."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    of_class = [(labels == c).nonzero()[:, 0] for c in range(10)]
    train = torch.cat([of_class[c][: round(120 * 20 ** (-c / 9))] for c in range(10)])
    test = torch.cat([rows[-50:] for rows in of_class])
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def main(epochs: int = 40) -> float:
    torch.manual_seed(0)
    train, test = long_tailed_digits()
    counts = torch.bincount(train.tensors[1])  # [10], the images of each class
    encoder = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten())
    encoder.extend([nn.Linear(64 * 4 * 4, 64), nn.ReLU()])
    classifier = nn.Linear(64, 10)
    projection = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))  # for the contrast; not kept
    criterion = AllNC(counts, feature_dim=64, projection_dim=32)  # holds the class means: a module, with a state_dict
    parameters = [*encoder.parameters(), *classifier.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    loader = DataLoader(train, batch_size=64, shuffle=True)

    for step in range(epochs * len(loader)):
        if step % len(loader) == 0:
            batches = iter(loader)
        images, labels = next(batches)
        features = encoder(images)
        branch = (classifier(features), labels)  # one classifier serves the uniform and the re-balancing branch
        z = F.normalize(projection(features), dim=1)
        progress = step / (epochs * len(loader))  # the share of training done moves the loss from η = 1 to 0
        loss = criterion(features, labels, classifier.weight, branch, branch, progress, z=z)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()

    images, labels = test.tensors
    with torch.no_grad():
        accuracy = (classifier(encoder(images)).argmax(1) == labels).float().mean().item()
    print(f"test accuracy {accuracy:.1%} after {epochs} epochs of {len(train)} images")
    return accuracy


if __name__ == "__main__":
    main()
