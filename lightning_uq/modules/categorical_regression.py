"""Regression by classification over atoms: every index predicts a distribution, trained on 2-hot targets."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.validation import describe
from lightning_uq.functional.waiting import is_free
from lightning_uq.losses.categorical_regression import join_atoms
from lightning_uq.modules.arguments import given_network, take_training_option
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.networks.categorical_regression import CategoricalRegressionNetwork
from lightning_uq.networks.factory import Factory
from lightning_uq.tasks import CategoricalRegression


class CategoricalRegressionModule(UncertaintyModule):
    """A regressor whose indices predict distributions over atoms, with random priors on their means.

    The loss is the cross-entropy against the 2-hot encoding of the target minus the prior, averaged over the drawn indices, or
    over all indices of a finite set. The prediction has one Gaussian per index, with the mean and variance of its distribution. The
    2-hot encoding adds to that variance, up to a quarter of the squared distance between two atoms.

    Args:
        network: A :class:`~lightning_uq.networks.CategoricalRegressionNetwork`, or a factory of it, which a checkpoint can
            store.
        training: Arguments of :class:`UncertaintyModule`: ``optimizer``, ``data_noise`` and the like. The task follows from the
            network's atoms.

    Raises:
        InputError: ``network`` has another type, or ``task`` has other atoms.

    Source: ``Cat2HotRegression`` of google-deepmind/enn.

    Example:
        >>> import torch
        >>> from lightning_uq.networks import CatMLPEnsemble
        >>> module = CategoricalRegressionModule(CatMLPEnsemble(4, torch.linspace(-3, 3, 13), num_members=5))
        >>> module.predict(torch.zeros(6, 4)).epistemic_variance.shape
        torch.Size([6, 1])
    """

    network: CategoricalRegressionNetwork

    def __init__(
        self, network: CategoricalRegressionNetwork | Factory | Callable[[], nn.Module], **training: Any
    ) -> None:
        built = given_network(network, training)
        if not isinstance(built, CategoricalRegressionNetwork):
            raise InputError(
                f"`network` must be a CategoricalRegressionNetwork, or a factory of one, but it is {describe(built)}."
            )
        task = CategoricalRegression(built.atoms.tolist())
        if take_training_option(training, "task", task) != task:
            raise InputError(f"`task` follows from the network's atoms: leave it out, or pass {task!r}.")
        super().__init__(built, task=task, **training)
        self._range_checked = False

    def outputs_at(self, x: Any, index: Tensor) -> Tensor:
        """Raw outputs [Z, B, D A + D] at these indices: logits over the atoms, then the prior."""
        return join_atoms(*self.network.logits_and_prior(x, index))

    def training_loss(self, x: Any, y: Tensor, batch: Any) -> Tensor:
        """Mean over the members, or over the drawn indices, of the cross-entropy."""
        index = self._place(self.network.training_index(self.num_train_samples))
        loss = self.index_losses(self.outputs_at(x, index), self.targets(y, batch, index)).mean()
        self._check_range(y)  # after the check that the targets are numbers
        return self.regularized(loss, x)

    def _check_range(self, y: Tensor) -> None:
        """Warn, once, of targets outside the atoms' range. On a GPU only the first batch is checked."""
        if self._range_checked:
            return
        atoms = self.network.atoms
        outside = int(((y < atoms[0]) | (y > atoms[-1])).sum())
        if outside:
            rank_zero_warn(
                f"{outside} of the {y.numel()} targets of a batch lie outside the atoms' range, {float(atoms[0]):g} to "
                f"{float(atoms[-1]):g}, and are clipped to it. Pass wider `atoms`, or scaled targets."
            )
        self._range_checked = bool(outside) or not is_free(y)
