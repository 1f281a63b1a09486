"""Checks of a batch and of a network's outputs; each raises one error that names the cause."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_uq.errors import InputError, NotFiniteError, UQError
from lightning_uq.losses.data_noise import DataNoise
from lightning_uq.networks.base import EpistemicNetwork
from lightning_uq.tasks import Task, describe

if TYPE_CHECKING:
    from lightning_uq.modules.base import UncertaintyModule


def check_fits_task(task: Task, network: EpistemicNetwork, data_noise: DataNoise | None) -> None:
    """Refuse noise that changes targets other than numbers, and probabilities as outputs if the task needs raw outputs."""
    if getattr(data_noise, "of_targets", False) and not task.has_numeric_targets:
        raise InputError(
            f"`data_noise` must leave the targets of {describe(task)} unchanged, but {data_noise!r} changes them."
        )
    task.check_kind(network.read_output.output)


def check_first_output(module: "UncertaintyModule", output: Tensor) -> None:
    """Refuse outputs [Z, B, ...] that do not fit the task, and report outputs that are not logits."""
    module.task.check_output(output)
    if module.task.takes_probabilities:
        module.network.read_output.reports_log_probs(output, module)


def check_labelled(x: Any, y: Any) -> Tensor:
    """Return the target ``y`` of a batch that needs one.

    Raises:
        InputError: The batch holds no target, or the target is not a tensor.
    """
    if y is None:
        raise InputError(
            "The batch holds an input without a target. It must be `(x, y)` or a mapping with `input` and `target`. For any other "
            "layout, override `unpack_batch`."
        )
    if not isinstance(y, Tensor):
        raise InputError(
            f"The targets of a batch must be a tensor, but they are a {type(y).__name__}. Let the data set return numbers. If a batch "
            "is not a pair, as with several training loaders, override `unpack_batch`."
        )
    return y


def check_first_loss(loss: Tensor) -> None:
    """Refuse a non-finite loss at the first step. Later steps may overflow under fp16, which skips them."""
    if not bool(loss.isfinite()):
        raise NotFiniteError(
            f"The loss of the first step must be finite, but it is {loss.item()}. Either the network's weights or outputs hold "
            "NaN or infinity, or the loss does not fit them."
        )


def raise_shape_error(error: RuntimeError, x: Any) -> None:
    """Re-raise torch's error about shapes or dtypes as an :class:`InputError` that names the input; ignore other errors."""
    if isinstance(error, UQError) or not isinstance(x, Tensor):
        return
    if any(word in str(error) for word in ("shape", "size", "dtype")):
        text = str(error).splitlines()[0]
        kind = f"shape {list(x.shape)} and {x.dtype}"
        raise InputError(f"The network does not take an input of {kind}: {text}") from error
