import sys

import pandas as pd
import pytest

from lightning_uq.data import TableDataModule
from lightning_uq.data.table_files import place_of, read_table
from lightning_uq.errors import InputError, MissingExtraError


def test_quoted_fields_semicolons_and_decimal_commas(tmp_path):
    path = tmp_path / "german.csv"
    path.write_text('Größe;Ort;"Preis; netto"\n1,5;"Ulm; alt";1.234,50\n2,25;"Bonn ""Mitte""";7,00\n', encoding="utf-8")
    frame = read_table(str(path), {"sep": ";", "decimal": ",", "thousands": "."})
    assert frame.to_dict("list") == {
        "Größe": [1.5, 2.25],
        "Ort": ["Ulm; alt", 'Bonn "Mitte"'],
        "Preis; netto": [1234.5, 7.0],
    }
    with pytest.raises(InputError, match=r"no commas, but 3 ';'. Pass sep=';' \(.*\). If .* add decimal=','"):
        read_table(str(path), {})


@pytest.mark.parametrize(
    ("text", "csv", "message"),
    [
        (
            "a\tb\n1\t2\n",
            {},
            r"no commas, but 1 '\\t'. Pass sep='\\t' \(in the file of --config: {data: {init_args: {sep: \"\\t\"}}}\)\.",
        ),
        ("a|b\n1|2\n", {}, r"Pass sep='\|'"),
        ("a,b\n1,2,3\n4,5,6\n", {}, "some rows have more fields than the header. Check the quotes and the separator"),
        ("a,b\n1,2\n4,5,6\n", {}, "cannot be read as a table: .*Expected 2 fields in line 3, saw 3"),
        ("a,b\n", {}, "must hold rows below its header, but it has none"),
        ("x,y,y\n1,2,3\n", {}, "must be unique, but `y` occurs twice"),
        ('x,"y", y\n1,2,3\n', {"skipinitialspace": True}, "must be unique, but `y` occurs twice"),
        ("made by hand\nx;y;y\n1;2;3\n", {"sep": ";", "skiprows": 1}, "must be unique, but `y` occurs twice"),
        ("\ufeffy,x,y\n1,2,3\n", {}, "must be unique, but `y` occurs twice"),
        ("", {}, "cannot be read as a table: No columns"),
        ('a,b\n1,"2\n', {}, "cannot be read as a table"),
        ("a;b\n1;2\n", {"sep": ";", "decimal": ",,"}, "cannot be read as a table"),
    ],
)
def test_unreadable_text(tmp_path, text, csv, message):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_table(str(path), csv)


@pytest.mark.parametrize(
    ("text", "csv", "lines"),
    [
        ("a,b\n1,2\n3,4\n", {}, ["line 2", "line 3"]),
        ('a,b\n\n1,"two\nlines"\n  \n3,4\n', {}, ["line 3", "line 6"]),
        ("note, of two\nand more\na;b\n1;2\n3;4\n", {"sep": ";", "skiprows": 2}, ["line 4", "line 5"]),
        ("a,b\n# no row\n1,2\n", {"comment": "#"}, ["row 1"]),
    ],
)
def test_a_row_is_named_by_its_line(tmp_path, text, csv, lines):
    path = tmp_path / "table.csv"
    path.write_text(text)
    frame = read_table(str(path), csv)
    assert [place_of(str(path), csv, row) for row in range(len(frame))] == lines


def test_encodings(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes("Ort,x\nKöln,1\n".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read as utf-8.*Pass its encoding, .* encoding='latin-1'"):
        read_table(str(path), {})
    assert read_table(str(path), {"encoding": "latin-1"})["Ort"].tolist() == ["Köln"]
    path.write_bytes("Ort,x\nKöln,1\n".encode("utf-8-sig"))
    assert list(read_table(str(path), {}).columns) == ["Ort", "x"]


def test_row_numbers_without_a_name(tmp_path):
    table = pd.DataFrame({"x": range(30), "y": ["a", "b"] * 15})
    table.to_csv(tmp_path / "table.csv")
    with pytest.raises(InputError, match=r"`Unnamed: 0` has none. Row numbers.*drop=\['Unnamed: 0'\]"):
        TableDataModule(str(tmp_path / "table.csv"), "y").setup()
    assert TableDataModule(str(tmp_path / "table.csv"), "y", drop=["Unnamed: 0"]).feature_names == ["x"]


def test_files_of_no_table(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*nowhere\.csv\."):
        read_table(str(tmp_path / "nowhere.csv"), {})
    with pytest.raises(InputError, match="`path` must be the path of a .csv or .parquet file, but it is 'table.xlsx'"):
        TableDataModule("table.xlsx", "y")
    (tmp_path / "text.parquet").write_text("a,b")
    with pytest.raises(InputError, match=r"text\.parquet cannot be read as a table"):
        read_table(str(tmp_path / "text.parquet"), {})
    with pytest.raises(InputError, match=r"`sep` is for \.csv files, but .*text\.parquet"):
        TableDataModule(str(tmp_path / "text.parquet"), "y", files={"test": "t.parquet"}, sep=";")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_table(str(tmp_path / "folder.csv"), {})


@pytest.mark.parametrize(("module", "extra"), [("pandas", "data"), ("pyarrow", "parquet")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, extra):
    pd.DataFrame({"x": [1], "y": ["a"]}).to_parquet(tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"lightning-uq\[{extra}\]"):
        TableDataModule(str(tmp_path / "t.parquet"), "y").setup()
