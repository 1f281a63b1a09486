"""FitKNN and FitViM: their scores from the definitions, in and without a Trainer, on one rank and on two."""

import math
import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uq.callbacks.gmm import FitGMM
from lightning_uq.callbacks.knn import FitKNN
from lightning_uq.callbacks.ood import OODDetection
from lightning_uq.callbacks.ood_scores import OODScorer
from lightning_uq.callbacks.sibling import fitted_states
from lightning_uq.callbacks.temperature import TemperatureScaling
from lightning_uq.callbacks.vim import FitViM
from lightning_uq.errors import InputError, NotFittedError
from lightning_uq.functional.ood import auroc
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.modules.ensemble import EnsembleModule
from lightning_uq.networks.factory import Factory
from tests.tolerance import tolerance

GENERATOR = torch.Generator().manual_seed(1)
X, TEST_X, FAR_X = (torch.randn(n, 4, generator=GENERATOR) for n in (60, 31, 17))
FAR_X = FAR_X + 6
Y, TEST_Y = ((x[:, 0] > 0).long() for x in (X, TEST_X))
NETWORK = Factory("lightning_uq.networks.mlp.MLP", {"in_features": 4, "out_features": 2, "hidden_sizes": [6]})
MAKE = {"knn": lambda **kwargs: FitKNN(k=3, **kwargs), "vim": lambda **kwargs: FitViM(dim=2, **kwargs)}
both = pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))


def loader(x=X, y=Y, **kwargs):
    return DataLoader(TensorDataset(x, y), batch_size=8, **kwargs)


class UsersModule(LightningModule):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 2, bias=bias)
        if bias:  # as after a training, the largest logit is positive
            nn.init.constant_(self.head.bias, 1.0)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


@torch.no_grad()
def features_of(module: UsersModule, x: torch.Tensor) -> np.ndarray:
    return module.body[1](module.body[0](x)).double().numpy()


def knn_by_hand(train: np.ndarray, x: np.ndarray, k: int) -> list[float]:
    unit = [row / max(math.sqrt((row**2).sum()), 1e-12) for row in train]
    scores = []
    for row in x:
        row = row / max(math.sqrt((row**2).sum()), 1e-12)
        scores.append(sorted(math.sqrt(((row - other) ** 2).sum()) for other in unit)[k - 1])
    return scores


