"""What happens after deployment: monitor, retrain, release, replay."""
