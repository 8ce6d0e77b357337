"""From scores to a coreset: ranking, budget, filters."""
