"""Settings, parameters, data set configs and feature sets, each parsed once."""
