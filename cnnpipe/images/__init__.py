"""Find image files and decode them."""
