"""Files that released versions wrote are read for good: those in ``files/`` load, and give the outputs that lie beside them.

A change that breaks one of them fails here. To write a file for a new kind of state, or for a new format, add an entry to ``KINDS`` and
call ``python -c "from tests.callbacks.test_uq_files import write; write()"``. It never writes a file that is there: what is committed
stands for the files of users.

``unversioned.ckpt`` was written before states named the release that wrote them.
"""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_uq import (
    ConformalIntervals,
    ConformalSets,
    DeterministicModule,
    Factory,
    FitGMM,
    FitLaplace,
    Multilabel,
    Regression,
    TemperatureScaling,
    __version__,
    load_fitted,
    save_fitted,
)
from lightning_uq.callbacks.sibling import fitted_states
from lightning_uq.checkpoint_files import read_checkpoint
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.running.fitted_state import FORMAT

FILES = Path(__file__).parent / "files"
INPUTS = torch.tensor([[0.5, -1.0], [-2.0, 0.25], [0.0, 0.0]])


class Linear(nn.Module):
    """A plain module."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, x):
        return self.net(x)


class Lit(LightningModule):
    """A user's module."""

    def __init__(self, outputs=2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, outputs)

    def forward(self, x):
        return self.net(x)


def ours():
    return DeterministicModule(Factory("torch.nn.Linear", {"in_features": 2, "out_features": 2}))


KINDS = {
    "density": (Linear, lambda: [FitGMM()], "class"),
    "temperature": (lambda: Lit(outputs=3), lambda: [TemperatureScaling(task=Multilabel(num_labels=3))], "labels"),
    "sets": (ours, lambda: [TemperatureScaling(), ConformalSets(alpha=0.2)], "class"),
    "laplace": (Lit, lambda: [FitLaplace(task=Regression(head="mean"))], "numbers"),
    "intervals": (Linear, lambda: [ConformalIntervals(task=Regression(head="mean"))], "numbers"),
}
"""What makes the model and the callbacks of each file, and the kind of their targets."""


def write():
    """Write the files of ``KINDS`` that are missing, and the outputs that they have to give."""
    for kind, (make, callbacks, targets) in KINDS.items():
        path = FILES / f"{kind}.ckpt"
        if path.exists():
            continue
        torch.manual_seed(0)
        x = torch.randn(40, 2)
        noisy = x + torch.randn(40, 2)
        y = {"class": (noisy[:, 0] > 0).long(), "labels": (noisy[:, [0, 1, 0]] > 0).float(), "numbers": noisy}[targets]
        model = make()
        (linear,) = (part for part in model.modules() if isinstance(part, nn.Linear))
        goal = 4 * nn.functional.one_hot(y) - 2.0 if targets == "class" else y
        with torch.no_grad():
            linear.weight.copy_(torch.linalg.lstsq(x, goal).solution.T)
        save_fitted(path, model, [one.fit(model, [(x, y)]) for one in callbacks()])
        outputs = {name: value.tolist() for name, value in load_fitted(path)(INPUTS).items()}
        path.with_suffix(".json").write_text(json.dumps({"inputs": INPUTS.tolist(), "outputs": outputs}))


def test_every_kind_has_its_file():
    assert {path.stem for path in FILES.glob("*.ckpt")} == {*KINDS, "unversioned"}
    assert all(path.stat().st_size < 10_000 for path in FILES.iterdir())


@pytest.mark.parametrize("path", sorted(FILES.glob("*.ckpt")), ids=lambda path: path.stem)
def test_a_file_of_an_earlier_release_gives_the_same_outputs(path):
    expected = json.loads(path.with_suffix(".json").read_text())
    found = load_fitted(path)(torch.tensor(expected["inputs"]))
    assert found.keys() == expected["outputs"].keys()
    for name, values in expected["outputs"].items():
        torch.testing.assert_close(found[name], torch.tensor(values, dtype=found[name].dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_take_the_states_of_an_earlier_release(kind):
    make, callbacks, _ = KINDS[kind]
    model = make()
    model.load_state_dict(read_checkpoint(FILES / f"{kind}.ckpt")["state_dict"])
    states = fitted_states(FILES / f"{kind}.ckpt")
    for one in callbacks():
        one.load_state_dict(states[one.state_key])
        one.check_fitted(model)
    assert len(states) == len(callbacks())


def test_a_file_names_its_format_and_the_release_that_wrote_it(tmp_path):
    model = Linear()
    save_fitted(tmp_path / "a.ckpt", model, [FitGMM().fit(model, [(INPUTS.repeat(9, 1), torch.arange(27) % 2)])])
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["FitGMM"]
    assert (state["version"], state["lightning_uq"]) == (FORMAT, __version__)
    old = torch.load(FILES / "unversioned.ckpt", weights_only=True)["callbacks"]["TemperatureScaling"]
    assert old["version"] == 1
    assert "lightning_uq" not in old


# ---------------------------------------------------------------------- a newer format

NEWER = r"The state of TemperatureScaling.* has format 7, which lightning_uq 9.1.0 wrote, but lightning_uq .* Install lightning_uq 9.1.0"


@pytest.fixture
def newer(tmp_path):
    """A file as a later release might write it, and a checkpoint with the same weights beside it."""
    content = torch.load(FILES / "sets.ckpt", weights_only=True)
    state = {"version": 7, "lightning_uq": "9.1.0", "what": "else"}
    content["callbacks"]["TemperatureScaling"] = state
    torch.save(content, tmp_path / "a-uq.ckpt")
    torch.save({**content, "callbacks": {}}, tmp_path / "a.ckpt")
    return tmp_path / "a-uq.ckpt"


def test_load_fitted_tells_who_wrote_a_newer_format(newer):
    with pytest.raises(InputError, match=NEWER):
        load_fitted(newer)


@pytest.mark.filterwarnings("ignore:The checkpoint holds what", "ignore:Be aware that when using")
def test_a_trainer_tells_who_wrote_a_newer_format(newer, make_trainer):
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(INPUTS, torch.tensor([0, 1, 0])), batch_size=3)
    trainer = make_trainer(callbacks=[TemperatureScaling()])
    with pytest.raises(InputError, match=NEWER):
        trainer.test(ours(), rows, ckpt_path=newer, weights_only=True, verbose=False)
    with pytest.raises(NotFittedError, match=NEWER):  # it lies beside the file that is tested
        trainer.test(ours(), rows, ckpt_path=newer.with_name("a.ckpt"), weights_only=True, verbose=False)


def test_weights_of_a_newer_file_load_with_the_usual_warning(newer):
    with pytest.warns(UserWarning, match="holds what ConformalSets and TemperatureScaling fitted"):
        DeterministicModule.load_from_checkpoint(newer)
