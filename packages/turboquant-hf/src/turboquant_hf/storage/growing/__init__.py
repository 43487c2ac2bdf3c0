"""The parts of a store that has room for any number of tokens."""
