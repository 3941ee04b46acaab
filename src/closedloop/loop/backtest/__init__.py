"""The policy backtest: the loop offline, on a data set's own history, under one policy after another."""
