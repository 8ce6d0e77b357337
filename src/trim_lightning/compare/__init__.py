"""What several runs have in common, where they differ, and whether the difference is more than chance."""
