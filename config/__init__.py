"""Complete DeepSpeed JSONs to copy, their reader, checker and planner; a package, so no other `config` hides it."""
