"""Everything that needs Ray: actors, leases, the Tuner."""
