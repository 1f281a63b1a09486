"""One small classification that the pictures of methods share: two moons, and maps of a score around them."""

import torch
from lightning.pytorch import LightningModule
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from docs.figures import style, toy
from lightning_uq import Prediction
from lightning_uq.data import two_moons

BOX = (-3.0, 4.0, -2.5, 3.0)
COLUMNS, ROWS = 106, 83
GRID = torch.cartesian_prod(torch.linspace(*BOX[2:], ROWS), torch.linspace(*BOX[:2], COLUMNS)).flip(1)


def data(num_points: int = 400, noise: float = 0.15) -> tuple[Tensor, Tensor]:
    """Points [N, 2] and their classes [N]."""
    return two_moons(num_points, noise, generator=torch.Generator().manual_seed(0))


def fit(module: LightningModule, *, epochs: int = 40, callbacks=()) -> Prediction:
    """Train a module on three quarters of the points, and predict on the grid."""
    x, y = data()
    toy.train(module, (x[:300], y[:300]), (x[300:], y[300:]), epochs=epochs, callbacks=callbacks)
    return module.predict(GRID)


def score_map(axes, values: Tensor, title: str, color: str = style.ORANGE, cap: float = 1.0) -> None:
    """Draw a score of the grid's points, from its smallest value (no colour) to its ``cap`` quantile, and the data."""
    low, high = values.min(), values.quantile(cap)
    image = ((values - low) / (high - low)).reshape(ROWS, COLUMNS)
    colors = LinearSegmentedColormap.from_list("score", [(*_rgb(color), 0.0), (*_rgb(color), 0.9)])
    axes.imshow(
        image.double().numpy(),
        cmap=colors,
        vmin=0,
        vmax=1,
        origin="lower",
        extent=BOX,
        aspect="auto",
        interpolation="none",
    )
    x, y = data()
    for label, marker in ((0, style.BLUE), (1, style.GREEN)):
        axes.scatter(*x[y == label].T, s=5, color=marker, linewidths=0)
    axes.set(xlim=BOX[:2], ylim=BOX[2:], xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)


def _rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
