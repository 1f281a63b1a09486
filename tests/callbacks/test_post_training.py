"""The contract of a post-training callback, point by point, held by FitGMM on a module that knows nothing of this package."""

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from lightning_uq.callbacks.fitting import FittingCallback
from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.sibling import fitted_states
from lightning_uq.callbacks.vector_scaling import VectorScaling
from lightning_uq.callbacks.vim import FitViM
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.mlp import MLP
from lightning_uq.predictions import CategoricalPrediction

# Fits of batches and of the whole data set are compared, so everything is in float64: see tests/tolerance.py.
X = torch.randn(45, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = (X[:, 0] > 0).long()
DATA = TensorDataset(X, Y)


def loader(shuffle: bool = False, **kwargs) -> DataLoader:
    return DataLoader(DATA, batch_size=8, shuffle=shuffle, **kwargs)


FLOAT32 = DataLoader(TensorDataset(X.float(), Y), batch_size=8)


@pytest.fixture
def make_trainer(make_trainer):
    """A Trainer of the precision of this file's modules and data."""
    return lambda **kwargs: make_trainer(**{"precision": "64-true", **kwargs})


class UsersModule(LightningModule):
    """As somebody writes it who has never heard of uncertainty."""

    def __init__(self, batchnorm: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(6) if batchnorm else nn.Identity()
        self.body = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 2)
        self.augment = False
        self.modes: list[bool] = []
        self.double()

    def forward(self, x):
        self.modes.append(self.training)
        return self.head(self.body(x))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x + 100 if self.augment and self.trainer.training else x), y

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def checkpoint(tmp_path, **kwargs) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=tmp_path / "ckpt", monitor="val_loss", **kwargs)


def reference(state: dict, gmm: FitGMM, x: torch.Tensor = X, y: torch.Tensor = Y, **kwargs) -> FitGMM:
    """A fit without a Trainer, on the weights of ``state``."""
    module = UsersModule(**kwargs)
    module.load_state_dict(state)
    return FitGMM(
        covariance=gmm.covariance, regularization=gmm.regularization, feature_transform=gmm.coordinates.transform
    ).fit(module, [(x, y)])


def assert_same_fit(one: FittingCallback, other: FittingCallback) -> None:
    assert one.fitted
    assert other.fitted
    theirs = other.state_dict()["tensors"]
    for name, value in one.state_dict()["tensors"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-9)
        else:
            assert theirs[name] == value


@pytest.mark.parametrize(
    "rows",
    [
        (X[1:], Y[1:]),
        (torch.cat([X, X[:1]]), torch.cat([Y, Y[:1]])),
        (X.clone().index_add_(0, torch.tensor([7]), torch.full((1, 4), 0.01).double()), Y),
        (X.float().double(), Y),
    ],
    ids=["a row is missing", "a row counts twice", "a row is augmented", "inputs are rounded to float32"],
)
def test_the_comparison_of_two_fits_finds_a_fault(rows):
    module = UsersModule()
    with pytest.raises(AssertionError, match="not close"):
        assert_same_fit(FitGMM().fit(module, [rows]), FitGMM().fit(module, loader()))


# ---------------------------------------------------------------------- 1, 2: when, and in what mode


def test_it_fits_in_evaluation_mode_and_puts_everything_back(make_trainer):
    module, gmm = UsersModule(), FitGMM(weights="last")
    trainer = make_trainer(callbacks=[gmm], num_sanity_val_steps=0)
    trainer.fit(module, loader())
    assert_same_fit(gmm, reference(module.state_dict(), gmm))
    first = module.modes.index(True)  # before it, one batch is looked at
    assert module.modes[first : first + 6] == [True] * 6  # batches of the epoch
    assert not any(module.modes[:first] + module.modes[first + 6 :])
    assert all(m.training for m in module.modules())


def test_the_random_state_is_as_it_would_be_without(make_trainer):
    after = []
    for callbacks in ([], [FitGMM()]):
        torch.manual_seed(3)
        make_trainer(callbacks=callbacks).fit(UsersModule(), loader(shuffle=True))
        after.append(torch.rand(1))
    assert torch.equal(*after)


