"""What tests share: simulated disk, fixtures, fakes of what lies outside the project."""
