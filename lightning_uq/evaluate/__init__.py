"""The numbers of the DDU experiments for trained checkpoints, in their JSON: ``lightning-uq evaluate``.

A run is one network, or the members of one ensemble; its accuracy, calibration error and two detection scores are
averaged over runs. The scores depend on the model type, and so does the kind that average precision takes as positive:

============  ==============================================  =======================================
model type    m1                                              m2
============  ==============================================  =======================================
``softmax``   logsumexp of the logits; positive: in           entropy of the softmax; positive: out
``ensemble``  mutual information; positive: out               entropy of the mean; positive: out
``gmm``       log sum_c p(f | c); positive: in                entropy of p(c | f); positive: out
============  ==============================================  =======================================

``t_`` stands for "after temperature scaling", each member's own on its validation data; a density does not change with
it. The two average precisions of one table row are therefore not always comparable; ``*_auprc_in`` and ``*_auprc_out``
give both for each. All numbers are computed in float64. The original computes in float32, where the entropies of a saturated posterior tie at 0.

Source: Mukhoti et al. (arXiv 2102.11582), its evaluation script.
"""

from lightning_uq.evaluate.data import data_names
from lightning_uq.evaluate.models import load_model
from lightning_uq.evaluate.numbers import Outputs, metrics
from lightning_uq.evaluate.run import evaluate, write
from lightning_uq.evaluate.settings import ModelType, Settings

__all__ = ["ModelType", "Outputs", "Settings", "data_names", "evaluate", "load_model", "metrics", "write"]
