"""What the networks share: embeddings of times and labels, and the check of their input."""

from __future__ import annotations

from torch import Tensor, nn

from imm.ops.timestep_embedding import sinusoids


def check_image(x: Tensor, channels: int, resolution: int) -> None:
    """Raises ValueError unless x is ``[B, channels, resolution, resolution]``."""
    if x.dim() != 4 or tuple(x.shape[1:]) != (channels, resolution, resolution):
        raise ValueError(f"x: expected [B, {channels}, {resolution}, {resolution}], got {list(x.shape)}")


class TimestepEmbedder(nn.Module):
    """Sinusoids, Linear, SiLU, Linear: ``[B]`` times -> ``[B, out_features]``."""

    def __init__(self, out_features: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, out_features), nn.SiLU(), nn.Linear(out_features, out_features))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(t, self.frequencies).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """One row per class and a last one for "none": ``[B]`` int64 -> ``[B, out_features]``."""

    def __init__(self, num_classes: int, out_features: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, out_features)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)
