"""What the library is measured against, written the way its users would write it."""
