"""Code that several probes share. No module here is a probe."""
