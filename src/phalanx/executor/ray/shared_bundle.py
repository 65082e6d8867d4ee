"""A bundle with room for one rank. Ranks of two lines have it at a time while one is to take over from the other."""

from __future__ import annotations

import threading

from ray.util.placement_group import PlacementGroup


class SharedBundle:
    """Has one user at first. For any thread, but for `devices`, which belong to the actor that came first."""

    def __init__(self, group: PlacementGroup, index: int, node_id: str, *, is_ours: bool = False) -> None:
        self.group = group
        self.index = index
        """In the group."""
        self.node_id = node_id
        self.devices: tuple[str, ...] = ()
        """Physical ids, once an actor has been given them with the bundle."""
        self.is_ours = is_ours
        """Whether the group was made for it: then nobody else can put anything there, whatever our actors ask for."""
        self._num_users = 1
        self._changing = threading.Lock()

    @property
    def is_shared(self) -> bool:
        """Whether another line has it, too: what there is in it was asked for by that one's actor."""
        return self._num_users > 1

    def share(self) -> bool:
        """Have another user, until `let_go`. False if it is given back by now, or not ours."""
        with self._changing:
            if not self.is_ours or not self._num_users:
                return False
            self._num_users += 1
            return True

    def let_go(self) -> bool:
        """One user less; whether that was the last one."""
        with self._changing:
            self._num_users -= 1
            return not self._num_users

    def resource(self, name: str) -> str:
        """What Ray calls the part of its node's resource `name` that is in the bundle."""
        return f"{name}_group_{self.index}_{self.group.id.hex()}"
