"""The pages that people look at: a selection's report, a comparison, one record explained."""
