"""Tokens → rows: passes of encoders over shards, and the banks that hold what came out."""
