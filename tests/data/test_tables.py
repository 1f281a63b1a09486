import pickle
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_uq.data import TableDataModule
from lightning_uq.errors import InputError


def people(num=80, seed=0):
    """A table as its authors write it: numbers, text, booleans, missing values, a constant."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "age": rng.integers(18, 90, num),
            "city": rng.choice(["Bonn", "Köln", "Ulm, old town"], num),
            "zip": rng.choice([1067, 50667, 80331], num),
            "height": rng.normal(170, 10, num).round(1),
            "married": rng.random(num) > 0.5,
            "country": "DE",
            "income": np.where(np.arange(num) % 4 == 0, ">50K", "<=50K"),
        }
    )
    table.loc[::7, "height"] = np.nan
    table.loc[::9, "city"] = None
    return table


@pytest.fixture
def csv(tmp_path):
    def write(table, name="people.csv", **arguments):
        path = tmp_path / name
        (table.to_parquet if name.endswith("parquet") else table.to_csv)(path, index=False, **arguments)
        return str(path)

    return write


def parts(data):
    return {part: data.dataset(part).tensors for part in ("train", "val", "test", "ood")}


# ------------------------------------------------------------------ features


@pytest.mark.parametrize("name", ["people.csv", "people.parquet"])
def test_mixed_columns_become_features(csv, name):
    table = people()
    data = TableDataModule(csv(table, name), "income", categorical=["zip"])
    assert data.feature_names == [
        *("age", "city=Bonn", "city=Köln", "city=Ulm, old town", "city=missing", "zip=1067", "zip=50667", "zip=80331"),
        *("height", "height=missing", "married=False", "married=True", "unseen"),
    ]
    x, y = data.dataset("train").tensors
    assert x.dtype == torch.float32
    assert x.shape == (data.num_train, data.num_features) == (48, 13)
    assert (data.task, data.num_classes, data.class_names) == ("classification", 2, ("<=50K", ">50K"))
    assert y.bincount().tolist() == [36, 12]
    torch.testing.assert_close(x[:, 0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(x[:, 0].std(correction=0), torch.tensor(1.0))
    for one_hot in (slice(1, 5), slice(5, 8), slice(10, 12)):
        assert (x[:, one_hot].sum(1) == 1).all()
    assert (x[:, 8][x[:, 9] == 1] == 0).all()
    assert (x[:, 12] == 0).all()


def test_transform_recomputed_by_hand(csv):
    table = people()
    data = TableDataModule(csv(table), "income")
    x = data.transform(table)
    train = data.dataset("train").tensors[0]
    # Rows are unique in age and height, which identifies the training rows.
    rows = torch.tensor([int((x == row).all(1).nonzero()[0]) for row in train])
    chosen = table.iloc[rows.numpy()]
    for column in ("age", "height"):
        values = (table[column] - chosen[column].mean()) / chosen[column].std(ddof=0)
        expected = torch.tensor(values.fillna(0.0).to_numpy()).float()
        torch.testing.assert_close(x[:, data.feature_names.index(column)], expected)
    assert x[:, data.feature_names.index("city=missing")].tolist() == table["city"].isna().astype(float).tolist()
    assert x[:, data.feature_names.index("married=True")].tolist() == table["married"].astype(float).tolist()


def test_statistics_come_from_the_training_rows_alone(csv):
    table = people()
    data = TableDataModule(csv(table), "income", categorical=["zip"])
    x = data.transform(table)
    train = {int((x == row).all(1).nonzero()[0]) for row in data.dataset("train").tensors[0]}
    others = [row for row in range(len(table)) if row not in train]
    changed = table.copy()
    changed.loc[others, "age"] = 10_000
    changed.loc[others, "city"] = "Atlantis"
    changed.loc[others, "zip"] = 1
    changed.loc[others, "height"] = np.nan
    other = TableDataModule(csv(changed, "changed.csv"), "income", categorical=["zip"])
    assert other.feature_names == data.feature_names
    assert torch.equal(other.dataset("train").tensors[0], data.dataset("train").tensors[0])
    assert (other.dataset("test").tensors[0][:, -1] == 1).all()


def test_an_unseen_level_is_all_zeros_and_marked_or_an_error(csv):
    table = people()
    new = pd.DataFrame({"age": [30, None], "city": ["Rome", "Bonn"], "height": [170.0, 171], "married": [True, False]})
    data = TableDataModule(csv(table), "income", drop=["zip", "country"])
    x = dict(zip(data.feature_names, data.transform(new).T.tolist(), strict=True))
    assert [x[f"city={level}"] for level in ("Bonn", "Köln", "missing")] == [[0, 1], [0, 0], [0, 0]]
    assert x["unseen"] == [1, 1]  # the second misses an age, and no training row does
    assert x["age"][1] == 0
    strict = TableDataModule(csv(table), "income", drop=["zip", "country"], unseen="error")
    assert strict.feature_names == data.feature_names[:-1]
    with pytest.raises(
        InputError, match="Column `age` misses 1 values, but it has no missing values in the training rows"
    ):
        strict.transform(new)
    with pytest.raises(
        InputError, match="Column `city` holds level 'Rome' in 1 rows, which is not in the training rows"
    ):
        strict.transform(new[:1])
    with pytest.raises(InputError, match="Column `married` holds a missing value in 1 rows"):
        strict.transform(people(3).assign(married=[True, None, False]))


def test_a_category_is_the_same_however_pandas_reads_it(csv):
    data = TableDataModule(csv(people()), "income", categorical=["zip"], drop=["country"])
    table = people(20)
    expected = data.transform(table)
    for zips in (table["zip"].astype(float), table["zip"].astype(str), table["zip"].astype("category")):
        assert torch.equal(data.transform(table.assign(zip=zips)), expected)
    for married in (table["married"].astype(object), table["married"].astype(str), table["married"].astype("boolean")):
        assert torch.equal(data.transform(table.assign(married=married)), expected)
    # A missing value turns integers into floats.
    gap = data.transform(table.assign(zip=table["zip"].where(table.index != 0)))
    assert torch.equal(gap[1:], expected[1:])
    assert gap[0, -1] == 1
    assert torch.equal(data.transform(table[table.columns[::-1]].assign(more=1)), expected)


def test_one_line_reports_what_was_done(csv, caplog):
    table = people()
    with caplog.at_level("INFO"):
        TableDataModule(csv(table), "income", drop=["zip"]).setup()
    (line,) = [record.getMessage() for record in caplog.records if "people.csv" in record.getMessage()]
    assert "classification of income (2 classes: <=50K, >50K); 48 training rows; 5 columns become 10 features" in line
    assert "Columns left out: zip, country (constant)." in line


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([f"2024-01-{1 + i % 28:02}" for i in range(80)], r"Column `new` holds dates.*drop=\['new'\]"),
        ([f"{1 + i % 28}.3.2024 10:15" for i in range(80)], "Column `new` holds dates"),
        ([f"user {i}" for i in range(80)], r"different text in each of the 80 training rows, like ids.*drop=\['new'\]"),
        ([f"level {i % 60}" if i < 60 else "x" for i in range(80)] * 2, "more than 50. Group .* hash"),
        (
            [f"{i},5" for i in range(80)],
            r"Column `new` .* '\d+,5', which looks like numbers with commas .* Pass decimal=','",
        ),
        ([f"1.{i + 100},5" for i in range(80)], "looks like numbers with commas"),
        ([*map(str, range(79)), "?"] * 2, r"numbers as text. .*na_values=\['\?'\].*categorical=\['new'\]"),
        ([f"{i % 40} %" for i in range(80)], r"numbers with a sign or unit, such as '\d+ %'. .*categorical=\['new'\]"),
        ([f"${i % 40}" for i in range(80)], "numbers with a sign or unit, such as '\\$"),
        ([f"1.{i % 40 + 100},50 €" for i in range(80)], "numbers with a sign or unit"),
        ([f"{1 + i % 9},234,{100 + i % 5}.5" for i in range(80)], "groups of thousands. Pass .* thousands=','"),
        ([f"{1 + i % 9}'234" for i in range(80)], "groups of thousands.*Remove other separators"),
        (
            [str(i) if i % 3 else f"1,{100 + i}" for i in range(80)],
            r"such as '1,\d+', which looks like numbers with commas",
        ),
        ([*range(79), np.inf], "Column `new` must be finite, but 1 rows are infinite"),
    ],
)
def test_columns_that_are_no_features(csv, column, message):
    # With files for the other parts, all rows are training rows.
    path, others = csv(people(len(column)).assign(new=column)), csv(people(), "others.csv")
    with pytest.raises(InputError, match=message):
        TableDataModule(path, "income", files={"val": others, "test": others}).setup()
    assert TableDataModule(path, "income", drop=["new"]).num_train


def test_parquet_dates_and_nested_values(csv):
    table = people()
    dates = table.assign(day=pd.date_range("2024-01-01", periods=80))
    with pytest.raises(InputError, match="Column `day` holds dates"):
        TableDataModule(csv(dates, "a.parquet"), "income").setup()
    with pytest.raises(InputError, match="Column `day` holds dates"):
        TableDataModule(csv(dates.assign(day=dates["day"].dt.date), "b.parquet"), "income").setup()
    with pytest.raises(InputError, match="Column `day` must hold numbers or text, but it holds mixed values"):
        TableDataModule(csv(table.assign(day=[[1, 2]] * 80), "c.parquet"), "income").setup()


def test_text_in_a_column_of_numbers_of_new_rows(csv):
    data = TableDataModule(csv(people()), "income")
    with pytest.raises(InputError, match="Column `age` must hold numbers, as in the training rows, but .* 'old'"):
        data.transform(people(3).assign(age=["20", "old", "30"]))
    with pytest.raises(InputError, match="lacks `age`, `height`"):
        data.transform(people(3).drop(columns=["age", "height"]))


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_an_extreme_cell_is_named_by_line_and_value(csv, part):
    table = people()
    row = int(TableDataModule(csv(table), "income").test_rows[0]) if part == "test" else 17
    message = r"Column `age` holds 1e\+30 in line {} of .*{}, more than 1e\+06 .* Correct it, or remove the row"
    broken = table.assign(age=table["age"].astype(float).where(table.index != row, 1e30))
    if part == "val":  # in a file of its own
        data = TableDataModule(csv(table), "income", files={"val": csv(broken, "val.csv")})
        message = message.format(row + 2, "val.csv")
    else:
        data = TableDataModule(csv(broken), "income")
        message = message.format(row + 2, "people.csv")
    with pytest.raises(InputError, match=message):
        data.setup()


def test_an_extreme_target_is_named(csv):
    ages = people()["age"].astype(float)
    data = TableDataModule(csv(people().assign(age=ages.where(ages.index != 17, 1e30))), "age")
    with pytest.raises(InputError, match=r"`age` holds 1e\+30 in line 19 of .*, more than .* na_values=\['1.*e\+30'\]"):
        data.setup()


def test_columns_of_zeros_and_of_many_orders_of_magnitude_are_no_mistake(csv):
    gain = np.zeros(80)
    gain[::10] = [7e3, 2e5, 1e7, 4e4, 900, 3e6, 99999, 5e8]
    table = people().assign(gain=gain, size=10.0 ** (np.arange(80) % 6))
    assert {"gain", "size"} <= set(TableDataModule(csv(table), "income").feature_names)


def test_extreme_new_rows(csv):
    data = TableDataModule(csv(people()), "income")
    with pytest.raises(
        InputError, match=r"Column `height` holds 1e\+30 in row b, more than 1e\+06 standard deviations"
    ):
        data.transform(people(3).assign(height=[170.0, 1e30, 160.0]).set_index(pd.Index(["a", "b", "c"])))


def test_a_column_without_values_is_no_constant(csv):
    data = TableDataModule(csv(people().assign(void=np.nan)), "income")
    assert data.notes[-1] == "Columns left out: country (constant), void (no values)."
    assert type(data._fitted).from_state(data._fitted.state()) == data._fitted


# ------------------------------------------------------------------ out-of-distribution files


def test_a_file_of_out_of_distribution_rows_is_encoded_like_the_others(csv):
    table, far = people(), people(30, seed=7).drop(columns=["income", "country"]).assign(city="Rome")
    plain = TableDataModule(csv(table), "income")
    data = TableDataModule(csv(table), "income", files={"ood": csv(far, "far.csv")})
    assert list(data.ood_dataloaders()) == ["far"]
    x = torch.cat([batch[0] for batch in data.ood_dataloaders()["far"]])
    assert torch.equal(x, plain.transform(far))
    assert (x[:, -1] == 1).all()
    for part in ("train", "val", "test"):
        assert torch.equal(data.dataset(part).tensors[0], plain.dataset(part).tensors[0])
    # Beside held-out classes, and for a regression, which has none.
    three = table.assign(income=[f"class {i % 3}" for i in range(80)])
    both = TableDataModule(csv(three), "income", ood_classes=["class 2"], files={"ood": csv(far, "far.csv")})
    assert list(both.ood_dataloaders()) == ["people_class 2", "far"]
    ages = TableDataModule(csv(table), "age", drop=["income"], files={"ood": csv(far, "far.csv")})
    assert (ages.task, list(ages.ood_dataloaders())) == ("regression", ["far"])


def test_out_of_distribution_rows_decide_nothing(csv):
    table = pd.DataFrame({"a": np.arange(60.0), "y": np.arange(60.0) / 7})
    far = pd.DataFrame({"a": [1.0, np.nan]})
    data = TableDataModule(csv(table), "y", files={"ood": csv(far, "far.csv")})
    with pytest.raises(
        InputError, match="Column `a` misses 1 values, but it has no missing values in the training rows"
    ):
        data.setup()
    with pytest.raises(InputError, match="lacks `a`"):
        TableDataModule(csv(table), "y", files={"ood": csv(far.assign(b=1)[["b"]], "far.csv")}).setup()


# ------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    ("values", "task", "names"),
    [
        (["b", "a", "c", "a"], "classification", ("a", "b", "c")),
        ([True, False], "classification", ("False", "True")),
        ([3, 1, 10], "classification", ("1", "3", "10")),
        ([-1, 1], "classification", ("-1", "1")),
        (range(40), "regression", None),
        ([0.5, 1.25, 3.0], "regression", None),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_the_task_is_read_from_the_target(csv, name, values, task, names):
    table = people().assign(y=[list(values)[i % len(values)] for i in range(80)]).drop(columns="income")
    data = TableDataModule(csv(table, name), "y")
    assert data.task == task
    x, y = data.dataset("train").tensors
    if names:
        assert data.class_names == names
        everything = torch.cat([targets for _, targets in list(parts(data).values())[:3]])
        expected = table["y"].astype(str).map({name: place for place, name in enumerate(names)})
        assert everything.bincount().tolist() == expected.value_counts().sort_index().tolist()
    else:
        assert y.shape == (48, 1)
        assert y.dtype == torch.float32
        torch.testing.assert_close(data.target_scale[0][0], float(y.double().mean()))
        torch.testing.assert_close(data.target_scale[1][0], float(y.double().std(correction=0)))


def test_categories_keep_their_order(csv):
    grades = pd.Categorical(["low", "mid", "high", "low"] * 20, categories=["low", "mid", "high", "never"])
    table = people().assign(grade=grades)
    assert TableDataModule(csv(table, "g.parquet"), "grade").class_names == ("low", "mid", "high")
    data = TableDataModule(csv(table, "g.parquet"), "income")
    assert [name for name in data.feature_names if "grade" in name] == ["grade=low", "grade=mid", "grade=high"]


def test_the_task_can_be_overruled(csv):
    table = people().assign(stars=np.arange(80) % 5, points=(np.arange(80) % 3).astype(float))
    assert TableDataModule(csv(table), "stars", task="regression").target_scale[0][0] == pytest.approx(2, abs=0.7)
    with pytest.warns(UserWarning, match="its values are whole, as .* pass task='classification'"):
        assert TableDataModule(csv(table), "points").task == "regression"
    assert TableDataModule(csv(table), "points", task="classification").classes == (0, 1, 2)
    with pytest.raises(InputError, match="Column `height` must hold class labels"):
        TableDataModule(csv(people().fillna({"height": 1.5})), "height", task="classification").setup()
    with pytest.raises(InputError, match="Column `income` must hold numbers to be regressed, but it holds strings"):
        TableDataModule(csv(table), "income", task="regression").setup()


def test_several_targets_are_regressed_in_their_units(csv):
    table = people().fillna({"height": 170.0})
    data = TableDataModule(csv(table), ["age", "height"])
    y = torch.cat([data.dataset(part).tensors[1] for part in ("train", "val", "test")])
    assert data.num_targets == 2
    expected = torch.tensor(table[["age", "height"]].to_numpy()).float()
    torch.testing.assert_close(y.sort(0).values, expected.sort(0).values)
    assert not any(name.startswith(("age", "height")) for name in data.feature_names)
    with pytest.raises(InputError, match="one target column, but `target` names 2"):
        TableDataModule(csv(table), ["age", "height"], task="classification").setup()


def test_missing_targets_are_counted(csv):
    table = people()
    table.loc[[3, 5], "income"] = None
    with pytest.raises(InputError, match="column `income` misses 2 of 80, the first in line 5 of .*people.csv"):
        TableDataModule(csv(table), "income").setup()
    table = people().assign(income=np.where(np.arange(80) % 2, "None", "Mild"))
    with pytest.raises(InputError, match="misses 40 of 80.* keep_default_na=False"):
        TableDataModule(csv(table), "income").setup()
    data = TableDataModule(csv(table.drop(columns=["height", "city"])), "income", keep_default_na=False)
    assert data.class_names == ("Mild", "None")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["2024-01-01"] * 80, "Column `y` holds dates"),
        ([f"${i}" for i in range(80)], "Column `y` holds numbers with a sign or unit, such as '\\$0'"),
        (np.minimum(np.arange(80), 9)[::-1], "class 0 has 1. .* pass task='regression'"),
        ([f"user {i}" for i in range(80)], "class user 0 has 1. Merge it, remove it, or hold it out.$"),
        ([f"{i},5" for i in range(80)], "Column `y` .* '0,5', which looks like numbers with commas"),
        (
            ["1", "2", "3", "many"] * 20,
            r"Column `y` holds numbers as text. .*na_values=\['many'\].*task='classification'",
        ),
        ([np.inf, *range(79)], "Column `y` must be finite, but 1 rows"),
        ([2.5] * 80, "training targets of people must vary"),
        (["a"] * 80, "A classification needs at least 2 classes, but people has 1"),
        (np.arange(80) * 1e300, "targets in y must be finite in float32"),
    ],
)
def test_targets_that_are_none(csv, values, message):
    with pytest.raises(InputError, match=message):
        TableDataModule(csv(people().assign(y=values)), "y").setup()


def test_numbers_in_any_of_pandas_types(csv):
    table = people().assign(
        nullable=pd.array([1, 2, None, 4] * 20, dtype="Int64"),
        money=[Decimal(i) / 8 if i % 2 else None for i in range(80)],
        flag=pd.array([True, None, False, True] * 20, dtype="boolean"),
        text=pd.array(["u", None, "v", "w"] * 20, dtype="string"),
    )
    data = TableDataModule(csv(table, "types.parquet"), "income", drop=["age", "city", "zip", "height", "married"])
    assert data.feature_names == [
        *("nullable", "nullable=missing", "money", "money=missing", "flag=False", "flag=True", "flag=missing"),
        *("text=u", "text=v", "text=w", "text=missing", "unseen"),
    ]
    x = data.transform(table)
    assert x[:, 1].tolist() == [0, 0, 1, 0] * 20
    assert x[:, 3].tolist() == [1, 0] * 40
    assert x[:, 6].tolist() == [0, 1, 0, 0] * 20


# ------------------------------------------------------------------ splits


def test_fractions_are_kept_in_every_class(csv):
    data = TableDataModule(csv(people(200)), "income", fractions=(0.5, 0.1, 0.4))
    assert [y.bincount().tolist() for _, y in list(parts(data).values())[:3]] == [[75, 25], [15, 5], [60, 20]]


def test_own_files_for_validation_and_test(csv):
    train, val, test = people(80), people(30, seed=1), people(20, seed=2)
    data = TableDataModule(csv(train), "income", files={"val": csv(val, "v.parquet"), "test": csv(test, "t.csv")})
    assert [len(x) for x, _ in parts(data).values()] == [80, 30, 20, 0]
    torch.testing.assert_close(data.dataset("test").tensors[0], data.transform(test))
    assert data.dataset("val").tensors[1].tolist() == (val["income"] == ">50K").astype(int).tolist()
    one = TableDataModule(csv(train), "income", files={"test": csv(test, "t.csv")})
    assert [len(x) for x, _ in parts(one).values()] == [60, 20, 20, 0]
    with pytest.raises(InputError, match="needs training rows, but other is only in the validation or test rows"):
        TableDataModule(csv(train), "income", files={"test": csv(test.assign(income="other"), "o.csv")}).setup()


def test_held_out_classes(csv):
    table = people().assign(city=["Bonn", "Köln", "Ulm", "Rom"] * 20)
    data = TableDataModule(csv(table), "city", ood_classes=["Köln"])
    assert data.classes == ("Bonn", "Rom", "Ulm")
    assert [len(x) for x, _ in parts(data).values()] == [36, 12, 12, 20]
    assert list(data.ood_dataloaders()) == ["people_Köln"]
    assert data.dataset("ood").tensors[1].unique().tolist() == [1]
    numbers = table.assign(city=[10, 20, 30, 40] * 20)
    data = TableDataModule(csv(numbers), "city", ood_classes=[20, 40])
    assert data.dataset("ood").tensors[1].unique().tolist() == [20, 40]
    assert data.dataset("train").tensors[1].unique().tolist() == [0, 1]
    with pytest.raises(InputError, match=r"labels of people \(Bonn, Köln, Rom, Ulm\), but it holds Paris"):
        TableDataModule(csv(table), "city", ood_classes=["Paris"]).setup()
    with pytest.raises(InputError, match="class Ulm has 2"):
        TableDataModule(csv(table.assign(city=["a"] * 40 + ["b"] * 38 + ["Ulm"] * 2)), "city").setup()


def test_the_split_is_the_same_in_any_process(csv):
    path = csv(people())
    code = f"""
