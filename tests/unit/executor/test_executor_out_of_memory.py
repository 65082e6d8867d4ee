"""Lack of memory is never guessed: the kernel's counters say, or nobody does."""

from __future__ import annotations

from phalanx.executor.out_of_memory import OutOfMemoryKills

V2 = {"/proc/self/cgroup": "0::/pod/run\n", "/sys/fs/cgroup/pod/run/memory.events": "low 0\noom 2\noom_kill 1\n"}
V1 = {
    "/proc/self/cgroup": "5:cpu:/\n4:memory,x:/run\n0::/\n",
    "/sys/fs/cgroup/memory/run/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
}


def test_where_the_counters_are() -> None:
    host = {"/proc/vmstat": "nr_free_pages 9\noom_kill 4\n"}
    assert OutOfMemoryKills.now({**V2, **host}.get) == OutOfMemoryKills(in_cgroup=1, on_host=4)
    assert OutOfMemoryKills.now({**V1, **host}.get) == OutOfMemoryKills(in_cgroup=3, on_host=4)
    assert OutOfMemoryKills.now({}.get) == OutOfMemoryKills(None, None)
    assert OutOfMemoryKills.now({"/proc/self/cgroup": "0::/\n"}.get) == OutOfMemoryKills(None, None)


def test_what_they_say() -> None:
    before = OutOfMemoryKills(in_cgroup=1, on_host=4)
    assert before.explain(before) == ", not by the kernel for lack of memory"
    assert "in its control group for lack of memory" in before.explain(OutOfMemoryKills(2, 5))
    assert "on this host for lack of memory" in before.explain(OutOfMemoryKills(1, 5))
    assert OutOfMemoryKills(None, None).explain(OutOfMemoryKills(2, 5)) == " (out of memory?)"


def test_this_host() -> None:
    kills = OutOfMemoryKills.now()
    assert kills.on_host is None or kills.on_host >= (kills.in_cgroup or 0) >= 0
