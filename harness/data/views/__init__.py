"""Views: a sample to the inputs that a task family needs. One file a view; nothing to register."""
