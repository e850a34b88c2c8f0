"""Progressive learning on two processes: every switch comes on the same step on all ranks."""

import json

import pytest

from tests.helpers.processes import run_on_two_ranks

# three steps an epoch; sizes and 9 times the strengths of the phases from epochs 0, 2 and 4
SCHEDULE = [
    [step, *phase]
    for start, phase in ((0, (16, 2.7)), (6, (24, 6.3)), (12, (32, 9.0)))
    for step in range(start, start + 6)
]


@pytest.mark.slow
def test_all_ranks_switch_size_and_strength_on_the_same_step(make_folder, tmp_path):
    """Without workers, with persistent ones, and resumed: at a switch, after it, in a phase."""
    root = make_folder({"train": {"a": 12, "b": 12}, "val": {"a": 2, "b": 2}})
    run_on_two_ranks("curriculum_on_two_ranks.py", root, tmp_path)
    starts = {"alone": 0, "persistent": 0, "from-6": 6, "from-7": 7, "from-10": 10}
    for name, start in starts.items():
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert ranks == [SCHEDULE[start:]] * 2, name
