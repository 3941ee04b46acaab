"""The loop after deployment: monitor, retrain, release, replay."""
