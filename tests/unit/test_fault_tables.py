"""What benchmarks/faults.py and soak.py make of what they measured."""

import pytest
from fault_kinds import name_of
from faults import Results, Run, is_right, lasting_table, page, table
from soak import Look, Soak, per_minute, steps_per_s
from soak import table as soak_table


def runs():
    """Four undisturbed runs, the first of them slow, and two faults of each sort."""
    made = [Run("local-cluster", "gang", 0, seconds=s, digest="a") for s in (30, 10, 11, 12)]
    for seed, (fault, seconds, digest, redone) in enumerate(
        [("kill python", 14, "a", 5), ("kill python", 21, "b", 0), ("fill disk", 9, "a", 0)]
    ):
        run = Run("local-cluster", "gang", seed, fault, 3.0, "", seconds=seconds, digest=digest)
        made.append(run)
        run.struck, run.redone_steps = True, redone
    missed = Run("local-cluster", "gang", 9, "fill disk", 20.0, seconds=10, digest="a")
    stays = Run("local-cluster", "gang", 0, "always raise", stays=True, struck=True, digest="a")
    stays.error, stays.error_s = "UserFunctionError: of the user", 16.25
    return [*made, missed, stays]


def test_seconds_are_lost_against_undisturbed_runs():
    lines = table(runs()).splitlines()
    assert lines[2] == "| gang | fill disk | 1 | 1 | 0 | 0, 0 | -2.0, -2.0 |"
    assert lines[3] == "| gang | kill python | 2 | 1 | 0 | 2, 5 | 6.5, 10.0 |"
    assert lines[4] == "| gang | **all** | 3 | 2 | 0 | 0, 5 | 3.0, 10.0 |"
    assert len(lines) == 5


def test_faults_that_stay_end_in_errors():
    lines = lasting_table(runs()).splitlines()
    assert lines[2] == "| gang | always raise | 1 | UserFunctionError | 0 | 16.2, 16.2 | 1 |"
    assert "On `local-cluster`" in page(runs()) and "standalone" not in page(runs())


def test_a_run_is_right_only_with_all_undisturbed_ones():
    made = runs()
    assert is_right(made[4], made) and not is_right(made[5], made)
    made[2].digest = "c"
    assert not is_right(made[4], made)


def test_results_are_kept_by_the_run(tmp_path):
    kept = Results(tmp_path / "deep/faults.json", resume=True)
    for run in runs():
        kept.add(run)
    assert Results(tmp_path / "deep/faults.json", resume=True).runs == runs()
    assert Results(tmp_path / "deep/faults.json", resume=False).runs == []


def test_faults_are_called_as_their_functions():
    def pull_the_plug(scene):
        return ""

    assert name_of(pull_the_plug) == "pull the plug"


def test_a_soak_is_looked_at_by_the_minute():
    looks = [
        Look(float(s), 2 * s, 100.0 + s, 50.0, 300.0, 4, 10.0, 90, 12) for s in range(0, 600, 5)
    ]
    assert steps_per_s(looks) == pytest.approx([2.0] * 9)
    assert per_minute(looks, "driver_mb")[0] == pytest.approx(127.5)
    done = Soak("gang", looks, [(60.0, "fill disk", "")], ["RETRY"], 1190, "a", "a")
    lines = soak_table([done]).splitlines()
    assert lines[2].startswith("| gang | 10 | 1 | 1 | yes | driver, MB |")
    assert any("steps a second | 2.0 | 2.0 |" in line for line in lines)
    assert "| no " in soak_table([Soak("gang", looks, digest="a", expected="b")])
