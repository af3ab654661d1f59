"""Ranks: several engine processes that compute one model together."""