def test_augmentation_in_a_transfer_hook_is_not_fitted(make_trainer):
    module, gmm = UsersModule(), FitGMM(weights="last")
    module.augment = True
    make_trainer(callbacks=[gmm]).fit(module, loader())
    assert_same_fit(gmm, reference(module.state_dict(), gmm))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_sums_are_float64_in_every_precision(make_trainer, precision):
    module, gmm = UsersModule(), FitGMM(feature_transform="raw", weights="last")
    make_trainer(callbacks=[gmm], precision=precision).fit(module.float(), FLOAT32)
    tensors = gmm.state_dict()["tensors"]
    assert all(t.dtype == torch.float64 for t in tensors.values() if isinstance(t, torch.Tensor))
    same = reference({k: v.float() for k, v in module.state_dict().items()}, gmm)
    torch.testing.assert_close(tensors["raw.0.mean"], same.state_dict()["tensors"]["raw.0.mean"], rtol=3e-2, atol=3e-2)


# ---------------------------------------------------------------------- 3: which weights


def test_best_weights_are_fitted_and_the_last_put_back(make_trainer, tmp_path):
    module, gmm = UsersModule(), FitGMM(feature_transform="raw")
    best = checkpoint(tmp_path)
    trainer = make_trainer(callbacks=[gmm, best], max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert_same_fit(gmm, reference(state, gmm))
    alone = UsersModule()
    torch.manual_seed(0)
    assert set(alone.state_dict()) == set(module.state_dict())
    last = trainer.callback_metrics["val_loss"]
    (again,) = trainer.validate(module, loader(), verbose=False)
    assert again["val_loss"] == pytest.approx(last.item(), rel=1e-6)  # the weights in memory are the last ones


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)])
def test_standing_before_an_averaging_callback_is_an_error(make_trainer, averaging):
    with pytest.raises(InputError, match="FitGMM stands before .*Averaging.*Swap them"):
        make_trainer(callbacks=[FitGMM(), averaging], max_epochs=2).fit(UsersModule(), loader())


def test_after_an_ema_the_average_is_fitted(make_trainer):
    module, gmm = UsersModule(), FitGMM(weights="last")
    ema = EMAWeightAveraging(decay=0.5)
    make_trainer(callbacks=[ema, gmm], max_epochs=3).fit(module, loader())
    assert_same_fit(gmm, reference(module.state_dict(), gmm))


def test_the_raw_weights_of_an_ema_checkpoint_are_noticed(make_trainer, tmp_path):
    gmm = FitGMM()
    callbacks = [EMAWeightAveraging(decay=0.9), gmm, checkpoint(tmp_path)]
    trainer = make_trainer(callbacks=callbacks, max_epochs=3, enable_checkpointing=True)
    trainer.fit(UsersModule(), loader(), loader())
    with pytest.raises(NotFittedError, match="Use a Trainer without the averaging callback"):
        trainer.test(UsersModule(), loader(), ckpt_path="best", verbose=False, weights_only=True)
    fresh = FitGMM()
    make_trainer(callbacks=[fresh]).test(
        UsersModule(), loader(), ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False, weights_only=True
    )
    assert_same_fit(gmm, fresh)


# ---------------------------------------------------------------------- 4: it persists


