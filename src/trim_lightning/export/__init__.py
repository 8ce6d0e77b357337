"""The coreset as files that other trainers read unchanged."""
