"""One Executor over any launcher and any channel: starts workers, sends them calls, collects their replies."""