def test_the_uq_file_is_the_best_one_with_the_states_of_all(make_trainer, tmp_path):
    first, second = FitGMM(feature_transform="raw"), FitGMM(feature_transform="raw", name="tied", covariance="tied")
    best = checkpoint(tmp_path, save_last=True)
    trainer = make_trainer(callbacks=[first, second, best], max_epochs=3, enable_checkpointing=True)
    trainer.fit(UsersModule(), loader(), loader())
    path = Path(best.best_model_path)
    assert first.uq_ckpt_path == second.uq_ckpt_path == str(path.with_name(path.stem + "-uq.ckpt"))
    original, written = (torch.load(p, weights_only=True) for p in (path, first.uq_ckpt_path))
    assert set(fitted_states(first.uq_ckpt_path)) == {"FitGMM", "FitGMM{'name': 'tied'}"}
    for name, value in original["state_dict"].items():
        assert torch.equal(written["state_dict"][name], value)
    assert written["epoch"] == original["epoch"]
    assert written["global_step"] == original["global_step"]
    assert "FitGMM" not in original["callbacks"]  # the best file itself is left alone
    loaded = UsersModule.load_from_checkpoint(first.uq_ckpt_path, weights_only=True)
    assert_same_fit(first, FitGMM(feature_transform="raw").fit(loaded, [(X, Y)]))


def test_a_fresh_trainer_finds_the_sibling_of_the_plain_file(make_trainer, tmp_path):
    gmm, best = FitGMM(), checkpoint(tmp_path)
    trainer = make_trainer(callbacks=[gmm, best], max_epochs=3, enable_checkpointing=True)
    trainer.fit(UsersModule(), loader(), loader())
    for path in (best.best_model_path, gmm.uq_ckpt_path):
        for run in ("validate", "test", "predict"):
            fresh = FitGMM()
            options = {} if run == "predict" else {"verbose": False}
            getattr(make_trainer(callbacks=[fresh]), run)(
                UsersModule(), loader(), ckpt_path=path, weights_only=True, **options
            )
            assert_same_fit(gmm, fresh)


def test_last_weights_go_to_a_name_that_lightning_does_not_resume_from(make_trainer, tmp_path):
    paths = []
    for _ in range(2):
        gmm = FitGMM(weights="last")
        other = FitGMM(weights="last", name="b")
        trainer = make_trainer(callbacks=[gmm, other, checkpoint(tmp_path)], enable_checkpointing=True)
        trainer.fit(module := UsersModule(), loader(), loader())
        assert gmm.uq_ckpt_path == other.uq_ckpt_path
        paths.append(Path(gmm.uq_ckpt_path).name)
        written = torch.load(gmm.uq_ckpt_path, weights_only=True)
        for name, value in module.state_dict().items():
            assert torch.equal(written["state_dict"][name], value)
    assert paths == ["uq-last.ckpt", "uq-last-v1.ckpt"]  # none is overwritten


def test_resuming_from_the_uq_file_works_and_clears_the_state(make_trainer, tmp_path):
    gmm = FitGMM()
    trainer = make_trainer(callbacks=[gmm, checkpoint(tmp_path)], max_epochs=2, enable_checkpointing=True)
    trainer.fit(UsersModule(), loader(), loader())
    seen = []

    class Spy(FitGMM):
        def on_train_start(self, trainer, pl_module):
            seen.append(self.fitted)

    again = Spy(weights="last")
    trainer = make_trainer(callbacks=[again], max_epochs=4)
    trainer.fit(UsersModule(), loader(), loader(), ckpt_path=gmm.uq_ckpt_path, weights_only=True)
    assert seen == [False]
    assert again.fitted
    assert trainer.current_epoch == 4


# ---------------------------------------------------------------------- 5: never stale


def test_other_weights_in_memory_are_refitted_on(make_trainer, tmp_path):
    gmm = FitGMM(feature_transform="raw")
    trainer = make_trainer(callbacks=[gmm, checkpoint(tmp_path)], max_epochs=4, enable_checkpointing=True)
    trainer.fit(UsersModule(), loader(), loader())
    other = UsersModule()
    with pytest.warns(UserWarning, match="fitted on other weights.*fitted again"):
        trainer.test(other, loader(), verbose=False)
    assert_same_fit(gmm, reference(other.state_dict(), gmm))


def test_without_a_loader_stale_state_is_an_error_that_says_what_to_do(make_trainer):
    with pytest.raises(NotFittedError, match="no state that was fitted on the weights in memory.*`dataloader=`"):
        make_trainer(callbacks=[FitGMM()]).test(UsersModule(), loader(), verbose=False)


