"""Data sets as they lie, and what becomes of a sample before an encoder sees it."""
