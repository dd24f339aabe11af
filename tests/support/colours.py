"""The distance of two colours as colour-blind people see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: What is seen of linear red, green and blue by the ordinary eye and with each kind of colour
#: blindness (Machado et al. 2009, severity 1).
VISIONS = {
    "ordinary": torch.eye(3, dtype=torch.float64),
    "protanopia": torch.tensor(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        dtype=torch.float64,
    ),
    "deuteranopia": torch.tensor(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        dtype=torch.float64,
    ),
    "tritanopia": torch.tensor(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
        dtype=torch.float64,
    ),
}
#: Linear sRGB to XYZ, divided by the white point D65.
TO_XYZ = torch.tensor(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ],
    dtype=torch.float64,
) / torch.tensor([[0.95047], [1.0], [1.08883]], dtype=torch.float64)


def of_hex(colour: str) -> list[int]:
    """Return red, green and blue from 0 to 255 of a colour such as ``"#0072b2"``."""
    return list(bytes.fromhex(colour.removeprefix("#")))


def _lab(rgb: Sequence[int], vision: Tensor) -> Tensor:
    """Return the colour that is seen in CIELAB."""
    x = torch.tensor(rgb, dtype=torch.float64) / 255
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ (vision @ linear).clamp(0, 1)
    f = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack((116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])))


def difference(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the least distance of two colours in CIELAB over all kinds of vision.

    A distance of 2 can just be seen side by side.
    """
    seen = ((_lab(first, vision), _lab(second, vision)) for vision in VISIONS.values())
    return min(float(torch.linalg.vector_norm(a - b)) for a, b in seen)
