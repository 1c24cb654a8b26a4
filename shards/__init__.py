"""Recipes: one module per data set, each writing WebDataset shards and a manifest."""
