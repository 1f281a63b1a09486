"""Computes the metrics of the DDU experiments for trained checkpoints, in their JSON format: ``lightning-uq evaluate``.

A run is one network, or the members of one ensemble. Its accuracy, its calibration error and two detection scores are
averaged over runs. The scores depend on the model type, and so does the class that average precision takes as positive:

============  ==============================================  =======================================
model type    m1                                              m2
============  ==============================================  =======================================
``softmax``   logsumexp of the logits; positive: in           entropy of the softmax; positive: out
``ensemble``  mutual information; positive: out               entropy of the mean; positive: out
``gmm``       log sum_c p(f | c); positive: in                entropy of p(c | f); positive: out
============  ==============================================  =======================================

Each number appears in the JSON under the original's key and under a plain name:

================  ================================  =====================================================================
original          plain name                        number
================  ================================  =====================================================================
``accuracy``      ``accuracy``                      share of test inputs whose most probable class is the label
``ece``           ``ece``                           expected calibration error, 15 bins of equal width
``m1_auroc``      ``ood_auroc_<score>``             area under the ROC curve of the score m1, test data against OOD data
``m1_auprc_in``   ``ood_auprc_in_<score>``          average precision, in-distribution data positive
``m1_auprc_out``  ``ood_auprc_out_<score>``         average precision, OOD data positive
``m1_auprc``      the one in the table above  the original's choice of the two
``t_...``         ``..._after_temperature``         the same after temperature scaling; a density does not change with it
``std``           ``se``                            standard error over runs, sqrt(sum (x - mean)^2 / (R - 1) / R)
================  ================================  =====================================================================

The names of the scores are ``energy`` and ``predictive_entropy`` (softmax), ``mutual_information`` and ``predictive_entropy``
(ensemble), ``log_density`` and ``posterior_entropy`` (gmm), for m1 and m2. The two values of ``m1_auprc`` and ``m2_auprc`` in one
row of the original's tables are not always comparable, because their positives differ.

Two definitions differ from the original's:

- Each member's temperature T minimizes the likelihood of its validation data exactly
  (:func:`~lightning_uq.functional.fit_temperature`). The original takes the best of 0.1, 0.2, ..., 10.0. As the likelihood has one minimum
  in T, the original's T is less than 0.1 away from ours if ours lies in [0.1, 10], and 0.1 or 10 if it does not. ``info`` holds both:
  ``temperature`` and ``grid_temperature``, one list per run with one number per member.
- All numbers are computed in float64. The original computes in float32, where the entropies of a saturated posterior tie at 0.

Source: Mukhoti et al. (arXiv 2102.11582), its evaluation script.
"""

from lightning_uq.evaluate.data import data_names
from lightning_uq.evaluate.models import load_model
from lightning_uq.evaluate.numbers import Outputs, metrics
from lightning_uq.evaluate.run import evaluate, read_result, write, write_page
from lightning_uq.evaluate.settings import ModelType, Settings
from lightning_uq.evaluate.table import make_table

__all__ = [
    "ModelType",
    "Outputs",
    "Settings",
    "data_names",
    "evaluate",
    "load_model",
    "make_table",
    "metrics",
    "read_result",
    "write",
    "write_page",
]
