"""Sets equal to those of TorchCP 1.2.1, and intervals to those of MAPIE 1.6.0, at the level 0.8.

TorchCP ran in float64, with uniforms of one draw per row. Its u multiplies what is taken off, so it got 1 - u.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_uq.functional import (
    aps_scores,
    conformal_interval,
    conformal_quantile,
    group_quantiles,
    interval_excess,
    lac_scores,
    prediction_sets,
    raps_scores,
    true_label_scores,
)

REFERENCE = {
    key: torch.from_numpy(value)
    for key, value in np.load(Path(__file__).parents[1] / "reference/conformal.npz").items()
}
LOGITS, TARGET, UNIFORMS = (REFERENCE[key] for key in ("logits", "target", "uniforms"))
SCORES = {
    "lac": lac_scores(LOGITS),
    "aps": aps_scores(LOGITS),
    "aps_randomized": aps_scores(LOGITS, UNIFORMS),
    "raps": raps_scores(LOGITS, 0.02, 2),
    "raps_randomized": raps_scores(LOGITS, 0.02, 2, UNIFORMS),
}


@pytest.mark.parametrize("kind", ["marginal", "by_class"])
@pytest.mark.parametrize("method", SCORES)
def test_sets_are_those_of_torchcp(method, kind):
    scores = SCORES[method]
    own, target = true_label_scores(scores, TARGET)[:100], TARGET[:100]
    threshold = conformal_quantile(own, 0.2) if kind == "marginal" else group_quantiles(own, target, 5, 0.2)
    assert torch.equal(prediction_sets(scores[100:], threshold), REFERENCE[f"{method}_{kind}"])


@pytest.mark.parametrize("method", ["absolute", "cqr"])
def test_intervals_are_those_of_mapie(method):
    mean, low, high = REFERENCE["outputs"].T
    lower, upper = (mean, mean) if method == "absolute" else (low, high)
    scores = interval_excess(lower[:80], upper[:80], REFERENCE["regression_target"][:80])
    found = conformal_interval(lower[80:], upper[80:], conformal_quantile(scores, 0.2))
    torch.testing.assert_close(torch.stack(found, 1), REFERENCE[method], rtol=0, atol=1e-14)