def vim_by_hand(head: nn.Linear, train: np.ndarray, x: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The virtual logit, and the softmax probability that it has among the others (Wang et al., equation 10)."""
    weight = head.weight.detach().double().numpy()
    bias = np.zeros(len(weight)) if head.bias is None else head.bias.detach().double().numpy()
    origin = -np.linalg.pinv(weight) @ bias
    _, _, vt = np.linalg.svd(train - origin)
    beyond = vt[dim:].T @ vt[dim:]  # projector on what is left after the first `dim` directions
    norms = np.linalg.norm((train - origin) @ beyond, axis=1)
    alpha = (train @ weight.T + bias).max(1).mean() / norms.mean()
    virtual = alpha * np.linalg.norm((x - origin) @ beyond, axis=1)
    logits = x @ weight.T + bias
    return virtual, np.exp(virtual) / (np.exp(virtual) + np.exp(logits).sum(1))


# ---------------------------------------------------------------------- from the definitions


@pytest.mark.parametrize("k", [1, 3, 50, 60])
def test_knn_is_its_definition(k):
    module = UsersModule()
    knn = FitKNN(k=k).fit(module, loader(shuffle=True))
    expected = knn_by_hand(features_of(module, X), features_of(module, TEST_X), k)
    np.testing.assert_allclose(knn.score(module, loader(TEST_X, TEST_Y)), expected, rtol=1e-5, atol=1e-6)


def test_knn_of_features_with_a_large_part_in_common():
    network = nn.Sequential(nn.Identity(), nn.Linear(4, 2))
    train, x = 1000 + X.float(), 1000 + TEST_X.float()
    expected = knn_by_hand(train.double().numpy(), x.double().numpy(), 3)
    np.testing.assert_allclose(FitKNN(k=3).fit(network, [train]).score(network, [x]), expected, rtol=1e-7)


def test_a_training_row_is_its_own_nearest_neighbour():
    module = UsersModule()
    scores = FitKNN(k=1).fit(module, loader()).score(module, loader())
    assert scores.max() < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", [1, 3, None])
def test_vim_is_its_definition(bias, dim):
    module = UsersModule(bias)
    with torch.no_grad():
        module.head.weight.mul_(3)
    vim = FitViM(dim=dim).fit(module, loader())
    train, x = features_of(module, X), features_of(module, TEST_X)
    virtual, probability = vim_by_hand(module.head, train, x, dim or 3)
    logits = x @ module.head.weight.detach().double().numpy().T
    logits = logits if module.head.bias is None else logits + module.head.bias.detach().double().numpy()
    scores = vim.score(module, loader(TEST_X, TEST_Y)).numpy()
    np.testing.assert_allclose(scores, virtual - np.log(np.exp(logits).sum(1)), rtol=1e-4, atol=1e-5)
    assert (np.argsort(scores) == np.argsort(probability)).all()  # so the paper's score orders inputs
    np.testing.assert_allclose(1 / (1 + np.exp(-scores)), probability, rtol=1e-4, atol=1e-6)


@both
def test_far_inputs_score_higher(make):
    module = UsersModule()
    scorer = make().fit(module, loader())
    near, far = scorer.score(module, loader(TEST_X, TEST_Y)), scorer.score(module, [-20 * FAR_X])
    assert near.dtype == torch.float64
    assert auroc(torch.cat([near, far]), torch.arange(48) >= 31) > 0.5


@both
def test_labels_are_not_looked_at(make):
    module = UsersModule().double()  # batches of 8 and of 7 rows differ in float32
    x = X.double()
    one, other = make().fit(module, loader(x)), make().fit(module, DataLoader(x, batch_size=7))
    scores = [scorer.score(module, [TEST_X.double()]) for scorer in (one, other)]
    torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-9)


@both
def test_an_ensembles_score_is_the_mean_of_its_members(make):
    ensemble = EnsembleModule(NETWORK, num_members=3, seed=0)
    whole = make().fit(ensemble, loader()).score(ensemble, loader(TEST_X, TEST_Y))
    members = [ensemble.network.member(i) for i in range(3)]
    alone = [make().fit(member, loader()).score(member, loader(TEST_X, TEST_Y)) for member in members]
    torch.testing.assert_close(whole, torch.stack(alone).mean(0), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- under the Trainer


@both
def test_it_persists_and_is_logged_beside_the_others(make, make_trainer, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val_loss")
    mine, gmm, scaling = make(), FitGMM(feature_transform="raw"), TemperatureScaling()
    trainer = make_trainer(callbacks=[gmm, mine, scaling, keep], max_epochs=8, enable_checkpointing=True)
    noisy = loader(TEST_X, torch.where(torch.arange(31) % 5 == 0, 1 - TEST_Y, TEST_Y))
    trainer.fit(UsersModule(), loader(), noisy)
    assert set(fitted_states(mine.uq_ckpt_path)) == {"FitGMM", type(mine).__name__, "TemperatureScaling"}
    fresh, module = make(), UsersModule()
    detection = OODDetection({"far": loader(FAR_X, torch.zeros(17).long())})
    trainer = make_trainer(callbacks=[FitGMM(feature_transform="raw"), fresh, detection])
    (tested,) = trainer.test(
        module, loader(TEST_X, TEST_Y), ckpt_path=keep.best_model_path, verbose=False, weights_only=True
    )
    name = mine.score_name
    assert isinstance(fresh, OODScorer)
    assert {f"ood_auroc/far/{name}", "ood_auroc/far/log_density"} <= set(tested)
    score = torch.cat([mine.score(module, loader(TEST_X, TEST_Y)), mine.score(module, [FAR_X])])
    assert tested[f"ood_auroc/far/{name}"] == pytest.approx(auroc(score, torch.arange(48) >= 31).item(), abs=1e-6)
    torch.testing.assert_close(fresh.score(module, [FAR_X]), mine.score(module, [FAR_X]), rtol=0, atol=0)


@both
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision(make, make_trainer, precision):
    module, scorer = UsersModule(), make(weights="last")
    trainer = make_trainer(callbacks=[scorer], precision=precision)
    trainer.fit(module, loader())
    detection = OODDetection({"far": loader(-20 * FAR_X, torch.zeros(17).long())})
    (tested,) = make_trainer(callbacks=[scorer, detection], precision=precision).test(
        module, loader(TEST_X, TEST_Y), verbose=False
    )
    assert tested[f"ood_auroc/far/{scorer.score_name}"] > 0.5


@both
def test_our_module_compiled_and_the_temperature_inside_change_nothing(make, make_trainer):
    module = DeterministicModule(NETWORK, optimizer=Factory("torch.optim.SGD", {"lr": 0.5}))
    scorer, scaling = (
        make(weights="last"),
        TemperatureScaling(weights="last", scope="shared", dataloader=loader(X, 1 - Y)),
    )
    with pytest.warns(UserWarning, match="no finite positive temperature"):
        make_trainer(callbacks=[scorer, scaling], max_epochs=3).fit(module, loader())
    results = []
    for callbacks in ([scorer], [scorer, scaling]):
        detection = OODDetection({"far": loader(FAR_X, torch.zeros(17).long())}, scores=[scorer.score_name])
        (tested,) = make_trainer(callbacks=[*callbacks, detection]).test(module, loader(TEST_X, TEST_Y), verbose=False)
        results.append({k: v for k, v in tested.items() if k.startswith("ood")})
    assert results[0] == results[1]
    compiled = torch.compile(module, backend="eager")
    compiled(TEST_X)
    torch.testing.assert_close(make().fit(compiled, loader()).score(compiled, [TEST_X]), scorer.score(module, [TEST_X]))


@both
def test_state_and_pickle_round_trips_and_staleness(make):
    module = UsersModule()
    scorer = make().fit(module, loader())
    other = make()
    other.load_state_dict(scorer.state_dict())
    twin = pickle.loads(pickle.dumps(scorer))
    expected = scorer.score(module, [TEST_X])
    for copy in (other, twin):
        torch.testing.assert_close(copy.score(module, [TEST_X]), expected, rtol=0, atol=0)
    with torch.no_grad():
        module.head.weight.add_(0.1)
    with pytest.raises(NotFittedError, match="fitted on other weights"):
        other.score(module, [TEST_X])
    with pytest.raises(NotFittedError, match="is not fitted"):
        make().score(module, [TEST_X])


def test_a_subspace_of_another_size_is_refused():
    state = FitViM(dim=2).fit(UsersModule(), loader()).state_dict()
    with pytest.raises(InputError, match="has dim=3, but its state was fitted with dim=2"):
        FitViM(dim=3).load_state_dict(state)


def test_a_callback_that_is_fitted_twice_looks_for_the_layer_again():
    first = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    second = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    scorer = FitKNN(k=1).fit(first, loader())
    assert scorer.features.resolved == "2"
    assert scorer.fit(second, loader()).features.resolved == "4"


TWO_RANKS = """
import json, torch, warnings
from torch import nn
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from lightning_uq.callbacks.knn import FitKNN
from lightning_uq.callbacks.vim import FitViM
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
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(x, y), batch_size=4)
few = [x[:5]]  # one batch: the second rank has none
make = lambda: [FitKNN(k=3, weights="last"), FitViM(dim=3, weights="last"),
                FitKNN(k=3, weights="last", name="few", dataloader=few)]