def test_one_optimizer_step_makes_it_stale_without_a_trainer():
    module = UsersModule()
    gmm = FitGMM().fit(module, loader())
    assert gmm.score(module, loader()).shape == (45,)
    with torch.no_grad():
        module.body[0].weight += 1e-3
    with pytest.raises(NotFittedError, match="fitted on other weights"):
        gmm.score(module, loader())
    with pytest.raises(NotFittedError, match="FitGMM is not fitted"):
        FitGMM().score(module, loader())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_another_precision_is_not_taken_for_other_weights(make_trainer, tmp_path, precision):
    gmm = FitGMM()
    trainer = make_trainer(callbacks=[gmm, checkpoint(tmp_path)], enable_checkpointing=True, precision="32-true")
    trainer.fit(UsersModule().float(), FLOAT32, FLOAT32)
    fresh = FitGMM()
    make_trainer(callbacks=[fresh], precision=precision).test(
        UsersModule().float(), FLOAT32, ckpt_path=gmm.uq_ckpt_path, verbose=False, weights_only=True
    )
    assert_same_fit(gmm, fresh)


def test_float64_weights_that_were_loaded_into_float32_ones_are_recognised(make_trainer, tmp_path):
    gmm, fresh = FitGMM(), FitGMM()
    fitting = make_trainer(callbacks=[gmm, checkpoint(tmp_path)], enable_checkpointing=True)
    fitting.fit(UsersModule(), loader(), loader())
    # Lightning restores before it makes the module float64: the weights are rounded on their way.
    make_trainer(callbacks=[fresh]).test(
        UsersModule().float(), loader(), ckpt_path=gmm.uq_ckpt_path, verbose=False, weights_only=True
    )
    assert_same_fit(gmm, fresh)


# ---------------------------------------------------------------------- 6: the fitting data


def test_a_shuffled_loader_that_drops_rows_is_read_whole(make_trainer):
    module, gmm = UsersModule(), FitGMM(weights="last")
    make_trainer(callbacks=[gmm]).fit(module, loader(shuffle=True, drop_last=True))
    assert_same_fit(gmm, reference(module.state_dict(), gmm))


def test_rows_outside_a_subset_sampler_are_not_read(make_trainer):
    rows = list(range(30))
    module, gmm = UsersModule(), FitGMM(weights="last")
    make_trainer(callbacks=[gmm]).fit(module, DataLoader(DATA, batch_size=8, sampler=SubsetRandomSampler(rows)))
    assert_same_fit(gmm, reference(module.state_dict(), gmm, X[rows], Y[rows]))


def test_limit_train_batches_holds(make_trainer):
    module, gmm = UsersModule(), FitGMM(weights="last")
    make_trainer(callbacks=[gmm], limit_train_batches=3).fit(module, loader())
    assert_same_fit(gmm, reference(module.state_dict(), gmm, X[:24], Y[:24]))


def test_a_dataloader_of_ones_own_and_the_data_modules_come_first(make_trainer):
    half = DataLoader(TensorDataset(X[:20], Y[:20]), batch_size=7)

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(shuffle=True)

        def uq_fit_dataloader(self):
            return half

    for gmm, kwargs in (
        (FitGMM(weights="last"), {"datamodule": Data()}),
        (FitGMM(weights="last", dataloader=half), {"train_dataloaders": loader()}),
    ):
        module = UsersModule()
        make_trainer(callbacks=[gmm]).fit(module, **kwargs)
        assert_same_fit(gmm, reference(module.state_dict(), gmm, X[:20], Y[:20]))


def test_several_training_loaders_ask_for_one_before_training(make_trainer):
    module = UsersModule()
    with pytest.raises(
        InputError, match="needs exactly one training loader, .* has 2. Pass the fitting data as `dataloader`"
    ):
        make_trainer(callbacks=[FitGMM()]).fit(module, {"a": loader(), "b": loader()})
    assert module.modes == []


