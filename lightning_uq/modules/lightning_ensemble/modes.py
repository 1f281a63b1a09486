"""Train and eval modes around an evaluation: each member chooses its own, as it would alone."""

from typing import TYPE_CHECKING

from torch import nn

from lightning_uq.modules.lightning_ensemble.part import Part

if TYPE_CHECKING:
    from lightning_uq.modules.lightning_ensemble.members import Members


class MemberModes(Part):
    """Lightning's ``on_*_model_eval`` and ``on_*_model_train``, for the ensemble and each member.

    Lightning stores the mode of every module before an evaluation and restores it afterwards, except for modules with their own
    ``on_*_model_train``. In that case, this class restores the modes of the ensemble outside its members.
    """

    def __init__(self, members: "Members") -> None:
        super().__init__(members)
        self._modes: list[tuple[nn.Module, bool]] = []

    def on_validation_model_eval(self) -> None:
        """Begin a validation."""
        self._begin("on_validation_model_eval")

    def on_test_model_eval(self) -> None:
        """Begin a test."""
        self._begin("on_test_model_eval")

    def on_predict_model_eval(self) -> None:
        """Begin predictions."""
        self._begin("on_predict_model_eval")

    def on_validation_model_train(self) -> None:
        """End a validation."""
        self._end("on_validation_model_train")

    def on_test_model_train(self) -> None:
        """End a test."""
        self._end("on_test_model_train")

    def _begin(self, hook: str) -> None:
        own = {module for member in self.members.modules for module in member.modules()}
        self._modes = [(module, module.training) for module in self.members.ensemble.modules() if module not in own]
        for module, _ in self._modes:
            module.training = False
        self._call(hook)

    def _end(self, hook: str) -> None:
        for module, mode in self._modes:
            module.training = mode
        self._call(hook)

    def _call(self, hook: str) -> None:
        # Members without an override need Lightning's own hook: it sets their mode.
        for i in range(len(self.members.modules)):
            with self.members.using_stream(i) as member:
                getattr(member, hook)()
