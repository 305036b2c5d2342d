"""Floor 0: the five nouns, the types that travel between rooms, and what every room needs."""
