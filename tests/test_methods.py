"""Methods are found in the package, in a user's file and in a user's module; each error is one sentence."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import lightning_uq
from lightning_uq import InputError, Method
from lightning_uq.cli import main
from lightning_uq.compare import Configuration
from lightning_uq.compare.planning import plan
from lightning_uq.compare.planning.discovery import find_methods, methods
from lightning_uq.compare.problem import make_problem
from tests.contract import cases

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
EXAMPLE, CALLBACK = (
    block for block in re.findall(r"```python\n(.*?)```", CONTRIBUTING, flags=re.DOTALL) if "METHOD = " in block
)
METHOD = "from lightning_uq import Method\nMETHOD = Method(name={name!r}, trained_as='softmax', ood_score='energy')\n"
QUICK = ("compare", "--seeds", "1", "--max-epochs", "1")


@pytest.fixture
def new_file(project, monkeypatch):
    """Add a file to a room of the package as a contributor would."""

    def add(room, name, text):
        (project / room).mkdir()
        (project / room / f"{name}.py").write_text(text)
        package = importlib.import_module(f"lightning_uq.{room}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(project / room)])
        importlib.invalidate_caches()

    return add


def test_a_new_file_in_the_package_is_compared_and_in_the_contract(new_file, make_trainer, tmp_path, capsys):
    new_file("modules", "noisy", EXAMPLE)
    assert main([*QUICK, "--methods", "noisy_logits"]) == 0
    assert "noisy_logits" in capsys.readouterr().out

    modules, callbacks = cases.discovered_cases()
    (case,) = modules
    assert (case.name, case.is_discovered, callbacks) == ("noisy_logits", True, [])
    module = case.build()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, cases.loader("classification", 21), cases.loader("classification", 9))
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    again = type(module).load_from_checkpoint(tmp_path / "new.ckpt", weights_only=True)
    x, _ = cases.rows(5)
    torch.testing.assert_close(again.predict(x).probs, module.predict(x).probs, rtol=1e-6, atol=1e-6)


def test_a_new_callback_in_the_package_is_compared_and_in_the_contract(new_file, make_trainer):
    new_file("callbacks", "centre", CALLBACK)
    assert "centre" in plan.choose_methods(Configuration(), make_problem(Configuration(), 0))[0]

    modules, callbacks = cases.discovered_cases()
    (case,) = callbacks
    assert (case.name, case.is_discovered, case.fits, modules) == ("centre, FitCentre", True, True, [])
    loader = cases.loader("classification", 21)
    callback = case.build(dataloader=loader, name="other")
    module = cases.UsersModule()
    make_trainer(callbacks=[callback]).fit(module, loader, loader)
    assert callback.score(module, loader).shape == (21,)


def test_the_contracts_list_is_the_list_of_methods():
    stands_for = {case.method for case in [*cases.MODULES, *cases.CALLBACKS]} - {None}
    found = {case.name.partition(",")[0] for case in [*cases.MODULES, *cases.CALLBACKS] if case.is_discovered}
    only_a_score = {name for name, method in methods().items() if not method.build and not method.callbacks(None)}
    assert stands_for | found | only_a_score == set(methods())


@pytest.mark.parametrize(
    "case", [case for case in cases.MODULES if case.method], ids=lambda case: case.name.replace(" ", "_")
)
def test_a_case_is_of_the_class_that_its_method_builds(case):
    assert type(case.build()) is type(methods()[case.method].build(cases.SETTING))


def test_a_users_file_and_module_are_compared(project, capsys):
    (project / "package").mkdir()
    (project / "package" / "__init__.py").touch()
    (project / "package" / "module.py").write_text(METHOD.format(name="second"))
    (project / "elsewhere").mkdir()
    (project / "elsewhere" / "helper.py").write_text("SCALE = 0.1")
    (project / "elsewhere" / "my_method.py").write_text("import helper\n" + EXAMPLE)
    methods = "softmax,elsewhere/my_method.py,package.module"
    assert main([*QUICK, "--methods", methods, "--out", "out"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1].islower()]
    # A table that is wider than the terminal comes in parts.
    assert [row for row in dict.fromkeys(rows) if row != "bold:"] == ["softmax", "noisy_logits", "second"]
    assert f"--methods {methods}" in (project / "out" / "report.html").read_text()
    assert str(project / "elsewhere") not in sys.path
    assert main([*QUICK, "--methods", methods, "--out", "out"]) == 0  # the file is imported already


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "nowhere.py", "methods: there is no file nowhere.py."),
        (None, "nowhere.at_all", "methods: nowhere.at_all cannot be imported (ModuleNotFoundError: No module named 'nowhere')."),
        (None, "magic", "methods: unknown for classification: 'magic'. Choose from softmax, "),
        ("x = 1", "mine.py", "methods: mine.py holds no method. Define METHOD = lightning_uq.Method(...) at its end."),
        ("METHOD = 'softmax'", "mine.py", "mine must define METHOD as a lightning_uq.Method, but it is a str."),
        ("import numpy\nnumpy.nothing", "mine.py", "methods: mine.py cannot be imported (AttributeError: "),
        ("x = (", "mine.py", "methods: mine.py cannot be imported (SyntaxError: "),
        (
            METHOD.format(name="ensemble"),
            "mine.py",
            "methods: mine.py defines 'ensemble', but another method has the same name. Rename it.",
        ),
        (METHOD.format(name="my-method"), "mine.py", "must be a Python identifier such as 'my_method', but it is 'my-method'."),
        ("METHOD = 1", "json.py", "methods: json.py has the same name as another module, json. Rename the file."),
        (METHOD.replace("softmax", "magic").format(name="reader"), "mine.py", "methods: unknown for classification: 'magic'."),
        (METHOD.replace("softmax", "energy").format(name="reader"), "mine.py", "methods: energy trains no network for other methods"),
    ],
)  # fmt: skip
def test_a_bad_method_is_one_line(project, capsys, text, name, message):
    if text is not None:
        (project / name).write_text(text)
    assert main([*QUICK, "--methods", f"softmax,{name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("build=lambda setting: 5", "`build` of method 'mine' must return a LightningModule, but it returned an object of type int."),
        ("build=lambda setting: setting.network()", "`build` of method 'mine' must return a LightningModule, but it returned"),
        ("trained_as='softmax', callbacks=lambda setting: None", "`callbacks` of method 'mine' must return a list of Lightning"),
    ],
)  # fmt: skip
def test_what_a_method_makes_is_checked_in_one_line(project, capsys, arguments, message):
    (project / "mine.py").write_text(
        f"from lightning_uq import Method\nMETHOD = Method(name='mine', ood_score='energy', {arguments})\n"
    )
    assert main([*QUICK, "--methods", "mine.py"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_debug_gives_the_traceback_of_a_file_that_cannot_be_imported(project, monkeypatch):
    (project / "mine.py").write_text("1 / 0")
    monkeypatch.setenv("LIGHTNING_UQ_DEBUG", "1")
    with pytest.raises(InputError, match=r"mine\.py cannot be imported") as raised:
        main([*QUICK, "--methods", "mine.py"])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_two_files_with_one_name_are_refused(project):
    for name in ("first", "second"):
        (project / f"{name}.py").write_text(METHOD.format(name="mine"))
    with pytest.raises(InputError, match=r"second\.py defines 'mine', but another method has the same name"):
        find_methods(["first.py", "second.py"], methods())


def test_several_methods_in_a_file_and_doubled_names(project):
    two = METHOD.format(name="one") + "METHODS = (Method(name='two', trained_as='one', ood_score='energy'),)\n"
    (project / "mine.py").write_text(two)
    chosen, known = find_methods(["mine.py", "softmax", "mine.py", "one"], methods())
    assert chosen == ["two", "one", "softmax"]
    assert known["two"].trainee == "one"


@pytest.mark.parametrize("arguments", [{}, {"build": lambda setting: None, "trained_as": "softmax"}])
def test_a_method_is_built_or_reads_another(arguments):
    with pytest.raises(InputError, match="needs either `build`, .* or `trained_as`"):
        Method(name="mine", ood_score="energy", **arguments)
    with pytest.raises(InputError, match="'energy' builds no module, since it reads the network of 'softmax'"):
        methods()["energy"].make_module(cases.SETTING)


def test_the_names_are_public():
    assert lightning_uq.Method is Method
