"""The parts of a store for compiled decoding: made once, written in place, at fixed addresses."""
