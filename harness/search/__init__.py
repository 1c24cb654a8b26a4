"""A study in one process, without Ray: its rounds, its chosen head, its score."""
