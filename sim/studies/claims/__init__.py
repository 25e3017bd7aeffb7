"""Analyses that hold what is claimed of a method against numbers: hardware, rank, filters."""