from lightning_uq.data import TableDataModule
data = TableDataModule({path!r}, "income", seed=3)
print([data.dataset(part).tensors[0].double().mul(1e6).sum().item() for part in ("train", "val", "test")], data.feature_names)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    data = TableDataModule(path, "income", seed=3)
    sums = [data.dataset(part).tensors[0].double().mul(1e6).sum().item() for part in ("train", "val", "test")]
    assert run.stdout.strip() == f"{sums} {data.feature_names}"
    assert not torch.equal(data.dataset("test").tensors[0], TableDataModule(path, "income").dataset("test").tensors[0])


def test_pickling(csv):
    data = TableDataModule(csv(people()), "income")
    before = pickle.loads(pickle.dumps(data))
    data.setup()
    after = pickle.loads(pickle.dumps(data))
    for copy in (before, after):
        assert torch.equal(copy.dataset("test").tensors[0], data.dataset("test").tensors[0])


# ------------------------------------------------------------------ a Trainer


class Linear(LightningModule):
    def __init__(self, num_features):
        super().__init__()
        self.save_hyperparameters()
        self.task = "module"
        self.layer = nn.Linear(num_features, 2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1])
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("loss", nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def quiet(tmp_path, **arguments):
    return Trainer(default_root_dir=tmp_path, **QUIET, **arguments)


@pytest.fixture
def checkpoint(csv, tmp_path):
    data = TableDataModule(
        csv(people()), "income", batch_size=16, categorical=["zip"], drop=["country"], encoding="utf-8"
    )
    module = Linear(data.num_features)
    trainer = quiet(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, data)
    assert len(module.seen) == 6
    first, second = torch.cat(module.seen[:3]), torch.cat(module.seen[3:])
    assert torch.equal(first.bincount(), second.bincount())
    assert not torch.equal(first, second)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    return data, module, tmp_path / "run.ckpt"


def test_a_checkpoint_restores_the_encoding_without_the_table(csv, checkpoint, tmp_path):
    data, module, path = checkpoint
    assert torch.load(path, weights_only=True)["TableDataModule"] == data.state_dict()
    new = people(20, seed=5)
    expected = data.transform(new)
    (tmp_path / "people.csv").unlink()
    restored = TableDataModule.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(restored.transform(new), expected)
    assert restored.num_features == data.num_features
    assert (restored.task, restored.classes) == ("classification", ("<=50K", ">50K"))
    assert restored.csv == {"encoding": "utf-8"}
    assert restored.categorical == ("zip",)


def test_a_trainer_evaluates_a_changed_table_with_the_stored_encoding(csv, checkpoint, tmp_path):
    _, module, path = checkpoint
    changed = people(100, seed=9).assign(age=lambda table: table["age"] * 3)
    data = TableDataModule(csv(changed), "income", categorical=["zip"], drop=["country"])
    data.setup()
    own = data.transform(changed)
    (result,) = quiet(tmp_path).test(module, data, ckpt_path=str(path), weights_only=True, verbose=False)
    stored = TableDataModule.load_from_checkpoint(path, weights_only=True)
    assert not torch.equal(stored.transform(changed), own)
    x, y = data.dataset("test").tensors
    known = stored.transform(changed)
    assert all((known == row).all(1).any() for row in x)
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(module.layer(x), y).item(), abs=1e-5)


