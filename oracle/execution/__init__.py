"""Ways to run a candidate: one module for each execution mode."""
