"""Workers as actors on the nodes of a Ray cluster. The only home of `ray`, which is an optional extra."""
