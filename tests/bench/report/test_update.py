"""Tables inside a page: only they change, and marks that do not pair are errors."""

import pytest

from bench.report.markdown import renewed
from dimo.errors import DimoError

BEGIN, END = "<!-- dimo report --protocol digits -->", "<!-- dimo report end -->"


def test_only_what_is_between_the_marks_changes() -> None:
    page = f"above\n{BEGIN}\nold\n\nolder\n{END}\nbetween\n{BEGIN}\n{END}\nbelow"
    expected = f"above\n{BEGIN}\nnew\n{END}\nbetween\n{BEGIN}\nnew\n{END}\nbelow"
    asked = []
    assert renewed(page, lambda *name: asked.append(name) or "new\n") == expected
    assert asked == [("digits", False), ("digits", False)]
    assert renewed(expected, lambda *_: "new\n") == expected


def test_a_table_may_be_of_the_ablations() -> None:
    begin = BEGIN.replace(" -->", " --ablation -->")
    page = renewed(f"{begin}\nold\n{END}", lambda name, ablation: f"{name} {ablation}\n")
    assert page == f"{begin}\ndigits True\n{END}"


def test_a_table_may_hold_what_a_pattern_would_act_on() -> None:
    assert renewed(f"{BEGIN}\n{END}", lambda *_: "\\1 \\g<0>\n") == f"{BEGIN}\n\\1 \\g<0>\n{END}"


@pytest.mark.parametrize(
    "page",
    ["", f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}", f"in a line {BEGIN}\n{END}"],
)
def test_marks_that_do_not_pair_are_an_error(page: str) -> None:
    with pytest.raises(DimoError, match="whole tables between"):
        renewed(page, lambda *_: "new\n")
