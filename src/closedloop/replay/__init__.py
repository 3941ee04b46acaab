"""The whole loop over a data set's history, on a simulated clock."""
