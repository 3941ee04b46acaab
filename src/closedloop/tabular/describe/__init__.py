"""`closedloop describe`: a strange table becomes a data set's config."""
