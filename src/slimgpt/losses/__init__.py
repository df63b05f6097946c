"""Losses over large vocabularies, in pieces."""
