"""A finished student for the world outside: weights, graphs, and a card that says what they are."""
