"""Users' projects whose batches are no pairs: graphs, mappings, windows that the module makes itself."""

import collections
import logging

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_uq import (
    BayesByBackpropModule,
    CalibratedNLL,
    DeterministicModule,
    DropoutModule,
    EnsembleModule,
    EpinetModule,
    FitGMM,
    FitKNN,
    InputError,
    OODDetection,
    PredictionWriter,
    TemperatureScaling,
    UnsupportedError,
    read_predictions,
)

NUM, CLASSES = 48, 3


# ---------------------------------------------------------------------- graphs: an object that holds its tensors


class Graphs:
    """A batch of graphs, as torch_geometric's: nodes, the graph of each node, a label per graph."""

    def __init__(self, items):
        self.x = torch.cat([x for x, _ in items])
        self.batch = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(x) for x, _ in items]))
        self.y = torch.tensor([y for _, y in items])
        self.moves = 0

    def to(self, device, **_):
        self.moves += 1
        self.x, self.batch, self.y = (t.to(device) for t in (self.x, self.batch, self.y))
        return self


class GraphNet(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.node, self.drop, self.head = nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, CLASSES)

    def forward(self, graphs):
        h = self.drop(torch.relu(self.node(graphs.x)))
        pooled = h.new_zeros(int(graphs.batch.max()) + 1, 8).index_add_(0, graphs.batch, h)
        return self.head(pooled)


class GraphLit(LightningModule):
    """Its step normalises the nodes in place."""

    def __init__(self):
        super().__init__()
        self.net = GraphNet()

    def forward(self, graphs):
        return self.net(graphs)

    def training_step(self, graphs, _):
        return F.cross_entropy(self(graphs), graphs.y)

    def test_step(self, graphs, batch_idx):
        graphs.x.mul_(100.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def graph_items(shift=0.0):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2 + i % 3, 4, generator=generator) + shift, i % CLASSES) for i in range(NUM)]


def graph_loader(shift=0.0):
    return DataLoader(graph_items(shift), batch_size=8, collate_fn=Graphs)


METHODS = {
    "deterministic": lambda: DeterministicModule(GraphNet()),
    "ensemble": lambda: EnsembleModule(GraphNet, num_members=2, seed=0),
    "ensemble of modules": lambda: EnsembleModule(GraphLit, num_members=2, seed=0),
    "epinet": lambda: EpinetModule(GraphNet(), num_eval_samples=5),
    "dropout": lambda: DropoutModule(GraphNet(0.5), num_eval_samples=4, num_train_samples=2),
    "bayes by backprop": lambda: BayesByBackpropModule(GraphNet(), num_train=NUM, num_eval_samples=3),
}


@pytest.mark.parametrize("method", METHODS)
def test_graphs_are_trained_tested_and_predicted(make_trainer, tmp_path, method):
    module = METHODS[method]()
    writer = PredictionWriter(tmp_path / "predictions", format="csv")
    trainer = make_trainer(callbacks=[writer], max_epochs=1)
    trainer.fit(module, graph_loader(), graph_loader())
    (found,) = trainer.test(module, graph_loader(), verbose=False)
    assert any(name.endswith("test_accuracy") for name in found)
    predictions = trainer.predict(module, graph_loader())
    assert [p.probs.shape for p in predictions] == [(8, CLASSES)] * 6
    assert read_predictions(tmp_path / "predictions")["index"].tolist() == list(range(NUM))


def test_dropout_of_graphs_gives_each_index_one_function(make_trainer):
    # Repeating the input, as is done for tensors, would take rows of one index for those of another.
    module = DropoutModule(GraphNet(0.5), num_eval_samples=4).eval()
    graphs = Graphs(graph_items()[:8])
    output = module(graphs)
    each = torch.cat([module.network(graphs, index[None]) for index in module.network.evaluation_index(4)])
    assert torch.equal(output, each)
    assert not torch.equal(output[0], output[1])


