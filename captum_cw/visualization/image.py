"""Scores of image tokens, shown on the image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from captum.attr import visualization as captum_image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from captum_cw.visualization._output import new_figure

__all__ = ["PatchScores", "fold_patches", "plot_image_scores"]

Size = int | tuple[int, int]


class PatchScores(NamedTuple):
    """Scores of image tokens: those of patches, and those of special tokens.

    Example:
        >>> patches, special = fold_patches(torch.rand(5), image_size=4, patch_size=2)
        >>> patches.shape, special.shape
        (torch.Size([2, 2]), torch.Size([1]))
    """

    patches: Tensor
    """``(..., rows, columns)``."""
    special: Tensor
    """``(..., n)``: class and register tokens, in their order."""


def fold_patches(scores: Tensor, image_size: Size, patch_size: Size) -> PatchScores:
    """Fold the scores of image tokens into the grid of patches.

    Args:
        scores: Scores of tokens, ``(..., T)``, such as those of ``TokenScores`` or the row of a
            map. Patches are row by row, after any class and register tokens, as in ViT, DeiT,
            DINOv2, DINOv3, CLIP and SigLIP.
        image_size: Height and width in pixels, or one number for both: ``pixel_values.shape[-2:]``.
        patch_size: Height and width of a patch, or one number: ``model.config.patch_size``.

    Returns:
        The scores of the patches, and those of the tokens before them.

    Raises:
        ValueError: If the image has more patches than there are tokens, or is smaller than a patch.

    Example:
        >>> folded = fold_patches(torch.arange(5.0), image_size=4, patch_size=2)
        >>> folded.patches.tolist(), folded.special.tolist()
        ([[1.0, 2.0], [3.0, 4.0]], [0.0])
    """
    (height, width), (tall, wide) = _pair(image_size), _pair(patch_size)
    rows, columns = height // tall, width // wide
    T, n = scores.shape[-1], scores.shape[-1] - rows * columns
    if rows * columns == 0 or n < 0:
        raise ValueError(
            f"An image of {height} x {width} pixels has {rows} x {columns} patches of {tall} x "
            f"{wide}, but there are {T} tokens: give the image size of the model input, and the "
            "model's patch size (model.config.patch_size, or that of its vision_config)."
        )
    return PatchScores(scores[..., n:].reshape(*scores.shape[:-1], rows, columns), scores[..., :n])


def plot_image_scores(
    scores: Tensor,
    image: Tensor,
    patch_size: Size,
    *,
    title: str | None = None,
    sign: str = "absolute_value",
    outlier_perc: float = 2,
    use_pyplot: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Plot an image next to the scores of its patches, with Captum's ``visualize_image_attr``.

    Args:
        scores: Scores of one image's tokens, ``(T,)``.
        image: The model input, ``(3, H, W)`` or ``(1, H, W)``. It is shown between its smallest and
            its largest value.
        patch_size: The size of a patch in pixels.
        title: The title of the right panel.
        sign: ``"absolute_value"``, ``"positive"``, ``"negative"`` or ``"all"``, as in Captum.
        outlier_perc: The percentage of the largest scores that the colour scale ignores.
        use_pyplot: As in Captum.

    Returns:
        The figure, and its two axes.

    Raises:
        ValueError: If ``image`` is not an image, the numbers of patches differ, or all scores are
            zero.

    Example:
        >>> fig, axes = plot_image_scores(
        ...     torch.rand(5), torch.rand(3, 4, 4), patch_size=2, use_pyplot=False)
        >>> [ax.get_title() for ax in axes]
        ['image', 'scores of 2 x 2 patches']
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image has shape {tuple(image.shape)}: expected (3, H, W) or (1, H, W).")
    if scores.dim() != 1:
        raise ValueError(f"scores have shape {tuple(scores.shape)}: expected (T,), of one image.")
    height, width = image.shape[-2:]
    patches = fold_patches(scores.detach().float().cpu(), (height, width), patch_size).patches
    if not patches.any():
        raise ValueError("The scores of all patches are zero.")
    tall, wide = _pair(patch_size)
    pixels = patches.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
    # The model does not see the edge of an image whose size is not a multiple of the patch size.
    pixels = torch.nn.functional.pad(pixels, (0, width - pixels.shape[1], 0, height - len(pixels)))

    shown = image.detach().float().cpu()
    shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp(min=1e-12)
    shown = shown.expand(3, -1, -1).permute(1, 2, 0)

    fig, grid = new_figure(1, 2, (9, 4.2), use_pyplot)
    left, right = grid[0]
    left.imshow(shown.numpy())
    left.set_title("image")
    left.set_axis_off()
    if title is None:
        title = f"scores of {patches.shape[0]} x {patches.shape[1]} patches"
    captum_image.visualize_image_attr(
        pixels[..., None].numpy(),
        shown.numpy(),
        method="blended_heat_map",
        sign=sign,
        plt_fig_axis=(fig, right),
        outlier_perc=outlier_perc,
        show_colorbar=True,
        title=title,
        use_pyplot=False,
    )
    return fig, [left, right]


def _pair(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
