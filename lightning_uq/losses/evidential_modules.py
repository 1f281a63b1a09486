"""Evidential losses of a network's raw outputs: modules that replace ``nn.CrossEntropyLoss``."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uq.functional.precision import upcast
from lightning_uq.functional.validation import check_at_least, check_bool, check_choice, check_positive
from lightning_uq.losses.evidence import Evidence, evidence_function
from lightning_uq.losses.evidence_formulas import RISKS, Fisher, Risk, check_p_norm
from lightning_uq.losses.evidential import (
    evidential_loss,
    fisher_evidential_loss,
    maxnorm_loss,
    relaxed_evidential_loss,
)
from lightning_uq.losses.reduction import Reduction, check_reduction


class EvidenceLoss(nn.Module, ABC):
    """Base class of losses that take a network's raw outputs; it handles evidence, annealing factor, weights and reduction.

    Args:
        evidence: ``"clamped_exp"``, ``"softplus"``, ``"relu"``, or a function that returns non-negative evidence.
        reg_factor: Weight of the regularizer; :meth:`forward` takes another value, for annealing.
        weight: Weight of each class, C numbers.
        ignore_index: Class index of positions that do not count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        validate_args: Whether to check the values: one pass over the data, and a synchronisation on a GPU.

    Attributes:
        prior: The number added to the evidence to give the concentration.

    Raises:
        InputError: An argument is not as above.
    """

    prior: float = 1.0
    weight: Tensor | None

    def __init__(
        self,
        evidence: Evidence = "clamped_exp",
        reg_factor: float = 0.0,
        *,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        validate_args: bool = True,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_bool("validate_args", validate_args)
        check_at_least("reg_factor", reg_factor, 0)
        self.evidence = evidence_function(evidence)
        self.reg_factor = reg_factor
        self.register_buffer("weight", None if weight is None else torch.as_tensor(weight, dtype=torch.float32))
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.validate_args = validate_args

    def concentration(self, logits: Tensor) -> Tensor:
        """alpha = evidence + prior, for raw outputs [N, C, ...], in at least float32."""
        return self.evidence(upcast(logits)) + self.prior

    def forward(self, logits: Tensor, target: Tensor, reg_factor: float | None = None) -> Tensor:
        """The loss of raw outputs [N, C, d1, ..., dk] and targets; ``reg_factor`` overrides the module's own."""
        factor = self.reg_factor if reg_factor is None else reg_factor
        return self.of_evidence(self.evidence(upcast(logits)), target, factor)

    @abstractmethod
    def of_evidence(self, evidence: Tensor, target: Tensor, reg_factor: float) -> Tensor:
        """The loss of evidence."""

    def _options(self) -> dict[str, Any]:
        """The arguments that all loss functions of evidence share."""
        return {"weight": self.weight, "ignore_index": self.ignore_index, "validate_args": self.validate_args}


class EvidentialLoss(EvidenceLoss):
    """:func:`evidential_loss` of raw outputs: a drop-in for ``nn.CrossEntropyLoss``.

    Args:
        evidence: See :class:`EvidenceLoss`.
        reg_factor: Weight of the KL regularizer.
        risk: ``"sse"``, ``"nll"`` or ``"cross_entropy"``.
        options: The other arguments of :class:`EvidenceLoss`.

    Source: Sensoy et al., NeurIPS 2018 (arXiv 1806.01768).

    Example:
        >>> loss = EvidentialLoss(reg_factor=1.0)
        >>> loss(torch.tensor([[3.0, -3.0]]), torch.tensor([0]))
        tensor(0.0096)
    """

    def __init__(
        self,
        evidence: Evidence = "clamped_exp",
        reg_factor: float = 0.0,
        *,
        risk: Risk = "sse",
        **options: Any,
    ) -> None:
        check_choice("risk", risk, tuple(RISKS))
        super().__init__(evidence, reg_factor, **options)
        self.risk: Risk = risk

    def of_evidence(self, evidence: Tensor, target: Tensor, reg_factor: float) -> Tensor:
        """See :func:`evidential_loss`."""
        return evidential_loss(
            evidence,
            target,
            reg_factor,
            self.reduction,
            risk=self.risk,
            **self._options(),
        )


