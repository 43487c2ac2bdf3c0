"""`turboquant plan`: how many tokens and requests fit a card, by cache."""