def test_a_logger_takes_a_module_whose_arguments_have_the_same_names(csv, tmp_path):
    data = TableDataModule(csv(people()), "income")
    module = Linear(data.num_features)
    module.save_hyperparameters({"task": "another", "seed": 5})
    trainer = Trainer(
        **{**QUIET, "logger": CSVLogger(tmp_path)}, default_root_dir=tmp_path, max_steps=1, log_every_n_steps=1
    )
    trainer.fit(module, data)
    assert "another" in (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()


def test_a_regression_keeps_its_scale(csv):
    table = people().fillna({"height": 170.0})
    data = TableDataModule(csv(table), "height")
    restored = TableDataModule(csv(table.assign(height=table["height"] * 2)), "height")
    restored.load_state_dict(data.state_dict())
    assert restored.task == "regression"
    assert restored.target_scale == data.target_scale
    restored.setup()
    assert restored.target_scale == data.target_scale


def test_a_state_of_another_table_is_refused(csv):
    state = TableDataModule(csv(people()), "income").state_dict()
    with pytest.raises(InputError, match="targets income in format 1, but this TableDataModule has age"):
        TableDataModule(csv(people()), "age").load_state_dict(state)
    other = TableDataModule(csv(people().assign(income=["a", "b"] * 40), "o.csv"), "income")
    other.load_state_dict(state)
    with pytest.raises(InputError, match=r"must have the classes of the stored run \(<=50K, >50K\), but it has a, b"):
        other.setup()
    with pytest.raises(InputError, match="classes of the stored run"):
        other.dataset("test")
    fresh = TableDataModule(other.paths["train"], "income")
    fresh.setup()
    with pytest.raises(InputError, match="classes of the stored run"):
        fresh.load_state_dict(state)


def test_rows_that_are_read_in_inference_mode_can_be_trained_on(csv):
    data = TableDataModule(csv(people()), "income")
    with torch.inference_mode():
        x, _ = data.dataset("train").tensors
    nn.Linear(data.num_features, 1)(x).sum().backward()


# ------------------------------------------------------------------ what a comparison reads


def test_notes_tell_what_became_of_the_columns(csv):
    table = people()
    data = TableDataModule(csv(table), "income", drop=["zip"])
    missing = table[["age", "city", "height", "married"]].isna().any(axis=1).sum()
    assert data.notes == (
        "Categories become one feature per level: city, married.",
        f"{missing} of 80 rows miss values: a number becomes the training mean, and a category a separate level.",
        "Columns left out: zip, country (constant).",
    )
    numbers = TableDataModule(csv(pd.DataFrame({"a": np.arange(60.0), "y": np.arange(60.0) / 7})), "y")
    assert numbers.notes == ()


def test_numbers_that_miss_nothing_have_no_feature_for_the_unseen(csv):
    table = pd.DataFrame({"a": np.arange(60.0), "b": np.arange(60) ** 2, "y": np.arange(60.0) / 7})
    data = TableDataModule(csv(table), "y")
    assert data.feature_names == ["a", "b"]
    assert data.input_shape == (2,)
    with pytest.raises(
        InputError, match="Column `a` misses 1 values, but it has no missing values in the training rows. Fill them"
    ):
        data.transform(pd.DataFrame({"a": [np.nan], "b": [1]}))
    # A value that only a test row misses needs it, whichever part the row falls into.
    table.loc[3, "a"] = np.nan
    for seed in range(4):
        assert TableDataModule(csv(table), "y", seed=seed).feature_names[-1] == "unseen"


def test_two_labels_of_a_binary_task(csv):
    data = TableDataModule(csv(people()), "income", drop=["zip"], task="binary")
    assert (data.task, data.num_outputs, data.task_arguments) == ("binary", 1, {})
    assert data.class_names == ("<=50K", ">50K")
    assert data.notes[0] == "Label 1 stands for >50K, and 0 for <=50K."
    y = data.dataset("train").tensors[1]
    assert y.float().mean() == 0.25
    table = people().assign(income=[f"class {i % 3}" for i in range(80)])
    with pytest.raises(InputError, match="task='binary' needs 2 classes, but people has 3 .* hold the others out"):
        TableDataModule(csv(table), "income", task="binary").setup()
    held_out = TableDataModule(csv(table), "income", task="binary", ood_classes=["class 1"])
    assert held_out.class_names == ("class 0", "class 2")


@pytest.mark.parametrize("kind", [bool, int, float])
def test_several_columns_of_labels(csv, kind):
    table = people()
    rain = np.arange(80) % 2 == 0
    table = table.assign(rain=rain.astype(kind), wind=(np.arange(80) % 3 == 0).astype(kind))
    arguments = {"task": "multilabel"} if kind is float else {}
    data = TableDataModule(csv(table), ["rain", "wind"], drop=["zip"], **arguments)
    assert (data.task, data.num_outputs, data.task_arguments) == ("multilabel", 2, {"num_labels": 2})
    assert data.class_names == ("rain", "wind")
    y = data.dataset("test").tensors[1]
    assert torch.equal(y[:, 0], torch.from_numpy(rain).long()[data.test_rows])
    restored = TableDataModule(csv(table), ["rain", "wind"], drop=["zip"], **arguments)
    restored.load_state_dict(data.state_dict())
    assert restored.class_names == ("rain", "wind")
    assert torch.equal(restored.dataset("test").tensors[0], data.dataset("test").tensors[0])


@pytest.mark.parametrize(
    ("target", "task", "message"),
    [
        ("income", "regression", "Column `income` must hold numbers to be regressed, but it holds strings"),
        (
            "income",
            "multilabel",
            "task='multilabel' needs labels 0 and 1, or booleans, but column `income` holds '>50K'",
        ),
        ("height", "multilabel", "Every row needs a target, but column `height` misses"),
        (["age", "married"], "binary", "task='binary' needs one target column, but `target` names 2"),
        (["age", "married"], "classification", "needs one target column, but `target` names 2. .* task='multilabel'"),
    ],
)
def test_targets_that_contradict_the_task(csv, target, task, message):
    with pytest.raises(InputError, match=message):
        TableDataModule(csv(people()), target, task=task).setup()


def test_held_out_labels_may_be_given_as_text(csv):
    table = pd.DataFrame({"a": np.arange(90.0), "y": np.arange(90) % 3})
    data = TableDataModule(csv(table), "y", ood_classes=["2"])
    assert data.classes == (0, 1)
    assert set(data.dataset("ood").tensors[1].tolist()) == {2}


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "incom"}, r"`target` must name columns of .*'age'.*but it holds 'incom'. Did you mean 'income'\?"),
        ({"drop": ["nothing"]}, "`drop` must name columns of .* but it holds 'nothing'"),
        ({"drop": "age"}, "`drop` must be a list of column names, but it is 'age'"),
        ({"drop": 5}, "`drop` must be a list of column names, but it is 5"),
        ({"fractions": 1}, "`fractions` must be three positive numbers that sum to 1, but it is 1"),
        ({"files": {"train": "a.csv"}}, "`files` must hold files of val, test or ood, but it holds train"),
        ({"categorical": ["x"]}, "`categorical` must name columns"),
        ({"drop": ["income"]}, "`target` must not be in `drop` or `categorical` too, but 'income' is"),
        (
            {"task": "ranking"},
            "`task` must be one of auto, classification, binary, multilabel, regression, but it is 'ranking'",
        ),
        ({"unseen": "zero"}, "`unseen` must be one of indicator, error"),
        ({"fractions": (0.5, 0.5)}, "`fractions` must be three positive numbers that sum to 1"),
        ({"fractions": (0.5, 0.5, 0.5)}, "`fractions` must be three positive numbers that sum to 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        (
            {"drp": ["age"]},
            "TableDataModule has no argument `drp`. It accepts these arguments of pandas.read_csv: sep, decimal",
        ),
        ({"drop": ["age", "city", "zip", "height", "married"]}, "a feature that varies .* all columns are constant"),
    ],
)
def test_bad_arguments(csv, arguments, message):
    path = csv(people())
    with pytest.raises(InputError, match=message):
        TableDataModule(**{"path": path, "target": "income", **arguments}).setup()


def test_encoders_are_plain_data(csv):
    data = TableDataModule(csv(people()), "income")
    encoder = data._fitted
    assert type(encoder).from_state(encoder.state()) == encoder
    assert replace(encoder, unseen="error").feature_names == data.feature_names[:-1]
