"""The forward passes: batches, Lightning predict modules, shards, devices."""
