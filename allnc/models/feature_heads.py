"""Encoders of stored features: none at all, and a residual layer pair."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualMLP(nn.Module):
    """x + W2 ReLU(W1 x + b1) + b2; it begins as the identity, because W2 and b2 are 0, so that what was learnt stays.

    Args:
        features: width F of input and result.
        hidden: width between the layers.

    Source: ours; the zeros after Houlsby et al., Parameter-Efficient Transfer Learning for NLP (ICML 2019).
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, features)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.second(self.first(features).relu_())  # [N, F]


def feature_encoder(name: str, features: int, hidden: int | None) -> nn.Module:
    """Return the module between stored features [N, F] and the heads.

    Args:
        name: linear (the identity) or mlp.
        features: width F.
        hidden: width between the two layers of mlp; None takes F.
    """
    return nn.Identity() if name == "linear" else ResidualMLP(features, hidden or features)
