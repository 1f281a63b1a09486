"""The parts of the reproductions that would be wrong without a sign: splits, augmentation, scores and resuming."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "reproduce"


@pytest.mark.parametrize("module", ["uci"], indirect=True)
def test_uci_splits_are_those_that_one_seed_draws_in_order(module: ModuleType):
    # What `np.random.seed(1)` and one `np.random.choice(range(309), 309, replace=False)` per split give.
    expected = {0: ([238, 257, 214, 70], [121, 115, 287, 216]), 2: ([267, 290, 147, 168], [224, 144, 0, 261])}
    for split, (train_begins, test_begins) in expected.items():
        train, test = module.split_rows(309, split)
        assert (len(train), len(test)) == (278, 31)
        assert train[:4].tolist() == train_begins
        assert test[:4].tolist() == test_begins
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(309))


@pytest.mark.parametrize("module", ["cifar_data"], indirect=True)
def test_augmentation_moves_and_mirrors_each_image_by_itself(module: ModuleType):
    torch.manual_seed(0)
    x = torch.randint(1, 256, (64, 3, 32, 32), dtype=torch.uint8)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    found = []
    for image, mirrored, moved in zip(padded, padded.flip(3), module.augmented(x), strict=True):
        places = [
            (flip, down, right)
            for flip, source in enumerate((image, mirrored))
            for down in range(9)
            for right in range(9)
            if torch.equal(source[:, down : down + 32, right : right + 32], moved)
        ]
        assert len(places) == 1
        found += places
    assert len(set(found)) > 40
    assert {flip for flip, _, _ in found} == {0, 1}


@pytest.mark.parametrize("module", ["results"], indirect=True)
def test_a_folder_of_results_continues_and_refuses_other_settings(module: ModuleType, tmp_path: Path):
    calls: list[str] = []

    def job(name: str):
        return lambda: calls.append(name) or {"name": name}

    first, left_out = module.run_jobs({"a": job("a")}, tmp_path, {"epochs": 1}, budget=1)
    assert first == {"a": {"name": "a"}}
    assert not left_out
    both = {"a": job("a"), "b": job("b")}
    assert module.run_jobs(both, tmp_path, {"epochs": 1}, budget=-1) == (first, ["b"])
    results, left_out = module.run_jobs(both, tmp_path, {"epochs": 1}, budget=1)
    assert results == {"a": {"name": "a"}, "b": {"name": "b"}}
    assert calls == ["a", "b"]
    with pytest.raises(SystemExit, match="Choose another folder"):
        module.run_jobs(both, tmp_path, {"epochs": 2}, budget=1)
    assert json.loads((tmp_path / "b.json").read_text())["result"] == {"name": "b"}
