"""Counts of an engine go on with its next process."""

from __future__ import annotations

from phalanx.engine.condition import Condition
from phalanx.engine.history import History
from phalanx.protocol.client import EngineStats, FormationStats, ReplicaStats

REPLICA = ReplicaStats(0, 0, 0, 9, 0, 0, 0, 0, 0)
BEFORE = FormationStats(5, False, "ready", 3, {"standby": 2, "new line": 1}, {"standby": 1}, 4, 0.5, "rank 1 died")


def told(formation: FormationStats | None) -> EngineStats:
    return EngineStats((REPLICA,), formation=formation)


def test_faults_and_what_healed_them() -> None:
    history = History()
    assert history.formation_with(None) is None and history.formation_with(BEFORE) == BEFORE
    history.add(told(BEFORE), Condition(pid=1))
    history.add(told(None), Condition(pid=1))  # it ended before it had said anything
    assert history.formation_with(None) is None
    now = history.formation_with(FormationStats(1, True, "none", 1, {"new line": 1}, {}, 0, 0.0))
    assert now == FormationStats(1, True, "none", 4, {"standby": 2, "new line": 2}, {"standby": 1}, 4, 0.0)
    history.add(
        told(FormationStats(1, False, "none", 1, {}, {}, 0, 0.0)),
        Condition(pid=1, verdicts={"gone": 1}, num_watcher_restarts=2),
    )
    found = history.formation_with(FormationStats(1, False, "none", 0, {}, {}, 0, 0.0))
    assert found is not None and (found.num_faults, found.num_standby_faults) == (4, 4)
    assert history.verdicts_with({"gone": 1, "hung": 1}) == {"gone": 2, "hung": 1}
    assert history.num_watcher_restarts == 2
