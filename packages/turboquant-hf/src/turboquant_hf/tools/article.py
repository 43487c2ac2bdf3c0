"""The text that the commands run a model over unless they are given another."""

from importlib.resources import files


def article() -> str:
    """The opening of the article on Shakespeare in the Encyclopaedia Britannica of 1911 (public domain)."""
    return (files(__package__) / "shakespeare_1911.txt").read_text(encoding="utf-8")
