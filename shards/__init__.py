"""Recipes: one module a data set, each writing WebDataset shards and a manifest."""