@pytest.mark.parametrize("kind", ["deterministic", "foreign"])
def test_callbacks_fit_and_score_graphs(make_trainer, tmp_path, kind):
    module = METHODS["deterministic"]() if kind == "deterministic" else GraphLit()
    gmm, knn = FitGMM(feature_transform="raw", attach=True), FitKNN(k=3)
    ood = OODDetection({"far": graph_loader(20.0)})
    trainer = make_trainer(callbacks=[CalibratedNLL(), knn, gmm, TemperatureScaling(attach=True), ood], max_epochs=1)
    module.validation_step = lambda batch, batch_idx: None
    trainer.fit(module, graph_loader(), graph_loader())
    assert gmm.score(module, graph_loader()).shape == (NUM,)
    (found,) = trainer.test(module, graph_loader(), verbose=False)
    # The test step scales its nodes in place, after the copy that is scored was taken.
    assert found["ood_auroc/far/log_density"] > 0.99
    (first, *_) = trainer.predict(module, graph_loader())
    assert first.log_density.shape == (8,)


def test_a_numberless_task_takes_its_rows_from_the_features(make_trainer):
    gmm = FitGMM(task="regression")
    net = GraphNet()
    net.head = nn.Linear(8, 2)
    gmm.fit(net, [Graphs(graph_items()[:24]), Graphs(graph_items()[24:])])
    assert gmm.score(net, graph_loader()).shape == (NUM,)


def test_members_see_graphs_that_no_other_member_has_touched(make_trainer):
    class Scaling(GraphLit):
        def training_step(self, graphs, _):
            graphs.x.mul_(2.0)
            self.seen = float(graphs.x.abs().sum())
            return F.cross_entropy(self(graphs), graphs.y)

    ensemble = EnsembleModule(Scaling, num_members=3, seed=0)
    make_trainer(max_epochs=1).fit(ensemble, graph_loader())
    assert len({member.seen for member in ensemble.members.modules}) == 1


# ---------------------------------------------------------------------- mappings


X = torch.randn(NUM, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()


def mapping_loader(**columns):
    return DataLoader(
        [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], batch_size=8
    )


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES))


@pytest.mark.parametrize("target", ["label", "labels", "target", "targets", "y", "mask"])
def test_one_tensor_beside_a_target_is_the_input_and_this_is_reported_once(make_trainer, caplog, target):
    paths = [f"{i}.png" for i in range(NUM)]
    loader = mapping_loader(image=X, **{target: Y}, path=paths, index=torch.arange(NUM))
    module = DeterministicModule(mlp())
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        make_trainer(max_epochs=1).fit(module, loader, loader)
    told = [record.message for record in caplog.records if "read as input" in record.message]
    assert len(told) == 1
    assert f"input 'image' and target {target!r}" in told[0]
    assert f"`lambda batch: (batch['image'], batch[{target!r}])`" in told[0]


def test_several_tensors_are_refused_unless_they_are_arguments_of_forward(make_trainer):
    loader = mapping_loader(image=X, depth=X, label=Y)
    with pytest.raises(InputError, match=r"keys are \['depth', 'image', 'label'\]. Pass `unpack_batch`"):
        make_trainer(max_epochs=1).fit(DeterministicModule(mlp()), loader)
    both = mapping_loader(image=X, label=Y, mask=Y)
    with pytest.raises(InputError, match="Pass `unpack_batch`"):
        make_trainer(max_epochs=1).fit(DeterministicModule(mlp()), both)


ModelOutput = collections.namedtuple("ModelOutput", ["loss", "logits", "hidden_states"], defaults=[None])


