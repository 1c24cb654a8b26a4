"""One file per family of encoders. The folder is the registry."""
