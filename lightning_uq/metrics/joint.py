"""The joint log-loss over a data set."""

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_uq.errors import InputError
from lightning_uq.functional import joint
from lightning_uq.functional.validation import check_integer, describe
from lightning_uq.metrics.base import HasProbs, UncertaintyMetric


class JointLogLoss(UncertaintyMetric):
    """Mean joint log-loss of tau labels predicted together, in nats and not divided by tau.

    It measures whether the hypotheses agree on which labels occur together, which a marginal score cannot. The value falls as the
    number of hypotheses Z grows (Jensen's inequality), so compare methods only at equal Z.

    Blocks consist of consecutive rows: pairs for "dyadic", ``kappa`` for "sampled", ``tau`` for "consecutive". The order of the rows
    is defined in one of two ways:

    - Without ``index``, by the order of arrival. Rows left over from a batch wait for the next; rows left at the end are dropped.
      The state is one sum. On several ranks, each makes blocks of its own rows and drops its own rest, so the value depends on the
      number of ranks and on the order of the data.
    - With ``index``, by each sample's position in the data set. A position that occurs twice (from a padding sampler) counts once,
      and the value does not depend on batch size, order or rank. The state is Z numbers per row.

    ``forward`` returns the value of its batch alone, which is NaN if the batch has no full block.

    Args:
        tau: Number of labels predicted together.
        kappa: Number of distinct inputs (anchors) among them, for "dyadic" (always 2) and "sampled".
        sampling: "dyadic": the exact expectation over tau draws, with replacement, from each pair, without sampling noise.
            "sampled": one such draw from each block of ``kappa`` rows, as in ENN; the draws are a hash of (seed, number of
            the block on its rank), independent of the batch size. "consecutive": each block of ``tau`` rows once.
        seed: Seed of the draws for "sampled".
        validate_args: Whether to check the values of each batch.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        InputError: An argument is unknown or out of range, or "dyadic" has a ``kappa`` other than 2.

    Source: Osband et al., The Neural Testbed (arXiv 2110.04629) and dyadic sampling (arXiv 2202.13509).

    Example:
        >>> logits = torch.tensor([[[9.0, -9.0], [9.0, -9.0]], [[-9.0, 9.0], [-9.0, 9.0]]])  # [Z, B, C]
        >>> metric = JointLogLoss(tau=10)
        >>> metric.update(logits, torch.tensor([1, 1]))  # unsure of each label, sure that they are the same
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    is_differentiable: bool | None = True
    higher_is_better: bool | None = False
    # A batch continues the block that the last one left open, so `forward` must not start from an empty state.
    full_state_update: bool | None = True
    plot_lower_bound: float | None = 0.0
    takes_index = True

    num_members: Tensor
    count: Tensor

    def __init__(
        self,
        tau: int = 10,
        kappa: int = 2,
        sampling: Literal["dyadic", "sampled", "consecutive"] = "dyadic",
        seed: int = 0,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        joint.check_joint(tau, kappa, sampling)
        check_integer("seed", seed, 0)
        self.tau, self.kappa, self.sampling, self.seed = tau, kappa, sampling, seed
        self._sum_name = f"joint_log_loss_{sampling}_{tau}_{kappa}_{seed}"
        self._add_sum(self._sum_name)
        self._add_sum("count")
        self._add_rows("carried")  # rows of the open block, [n, Z] flattened
        self._add_rows("log_probs")  # all rows, [N, Z] flattened, if they come with an index
        self._add_rows("index", torch.int64)
        self.add_state("num_members", torch.tensor(0), dist_reduce_fx="max")
        self._known_members: int | None = None  # also in the state, but read here without waiting for a device

    def update(self, prediction: Tensor | HasProbs, target: Tensor, index: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            prediction: Member logits [Z, B, C], or a prediction object with member ``logits``. The calibration of a single
                network belongs to it, so its calibrated probabilities are used. A calibration of the mean of several hypotheses does not
                apply to each of them, so they are used uncalibrated (:func:`has_joint`).
            target: Class indices [B].
            index: The samples' positions in the data set, integers [B]; in every update or in none.

        Raises:
            InputError: Shapes or values do not fit, the number of members changed, or only some updates had an ``index``.
        """
        logits = prediction if isinstance(prediction, Tensor) else _joint_logits(prediction)
        if not isinstance(logits, Tensor):
            raise InputError(
                "`prediction` must be member logits [Z, B, C] or a prediction with member `logits`, but "
                f"its type is {type(prediction).__name__}."
            )
        log_probs = joint.joint_log_probs(logits, target, validate=self.validate_args)
        members = len(log_probs)
        seen = int(self.num_members) if self._known_members is None else self._known_members
        if seen not in (0, members):
            raise InputError(f"`prediction` must have {seen} members as before, but it has {members}.")
        self._known_members = members
        self.num_members = torch.full_like(self.num_members, members)
        if index is None:
            self._add_consecutive(log_probs)
        else:
            self._add_indexed(log_probs, index)

    def _add_indexed(self, log_probs: Tensor, index: Tensor) -> None:
        if not isinstance(index, Tensor) or index.shape != log_probs.shape[1:] or index.dtype not in _INTEGERS:
            raise InputError(
                f"`index` must be integers of shape {list(log_probs.shape[1:])}, but it is {describe(index)}."
            )
        if float(self.count) or self._rows("carried").numel():
            raise InputError("`index` must be passed to every update or to none, but earlier updates had none.")
        self._append("log_probs", log_probs.T.reshape(-1))
        self._append("index", index)

    def _add_consecutive(self, log_probs: Tensor) -> None:
        if self._rows("index").numel():
            raise InputError("`index` must be passed to every update or to none, but earlier updates had it.")
        rows = torch.cat([self._rows("carried").reshape(-1, len(log_probs)).T, log_probs], 1)
        size = joint.block_size(self.tau, self.kappa, self.sampling)
        full = rows.shape[1] // size * size
        # Only drawn blocks depend on their number, and reading the state waits for a device.
        loss = self._losses(rows[:, :full], int(self.count) if self.sampling == "sampled" else 0)
        setattr(self, self._sum_name, getattr(self, self._sum_name) + loss.sum())
        self.count = self.count + len(loss)
        self.carried = [rows[:, full:].detach().T.reshape(-1)]

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the state of another metric with the same settings, or its ``metric_state``, as if its rows had come after this one's.

        Without ``index``, the blocks of both are kept, and the rows left over by both form further blocks.

        Raises:
            InputError: The other metric has another class, settings or number of members, or only one of the two has an ``index``.
        """
        other = JointLogLoss(self.tau, self.kappa, self.sampling, self.seed)
        if isinstance(incoming_state, Metric):
            name = getattr(incoming_state, "_sum_name", None)
            if not isinstance(incoming_state, JointLogLoss) or name != self._sum_name:
                settings = "one with other settings" if isinstance(incoming_state, JointLogLoss) else "of another class"
                raise InputError(
                    "`incoming_state` must be a JointLogLoss with the same settings (or its `metric_state`), but it is "
                    f"{settings}: {incoming_state!r}."
                )
            incoming_state = incoming_state.metric_state
        for name in other._defaults:
            setattr(other, name, incoming_state[name])
        members, seen = int(other.num_members), int(self.num_members)
        if not members:
            return
        if seen not in (0, members):
            raise InputError(f"`incoming_state` must have {seen} members like this metric, but it has {members}.")
        self._known_members, self.num_members, self._computed = members, other.num_members, None
        if other._rows("index").numel():
            self._add_indexed(other._rows("log_probs").reshape(-1, members).T, other._rows("index"))
            return
        setattr(self, self._sum_name, getattr(self, self._sum_name) + getattr(other, self._sum_name))
        self.count = self.count + other.count
        self._add_consecutive(other._rows("carried").reshape(-1, members).T)

    def _losses(self, log_probs: Tensor, first: int) -> Tensor:
        selected = None
        if self.sampling == "sampled":
            groups = log_probs.shape[1] // self.kappa
            selected = joint.hashed_draws(first, groups, self.tau, self.kappa, self.seed, log_probs.device)
        return joint.block_losses(log_probs, self.tau, self.kappa, self.sampling, selected)

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self._known_members = None

    def compute(self) -> Tensor:
        """Mean joint log-loss in nats over the full blocks; NaN, with a warning, without a full block."""
        index = self._rows("index")
        if index.numel():
            rows = self._rows("log_probs").reshape(-1, int(self.num_members))
            if len(rows) != len(index):
                raise InputError(
                    "All ranks must have the same number of members, but the numbers of their rows differ."
                )
            ordered, order = index.sort(stable=True)
            first = torch.ones_like(ordered, dtype=torch.bool)
            first[1:] = ordered[1:] != ordered[:-1]
            loss = self._losses(rows[order[first]].T, 0)
            total, count = loss.sum(), len(loss)
        else:
            total, count = getattr(self, self._sum_name), int(self.count)
        if count == 0:
            size = joint.block_size(self.tau, self.kappa, self.sampling)
            rank_zero_warn(
                f"JointLogLoss has not seen {size} rows with a joint prediction, so its value is NaN.", UserWarning
            )
            return torch.full_like(total, torch.nan)
        return total / count


def has_joint(prediction: Any) -> bool:
    """Whether a prediction of classes defines the joint probability of several labels.

    It does unless a calibration acts on the mean of several hypotheses, which does not apply to each of them.

    Example:
        >>> from lightning_uq import CategoricalPrediction
        >>> T = torch.tensor(2.0)
        >>> [has_joint(CategoricalPrediction(torch.zeros(Z, 1, 2), temperature=T)) for Z in (1, 5)]
        [True, False]
    """
    return not getattr(prediction, "is_calibrated", False) or prediction.num_indices == 1


def _joint_logits(prediction: Any) -> Tensor | None:
    """The logits [Z, B, C] of the hypotheses that predict labels jointly."""
    if has_joint(prediction) and getattr(prediction, "is_calibrated", False) and prediction.has_logits:
        log_probs: Tensor = prediction.log_probs.unsqueeze(0)
        return log_probs
    return getattr(prediction, "logits", None)


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
