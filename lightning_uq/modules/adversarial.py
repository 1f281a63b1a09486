"""Adversarial training of an ensemble: the size of the adversarial steps, and the loss that they smooth."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_uq.errors import InputError
from lightning_uq.functional.adversarial import adversarial_loss
from lightning_uq.modules.input_range import training_range
from lightning_uq.running.averages import averaged_copies


class Adversary(nn.Module):
    """Takes FGSM steps, in units of the input or of the input's range over the training data.

    Args:
        epsilon: Size of a step.
        scale: ``"range"`` or ``"absolute"``.

    Attributes:
        input_range: The range of the training inputs, [D], or [C, 1, 1] for images; None while it is unknown. It is part of the
            state dict.
    """

    input_range: Tensor | None

    def __init__(self, epsilon: float, scale: Literal["range", "absolute"]) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.scale = scale
        self.register_buffer("input_range", None)
        self._is_restored = False

    def measure(self, module: LightningModule, unpack_batch: Callable[[Any], Any]) -> None:
        """Measure the range at the start of a training, unless it was resumed with the range."""
        if self.scale == "range" and not self._is_restored:
            self.input_range = training_range(module, unpack_batch)
            for average in averaged_copies(module.trainer):  # the copies were made before the range was measured
                average.adversary.input_range = self.input_range.clone()  # type: ignore[union-attr]
        self._is_restored = False

    def resume(self, state_dict: Mapping[str, Any]) -> None:
        """Take the range from a checkpoint, for the training that it resumes."""
        self._is_restored = "adversary.input_range" in state_dict

    def loss(
        self,
        loss: Callable[[Tensor], Tensor],
        x: Any,
        parameters: Sequence[nn.Parameter],
        *,
        copies: int | None = None,
        scaler: Any = None,
        second_pass: AbstractContextManager[object] | None = None,
    ) -> Tensor:
        """The mean of the loss and the loss of adversarial inputs; see :func:`~lightning_uq.functional.adversarial_loss`.

        Args:
            loss: Function of inputs [B, ...], or [copies, B, ...].
            x: The inputs of the batch [B, ...].
            parameters: All parameters that the loss trains.
            copies: Number of copies of ``x`` that take separate steps, one per member.
            scaler: The gradient scaler, or None.
            second_pass: Context entered for the adversarial inputs.

        Raises:
            InputError: The inputs are not a floating-point tensor, or their range is unknown.
        """
        step = self._step(x)
        inputs = x if copies is None else x.expand(copies, *x.shape)
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=x.device))
        return adversarial_loss(loss, inputs, parameters, step, loss_scale=scale, second_pass=second_pass)

    def _step(self, x: Any) -> float | Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InputError(f"The input of adversarial training must be a floating-point tensor, but it is {found}.")
        if self.scale == "absolute":
            return self.epsilon
        if self.input_range is None:
            raise InputError(
                "The range of the training inputs is unknown: train with a Trainer, which measures it, or pass "
                '`adversarial_scale="absolute"`.'
            )
        return (self.epsilon * self.input_range).to(x)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}input_range" in state_dict:
            like = state_dict[f"{prefix}input_range"]
            self.input_range = torch.empty_like(like if self.input_range is None else self.input_range)
        super()._load_from_state_dict(state_dict, prefix, *args)
