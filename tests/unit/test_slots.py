"""Slots of clusters that are not there: counted from settings."""

from __future__ import annotations

import pytest

from tfspark import slots


class TestSlots:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"spark.master": "local[4]"}, None),
            ({"spark.master": "local-cluster[3,2,1024]"}, 6),
            ({"spark.master": "local-cluster[3, 3, 1024]", "spark.task.cpus": "2"}, 3),
            ({"spark.master": "spark://h:7077"}, None),
            ({"spark.master": "spark://h:7077", "spark.cores.max": "9"}, 9),
            (
                {
                    "spark.master": "spark://h:7077",
                    "spark.cores.max": "9",
                    "spark.executor.cores": "4",
                },
                8,
            ),
            ({"spark.master": "yarn", "spark.executor.instances": "5"}, 5),
            (
                {
                    "spark.master": "k8s://h",
                    "spark.executor.instances": "5",
                    "spark.executor.cores": "4",
                    "spark.task.cpus": "2",
                },
                10,
            ),
            (
                {
                    "spark.master": "yarn",
                    "spark.executor.cores": "4",
                    "spark.dynamicAllocation.enabled": "true",
                    "spark.dynamicAllocation.maxExecutors": "10",
                },
                40,
            ),
            (
                {
                    "spark.master": "yarn",
                    "spark.executor.cores": "4",
                    "spark.dynamicAllocation.enabled": "true",
                    "spark.dynamicAllocation.minExecutors": "2",
                },
                8,
            ),
        ],
    )
    def test_expected(self, settings, expected):
        assert slots._expected_slots(settings) == expected

    def wait(self, counts: list[int], expected: int | None) -> tuple[int, float]:
        """Plays the counts at one a 0.1 s, the last one for ever; the answer and its time."""
        now = 0.0

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds

        def count() -> int:
            return counts[min(round(now / 0.1), len(counts) - 1)]

        return slots._await_slots(count, expected, lambda: now, sleep), now

    def test_returns_as_soon_as_all_are_there(self):
        number, seconds = self.wait([0, 1, 1, 4], expected=4)
        assert number == 4
        assert seconds == pytest.approx(0.3)

    def test_settles_for_what_came(self):
        number, seconds = self.wait([0] * 100 + [3], expected=4)
        assert number == 3
        assert seconds == pytest.approx(10 + slots._SETTLED_S, abs=0.3)

    def test_gives_up_after_a_minute(self):
        number, seconds = self.wait([0], expected=None)
        assert number == 0
        assert seconds == pytest.approx(slots._REGISTRATION_S, abs=0.3)

    def test_waits_once_and_again_after_a_loss(self, monkeypatch):
        """On a standalone cluster nobody knows how many come, so each wait takes five seconds."""
        registered, waits = 3, []

        class Standalone:
            master = "spark://h:7077"
            _conf = {"spark.master": master}  # noqa: RUF012

        def wait(count, expected):
            nonlocal registered
            waits.append(count())
            registered = max(2, registered)  # a successor comes
            return count()

        monkeypatch.setattr(slots, "_await_slots", wait)
        monkeypatch.setattr(slots, "registered_slots", lambda context: registered)
        context = Standalone()
        assert [slots.slots(context) for _ in range(3)] == [3, 3, 3]
        assert waits == [3]
        registered = 1
        assert [slots.slots(context) for _ in range(2)] == [2, 2]
        assert waits == [3, 1]
        registered = 5
        assert slots.slots(context) == 5
        registered = 4  # more than when they were waited for, fewer than there have been
        assert slots.slots(context) == 4
        assert waits == [3, 1, 4]
