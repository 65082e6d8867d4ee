"""Whatever a client sends, the answer is a result or an error that is the client's own."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from server_rig import Rig

from phalanx.server.requests import ChatMessage, ChatRequest, CompletionRequest
from phalanx.server.unsupported import UNSUPPORTED

small = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3)
)
values = st.recursive(
    small, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
message = st.dictionaries(
    st.sampled_from([*ChatMessage.__struct_fields__, "tool_calls"]), values | st.just("user"), max_size=4
)


def bodies(kind: type) -> st.SearchStrategy[dict[str, object]]:
    names = st.sampled_from([*kind.__struct_fields__, *UNSUPPORTED, "user", "other"])
    fields = st.dictionaries(names, values, max_size=5)
    required = {
        "prompt": st.text(max_size=5) | values,
        "messages": st.lists(message | values, max_size=3),
        "model": st.none() | st.just("tiny") | values,
    }
    known = {name: strategy for name, strategy in required.items() if name in kind.__struct_fields__}
    return st.tuples(fields, st.fixed_dictionaries(known)).map(lambda parts: {**parts[0], **parts[1]})


@settings(deadline=None, max_examples=60)
@given(bodies(CompletionRequest), bodies(ChatRequest))
def test_no_body_is_the_servers_fault(completion: dict[str, object], chat: dict[str, object]) -> None:
    async def ask() -> None:
        rig = Rig("Hi")
        for path, body in (("/v1/completions", completion), ("/v1/chat/completions", chat)):
            response = await rig.client.post(path, json=body)
            assert response.status_code in (200, 400, 404), response.text
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert rig.engine.num_running == 0

    asyncio.run(ask())
