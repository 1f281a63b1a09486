"""The prediction of a softmax classifier."""

from typing import ClassVar

from torch import Tensor

from lightning_uq.errors import InputError
from lightning_uq.functional import entropy
from lightning_uq.predictions.class_probabilities import ClassProbabilities


class CategoricalPrediction(ClassProbabilities):
    """A classifier's prediction: one row of logits per hypothesis.

    Args:
        logits: Raw logits [Z, B, C] (or [Z, B, C, ...]).
        temperature: Scalar T of a pooled calibration: probabilities are softmax(log(mean_z p_z) / T). The members, hence
            ``expected_entropy`` and ``mutual_information``, stay as they are.
        class_scaling: Scale and bias [2, C] of a pooled calibration by vector scaling, in the place of T.
        log_density: Log-density [B] of the input's features, where one was fitted.

    Raises:
        InputError: ``logits`` has fewer than three axes.

    Example:
        >>> prediction = CategoricalPrediction(torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]))
        >>> prediction.probs
        tensor([[0.5000, 0.5000]])
        >>> prediction.mutual_information
        tensor([0.3278])
    """

    _batch_axis: ClassVar[dict[str, int | None]] = {
        "logits": 1,
        "temperature": None,
        "class_scaling": None,
        "log_density": 0,
        "pooled_log_probs": 0,
        "member_entropy": 0,
    }

    def __init__(
        self,
        logits: Tensor,
        temperature: Tensor | None = None,
        log_density: Tensor | None = None,
        class_scaling: Tensor | None = None,
    ) -> None:
        if isinstance(logits, Tensor) and logits.ndim < 3:
            raise InputError(f"Expected argument `logits` to be [Z, B, C], but got shape {list(logits.shape)}.")
        self._set(
            logits=logits,
            temperature=temperature,
            class_scaling=class_scaling,
            log_density=log_density,
            pooled_log_probs=None,
            member_entropy=None,
        )

    def pool(self) -> "CategoricalPrediction":
        """The same prediction without its members: log-probabilities and moments alone, Z times smaller."""
        tensors = dict(self.__dict__["_tensors"])
        if tensors["logits"] is not None:
            tensors.update(logits=None, pooled_log_probs=self._mean_log_probs, member_entropy=self.expected_entropy)
        return self._from_tensors(tensors)

    @property
    def logits(self) -> Tensor:
        """Raw member logits [Z, B, C, ...].

        Raises:
            InputError: The members were pooled away.
        """
        if self.__dict__["_tensors"]["logits"] is None:
            raise InputError(
                "The members' `logits` were pooled when this prediction was made; set `module.return_members = True` to "
                "keep them."
            )
        return self._get("logits")

    @property
    def _mean_log_probs(self) -> Tensor:
        pooled: Tensor | None = self.__dict__["_tensors"]["pooled_log_probs"]
        return entropy.mean_log_probs(self.logits) if pooled is None else pooled

    @property
    def log_probs(self) -> Tensor:
        """Pooled log-probabilities [B, C, ...], after the calibration where there is one."""
        return self._calibrated(self._mean_log_probs)

    @property
    def expected_entropy(self) -> Tensor:
        """mean_z H[p_z] in nats: [B, ...]."""
        stored: Tensor | None = self.__dict__["_tensors"]["member_entropy"]
        return entropy.expected_entropy(self.logits) if stored is None else stored

    @property
    def mutual_information(self) -> Tensor:
        """H[mean_z p_z] - mean_z H[p_z] in nats: [B, ...], from the untempered members."""
        if self.__dict__["_tensors"]["logits"] is not None:
            return entropy.mutual_information(self.logits)
        return (entropy.entropy(self._mean_log_probs, 1) - self.expected_entropy).clamp_min(0)
