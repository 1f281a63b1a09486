"""The exported graph, on numpy and onnxruntime alone: rows of numbers to answers that JSON can hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

NAMES = ["probs", "ood_score", "ood_p_value", "ood_alarm"]


class Predictor:
    """Gives each row its probabilities, label, score, p-value and alarm; several threads may call it at once.

    A row with a missing number (None, NaN) or an infinity has an alarm, a p-value of 0, and None for the other results. Numbers
    beyond float32 count as infinite.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # requests run side by side instead
        self._graph = onnxruntime.InferenceSession(path, options)
        self.width = self._graph.get_inputs()[0].shape[1]

    def __call__(self, rows: Sequence[Sequence[float | None]]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The answers, and the scores [B], which are infinite for rows without probabilities.

        Raises:
            ValueError: A row has another number of columns than the model.
        """
        widths = sorted({len(row) for row in rows} - {self.width})
        if widths:
            raise ValueError(f"Each row must have {self.width} numbers, but there is a row of {widths[0]}.")
        with np.errstate(over="ignore"):
            x = np.array(rows, dtype=np.float32)
        probs, scores, p_values, alarms = self._graph.run(NAMES, {"x": x})
        answers = [
            {
                "probabilities": row if usable else None,
                "label": label if usable else None,
                "ood_score": score if usable else None,
                "ood_p_value": p_value,
                "ood_alarm": alarm,
            }
            for usable, row, label, score, p_value, alarm in zip(
                (np.isfinite(probs).all(1) & np.isfinite(scores)).tolist(),
                probs.tolist(),
                probs.argmax(1).tolist(),
                scores.tolist(),
                p_values.tolist(),
                alarms.tolist(),
                strict=True,
            )
        ]
        return answers, scores