# ---------------------------------------------------------------------- 7: ranks

TWO_RANKS = """
import json, pathlib, torch, warnings
from torch import nn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.sibling import fitted_states
from tests.leaving import LeaveAtOnce
warned = pathlib.Path("warned")
def note(message, *_):
    if "trains in separate processes" in str(message):
        with warned.open("a") as file:
            print(message, file=file)
warnings.showwarning = note
torch.manual_seed(0)
x = torch.randn(21, 4).double()  # two ranks have other batches than one, so everything is in float64
y = (x[:, 0] > 0).long()
class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)
    def test_step(self, batch, batch_idx):
        pass
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(x, y), batch_size=4)
def main():
    gmm, second = FitGMM(weights=WEIGHTS), FitGMM(name="second", weights=WEIGHTS)
    module = Module()
    trainer = Trainer(accelerator="cpu", devices=2, strategy=STRATEGY, logger=False, max_epochs=2, precision="64-true",
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=".",
                      callbacks=[gmm, second, ModelCheckpoint(dirpath="ckpt", monitor="val_loss"), LeaveAtOnce()])
    trainer.fit(module, loader, loader)
    import glob
    (path,) = glob.glob("ckpt/*uq*.ckpt")
    state = torch.load(path, weights_only=True)
    alone = Module()
    alone.load_state_dict(state["state_dict"])
    one = FitGMM().fit(alone, [(x, y)]).state_dict()["tensors"]
    two = fitted_states(path)["FitGMM"]["tensors"]
    gap = max(float((one[k] - two[k]).abs().max()) for k in one if isinstance(one[k], torch.Tensor))
    tested = "best" if WEIGHTS == "best" else path
    trainer.test(module, loader, ckpt_path=tested, verbose=False, weights_only=True)  # the main process of a spawn has no state
    if trainer.is_global_zero:
        json.dump({"gap": gap, "path": path, "warned": warned.read_text().splitlines() if warned.exists() else []}, open(out, "w"))
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(("strategy", "weights"), [("ddp", "best"), ("ddp", "last"), ("ddp_spawn", "best")])
def test_two_ranks_give_what_one_gives(run_script, strategy, weights):
    result = run_script(TWO_RANKS.replace("STRATEGY", repr(strategy)).replace("WEIGHTS", repr(weights)))
    assert result["gap"] < 1e-9
    assert len(result["warned"]) == (strategy == "ddp_spawn")  # once, and not for each callback and rank
    for warning in result["warned"]:
        assert warning.startswith("DDPStrategy trains in separate processes, so the callbacks of the main")
        assert f"/{result['path']}'`, and `load_fitted('" in warning


def test_a_spawned_fit_that_writes_no_file_says_so(make_trainer):
    gmm = FitGMM()
    with pytest.warns(UserWarning, match="not fitted after `trainer.fit`.* No file holds the fitted states"):
        gmm._warn_of_ending_processes(make_trainer(devices=2, strategy="ddp_spawn", callbacks=[gmm]))


def test_an_error_on_one_rank_is_raised_on_both_with_one_text(run_script):
    code = TWO_RANKS.replace("STRATEGY", "'ddp'").replace("WEIGHTS", "'last'")
    code = code.replace("y = (x[:, 0] > 0).long()", "y = (x[:, 0] > 0).long(); y_fit = y.clone(); y_fit[1] = 7")
    code = code.replace(
        "FitGMM(weights='last')", "FitGMM(dataloader=DataLoader(TensorDataset(x, y_fit), batch_size=4))"
    )
    head, tail = code.split("    trainer.fit(module, loader, loader)\n")
    code = (
        head
        + """
    from lightning_uq.errors import InputError
    try:
        trainer.fit(module, loader, loader)
    except InputError as error:
        import os
        open(f"{out}.{trainer.global_rank}.part", "w").write(str(error))
        os.replace(f"{out}.{trainer.global_rank}.part", f"{out}.{trainer.global_rank}")
        if trainer.is_global_zero:
            import time
            while not os.path.exists(f"{out}.1"):
                time.sleep(0.1)
            texts = [open(f"{out}.{r}").read() for r in range(2)]
            json.dump(texts, open(out, "w"))
            assert not gmm.fitted