class Bert(nn.Module):
    """As a model of Hugging Face: arguments by name, an output with `logits`."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        assert labels is None  # the loss is not theirs
        h = torch.relu(self.body(input_ids * attention_mask[:, None]))
        return ModelOutput(torch.tensor(0.0), self.classifier(h))


def hf_loader():
    return mapping_loader(input_ids=X, attention_mask=torch.ones(NUM), labels=Y, idx=torch.arange(NUM))


@pytest.mark.parametrize(
    "build",
    [
        lambda: DeterministicModule(Bert()),
        lambda: EnsembleModule(Bert, num_members=2, seed=0),
        lambda: EpinetModule(Bert(), num_eval_samples=5),
    ],
)
def test_arguments_by_name_and_an_output_with_logits_need_no_glue(make_trainer, build):
    module, gmm = build(), FitGMM()  # the layer is found too
    trainer = make_trainer(callbacks=[gmm], max_epochs=1)
    trainer.fit(module, hf_loader())
    assert gmm.features.resolved == "classifier"
    (first, *_) = trainer.predict(module, hf_loader())
    assert first.probs.shape == (8, CLASSES)
    assert first.log_density.shape == (8,)


def test_the_layer_of_members_is_found_behind_an_output_function(make_trainer):
    class Holder:  # no nest to torch
        def __init__(self, logits):
            self.scores = logits

    class Holding(Bert):
        def forward(self, input_ids, attention_mask):
            return Holder(super().forward(input_ids, attention_mask).logits)

    module = EnsembleModule(Holding, num_members=2, seed=0, output=lambda out: out.scores)
    gmm = FitGMM()
    make_trainer(callbacks=[gmm], max_epochs=1).fit(module, hf_loader())
    assert gmm.features.resolved == "classifier"


def test_the_first_of_a_tuple_is_read_and_a_likely_other_one_is_a_warning(make_trainer):
    class WithFeatures(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            h = torch.relu(self.body(x))
            return self.head(h), h

    loader = DataLoader(list(zip(X, Y, strict=True)), batch_size=8)
    with pytest.warns(UserWarning, match=r"tuple of 2, whose first part.*`output=lambda out: out\[1\]`"):
        make_trainer(max_epochs=1).fit(DeterministicModule(WithFeatures()), loader)


def test_one_logit_with_labels_0_and_1_is_binary_even_where_a_batch_has_one_value(make_trainer):
    class OneLogit(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    y = (torch.arange(NUM) >= NUM // 2).long()  # the first batches hold only 0
    x = X + (2.0 * y - 1)[:, None]
    loader = DataLoader(list(zip(x, y, strict=True)), batch_size=8)
    module = OneLogit()
    with torch.no_grad():
        module.net.weight.fill_(1.0)
    scaling = TemperatureScaling().fit(module, loader)
    expected = TemperatureScaling(task="binary").fit(module, loader)
    assert torch.equal(scaling.temperature, expected.temperature)


# ---------------------------------------------------------------------- functions that a module is given


class Two(nn.Module):
    """Called by another method than `forward`."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, CLASSES)

    def scores(self, x):
        return self.head(self.drop(torch.relu(self.body(x))))


def call_scores(network, x):
    return network.scores(x)


def unpack(batch):
    return batch["a"], batch["b"]


def pick(out):
    return out


WITH_FUNCTIONS = {
    "deterministic": lambda **kw: DeterministicModule(Two(), **kw),
    "ensemble": lambda **kw: EnsembleModule(Two, num_members=2, seed=0, **kw),
    "dropout": lambda **kw: DropoutModule(Two(), num_eval_samples=4, **kw),
    "epinet": lambda **kw: EpinetModule(Two(), feature_layers="head", num_eval_samples=4, **kw),
    "epinet, auto": lambda **kw: EpinetModule(Two(), num_eval_samples=4, **kw),
    "bayes by backprop": lambda **kw: BayesByBackpropModule(Two(), num_train=NUM, num_eval_samples=3, **kw),
}


@pytest.mark.parametrize("method", WITH_FUNCTIONS)
def test_every_module_takes_the_functions_that_callbacks_take(make_trainer, method):
    loader = mapping_loader(a=X, b=Y, c=X)
    module = WITH_FUNCTIONS[method](unpack_batch=lambda batch: (batch["a"], batch["b"]), predict_fn=call_scores)
    trainer = make_trainer(max_epochs=1, callbacks=[FitGMM()] if method != "bayes by backprop" else [])
    trainer.fit(module, loader, loader)
    (first, *_) = trainer.predict(module, loader)
    assert first.probs.shape == (8, CLASSES)


def test_functions_that_can_be_imported_are_saved_and_a_lambda_is_asked_for(make_trainer, tmp_path):
    def build(**functions):
        return DeterministicModule(Two, **functions)

    loader, path = mapping_loader(a=X, b=Y, c=X), tmp_path / "a.ckpt"
    here = __name__
    for unpack_batch in (unpack, f"{here}.unpack"):
        module = build(unpack_batch=unpack_batch, predict_fn=call_scores, output=pick)
        trainer = make_trainer(max_epochs=1)
        trainer.fit(module, loader)
        trainer.save_checkpoint(path)
        again = DeterministicModule.load_from_checkpoint(path)
        assert torch.equal(again.predict(X).probs, module.predict(X).probs)
        assert again.unpack_batch(next(iter(loader)))[1].shape == (8,)
    module = build(unpack_batch=lambda batch: (batch["a"], batch["b"]), predict_fn=call_scores)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader)
    trainer.save_checkpoint(path)
    with pytest.raises(
        InputError, match=r"does not hold argument `unpack_batch`.*`load_from_checkpoint\(path, unpack_batch"
    ):
        DeterministicModule.load_from_checkpoint(path)
    again = DeterministicModule.load_from_checkpoint(path, unpack_batch=unpack)
    assert torch.equal(again.predict(X).probs, module.predict(X).probs)


