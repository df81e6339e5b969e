"""One optimizer step: measure the groups, decide by how much each is scaled, act."""
