"""A project that nobody here wrote, and what this package has to be told of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

TOOLS = {
    "EnsembleModule": "EnsembleModule(build, num_members=2, seed=1)",
    "FitGMM": "FitGMM()",
    "FitKNN": "FitKNN(k=3)",
    "TemperatureScaling": "TemperatureScaling()",
    "OODAlarm": "OODAlarm()",
    "OODDetection": 'OODDetection({"far": loader("far")})',
    "EpinetModule": "EpinetModule(build(), num_eval_samples=5)",
    "PredictionWriter": "PredictionWriter(folder)",
    "load_fitted": "load_fitted(path)",
}
"""What is tried with each client, and how it is called. A client's own arguments are appended."""

READS_AS = {"OODAlarm": "TemperatureScaling"}
"""By tool: another one that reads the same data, whose arguments it takes where a client names none of its own."""

REFUSALS: dict[tuple[str, str], str] = {}
"""What the error said, by client and tool that cannot work."""


@dataclass(frozen=True)
class Client:
    """A LightningModule of somebody else, and its data.

    Attributes:
        name: The package's class, its row in the table.
        predicts: What it predicts, in a few words.
        packages: The distributions that it comes from; their versions are printed.
        build: Makes the module as its documentation does.
        loader: ``loader(split)`` gives the batches of "train", "val", "test" and "far", in order.
        lines: By tool: the arguments that it needs, as they are written, where ``names`` are known.
        names: The functions that ``lines`` mention.
        refused: By tool that cannot work: what the error says; a training is refused before its first step.
        target_of: ``target_of(batch)`` has one row per prediction.
        input_of: What the module's ``forward`` is called with.
        trainer: "lightning", or "pytorch_lightning" for classes of that tree.
    """

    name: str
    predicts: str
    packages: Sequence[str]
    build: Callable[[], Any]
    loader: Callable[[str], Any]
    lines: Mapping[str, str] = field(default_factory=dict)
    names: Sequence[Callable[..., Any]] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    target_of: Callable[[Any], Any] = lambda batch: batch[1]
    input_of: Callable[[Any], Any] = lambda batch: batch[0]
    trainer: str = "lightning"

    def line(self, tool: str) -> str | None:
        """The client's own arguments of a tool, if it needs any."""
        return self.lines.get(tool, self.lines.get(READS_AS.get(tool, "")))

    def call(self, tool: str, **names: Any) -> Any:
        """What a tool makes of this client: the expression of :data:`TOOLS` with the client's own arguments."""
        import lightning_uq
        from lightning_uq import tasks

        own = {one.__name__: one for one in self.names}
        known = {**vars(lightning_uq), **vars(tasks), **own, "build": self.build, "loader": self.loader, **names}
        return eval(self.expression(tool), known)

    def expression(self, tool: str) -> str:
        """The line of Python that is run."""
        usual, own = TOOLS[tool], self.line(tool)
        return usual if own is None else usual.removesuffix(")") + ("" if usual.endswith("()") else ", ") + own + ")"

    @property
    def versions(self) -> str:
        """The packages with their versions."""
        return ", ".join(f"{name} {version(name)}" for name in self.packages)
