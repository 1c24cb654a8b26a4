"""The tables that a run leaves behind."""
