"""Test beds: data sets of contexts, whose compositions and counterfactuals have a truth."""