class MaxNormLoss(EvidenceLoss):
    """:func:`maxnorm_loss` of raw outputs: a drop-in for ``nn.CrossEntropyLoss``.

    Args:
        evidence: See :class:`EvidenceLoss`.
        reg_factor: Weight of the Fisher regularizer.
        p_norm: p >= 1 of the norm.
        fisher: ``"original"`` or ``"paper"``.
        options: The other arguments of :class:`EvidenceLoss`.

    Source: Tsiligkaridis (arXiv 1910.04819).

    Example:
        >>> MaxNormLoss()(torch.tensor([[3.0, -3.0]]), torch.tensor([0]))
        tensor(0.1144)
    """

    def __init__(
        self,
        evidence: Evidence = "clamped_exp",
        reg_factor: float = 0.0,
        *,
        p_norm: float = 4,
        fisher: Fisher = "original",
        **options: Any,
    ) -> None:
        check_p_norm(p_norm)
        check_choice("fisher", fisher, ("original", "paper"))
        super().__init__(evidence, reg_factor, **options)
        self.p_norm = p_norm
        self.fisher: Fisher = fisher

    def of_evidence(self, evidence: Tensor, target: Tensor, reg_factor: float) -> Tensor:
        """See :func:`maxnorm_loss`."""
        return maxnorm_loss(
            evidence,
            target,
            reg_factor,
            self.p_norm,
            self.reduction,
            self.fisher,
            **self._options(),
        )


class RelaxedEvidentialLoss(EvidenceLoss):
    """:func:`relaxed_evidential_loss` of raw outputs: R-EDL, and with ``reg_factor=0`` Re-EDL.

    Args:
        evidence: See :class:`EvidenceLoss`.
        reg_factor: Weight of the KL regularizer.
        prior: lambda, the prior weight of each class.
        options: The other arguments of :class:`EvidenceLoss`.

    Source: Chen et al., R-EDL, ICLR 2024; Chen et al., Re-EDL (arXiv 2410.00393).

    Example:
        >>> RelaxedEvidentialLoss("softplus")(torch.tensor([[3.0, -3.0]]), torch.tensor([0]))
        tensor(0.0041)
    """

    def __init__(
        self,
        evidence: Evidence = "softplus",
        reg_factor: float = 0.0,
        *,
        prior: float = 0.1,
        **options: Any,
    ) -> None:
        check_positive(prior=prior)
        super().__init__(evidence, reg_factor, **options)
        self.prior = prior

    def of_evidence(self, evidence: Tensor, target: Tensor, reg_factor: float) -> Tensor:
        """See :func:`relaxed_evidential_loss`."""
        return relaxed_evidential_loss(
            evidence,
            target,
            reg_factor,
            self.prior,
            self.reduction,
            **self._options(),
        )


class FisherEvidentialLoss(EvidenceLoss):
    """:func:`fisher_evidential_loss` of raw outputs: I-EDL.

    Args:
        evidence: See :class:`EvidenceLoss`.
        reg_factor: Weight of the KL regularizer.
        fisher_factor: Weight of the log-determinant of the Fisher information.
        options: The other arguments of :class:`EvidenceLoss`.

    Source: Deng et al., ICML 2023 (arXiv 2303.02045).

    Example:
        >>> FisherEvidentialLoss("softplus", fisher_factor=0.0)(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.4896)
    """

    def __init__(
        self,
        evidence: Evidence = "softplus",
        reg_factor: float = 0.0,
        *,
        fisher_factor: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(evidence, reg_factor, **options)
        self.fisher_factor = fisher_factor

    def of_evidence(self, evidence: Tensor, target: Tensor, reg_factor: float) -> Tensor:
        """See :func:`fisher_evidential_loss`."""
        return fisher_evidential_loss(
            evidence,
            target,
            reg_factor,
            self.fisher_factor,
            self.reduction,
            **self._options(),
        )
