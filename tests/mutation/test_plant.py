"""Every planted bug is caught by the law that is for it; `plant.py` itself shows what the other laws have to say."""

from __future__ import annotations

import pytest

from tests.mutation.plant import BUGS, LAWS, Bug, outcomes


def test_every_law_has_a_bug() -> None:
    assert {bug.caught_by for bug in BUGS} == set(LAWS)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_its_law_catches_a_planted_bug(bug: Bug) -> None:
    found = outcomes(bug, [bug.caught_by])[bug.caught_by]
    assert found.law > 0, f"{found}: {found.how or 'it holds'}"