if __name__ == "__main__":
    main()
"""
    )
    first, second = run_script(code)
    assert first == second
    assert "class labels in [0, 2), but their values go from 0 to 7" in first


# ---------------------------------------------------------------------- 8: features


def test_the_feature_layer_is_found_named_and_refused(make_trainer):
    module = UsersModule()
    gmm = FitGMM().fit(module, loader())
    assert gmm.features.resolved == "head"
    named = FitGMM(feature_layer="head").fit(module, loader())
    assert_same_fit(gmm, named)
    with pytest.raises(InputError, match="name of a submodule of UsersModule, but it is 'fc'. .*: body.0, head"):
        FitGMM(feature_layer="fc").fit(module, loader())


def test_two_heads_are_ambiguous_and_an_auxiliary_one_is_not():
    class TwoHeads(nn.Module):
        def __init__(self, both: bool) -> None:
            super().__init__()
            self.both, self.a, self.b, self.aux = both, nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            out = self.a(x) + (self.b(2 * x) if self.both else 0)
            self.unused = self.aux(x)
            return out

    assert FitGMM().fit(TwoHeads(False).double(), loader()).features.resolved == "a"
    with pytest.raises(InputError, match="Several layers with different inputs.*'a', 'b'"):
        FitGMM().fit(TwoHeads(True).double(), loader())
    with pytest.raises(InputError, match="feeds the output of Identity"):
        FitGMM().fit(nn.Identity(), loader())


def test_a_frozen_network_has_features_too():
    module = UsersModule().requires_grad_(False)
    assert FitGMM().fit(module, loader()).features.resolved == "head"


def test_a_network_that_was_compiled_and_called_before_is_hooked():
    module = UsersModule()
    gmm = FitGMM().fit(module, loader())
    compiled = copy.deepcopy(module)
    compiled.body = torch.compile(compiled.body, backend="eager")
    compiled.head = torch.compile(compiled.head, backend="eager")
    with torch.no_grad():
        compiled(X)
    assert_same_fit(gmm, FitGMM().fit(compiled, loader()))
    whole = torch.compile(copy.deepcopy(module), backend="eager")
    with torch.no_grad():
        whole(X)
    assert_same_fit(gmm, FitGMM().fit(whole, loader()))


def test_a_convolutions_input_is_averaged_over_space():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AvgPool2d(1), nn.Flatten(), nn.Linear(12, 2))
    images = torch.randn(30, 1, 4, 4)
    y = torch.arange(30) % 2
    gmm = FitGMM(feature_transform="raw", feature_layer="1").fit(network, [(images, y)])
    expected = network[0](images).detach().mean((2, 3)).double()
    mean = gmm.state_dict()["tensors"]["raw.0.mean"]
    torch.testing.assert_close(mean[1], expected[y == 1].mean(0), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- 9, 10, 11: what is touched, and what is not


def test_nothing_is_added_to_the_module(make_trainer):
    module = UsersModule()
    before = set(module.state_dict()), len(list(module.parameters())), set(vars(module))
    trainer = make_trainer(callbacks=[FitGMM(weights="last")])
    trainer.fit(module, loader())
    outputs = trainer.predict(module, loader())
    after = set(module.state_dict()), len(list(module.parameters())), set(vars(module))
    assert before[:2] == after[:2]
    assert after[2] - before[2] <= {"_trainer", "_hparams"}  # Lightning's own
    assert isinstance(outputs[0], torch.Tensor)  # a user's outputs are left alone
    torch.testing.assert_close(torch.cat(outputs), module.eval()(X).detach())


def test_attach_replaces_a_users_prediction_by_ours_and_gives_it_back(make_trainer):
    module = UsersModule()
    gmm = FitGMM(weights="last", attach=True)
    trainer = make_trainer(callbacks=[gmm, FitGMM(weights="last", name="b", covariance="tied", attach=True)])
    trainer.fit(module, loader())
    whole = CategoricalPrediction.cat(trainer.predict(module, loader()))
    torch.testing.assert_close(whole.probs, module.eval()(X).softmax(1).detach())
    assert whole.log_density.shape == (45,)
    assert "predict_step" not in vars(module)
    assert isinstance(module.predict_step((X, Y), 0), torch.Tensor)


def test_a_predict_fn_may_call_the_step_that_attach_replaces(make_trainer):
    module = UsersModule()
    predict_fn = lambda model, x: model.predict_step((x, None), 0)  # noqa: E731
    trainer = make_trainer(callbacks=[FitGMM(weights="last", predict_fn=predict_fn, attach=True)])
    trainer.fit(module, loader())
    whole = CategoricalPrediction.cat(trainer.predict(module, loader()))
    torch.testing.assert_close(whole.probs, module.eval()(X).softmax(1).detach())


def test_our_modules_predictions_carry_the_density(make_trainer):
    module = DeterministicModule(Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": 2}))
    gmm = FitGMM(feature_transform="raw", weights="last")
    trainer = make_trainer(callbacks=[gmm])
    trainer.fit(module, loader())
    whole = CategoricalPrediction.cat(trainer.predict(module, loader()))
    torch.testing.assert_close(-whole.log_density, gmm.score(module, loader()))
    assert "log_density" in whole.to_dict()


def test_it_survives_pickling_with_its_state():
    module = UsersModule()
    gmm = FitGMM().fit(module, loader())
    twin = pickle.loads(pickle.dumps(gmm))
    torch.testing.assert_close(twin.score(module, loader()), gmm.score(module, loader()))


# ---------------------------------------------------------------------- 12: what ends badly


def test_an_exception_leaves_nothing_fitted(make_trainer):
    gmm = FitGMM(weights="last")

    class Broken(UsersModule):
        def on_train_end(self):
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        make_trainer(callbacks=[gmm]).fit(Broken(), loader())
    assert not gmm.fitted


def test_labels_are_asked_for(make_trainer):
    class Bare(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return X[i]

    with pytest.raises(InputError, match="must have targets, but a batch has none"):
        FitGMM().fit(nn.Linear(4, 2), DataLoader(Bare(), batch_size=5))


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (X, torch.zeros_like(Y), "Every class needs at least 2 rows, but class 1 has 0"),
        (
            X.clone().index_fill_(0, torch.tensor([4]), float("nan")),
            Y,
            "must be finite, but it holds nan in a row of class",
        ),
        (X, Y + 5, r"class labels in \[0, 2\), but their values go from 5 to 6"),
        (X[:0], Y[:0], "class"),
    ],
)
def test_bad_fitting_data_is_named_and_nothing_is_half_fitted(x, y, match):
    gmm = FitGMM()
    with pytest.raises(InputError, match=match):
        gmm.fit(nn.Linear(4, 2).double(), [(x, y)])
    assert not gmm.fitted


def test_an_empty_loader_is_named():
    with pytest.raises(InputError, match="fitting data are empty"):
        FitGMM().fit(nn.Linear(4, 2), [])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"weights": "newest"}, "`weights`"), ({"score": "density"}, "`score`"), ({"predict_fn": 3}, "`predict_fn`")],
)
def test_wrong_arguments_are_named(kwargs, match):
    with pytest.raises(InputError, match=match):
        FitGMM(**kwargs)


def test_fast_dev_run_and_barebones(make_trainer):
    for options in ({"fast_dev_run": True}, {}):
        gmm = FitGMM(regularization=1.0)
        make_trainer(callbacks=[gmm], limit_train_batches=4, **options).fit(
            UsersModule(), DataLoader(DATA, batch_size=40)
        )
        assert gmm.fitted
        assert gmm.uq_ckpt_path is None


@pytest.mark.parametrize("make", [partial(FitGMM, feature_transform="raw"), FitViM, VectorScaling])
def test_fast_dev_run_fits_where_its_batches_hold_too_few_rows(make_trainer, make):
    """Two rows are neither two of each class, nor one per fold."""
    callback = make()
    few = DataLoader(DATA, batch_size=2)
    trainer = make_trainer(callbacks=[callback], fast_dev_run=True)
    trainer.fit(module := UsersModule(), few, few)
    trainer.test(module, few, verbose=False)
    expected = make().fit(module, few)
    assert_same_fit(callback, expected)


def test_fast_dev_run_and_other_limits_keep_a_real_error(make_trainer):
    few, one_class = DataLoader(DATA, batch_size=2), DataLoader(TensorDataset(X, torch.zeros_like(Y)), batch_size=2)
    for options, data in (({"limit_train_batches": 1}, few), ({"fast_dev_run": True}, one_class)):
        with pytest.raises(InputError, match="Every class needs at least 2 rows"):
            make_trainer(callbacks=[FitGMM()], **options).fit(UsersModule(), data)


def test_a_file_that_holds_nothing_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="holds no state"):
        fitted_states(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="cannot be read"):
        fitted_states(tmp_path / "b.ckpt")


def test_an_mlp_of_ours_is_hooked_at_its_last_layer():
    network = MLP(4, 2, hidden_sizes=(5,)).double()
    tensors = FitGMM(feature_transform="raw").fit(network, loader()).state_dict()["tensors"]
    assert tensors["raw.0.mean"].shape == (2, 5)


# ---------------------------------------------------------------------- what would fail after the training fails before it


class Untouched(UsersModule):
    on_after_batch_transfer = LightningModule.on_after_batch_transfer


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        ([(X, "ab")], {}, "FitGMM's fitting data must have targets, but a batch has targets of str"),
        ([{"image": X, "depth": X, "label": Y}], {}, r"its keys are \['depth', 'image', 'label'\].*`unpack_batch`"),
        ([(X, X[:, 0])], {}, r"FitGMM's fitting data must hold class labels, but a batch has targets of torch.float64"),
        (
            [(X, Y - 1)],
            {},
            "must hold class labels, but a batch has targets of torch.int64 from -1 to 0. Remove rows without a label",
        ),
        ([(X, Y)], {"feature_layer": "nose"}, r"`feature_layer`.*it is 'nose'"),
        (
            [(X, Y)],
            {"predict_fn": lambda model, x: {"out": model(x)}},
            r"a dict with keys \['out'\].*argument `output`",
        ),
        ([(X, Y)], {"predict_fn": lambda model, x: model(x).softmax(1)}, r"returned probabilities"),
        ([], {}, "FitGMM's fitting data are empty"),
    ],
)
def test_the_first_batch_is_looked_at_before_the_training(data, given, message, make_trainer):
    module, trainer = Untouched(), make_trainer(callbacks=[FitGMM(dataloader=data, **given)])
    with pytest.raises(InputError, match=message):
        trainer.fit(module, loader())
    assert trainer.global_step == 0
    assert not any(module.modes)


def test_a_loader_that_is_read_as_it_comes_is_left_to_the_training(make_trainer):
    class Stream(torch.utils.data.IterableDataset):
        read = 0

        def __iter__(self):
            for row in DATA:
                Stream.read += 1
                yield row

    trainer = make_trainer(callbacks=[FitGMM()], limit_train_batches=2)
    seen = []
    module = UsersModule()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: seen.append(Stream.read) or step(batch, batch_idx)
    trainer.fit(module, DataLoader(Stream(), batch_size=8))
    assert seen[0] <= 16  # a batch, and the one that Lightning fetches ahead


def test_what_was_never_fitted_is_fitted_from_its_loader_without_a_warning(make_trainer):
    module, gmm = UsersModule(), FitGMM(dataloader=loader())
    make_trainer(callbacks=[gmm]).test(module, loader(), verbose=False)
    assert_same_fit(gmm, reference(module.state_dict(), gmm))