def main():
    callbacks = make()
    module = Module()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, max_epochs=2, precision="64-true",
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      default_root_dir=".", callbacks=callbacks)
    trainer.fit(module, loader)
    for buffer in module.buffers():  # means of BatchNorm differ by rank; rank 0's are those fitted on
        torch.distributed.broadcast(buffer, 0)
    held = torch.randn(9, 4).double()
    mine = [c.score(module, [held]) for c in callbacks]
    everyones = [None, None]
    torch.distributed.all_gather_object(everyones, mine)
    one = [c.fit(module, few if c.name == "few" else loader).score(module, [held]) for c in make()]
    gaps = [float((a - b).abs().max()) for theirs in everyones for a, b in zip(one, theirs)]
    if trainer.is_global_zero:
        json.dump({"gaps": gaps, "rows": [len(c.state_dict()["tensors"]["neighbors"][0]) for c in callbacks[::2]]}, open(out, "w"))
if __name__ == "__main__":
    main()
"""


def test_two_ranks_give_what_one_gives(run_script):
    result = run_script(TWO_RANKS)
    assert len(result["gaps"]) == 6
    assert max(result["gaps"]) < tolerance(torch.float32, 64)["atol"]  # features are kept, and compared, in float32
    assert result["rows"] == [21, 5]


# ---------------------------------------------------------------------- what ends badly


def test_fewer_rows_than_neighbours_is_a_warning():
    module = UsersModule()
    with pytest.warns(UserWarning, match="fitted to 60 rows, fewer than k=100"):
        knn = FitKNN(k=100).fit(module, loader())
    expected = knn_by_hand(features_of(module, X), features_of(module, TEST_X), 60)
    np.testing.assert_allclose(knn.score(module, [TEST_X]), expected, rtol=1e-5)


@both
def test_bad_fitting_data_is_named_and_nothing_is_half_fitted(make):
    scorer = make()
    with pytest.raises(InputError, match="fitting data are empty"):
        scorer.fit(UsersModule(), [])
    with pytest.raises(InputError, match="the input of layer 'head', hold NaN or infinity"):
        scorer.fit(UsersModule(), [X * math.nan])
    assert not scorer.fitted
    with pytest.raises(InputError, match="`loader` must hold samples, but it is empty"):
        scorer.fit(module := UsersModule(), loader()).score(module, [])


def test_vim_names_what_it_cannot_use():
    convolution = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(InputError, match="the linear layer that makes the logits .* '0' is a Conv2d"):
        FitViM(feature_layer="0", dim=1).fit(convolution, [torch.randn(20, 1, 4, 4)])
    with pytest.raises(InputError, match="`dim` = 5 dimensions, but their rank is at most that"):
        FitViM(dim=5).fit(nn.Linear(6, 2), [torch.randn(30, 4) @ torch.randn(4, 6)])
    with pytest.raises(InputError, match="`dim` must be an integer from 1 to 5, but it is 6"):
        FitViM(dim=6).fit(nn.Linear(6, 2), [torch.randn(30, 6)])
    negative = nn.Linear(4, 2)
    nn.init.constant_(negative.bias, -50.0)
    with pytest.warns(UserWarning, match="negative in the mean"):
        FitViM(dim=1).fit(negative, [X])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FitKNN(k=0), "`k`"),
        (lambda: FitKNN(k=2.5), "`k`"),
        (lambda: FitViM(dim=0), "`dim`"),
        (lambda: FitViM(weights="newest"), "`weights`"),
    ],
)
def test_wrong_arguments_are_named(make, match):
    with pytest.raises(InputError, match=match):
        make()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, by release
def test_the_command_line_builds_all_of_them():
    pytest.importorskip("jsonargparse")
    parser = LightningArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    given = {
        "FitGMM": {"covariance": "tied", "regularization": 0.1},
        "TemperatureScaling": {"scope": "shared", "output": "probs"},
        "VectorScaling": {"weights": "last"},
        "MatrixScaling": {"max_rows": 100},
        "IsotonicScaling": {"weights": "last"},
        "CalibratedNLL": {"dataloader_idx": 1},
        "FitKNN": {"k": 5},
        "FitViM": {"dim": 3},
        "FitLaplace": {"select": "held_out", "link": "probit"},
    }
    entries = [{"class_path": f"lightning_uq.{name}", "init_args": args} for name, args in given.items()]
    built = parser.instantiate_classes(parser.parse_object({"callbacks": entries})).callbacks
    for callback, (name, args) in zip(built, given.items(), strict=True):
        assert type(callback).__name__ == name
        seen = {**vars(callback), **getattr(callback, "settings", {})}
        assert {key: seen[key] for key in args} == args
