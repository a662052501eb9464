"""Side-by-side measurements. Reads the clock; changes nothing."""
