"""The tests that hold the promise fail when it is broken."""

from __future__ import annotations

import dataclasses
import re

import pytest

from tests.faults import FAULTS, ROOT, Fault, first_of_each, missing, unnoticed


def test_each_of_the_ten_lines_has_a_fault_and_each_fault_a_name_of_its_own() -> None:
    assert {fault.line for fault in FAULTS} == set(range(1, 11))
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert [fault.line for fault in first_of_each()] == list(range(1, 11))


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_each_fault_still_fits_the_code(fault: Fault) -> None:
    assert missing(fault) == ""
    assert fault.old != fault.new


def test_a_fault_that_does_not_fit_is_said_to_be_so() -> None:
    fault = FAULTS[0]
    assert "found 0 times" in missing(dataclasses.replace(fault, old="no such text"))
    assert "found 0 times" in missing(dataclasses.replace(fault, file="fedfuse/absent.py"))
    assert "must be once" in missing(dataclasses.replace(fault, old="import"))
    assert "no test" in missing(dataclasses.replace(fault, tests=("tests/faults.py::test_x",)))


def test_the_documents_name_each_fault_and_its_tests() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    _, _, section = text.partition("## The ten lines\n")
    rows = dict(re.findall(r"^\| (\d+) (\|.*)$", section.partition("\n## ")[0], re.MULTILINE))
    for fault in FAULTS:
        row = rows[str(fault.line)]
        assert f"`{fault.name}`" in row
        for test in fault.tests:
            assert f"`{test.partition('::')[2]}`" in row
    named = re.findall(r"`([a-z-]+)`", "".join(rows.values()))
    assert set(named) == {fault.name for fault in FAULTS}


@pytest.mark.slow
@pytest.mark.parametrize("fault", first_of_each(), ids=[f.name for f in first_of_each()])
def test_a_planted_fault_is_noticed(fault: Fault) -> None:
    assert unnoticed(fault) == ()


@pytest.mark.slow
def test_what_is_no_fault_is_not_noticed() -> None:
    fault = FAULTS[0]
    harmless = dataclasses.replace(fault, new=f"{fault.old}  # the same")
    assert unnoticed(harmless) == harmless.tests
