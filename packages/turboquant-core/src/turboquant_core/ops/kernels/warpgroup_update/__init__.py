"""`cache_update` in Gluon, for Hopper's warpgroups."""
