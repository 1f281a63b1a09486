"""Run the examples of docs/predictions.md."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "predictions.md").read_text()


def test_the_examples_run(tmp_path, monkeypatch, make_trainer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer", make_trainer)
    names: dict = {"__name__": "predictions_page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "predictions.md", "exec"), names)
    prediction = names["prediction"]
    assert prediction.logits.shape == (5, 256, 3)
    assert prediction.score("energy").shape == (256,)
    assert "energy" in prediction.score_names
    assert names["maps"].predict(names["images"]).mutual_information.shape == (16, 8, 8)
    columns = names["columns"]
    assert columns["index"].tolist() == list(range(256))
    assert columns["label"].tolist() == prediction.label.tolist()