def test_members_that_run_at_once_cannot_be_called_one_by_one():
    with pytest.raises(UnsupportedError, match="called by a `predict_fn`. Use execution='loop'"):
        EnsembleModule(mlp, num_members=2, execution="stacked", predict_fn=call_scores)
    with pytest.raises(UnsupportedError, match="but `predict_fn` does not call it"):
        EnsembleModule(Two, num_members=2, prior_network=Two, prior_scale=1.0, predict_fn=call_scores)


# ---------------------------------------------------------------------- a module that makes its own windows


class Forecast(LightningModule):
    """As neuralforecast's: its step cuts windows out of series, so a batch of 2 series gives 6 rows."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def windows(self, batch):
        batch["temporal"] = batch["temporal"] / batch["scale"][:, None]  # in the batch itself
        cut = batch["temporal"].unfold(1, 6, 3).flatten(0, 1)
        return cut[:, :4], cut[:, 4:]

    def training_step(self, batch, _):
        x, y = self.windows(batch)
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def forecast(module, batch):
    return module.net(module.windows(batch)[0])


def series_loader():
    rows = [{"temporal": torch.randn(12), "scale": torch.tensor(2.0), "names": "a"} for _ in range(8)]
    return DataLoader(rows, batch_size=2)


def test_a_module_that_makes_its_own_input_is_handed_the_whole_batch(make_trainer):
    ensemble = EnsembleModule(Forecast, num_members=2, seed=0, predict_fn=forecast, task="regression")
    trainer = make_trainer(max_epochs=1)
    loader = series_loader()
    trainer.fit(ensemble, loader)
    (first, *_) = trainer.predict(ensemble, loader)
    assert first.mean.shape == (6, 1)
    batch = next(iter(loader))
    members = [
        member.net(batch["temporal"].div(2).unfold(1, 6, 3).flatten(0, 1)[:, :4]) for member in ensemble.members.modules
    ]
    # No member sees what another has scaled.
    torch.testing.assert_close(ensemble(batch), torch.stack(members))


def test_predictions_of_windows_are_not_written_as_if_they_were_samples(make_trainer, tmp_path):
    ensemble = EnsembleModule(Forecast, num_members=2, seed=0, predict_fn=forecast, task="regression")
    trainer = make_trainer(callbacks=[PredictionWriter(tmp_path / "p", format="csv")])
    with pytest.raises(InputError, match="Each of the 6 predictions of batch 0 must have an index.*sampler yielded 2"):
        trainer.predict(ensemble, series_loader())


def test_a_model_that_writes_into_its_input_is_read_as_one_that_does_not():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x.mul_(0.5))

    class Reading(Writing):
        def forward(self, x):
            return self.net(x * 0.5)

    def fitted(kind):
        torch.manual_seed(0)
        module = kind()
        x = X.clone()
        gmm = FitGMM(feature_transform="raw").fit(module, [(x[:24], Y[:24]), (x[24:], Y[24:])])
        assert torch.equal(x, X)
        y = module.net(X * 0.5).argmax(1)  # labels that the logits predict, most of them
        y[::5] = (y[::5] + 1) % CLASSES
        return gmm.state_dict()["tensors"]["raw.0.mean"], TemperatureScaling().fit(module, [(x, y)]).temperature

    for one, other in zip(fitted(Writing), fitted(Reading), strict=True):
        assert torch.equal(one, other)


def test_a_density_of_windows(make_trainer):
    gmm = FitGMM(predict_fn=forecast, task="regression", feature_layer="net.2")
    module = Forecast()
    make_trainer(max_epochs=1, callbacks=[gmm]).fit(module, series_loader())
    assert gmm.score(module, series_loader()).shape == (24,)
