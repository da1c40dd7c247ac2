"""What a lab looks through: start a world, take turns, count bytes, limit memory, read a trace, tabulate."""
