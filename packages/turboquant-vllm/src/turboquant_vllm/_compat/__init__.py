"""What differs between the versions of vLLM: the only modules that import it."""
