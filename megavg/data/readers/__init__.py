"""Readers of annotated picture collections: each module turns one file format into ``Draft``s, see ``base``."""
