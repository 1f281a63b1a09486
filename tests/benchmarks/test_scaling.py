"""docs/scaling.md shows the tables of benchmarks/scaling.json, and its script measures what it says."""

import json
import re

import pytest

from benchmarks.scaling import PAGE, PARTS, RECORD, Growth, exponent, line_of, measured, with_tables


def test_the_page_shows_the_recorded_tables():
    record, text = json.loads(RECORD.read_text()), PAGE.read_text()
    assert with_tables(text, record) == text
    for found in record["parts"].values():
        for one in found:
            assert line_of(one) in text


def test_the_record_has_what_the_script_measures():
    parts = json.loads(RECORD.read_text())["parts"]
    for name, growths in PARTS.items():
        expected = [(one.name, one.axis, list(one.sizes)) for one in growths()]
        assert [(one["name"], one["axis"], one["sizes"]) for one in parts[name]] == expected


def test_links_of_the_page_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target


def test_the_exponent_is_that_of_the_last_two_sizes():
    assert exponent([1, 10, 100], [5.0, 6.0, 600.0]) == pytest.approx(2.0)


def test_three_sizes_are_measured():
    sizes = []

    def prepare(size):
        return lambda: sizes.append(size) or size

    found = measured(Growth("w", "N", (1, 2, 3), prepare), repeats=1, threads=1)
    assert found["sizes"] == (1, 2, 3)
    assert len(found["ms"]) == len(found["mb"]) == 3
    assert set(sizes) == {1, 2, 3}


def test_the_limits_of_the_page_are_those_of_the_code():
    from lightning_uq.callbacks import feature_scores, laplace
    from lightning_uq.functional import matrix_scaling, vector_scaling
    from lightning_uq.modules import base
    from lightning_uq.networks import gaussian_mixture
    from lightning_uq.networks.ensemble import mapped_call
    from lightning_uq.running import row_sample

    assert base.MAX_MEMBERS == mapped_call.MAX_WRITTEN_OUT == 32
    assert gaussian_mixture.MAX_MIXTURE_ROWS == 2**14
    assert feature_scores.MAX_FEATURES == 2**17
    assert row_sample.MAX_ROWS == 2**20
    assert laplace.MAX_BYTES == vector_scaling._MAX_BYTES == matrix_scaling._MAX_BYTES == 4 * 2**30
