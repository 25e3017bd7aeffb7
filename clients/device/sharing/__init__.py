"""Adapters that are more than one user's: the arm `shared`, and what a strategy has devices train together."""
