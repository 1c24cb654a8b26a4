"""What several probes share. A module here is no probe."""
