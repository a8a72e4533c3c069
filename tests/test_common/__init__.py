"""What every part shares."""
