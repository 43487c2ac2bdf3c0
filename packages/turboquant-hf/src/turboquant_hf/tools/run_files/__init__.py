"""Long measurements: kept result by result in a run file, so that the same command goes on from there."""
