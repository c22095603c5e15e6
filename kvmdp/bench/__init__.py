"""Measurements: the same work under different ways of demand paging."""
