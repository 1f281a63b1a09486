"""The Laplace approximation of a last layer beside laplace-torch's."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Call, Contender, Work
from lightning_uq import FitLaplace
from lightning_uq.functional.laplace import LastLayerPosterior, output_variance, with_bias
from lightning_uq.tasks import Classification, Regression

TITLE = "Laplace approximation of the last layer"
ABOUT = """10,000 training rows in batches of 500, 64 inputs, two hidden layers of 128 units; predictions of 1,000 rows. Ours fits in float64 and chooses the prior
precision, and for regression the noise, by the marginal likelihood; laplace-torch fits in float32 and is given these numbers, so it has less to do. Compared are the
posterior variances of 100 outputs and the predictions: a mean and a variance for regression, and for ten classes the probabilities by the probit link. The head of the
classifier has no bias, since laplace-torch leaves out the correlation of weights and bias. It also adds a variance along the direction that a softmax ignores: the
comparison leaves out this direction, and the probabilities differ by less than 0.001. Of our
prediction of numbers, the product in float64 is one part and a fingerprint of the weights another: a posterior refuses a network whose weights changed after the fit."""

ROWS, TEST, INPUTS, WIDTH, CLASSES = 10_000, 1000, 64, 128, 10


def works(device: str) -> Iterator[Work]:
    """The fit and the prediction of one number and of ten classes."""
    torch.manual_seed(0)
    x, test = torch.randn(ROWS, INPUTS), torch.randn(TEST, INPUTS).to(device)
    targets = {"regression": x[:, :1].sin() + 0.1 * torch.randn(ROWS, 1), "classification": x[:, :CLASSES].argmax(1)}
    for likelihood, target in targets.items():
        network = trained(likelihood, x, target, device)
        loader = DataLoader(TensorDataset(x, target), batch_size=500)
        fitted = ours(likelihood, network, loader)
        chosen = fitted.transform().posteriors[0]
        theirs = partial(peer, likelihood, network, loader, chosen)
        fits = [
            Contender("lightning-uq", partial(ours_fit, likelihood, network, loader, test[:100])),
            Contender("Laplace", partial(peer_fit, theirs, test[:100]), "laplace-torch"),
        ]
        yield Work(f"{likelihood}, fit", fits, rtol=1e-4, atol=0, calls=1)
        predictions = [
            Contender("lightning-uq", partial(ours_predict, fitted, network, test)),
            Contender("Laplace", partial(peer_predict, theirs, test), "laplace-torch"),
        ]
        yield Work(f"{likelihood}, prediction", predictions, rtol=1e-4, atol=1e-5 if target.ndim == 2 else 1e-3)


def trained(likelihood: str, x: Tensor, target: Tensor, device: str) -> nn.Sequential:
    outputs = 1 if likelihood == "regression" else CLASSES
    head = nn.Linear(WIDTH, outputs, bias=likelihood == "regression")
    network = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), head)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    loss = nn.MSELoss() if likelihood == "regression" else nn.CrossEntropyLoss()
    for rows, labels in zip(x.split(500), target.split(500), strict=True):
        optimizer.zero_grad()
        loss(network(rows), labels).backward()
        optimizer.step()
    return network.to(device).eval()


def ours(likelihood: str, network: nn.Module, loader: DataLoader) -> FitLaplace:
    task = Regression(head="mean") if likelihood == "regression" else Classification(CLASSES)
    return FitLaplace(select="marginal_likelihood", link="probit", task=task, feature_layer="4").fit(network, loader)


def ours_fit(likelihood: str, network: nn.Sequential, loader: DataLoader, test: Tensor) -> Call:
    def call() -> Tensor:
        posterior = ours(likelihood, network, loader).transform().posteriors[0]
        with torch.no_grad():
            features = network[:-1](test).double()
        return output_variance(posterior, with_bias(features) if likelihood == "regression" else features)

    return call


def ours_predict(fitted: FitLaplace, network: nn.Module, test: Tensor) -> Call:
    def call() -> Tensor:
        prediction: Any = fitted.predict(network, test)
        return (
            prediction.probs if hasattr(prediction, "probs") else torch.cat([prediction.mean, prediction.variance], 1)
        )

    return call


def peer(likelihood: str, network: nn.Module, loader: DataLoader, chosen: LastLayerPosterior) -> Any:
    """Their posterior with the numbers that ours chose; not fitted yet."""
    from laplace import Laplace

    return Laplace(
        network,
        likelihood,
        subset_of_weights="last_layer",
        hessian_structure="full" if likelihood == "regression" else "kron",
        sigma_noise=float(chosen.noise[0].sqrt()) if likelihood == "regression" else 1.0,
        prior_precision=float(chosen.prior_precision[0]),
    ), loader


def peer_fit(theirs: Any, test: Tensor) -> Call:
    laplace, loader = theirs()

    def call() -> Tensor:
        laplace.fit(loader)
        _, covariance = laplace._glm_predictive_distribution(test)
        outputs = covariance.shape[1]
        centered = torch.eye(outputs, device=test.device) - (1 / outputs if outputs > 1 else 0.0)
        return (centered @ covariance @ centered).diagonal(dim1=1, dim2=2)

    return call


def peer_predict(theirs: Any, test: Tensor) -> Call:
    laplace, loader = theirs()
    laplace.fit(loader)
    if laplace.likelihood == "classification":
        return lambda: laplace(test, pred_type="glm", link_approx="probit")

    def call() -> Tensor:
        mean, variance = laplace(test)
        return torch.cat([mean, variance[:, 0] + laplace.sigma_noise**2], 1)

    return call
