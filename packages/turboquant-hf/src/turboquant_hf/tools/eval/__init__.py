"""`turboquant eval`: what every cache does to a model, measured and kept in a run file."""
